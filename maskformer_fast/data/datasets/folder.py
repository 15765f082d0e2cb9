"""Semantic data sets of images with index images, among them the plain folder.

Layout of the plain folder::

    root/images/{split}/**/NAME.jpg            (or png, webp, bmp, tiff, ppm)
    root/annotations/{split}/**/NAME.png       pixel value = class index
    root/classes.json                          optional, see `class_list.read_class_list`
    root/{split}/NAME.jpg  root/{split}/NAME_mask.png  root/{split}/_classes.csv       as well: Roboflow's masks

Without ``classes.json`` the classes are the indices from 0 to the largest in the training annotations.
``data.ignore_index`` is the value of unlabelled pixels, 255 by default.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskformer_fast.config import DataConfig, Task
from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.image_files import IMAGE_SUFFIXES, list_files, picture_suffixes
from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.data.bands import read_picture
from maskformer_fast.data.base import BrokenExampleError, check_same_size, raise_or_log, resolve_task
from maskformer_fast.data.datasets.class_list import (
    DEFAULT_IGNORE,
    UNKNOWN,
    ClassList,
    numbered_class_list,
    read_class_list,
)
from maskformer_fast.data.datasets.coco_json import split_names
from maskformer_fast.data.images import read_index_png
from maskformer_fast.data.pixel_values import listed, warn_once
from maskformer_fast.structures import Example

ROBOFLOW_CLASSES = "_classes.csv"
"""List of classes in a folder of images with masks, as Roboflow exports them."""
_MANY = 32  # number of inferred classes from which a few of them may not have almost all pixels
_PROBED = 32  # annotations that are read to see whether listed classes occur
_MAX_INFERRED = 4096  # most classes that are inferred; larger values are probably instance ids, depth or grey values


class Pair(NamedTuple):
    """Files of one example."""

    image: Path
    annotation: Path
    image_id: str
    file_name: str
    """Path of the image relative to the folder of images."""


class SemanticDataset:
    """Images with index images, whose pixel values are classes.

    Args:
        pairs: the files.
        classes: the classes and their pixel values.
        name: name of the data set in its metadata.
        exif: turn images as their EXIF orientation says.
        channels: number of bands of the images, as ``data.channels``.
    """

    task: Task = "semantic"

    def __init__(self, pairs: Sequence[Pair], classes: ClassList, name: str, exif: bool = True,
                 channels: int = 0) -> None:
        self._exif, self._channels = exif, channels
        self.metadata: Metadata = classes.metadata(name)
        self._pairs = list(pairs)
        self._lookup = classes.lookup()

    @property
    def file_names(self) -> list[str]:
        """File name of each image, relative to the folder of images."""
        return [pair.file_name for pair in self._pairs]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        """Read one example; its segments are the classes present, with the class indices as ids.

        Raises:
            BrokenExampleError: a file is missing or damaged, sizes differ, or a value is neither a class nor ignored.
        """
        pair = self._pairs[index]
        image = read_picture(pair.image, self._exif, self._channels)
        values = read_index_png(pair.annotation)
        check_same_size(pair.annotation, values.shape, image.shape[:2])
        # All values beyond the table read its last entry, which is UNKNOWN.
        labels = self._lookup[np.minimum(values.view(np.uint32), len(self._lookup) - 1)]
        counts = np.bincount((labels - UNKNOWN).ravel(), minlength=self.metadata.num_classes + 2)
        if counts[0]:
            raise BrokenExampleError(pair.annotation, self._unknown(values[labels == UNKNOWN]))
        things = self.metadata.is_thing
        segments = [
            SegmentInfo(id=int(c), category=int(c), is_thing=things[c], area=int(counts[c + 2]))
            for c in np.flatnonzero(counts[2:])
        ]
        return Example(image, segments, id_map=labels, image_id=pair.image_id, path=str(pair.image))

    def _unknown(self, values: np.ndarray) -> str:
        ids, counts = np.unique(values, return_counts=True)
        listed = ", ".join(f"{i} ({n} pixels)" for i, n in zip(ids[:8], counts[:8], strict=True))
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        names = f"{self.metadata.num_classes} classes of {self.metadata.name}"
        return f"expected values of the {names} or ignored ones, got {listed}{more}; see data.ignore_index"


def find_pairs(
    images: Path,
    annotations: Path,
    image_ending: str = "",
    annotation_ending: str = ".png",
    skip_broken: bool = False,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
) -> list[Pair]:
    """Match images with annotations by relative path, in sorted order.

    ``x/NAME{image_ending}.jpg`` below ``images`` belongs to ``x/NAME{annotation_ending}`` below ``annotations``.
    Capital letters in suffixes make no difference. `image_files.list_files` searches the files.

    Raises:
        FileNotFoundError: a folder is missing or has no image.
        ValueError: two images share an annotation, or images have none (unless ``skip_broken``).
    """
    if absent := [str(folder) for folder in (images, annotations) if not folder.is_dir()]:
        searched = f"looked for images in {images} and annotations in {annotations}"
        raise FileNotFoundError(f"no folder {' and no folder '.join(absent)}; {searched}")
    by_stem: dict[str, str] = {}
    for name in list_files(images, suffixes):
        stem = _stem(name)
        if not stem.endswith(image_ending) or (images == annotations and name.endswith(annotation_ending)):
            continue
        stem = stem.removesuffix(image_ending)
        if stem in by_stem:
            raise ValueError(f"{images / name}: expected one image for each annotation, got {by_stem[stem]} as well")
        by_stem[stem] = name
    if not by_stem:
        raise FileNotFoundError(
            f"{images}: expected images *{image_ending} ({', '.join(suffixes)}), found none"
        )
    ending, suffix = os.path.splitext("x" + annotation_ending)
    present: dict[str, str] = {}  # path without suffix -> path
    for name in sorted(list_files(annotations, (suffix.lower(),)), key=lambda name: not name.endswith(suffix)):
        present.setdefault(_stem(name), name)
    pairs = [
        Pair(images / name, annotations / present.get(stem + ending[1:], stem + annotation_ending), stem, name)
        for stem, name in by_stem.items()
    ]
    missing = [pair for pair in pairs if pair.image_id + ending[1:] not in present]
    if len(missing) == len(pairs):
        example = f"{pairs[0].annotation} for {pairs[0].image}"
        raise FileNotFoundError(f"{annotations}: expected annotations such as {example}, found none of the images'")
    raise_or_log(
        [f"{pair.image} (expected {pair.annotation})" for pair in missing], "images without annotation", skip_broken
    )
    return [pair for pair in pairs if pair.image_id + ending[1:] in present]


def _stem(name: str) -> str:
    """Path without its suffix, in one form of Unicode: file systems and archives have different ones."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def infer_class_list(folder: Path, ignore: int | None, skip_broken: bool = False) -> ClassList:
    """Make a class of every index from 0 to the largest in the annotations below a folder, except the ignored ones.

    255 is ignored. With another value in ``ignore`` it is ignored as well, unless 254 or a value above 255 occurs. A
    warning says if few of the classes occur, or if a few have almost all pixels: values of masks are then no indices.

    Raises:
        FileNotFoundError: there are no annotations.
        BrokenExampleError: an annotation cannot be read (unless ``skip_broken``).
        ValueError: there are too many indices, or none.
    """
    names = list_files(folder, (".png",)) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(f"{folder}: expected annotations *.png to count the classes in (or a classes.json)")
    skipped = DEFAULT_IGNORE if ignore is None else ignore
    counts = np.zeros(_MAX_INFERRED, dtype=np.int64)  # pixels of each value
    unlabelled: list[str] = []
    broken: list[BrokenExampleError] = []
    for name in names:
        try:
            values = read_index_png(folder / name)
        except BrokenExampleError as error:
            if not skip_broken:
                raise
            broken.append(error)
            continue
        present = values[values != skipped]
        if present.size and present.max() >= _MAX_INFERRED:
            raise ValueError(
                f"{folder / name}: expected class indices below {_MAX_INFERRED}, got {present.max()}; "
                "list the classes in classes.json if that is one"
            )
        if not present.size:
            unlabelled.append(name)
        counts += np.bincount(values[(values >= 0) & (values < _MAX_INFERRED)], minlength=_MAX_INFERRED)
    if len(broken) == len(names):
        raise ValueError(f"{folder}: expected annotations to count the classes in, got {len(broken)} that cannot be "
                         f"read, such as {broken[0]}")
    ignored = _ignored_values(folder, counts, skipped)
    classes = counts.copy()
    classes[[value for value in ignored if value < _MAX_INFERRED]] = 0
    found = np.flatnonzero(classes)
    if not len(found):
        raise ValueError(f"{folder}: expected labelled pixels, got only ignored ones ({listed(np.array(ignored))}); "
                         "list the classes with their values in classes.json if these are classes")
    if found[-1] == 0 and counts[DEFAULT_IGNORE] and ignore is None:
        raise ValueError(
            f"{folder}: expected class indices, got only 0 and {skipped}, which means unlabelled: for masks of 0 and "
            f"{skipped} list the classes with their values in classes.json, else set data.ignore_index to {skipped}"
        )
    if unlabelled:
        warn_once(f"unlabelled of {folder}", "%s: %d of %d annotations have only unlabelled pixels (%d): %s", folder,
                  len(unlabelled), len(names), skipped,
                  ", ".join(unlabelled[:5]) + (", ..." if len(unlabelled) > 5 else ""))
    inferred = numbered_class_list(range(int(found[-1]) + 1), ignored)
    _warn_of_other_values(folder, classes, found, len(inferred.names))
    return inferred


def _ignored_values(folder: Path, counts: np.ndarray, skipped: int) -> tuple[int, ...]:
    if skipped == DEFAULT_IGNORE or counts[254] or counts[256:].any():
        return (skipped,)
    if counts[DEFAULT_IGNORE]:
        warn_once(f"default of {folder}", "%s: pixels of value %d stay unlabelled beside data.ignore_index %d; list "
                  "the classes in classes.json if it is one", folder, DEFAULT_IGNORE, skipped)
    return skipped, DEFAULT_IGNORE


def _warn_of_other_values(
    folder: Path,
    counts: np.ndarray,  # pixels of each value that is not ignored
    found: np.ndarray,  # values that occur, in order
    num_classes: int,
) -> None:
    shares = np.sort(counts[found])[::-1].cumsum() / counts.sum()
    frequent = int(np.searchsorted(shares, 0.9)) + 1  # number of values that together have 90 % of the pixels
    way_out = "list the classes with their values in classes.json, or save the masks with class indices"
    if 2 * len(found) < num_classes:
        warn_once(f"few of {folder}", "%s: %d classes are inferred from the largest value, %d, but only %d values "
                  "occur: %s. If they are no class indices, %s", folder, num_classes, found[-1], len(found),
                  listed(found), way_out)
    elif len(found) >= _MANY and _MANY // 4 * frequent <= len(found):
        most = np.sort(found[np.argsort(-counts[found], kind="stable")[:frequent]])
        warn_once(f"frequent of {folder}", "%s: %d classes are inferred, but %s have 90 %% of the pixels: are the "
                  "edges of masks smoothed, or were the masks compressed? Then %s", folder, num_classes,
                  listed(most), way_out)


def _warn_of_ignored_classes(pairs: Sequence[Pair], classes: ClassList, source: Path) -> None:
    """Log that the first annotations have one listed class at most, and unlabelled pixels that are perhaps another."""
    seen: set[int] = set()
    for pair in pairs:
        try:
            seen.update(np.unique(read_index_png(pair.annotation)).tolist())
        except BrokenExampleError:
            continue
        if len(seen & set(classes.values)) > 1:
            return
    ignored = sorted(seen & set(classes.ignore))
    if ignored and len(classes.values) > 1:
        warn_once(f"ignored of {source}", "%s: the first %d annotations have only the values %s, of which %s means "
                  "unlabelled and is not trained. If it is a class, give that class its value as \"id\"", source,
                  len(pairs), ", ".join(map(str, sorted(seen))), ", ".join(map(str, ignored)))


def _roboflow_classes(path: Path) -> ClassList:
    """Read lines ``Pixel Value, Class`` after a line of titles."""
    values, names = [], []
    try:
        lines = path.read_text("utf-8-sig").splitlines()[1:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text in UTF-8, got {error}") from error
    for number, line in enumerate(lines, 2):
        value, _, name = (part.strip() for part in line.partition(","))
        if not line.strip():
            continue
        if not value.isdecimal() or int(value) > DEFAULT_IGNORE or not name:
            raise ValueError(f"{path}:{number}: expected a pixel value 0 to 255 and a name, got {line[:80]!r}")
        values.append(int(value))
        names.append(name)
    if not names or len(set(values)) < len(values) or len(set(names)) < len(names):
        raise ValueError(f"{path}: expected classes of distinct names and values, got {len(names)}")
    ignore = () if DEFAULT_IGNORE in values else (DEFAULT_IGNORE,)
    return ClassList(tuple(names), tuple(values), (False,) * len(names), default_colors(len(names)), ignore)


def folder_dataset(config: DataConfig, root: Path, split: str) -> SemanticDataset:
    """Open a plain folder in the layout of the module's docstring.

    Raises:
        FileNotFoundError: one of its folders is missing or empty.
        ValueError: ``classes.json`` is malformed, images have no annotation, or the task is not semantic.
        BrokenExampleError: without ``classes.json``, a training annotation cannot be read.
    """
    resolve_task(config.task, "semantic", ("semantic",), config.dataset)
    if beside := next((root / name for name in split_names(split) if (root / name / ROBOFLOW_CLASSES).is_file()), None):
        pairs = find_pairs(beside, beside, "", "_mask.png", config.skip_broken, picture_suffixes(config.channels))
        classes = _roboflow_classes(beside / ROBOFLOW_CLASSES)
        return SemanticDataset(pairs, classes, root.resolve().name, config.exif, config.channels)
    pairs = find_pairs(root / "images" / split, root / "annotations" / split, skip_broken=config.skip_broken,
                       suffixes=picture_suffixes(config.channels))
    listed = root / "classes.json"
    if listed.is_file():
        classes = read_class_list(listed)
        if config.ignore_index is not None:
            classes = classes.with_ignore(config.ignore_index)
        _warn_of_ignored_classes(pairs[:_PROBED], classes, listed)
    else:
        # Validation must have the classes of training, even if its own annotations show fewer.
        classes = infer_class_list(
            root / "annotations" / config.train_split, config.ignore_index, config.skip_broken
        )
    return SemanticDataset(pairs, classes, root.resolve().name, config.exif, config.channels)
