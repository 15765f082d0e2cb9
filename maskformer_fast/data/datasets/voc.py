"""Pascal VOC's segmentation: index or colour PNGs of classes, and of objects.

Layout::

    root/JPEGImages/NAME.jpg
    root/SegmentationClass/NAME.png             index of the class, or its colour if there is a labelmap.txt
    root/SegmentationObject/NAME.png            optional: index or colour of the object, for instances and panoptic
    root/ImageSets/Segmentation/{split}.txt     names; with only default.txt, or without lists, every tenth is "val"
    root/labelmap.txt                           CVAT's: NAME:R,G,B:PARTS:ACTIONS
    root/class_names.txt                        labelme2voc's: the names in the order of their indices

Without a list of classes they are the 21 of VOC. Pixels of index 255, or of VOC's border colour, are unlabelled. The
class ``background`` is stuff and all others are things.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskformer_fast.config import DataConfig, Task
from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.image_files import list_files, picture_suffixes
from maskformer_fast.core.metadata import VOID, SegmentInfo
from maskformer_fast.data.bands import read_picture
from maskformer_fast.data.base import (
    BrokenExampleError,
    check_same_size,
    path_below,
    raise_or_log,
    resolve_task,
    tenths,
)
from maskformer_fast.data.datasets.class_list import UNKNOWN, ClassList
from maskformer_fast.data.images import read_color_png, read_index_png
from maskformer_fast.structures import Example

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
BORDER = (224, 224, 192)
"""Colour of unlabelled pixels."""
_BACKGROUND = ("background", "_background_")
_IGNORED = "__ignore__"
_MOST_CLASSES = 255


class VocDataset:
    """Images with class PNGs, and with object PNGs for instances and panoptic segments.

    Args:
        root: the folder of the module's docstring.
        names: names of the images, without an ending.
        classes: the classes; their values are indices or colours.
        task: task of the training targets.
        by_color: the PNGs have colours.
        skip_broken: leave out images without a file instead of raising an error.
        exif: turn images as their EXIF orientation says.
        channels: number of bands of the images, as ``data.channels``.
    """

    def __init__(
        self, root: Path, names: list[str], classes: ClassList, task: Task, by_color: bool, skip_broken: bool,
        exif: bool, channels: int = 0,
    ) -> None:  # fmt: skip
        self.task = task
        self.metadata = classes.metadata(root.resolve().name)
        self._root, self._by_color, self._exif, self._channels = root, by_color, exif, channels
        order = np.argsort(np.array([*classes.values, *classes.ignore]), kind="stable")
        self._values = np.array([*classes.values, *classes.ignore])[order]
        self._classes = np.array([*range(len(classes.values)), *[VOID] * len(classes.ignore)], np.int32)[order]
        files = _image_files(root / "JPEGImages", channels)
        missing = [f"{root / 'JPEGImages' / name} (expected an image)" for name in names if name not in files]
        raise_or_log(missing, "names without an image", skip_broken)
        self._names = [name for name in names if name in files]
        self.file_names = [files[name] for name in self._names]
        if not self._names:
            raise FileNotFoundError(f"{root / 'JPEGImages'}: expected the images of the list, found none")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        """Read one example: the classes present, or for instances and panoptic segments the objects and background.

        Raises:
            BrokenExampleError: a file is missing or damaged, sizes differ, or a value is neither a class nor ignored.
        """
        file = self._root / "JPEGImages" / self.file_names[index]
        image = read_picture(file, self._exif, self._channels)
        path = self._root / "SegmentationClass" / f"{self._names[index]}.png"
        labels = self._labels(path, (image.shape[0], image.shape[1]))
        objects = labels
        if self.task != "semantic":
            objects = self._objects(self._names[index], labels)
        numbers, first, counts = np.unique(objects, return_index=True, return_counts=True)
        segments = []
        for number, place, count in zip(numbers.tolist(), first.tolist(), counts.tolist(), strict=True):
            category = int(labels.flat[place])
            if number != VOID:
                segments.append(SegmentInfo(number, category, self.metadata.is_thing[category], area=count))
        return Example(image, segments, id_map=objects, image_id=self._names[index], path=str(file))

    def _labels(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        values = read_color_png(path) if self._by_color else read_index_png(path)
        check_same_size(path, values.shape, size)
        place = np.searchsorted(self._values, values).clip(max=len(self._values) - 1)
        labels = np.where(self._values[place] == values, self._classes[place], np.int32(UNKNOWN))
        if (unknown := values[labels == UNKNOWN]).size:
            found = [_shown(value, self._by_color) for value in np.unique(unknown)[:8].tolist()]
            raise BrokenExampleError(path, f"expected values of the {self.metadata.num_classes} classes or ignored "
                                     f"ones, got {', '.join(found)} ({unknown.size} pixels); see labelmap.txt")
        return labels

    def _objects(self, name: str, labels: np.ndarray) -> np.ndarray:
        """Id of each pixel's object or stuff class; an object that has pixels of several classes is one of each."""
        path = self._root / "SegmentationObject" / f"{name}.png"
        objects = read_color_png(path) if self._by_color else read_index_png(path)
        check_same_size(path, objects.shape, labels.shape)
        things = np.array([*self.metadata.is_thing, False])[labels]
        # Pixels of stuff are one segment for each class, whatever their object.
        codes = np.where(things, objects.astype(np.int64) + 1, 0) * (self.metadata.num_classes + 1) + labels
        _, ids = np.unique(codes, return_inverse=True)
        return np.where(labels == VOID, np.int32(VOID), ids.reshape(labels.shape).astype(np.int32) + 1)


def _shown(value: int, by_color: bool) -> str:
    return str((value >> 16, value >> 8 & 255, value & 255)) if by_color else str(value)


def _image_files(folder: Path, channels: int) -> dict[str, str]:
    """Name without an ending -> file below the folder of images."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected the folder of images, found none")
    return {name.rsplit(".", 1)[0]: name for name in list_files(folder, picture_suffixes(channels))}


def voc_dataset(config: DataConfig, root: Path, split: str, training: bool) -> VocDataset:
    """Open a data set in the layout of the module's docstring.

    Raises:
        FileNotFoundError: a list, a folder or an image is missing.
        ValueError: a file is malformed, or the task needs objects and there is no ``SegmentationObject``.
    """
    has_objects = (root / "SegmentationObject").is_dir()
    allowed: tuple[Task, ...] = ("semantic", "panoptic", "instance") if has_objects else ("semantic",)
    task = resolve_task(config.task, "semantic", allowed, config.dataset)
    classes, by_color = read_classes(root)
    names = _names(root, split, training)
    return VocDataset(root, names, classes, task, by_color, config.skip_broken, config.exif, config.channels)


def _names(root: Path, split: str, training: bool) -> list[str]:
    lists = root / "ImageSets" / "Segmentation"
    path = lists / f"{split}.txt"
    others = sorted(lists.glob("*.txt")) if lists.is_dir() else []
    if path.is_file():
        return _listed(path, root)
    if [other.name for other in others] == ["default.txt"]:
        return tenths(_listed(others[0], root), training)
    if others:
        there = ", ".join(other.name for other in others)
        raise FileNotFoundError(f"{path}: no such list of images; there is {there}: see data.train_split and "
                                "data.val_split")
    folder = root / "SegmentationClass"
    names = [name.rsplit(".", 1)[0] for name in list_files(folder, (".png",))] if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(f"{folder}: expected PNGs of classes, found none")
    return tenths(names, training)


def _listed(path: Path, root: Path) -> list[str]:
    """Names of a list, one a line; what follows a name, as VOC's lists for each class have, does not count."""
    names = [line.split()[0] for line in _lines(path) if line.split()]
    if not names:
        raise ValueError(f"{path}: expected names of images, got none")
    for name in names:
        path_below(root, name, str(path))
    return list(dict.fromkeys(names))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text in UTF-8, got {error}") from error


def read_classes(root: Path) -> tuple[ClassList, bool]:
    """Classes of a data set, and whether their values are colours.

    Raises:
        ValueError: ``labelmap.txt`` or ``class_names.txt`` is malformed.
    """
    if (path := root / "labelmap.txt").is_file():
        names, colors = _label_map(path)
        codes = tuple(red << 16 | green << 8 | blue for red, green, blue in colors)
        if len(set(codes)) < len(codes):
            raise ValueError(f"{path}: expected distinct colours, got one twice")
        border = BORDER[0] << 16 | BORDER[1] << 8 | BORDER[2]
        return _class_list(path, names, codes, colors, () if border in codes else (border,)), True
    names = list(VOC_CLASSES)
    if (path := root / "class_names.txt").is_file():
        names = [line.strip() for line in _lines(path) if line.strip() and line.strip() != _IGNORED]
    return _class_list(path, names, tuple(range(len(names))), default_colors(len(names)), (255,)), False


def _class_list(
    path: Path, names: list[str], values: tuple[int, ...], colors: tuple[tuple[int, int, int], ...],
    ignore: tuple[int, ...],
) -> ClassList:  # fmt: skip
    if not 0 < len(names) <= _MOST_CLASSES or len(set(names)) < len(names):
        raise ValueError(f"{path}: expected 1 to {_MOST_CLASSES} distinct names of classes, got {len(names)}, "
                         f"{len(set(names))} of them distinct")
    things = tuple(name.lower() not in _BACKGROUND for name in names)
    return ClassList(tuple(names), values, things, colors, ignore)


def _label_map(path: Path) -> tuple[list[str], tuple[tuple[int, int, int], ...]]:
    names, colors = [], []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        parts = rest.split(":")[0].split(",")
        if not name or len(parts) != 3 or not all(part.strip().isdecimal() and int(part) < 256 for part in parts):
            raise ValueError(f"{path}:{number}: expected NAME:R,G,B:PARTS:ACTIONS, got {line[:80]!r}")
        names.append(name)
        colors.append((int(parts[0]), int(parts[1]), int(parts[2])))
    return names, tuple(colors)
