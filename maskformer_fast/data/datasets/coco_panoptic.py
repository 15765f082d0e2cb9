"""COCO panoptic annotations: a JSON file of segments and a PNG of segment ids for every image.

Layout, where ``{split}`` is ``data.train_split`` or ``data.val_split``::

    root/annotations/panoptic_{split}.json     (or panoptic_{split}2017.json)
    root/annotations/panoptic_{split}/         PNGs, in the folder named as the JSON file
    root/{split}/                              images; see `coco_json.image_paths` for other places

Id 0 is void. Every other id of a PNG must be listed in the JSON. Listed segments without pixels in the PNG are left
out, and the first one is logged.
Categories are those of the JSON, or of ``annotations/panoptic_coco_categories.json`` if the JSON lists none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.config import DataConfig, Task
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.data.bands import read_picture
from maskformer_fast.data.base import (
    BrokenExampleError,
    LeftOut,
    check_same_size,
    first_existing,
    path_below,
    raise_or_log,
    resolve_task,
)
from maskformer_fast.data.datasets.coco_json import (
    ImageInfo,
    Records,
    image_folders,
    image_paths,
    load_coco,
    load_json,
    read_categories,
    read_images,
    split_names,
    stored_file,
)
from maskformer_fast.data.images import read_panoptic_png
from maskformer_fast.structures import Example

_LOGGER = logging.getLogger("maskformer_fast.data")

PANOPTIC_TASKS: tuple[Task, ...] = ("panoptic", "semantic", "instance")
"""Tasks whose targets can be made from panoptic truth."""

_MAX_ID = 2**24 - 1  # largest id that three bytes of a pixel can hold
_CATEGORIES = "panoptic_coco_categories.json"  # file of the categories, if the annotation file lists none


class CocoPanoptic:
    """Segments of one annotation file.

    Args:
        path: the JSON file; the PNGs are in the folder of the same name beside it.
        locate: function that finds the image files of entries of ``images``.
        task: task of the training targets.
        name: name of the data set in its metadata.
        skip_broken: leave out images without annotation instead of raising an error.
        exif: turn images as their EXIF orientation says.
        channels: number of bands of the images, as ``data.channels``.
        folders: folders in which ``locate`` searches, for messages.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the JSON is malformed, lacks a key, has unknown or repeated ids, or images lack annotations.
    """

    def __init__(
        self,
        path: Path,
        locate: Callable[[list[ImageInfo]], list[Path]],
        task: Task,
        name: str,
        skip_broken: bool = False,
        exif: bool = True,
        folders: Sequence[Path] = (),
        channels: int = 0,
    ) -> None:
        self._exif, self._channels = exif, channels
        content = load_coco(path)
        self.path = path
        self.task = task
        self.metadata = _categories(content, path, name)
        images = read_images(content, path, folders)
        truth = _truth_by_image(content, path, set(images), self.metadata)
        missing = [f"image {info.id!r} ({info.file_name})" for info in images.values() if info.id not in truth]
        raise_or_log(missing, f"images without annotation in {path}", skip_broken)
        self._images = [info for info in images.values() if info.id in truth]
        if not self._images:
            raise ValueError(f"{path}: expected annotated images, found none")
        folder = path.with_suffix("")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: expected the folder of panoptic PNGs of {path.name}, found none")
        self._files = locate(self._images)
        for info in self._images:
            path_below(folder, truth[info.id][0], str(path))
        self._pngs = [folder / truth[info.id][0] for info in self._images]
        self._segments = [truth[info.id][1] for info in self._images]
        self._log_untrained()
        self._warned = False

    @property
    def file_names(self) -> list[str]:
        """File name of each image, as the annotation file has it."""
        return [image.file_name for image in self._images]

    def __len__(self) -> int:
        return len(self._images)

    def _log_untrained(self) -> None:
        """Log images without segments and the number of crowds.

        Raises:
            ValueError: no image has a segment that the task trains.
        """
        things, listed = np.array(self.metadata.is_thing), np.concatenate(self._segments)
        trained = listed if self.task == "semantic" else listed[listed[:, 2] == 0]
        if self.task == "instance":
            trained = trained[things[trained[:, 1]]]
        if not len(trained):
            raise ValueError(f"{self.path}: annotations: expected segments for task {self.task!r}, got none among "
                             f"{len(listed)} segments, {np.count_nonzero(listed[:, 2])} of them crowds")
        empty = [info.file_name for info, rows in zip(self._images, self._segments, strict=True) if not len(rows)]
        if empty:
            _LOGGER.warning("%s: %d of %d images have no segment: all of their pixels are void (%s)", self.path,
                            len(empty), len(self._images), ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else ""))
        if self.task != "semantic" and listed[:, 2].any():
            _LOGGER.info("%s: %d of %d segments are crowds, which are not trained", self.path,
                         np.count_nonzero(listed[:, 2]), len(listed))

    def __getitem__(self, index: int) -> Example:
        """Read one example with an id map of the annotations' ids.

        Raises:
            BrokenExampleError: a file is missing or damaged, sizes differ, or JSON and PNG disagree on the segments.
        """
        info, file, png = self._images[index], stored_file(self._files[index]), stored_file(self._pngs[index])
        image = read_picture(file, self._exif, self._channels)
        info.check_size(file, image.shape[:2])
        ids = read_panoptic_png(png)
        check_same_size(png, ids.shape, image.shape[:2])
        areas = segment_areas(ids)
        areas.pop(0, None)
        rows = self._segments[index].tolist()
        listed = {row[0] for row in rows}
        if stray := sorted(set(areas) - listed):
            raise BrokenExampleError(
                png, f"expected ids listed in {self.path.name}, got {stray[:8]} ({areas[stray[0]]} pixels of the first)"
            )
        if absent := sorted(listed - set(areas)):
            if not self._warned:
                self._warned = True
                _LOGGER.warning("%s: left out segments %s of %s, which have no pixel, and others of this kind", png,
                                absent[:8], self.path.name)
            rows = [row for row in rows if row[0] in areas]
        ids[ids == 0] = VOID
        things = self.metadata.is_thing
        segments = [
            SegmentInfo(number, category, things[category], bool(crowd), area=areas[number])
            for number, category, crowd in rows
        ]
        return Example(image, segments, id_map=ids, image_id=info.id, path=str(file))


def segment_areas(
    ids: np.ndarray,  # [H, W] int32
) -> dict[int, int]:
    """Count the pixels of each id."""
    flat = ids.ravel()
    # There are about fifty times fewer runs of equal ids to sort than pixels.
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(starts, append=flat.size)
    distinct, row = np.unique(flat[starts], return_inverse=True)
    areas = np.bincount(row, weights=lengths).astype(np.int64)
    return dict(zip(distinct.tolist(), areas.tolist(), strict=True))


def _categories(content: dict[str, Any], path: Path, name: str) -> Metadata:
    beside = path.parent / _CATEGORIES
    if "categories" not in content and beside.is_file():
        return read_categories({"categories": load_json(beside)}, beside, name, things_only=False)
    return read_categories(content, path, name, things_only=False)


def _truth_by_image(
    content: dict[str, Any], path: Path, image_ids: set[int | str], metadata: Metadata
) -> dict[int | str, tuple[str, np.ndarray]]:
    """Read file name and segments (id, class index, crowd: int32 [n, 3]) of each annotated image."""
    records = Records(content, "annotations", path)
    category_index = {category: index for index, category in enumerate(metadata.category_ids)}
    truth: dict[int | str, tuple[str, np.ndarray]] = {}
    left_out = LeftOut()
    for index, record in enumerate(records.items):
        image = records.image_id(index, image_ids)
        if image is None:
            left_out.add('an image that is not listed under "images"', str(record.get("file_name")))
            continue
        if image in truth:
            raise ValueError(f"{records.where(index)}: image_id: expected one annotation an image, got {image!r} twice")
        segments = Records(record, "segments_info", records.where(index))
        rows = []
        for row in range(len(segments.items)):
            number, category = segments.number(row, "id", 1), segments.number(row, "category_id")
            if number > _MAX_ID:
                raise segments.error(row, "id", f"an integer up to {_MAX_ID}")
            if category not in category_index:
                raise segments.error(row, "category_id", 'the id of an entry of "categories"')
            rows.append((number, category_index[category], bool(segments.number(row, "iscrowd", default=0))))
        if len({row[0] for row in rows}) != len(rows):
            raise ValueError(f"{records.where(index)}: segments_info: id: expected distinct ids, got one twice")
        truth[image] = records.text(index, "file_name"), np.array(rows, dtype=np.int32).reshape(-1, 3)
    left_out.log(path, "annotations")
    return truth


def coco_panoptic_dataset(config: DataConfig, root: Path, split: str, name: str) -> CocoPanoptic:
    """Open a data set in the layout of the module's docstring; raises as `CocoPanoptic` does."""
    task = resolve_task(config.task, "panoptic", PANOPTIC_TASKS, config.dataset)
    candidates = [root / "annotations" / f"panoptic_{text}.json" for text in split_names(split)]
    path = first_existing(candidates, "panoptic annotations")
    return CocoPanoptic(path, partial(image_paths, root, split), task, name, config.skip_broken, config.exif,
                        image_folders(root, split), config.channels)
