"""COCO instance annotations: polygons, run-length encodings and crowds.

Layout, where ``{split}`` is ``data.train_split`` or ``data.val_split``::

    root/annotations/instances_{split}.json    (or instances_{split}2017.json)
    root/{split}/                              images; see `coco_json.image_paths` for other places

or with the annotations beside the images, as labelling tools export them (`EXPORTS`). For the split "val" a folder
"valid" serves as well.

Classes are the ``categories`` in their order; all of them are things. Training leaves out images that have no object
or only crowds. Validation keeps them, because false detections in them count. Polygons of fewer than three points and
masks without pixels are dropped. Objects without a usable outline are dropped and logged.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.config import DataConfig, Task
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.metadata import SegmentInfo
from maskformer_fast.data.base import BrokenExampleError, check_same_size, first_existing, resolve_task
from maskformer_fast.data.datasets.coco_json import (
    Records,
    image_paths,
    load_coco,
    read_categories,
    read_images,
    split_names,
)
from maskformer_fast.data.images import read_image
from maskformer_fast.structures import Example

_LOGGER = logging.getLogger("maskformer_fast.data")
EXPORTS = ("_annotations.coco.json", "result.json", "annotations.json")
"""Annotation files in a split's folder of images, as Roboflow, Label Studio and labelme2coco write them."""
_COORDINATE_LIMIT = 1e9  # pixels; coordinates beyond it, NaN and infinities are errors


class CocoInstances:
    """Objects of one annotation file.

    Args:
        path: the JSON file.
        root, split: where the images are searched, see `coco_json.image_paths`.
        drop_empty: leave out images that have no object or only crowds.
        name: name of the data set in its metadata.
        exif: turn images as their EXIF orientation says.

    Raises:
        FileNotFoundError: annotations or images are missing.
        ValueError: the JSON is malformed, lacks a key, has unknown or repeated ids, or has boxes but no masks.
        ModuleNotFoundError: pycocotools is not installed.
    """

    task: Task = "instance"

    def __init__(self, path: Path, root: Path, split: str, drop_empty: bool, name: str, exif: bool = True) -> None:
        self._exif = exif
        coco_tools()  # reports a missing package now and not at the first example
        content = load_coco(path)
        self.path = path
        self.metadata = read_categories(content, path, name, things_only=True)
        images = read_images(content, path)
        objects = _objects_by_image(content, path, set(images), self.metadata.category_ids)
        self._images = [
            image for image in images.values()
            if not drop_empty or any(not item["crowd"] for item in objects.get(image.id, ()))
        ]
        if not self._images:
            raise ValueError(f"{path}: expected images with objects, found none")
        self._files = image_paths(root, split, self._images)
        # JSON text takes a fifth of the memory of parsed coordinates, and forked processes share it without copying.
        self._objects = [json.dumps(objects.get(image.id, [])).encode() for image in self._images]

    @property
    def file_names(self) -> list[str]:
        """File name of each image, as the annotation file has it."""
        return [image.file_name for image in self._images]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        """Read one example with masks, which may overlap, and with the annotations' ids.

        Raises:
            BrokenExampleError: the image is missing, damaged or of another size than listed, or an outline is invalid.
        """
        info, file = self._images[index], self._files[index]
        image = read_image(file, self._exif)
        check_same_size(file, image.shape[:2], (info.height, info.width))
        segments: list[SegmentInfo] = []
        masks: list[np.ndarray] = []
        for item in json.loads(self._objects[index]):
            try:
                mask = rasterize(item["outline"], info.height, info.width)
            except ValueError as error:
                raise BrokenExampleError(self.path, f"annotation {item['id']} of {info.file_name}: {error}") from error
            if pixels := int(np.count_nonzero(mask)):
                area = item["area"] or pixels
                segments.append(SegmentInfo(item["id"], item["category"], True, bool(item["crowd"]), area=area))
                masks.append(mask)
        stacked = np.stack(masks) if masks else np.zeros((0, info.height, info.width), dtype=np.bool_)
        return Example(image, segments, masks=stacked, image_id=info.id, path=str(file))


def _objects_by_image(
    content: dict[str, Any], path: Path, image_ids: set[int | str], category_ids: tuple[int, ...]
) -> dict[int | str, list[dict[str, Any]]]:
    records = Records(content, "annotations", path)
    category_index = {category: index for index, category in enumerate(category_ids)}
    objects: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    seen: set[int] = set()
    dropped: list[int] = []
    for index, record in enumerate(records.items):
        number, image = records.number(index, "id"), records.identity(index, "image_id")
        category, crowd = records.number(index, "category_id"), records.number(index, "iscrowd", default=0)
        if number in seen:
            raise ValueError(f"{records.where(index)}: id: expected distinct ids, got {number} twice")
        seen.add(number)
        if image not in image_ids:
            raise records.error(index, "image_id", 'the id of an entry of "images"')
        if category not in category_index:
            raise records.error(index, "category_id", 'the id of an entry of "categories"')
        outline = record.get("segmentation")
        if isinstance(outline, list):
            if not all(isinstance(part, list) for part in outline):
                raise records.error(index, "segmentation", "a list of polygons, each a list of numbers")
            outline = [part for part in outline if len(part) >= 6]
        elif not isinstance(outline, dict):
            raise records.error(index, "segmentation", "polygons or a run-length encoding")
        if not outline:
            dropped.append(number)
            continue
        area = record.get("area")  # COCO's evaluation groups objects by this area
        objects[image].append({
            "id": number, "category": category_index[category], "crowd": int(bool(crowd)), "outline": outline,
            "area": int(area) if isinstance(area, (int, float)) and 0 < area < 2**31 else 0,
        })
    if dropped and len(dropped) == len(records.items):
        raise ValueError(f"{path}: annotations: expected outlines in segmentation, found none: only boxes?")
    if dropped:
        _LOGGER.warning("%s: dropped %d annotations without a usable outline: ids %s", path, len(dropped), dropped)
    return objects


def rasterize(outline: list[list[float]] | dict[str, Any], height: int, width: int) -> np.ndarray:
    """Rasterise polygons [[x0, y0, x1, y1, ...], ...] in pixels, or a run-length encoding -> bool [height, width].

    Raises:
        ValueError: the outline is malformed, of another size, or more than one image width or height outside the image.
    """
    if isinstance(outline, dict):
        runs = _checked_runs(outline, height, width)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    tools = coco_tools().mask
    polygons = [_checked_polygon(part, height, width) for part in outline]
    return tools.decode(tools.merge(tools.frPyObjects(polygons, height, width))).view(np.bool_)


def _checked_polygon(part: list[float], height: int, width: int) -> list[float]:
    if len(part) % 2 or not all(isinstance(value, int | float) and abs(value) < _COORDINATE_LIMIT for value in part):
        raise ValueError(f"segmentation: expected pairs of finite numbers, got {str(part)[:80]}")
    # The rasteriser stores every step along the outline: one huge coordinate would take all memory.
    for values, size in ((part[0::2], width), (part[1::2], height)):
        if min(values) < -size or max(values) > 2 * size:
            raise ValueError(
                f"segmentation: expected coordinates near 0..{size}, got {min(values):g}..{max(values):g}"
            )
    return part


def _checked_runs(rle: dict[str, Any], height: int, width: int) -> list[int]:
    """Read the lengths of alternating runs of 0 and 1, in column-major order."""
    counts, size = rle.get("counts"), rle.get("size")
    if size != [height, width]:
        raise ValueError(f"segmentation: size: expected [{height}, {width}], got {size!r}")
    if isinstance(counts, str):
        runs = _decode_counts(counts)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = counts
    else:
        raise ValueError(f"segmentation: counts: expected a text or integers, got {str(counts)[:80]}")
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(
            f"segmentation: counts: expected runs that add up to {height * width} pixels, got {sum(runs)}"
        )
    return runs


def _decode_counts(text: str) -> list[int]:
    """Decode COCO's compressed run lengths: 5 bits in each character, differences to the run before the last."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"segmentation: counts: expected characters of COCO's encoding, got {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << 1 << shift - 5  # sign of the last group
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("segmentation: counts: expected a complete encoding, got one that ends within a number")
    return runs


def coco_instances_dataset(config: DataConfig, root: Path, split: str, drop_empty: bool) -> CocoInstances:
    """Open a data set in the layout of the module's docstring; raises as `CocoInstances` does."""
    resolve_task(config.task, "instance", ("instance",), config.dataset)
    candidates = [root / "annotations" / f"instances_{name}.json" for name in split_names(split)]
    candidates += [root / name / export for name in split_names(split) for export in EXPORTS]
    path = first_existing(candidates, "instance annotations")
    return CocoInstances(path, root, split, drop_empty, root.resolve().name, config.exif)
