"""COCO instance annotations: polygons, run-length encodings and crowds.

Layouts, where ``{split}`` is ``data.train_split`` or ``data.val_split``::

    root/annotations/instances_{split}.json    (or instances_{split}2017.json)
    root/{split}/                              images; see `coco_json.image_folders` for other places

    root/{split}/_annotations.coco.json        beside the images, as labelling tools export it, see `EXPORTS`

    root/result.json, root/annotations/instances_default.json      one part only, as Label Studio and CVAT export it

For the split "val" a folder "valid" serves as well. Of one part only, every tenth image is for validation.

Classes are the ``categories`` in their order; all of them are things. Categories that only group others are left out,
see `_groups`. Objects without a usable outline or without a
pixel are left out, counted by reason, and logged; a file without any other objects is an error. Training leaves out
images that have only crowds or objects without a usable outline, and with ``data.keep_empty`` false also images
without annotations. Validation keeps all images, because false detections in them count.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.config import DataConfig, Task
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.data.bands import read_picture
from maskformer_fast.data.base import BrokenExampleError, LeftOut, first_existing, resolve_task, tenths
from maskformer_fast.data.datasets.coco_json import (
    ImageInfo,
    Records,
    as_integer,
    image_folders,
    image_paths,
    load_coco,
    read_categories,
    read_images,
    split_names,
    stored_file,
)
from maskformer_fast.data.datasets.outlines import (
    NO_PIXEL,
    RELATIVE,
    Outline,
    is_relative,
    normalise_outline,
    problem_of,
    rasterize,
    usable_polygons,
)
from maskformer_fast.structures import Example

_LOGGER = logging.getLogger("maskformer_fast.data")
EXPORTS = ("_annotations.coco.json", "result.json", "annotations.json")
"""Annotation files in a split's folder of images, as Roboflow, Label Studio and labelme2coco write them."""
_ONLY_CROWDS = "only crowds, which are not trained (set iscrowd to 0 in annotations of single objects)"
_MASK_LIMIT = 1 << 34  # bytes of the masks of one image, a byte a pixel


class CocoInstances:
    """Objects of one annotation file.

    Args:
        path: the JSON file.
        root, split: where the images are searched, see `coco_json.image_folders`.
        training: leave out images that have only crowds or objects without a usable outline.
        name: name of the data set in its metadata.
        keep_empty: in training, keep images without annotations.
        exif: turn images as their EXIF orientation says.
        channels: number of bands of the images, as ``data.channels``.
        classes: names of classes that a network has; a category of such a name is never left out.
        content: what the JSON file would have, where other files were read; ``path`` is then theirs, for messages.

    Raises:
        FileNotFoundError: annotations or images are missing.
        ValueError: the JSON is malformed, lacks a key, has unknown ids, or no object has a usable outline.
        ModuleNotFoundError: pycocotools is not installed.
    """

    task: Task = "instance"

    def __init__(
        self, path: Path, root: Path, split: str, training: bool, name: str, keep_empty: bool = True, exif: bool = True,
        classes: Collection[str] = (), content: dict[str, Any] | None = None, channels: int = 0,
    ) -> None:
        self._exif, self._channels = exif, channels
        coco_tools()  # reports a missing package now and not at the first example
        content = load_coco(path) if content is None else content
        self.path = path
        self.metadata = read_categories(content, path, name, things_only=True)
        if groups := _groups(content, self.metadata, classes):
            content["categories"] = [
                record for record in content["categories"] if as_integer(record["id"]) not in groups
            ]
            self.metadata = read_categories(content, path, name, things_only=True)
            _LOGGER.warning("%s: left out the categories %s, which group others and have no annotation", path,
                            ", ".join(map(repr, groups.values())))
        images = read_images(content, path, image_folders(root, split))
        objects, annotated = _objects_by_image(content, path, images, self.metadata)
        self._images = list(images.values())
        if training:
            self._images = _trained_images(path, self._images, objects, annotated, keep_empty)
        self._files = image_paths(root, split, self._images)
        # JSON text takes a fifth of the memory of parsed coordinates, and forked processes share it without copying.
        self._objects = [json.dumps(objects.get(image.id, [])).encode() for image in self._images]
        self._warned = False

    @property
    def file_names(self) -> list[str]:
        """File name of each image, as the annotation file has it."""
        return [image.file_name for image in self._images]

    def __len__(self) -> int:
        return len(self._images)

    def outlines(self, index: int) -> list[tuple[int, Outline]]:
        """Class and outline, as the file has it, of each usable object of an image that is no crowd."""
        items = json.loads(self._objects[index])
        return [(item["category"], item["outline"]) for item in items if not item["crowd"]]

    def __getitem__(self, index: int) -> Example:
        """Read one example with masks, which may overlap, and with the annotations' ids.

        Raises:
            BrokenExampleError: the image is missing, damaged or of another size than listed, or an outline is invalid.
        """
        info, file = self._images[index], stored_file(self._files[index])
        image = read_picture(file, self._exif, self._channels)
        height, width = image.shape[:2]
        info.check_size(file, (height, width))
        segments: list[SegmentInfo] = []
        masks: list[np.ndarray] = []
        items = json.loads(self._objects[index])
        if len(items) * height * width > _MASK_LIMIT:
            reason = f"got {len(items)} objects of {height} x {width} pixels in {info.file_name}"
            raise BrokenExampleError(
                self.path, f"expected masks of at most {_MASK_LIMIT >> 30} GiB in an image, {reason}"
            )
        for item in items:
            try:
                mask = rasterize(item["outline"], height, width)
            except ValueError as error:
                raise BrokenExampleError(self.path, f"annotation {item['id']} of {info.file_name}: {error}") from error
            if pixels := int(np.count_nonzero(mask)):
                area = item["area"] or pixels
                segments.append(SegmentInfo(item["id"], item["category"], True, bool(item["crowd"]), area=area))
                masks.append(mask)
            elif not self._warned:  # one that `problem_of` has not seen
                self._warned = True
                _LOGGER.warning("%s: left out annotation %d of %s, with %s, and others of this kind",
                                self.path, item["id"], info.file_name, NO_PIXEL)
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), dtype=np.bool_)
        return Example(image, segments, masks=stacked, image_id=info.id, path=str(file))


def _objects_by_image(
    content: dict[str, Any], path: Path, images: dict[int | str, ImageInfo], metadata: Metadata
) -> tuple[dict[int | str, list[dict[str, Any]]], set[int | str]]:
    """Read the usable objects of each image, and the ids of the images that have any annotation."""
    records = Records(content, "annotations", path)
    numbers = _annotation_ids(records)
    category_index = {category: index for index, category in enumerate(metadata.category_ids)}
    objects: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    annotated: set[int | str] = set()
    left_out, relative, crowds = LeftOut(), 0, 0
    for index, (record, number) in enumerate(zip(records.items, numbers, strict=True)):
        image = records.image_id(index, images)
        if image is None:
            left_out.add('an image that is not listed under "images"', f"annotation {number}")
            continue
        category, crowd = records.number(index, "category_id"), bool(records.number(index, "iscrowd", default=0))
        if category not in category_index:
            raise records.error(index, "category_id", 'the id of an entry of "categories"')
        try:
            outline = normalise_outline(record.get("segmentation"))
        except ValueError as error:
            raise records.error(index, "segmentation", str(error)) from None
        info = images[image]
        annotated.add(image)
        relative += is_relative(outline)
        if problem := problem_of(outline, info.height, info.width):
            left_out.add(problem, f"annotation {number} of {info.file_name}")
            continue
        crowds += crowd
        area = record.get("area")  # COCO's evaluation groups objects by this area
        objects[image].append({
            "id": number, "category": category_index[category], "crowd": int(crowd),
            "outline": usable_polygons(outline),
            "area": int(area) if isinstance(area, (int, float)) and 0 < area < 2**31 else 0,
        })
    if numbers and (relative == len(numbers) or not objects):
        reasons = f"  all with {RELATIVE}" if relative == len(numbers) else str(left_out)
        raise ValueError(f"{path}: annotations: expected outlines with pixels in segmentation, got none:\n{reasons}")
    left_out.log(path, "annotations")
    if crowds == len(numbers) > 0:
        _LOGGER.warning("%s: all %d annotations are crowds, which are not trained and ignored in AP: set their iscrowd "
                        "to 0 if they are single objects", path, crowds)
    elif crowds:
        _LOGGER.info("%s: %d of %d annotations are crowds: not trained, and ignored in AP", path, crowds, len(numbers))
    return objects, annotated


def _annotation_ids(records: Records) -> list[int]:
    """Return a distinct number for each annotation: its id if that is one, else the next free number."""
    given = [as_integer(record.get("id")) for record in records.items]
    seen: set[int] = set()
    numbers: list[int | None] = []
    for number in given:
        is_new = number is not None and number >= 0 and number not in seen
        numbers.append(number if is_new else None)
        if is_new and number is not None:
            seen.add(number)
    free = max(seen, default=0)
    result = []
    for number in numbers:
        free += number is None
        result.append(free if number is None else number)
    if missing := numbers.count(None):
        _LOGGER.info("%s: numbered %d annotations, whose ids are absent, repeated or no numbers", records.path, missing)
    return result


def _trained_images(
    path: Path, images: list[ImageInfo], objects: dict[int | str, list[dict[str, Any]]],
    annotated: set[int | str], keep_empty: bool,
) -> list[ImageInfo]:
    """Choose the images of training, and log the others.

    Raises:
        ValueError: no image has an object.
    """
    left_out, kept, empty = LeftOut(), [], 0
    for image in images:
        if any(not item["crowd"] for item in objects.get(image.id, ())):
            kept.append(image)
        elif image.id in annotated:
            reason = _ONLY_CROWDS if image.id in objects else "objects without a usable outline only"
            left_out.add(reason, image.file_name)
        elif keep_empty:
            kept.append(image)
            empty += 1
        else:
            left_out.add("no object (--data.keep-empty trains them)", image.file_name)
    if len(kept) == empty:
        for image in kept:
            left_out.add("no annotation", image.file_name)
        raise ValueError(f"{path}: expected images with objects, found none of {len(images)}:\n{left_out}")
    left_out.log(path, f"of {len(images)} images")
    if empty:
        _LOGGER.info("%s: %d of %d images have no object and are trained as background (--data.no-keep-empty leaves "
                     "them out)", path, empty, len(images))
    return kept


def _groups(content: dict[str, Any], metadata: Metadata, classes: Collection[str]) -> dict[int, str]:
    """Categories that only group others, by id -> name.

    These are the ``supercategory`` of another category, have no annotation in this file, and no name of ``classes``.
    """
    annotations = content.get("annotations")
    records = annotations if isinstance(annotations, list) else []  # what else it may be is refused later
    used = {as_integer(record.get("category_id")) for record in records if isinstance(record, dict)}
    categories = {as_integer(record["id"]): record for record in content["categories"]}
    groups = {}
    for number, unique in zip(metadata.category_ids, metadata.class_names, strict=True):
        name = categories[number]["name"]
        has_members = any(
            other != number and record.get("supercategory") == name for other, record in categories.items()
        )
        if has_members and number not in used and unique not in classes:
            groups[number] = name
    return groups if len(groups) < len(categories) else {}


def coco_instances_dataset(
    config: DataConfig, root: Path, split: str, training: bool, classes: Collection[str] = ()
) -> CocoInstances:
    """Open a data set in one of the layouts of the module's docstring; raises as `CocoInstances` does."""
    resolve_task(config.task, "instance", ("instance",), config.dataset)
    exported = [root / name / export for name in split_names(split) for export in EXPORTS]
    candidates = [root / "annotations" / f"instances_{name}.json" for name in split_names(split)] + exported
    only = [root / "annotations" / "instances_default.json", *(root / export for export in EXPORTS)]
    path = first_existing([*candidates, *only], "instance annotations")
    folder = path.parent.name if path in exported else "default" if path == only[0] else split
    content = _tenths_of(load_coco(path), training) if path in only and path not in candidates else None
    return CocoInstances(path, root, folder, training, root.resolve().name, config.keep_empty, config.exif, classes,
                         content, config.channels)


def _tenths_of(content: dict[str, Any], training: bool) -> dict[str, Any]:
    """Content of a file with its images for training, or those for validation, and their annotations."""
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return content  # what is wrong with it is said later
    kept = tenths(images, training)
    others = {_text_id(image, "id") for image in images if image not in kept}
    return {**content, "images": kept,
            "annotations": [one for one in annotations if _text_id(one, "image_id") not in others]}  # fmt: skip


def _text_id(record: object, key: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    number = as_integer(value)
    return str(value if number is None else number)
