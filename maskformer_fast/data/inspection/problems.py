"""What is suspicious in a data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from maskformer_fast.config import DataConfig
from maskformer_fast.core.image_files import list_files, picture_suffixes
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.datasets.yolo import label_file
from maskformer_fast.data.inspection.measure import TINY_AREA, Part

FEW_OBJECTS = 10
"""Fewest objects of a class in training that are not suspicious."""
_SHOWN = 5  # examples of a problem
_LOGGER = logging.getLogger("maskformer_fast.data")
_NO_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt", "obj.names", "labels.txt")


@contextmanager
def warnings_of_readers() -> Iterator[list[str]]:
    """Collect what data sets warn of while they are opened and read, instead of logging it."""
    collected: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            collected.append(record.getMessage())

    handler = Collector(logging.WARNING)
    propagates = _LOGGER.propagate
    _LOGGER.addHandler(handler)
    _LOGGER.propagate = False
    try:
        yield collected
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.propagate = propagates


def listed(what: str, items: Sequence[str]) -> list[str]:
    """A line with a count and examples; none for no item."""
    if not items:
        return []
    different = list(dict.fromkeys(items))
    more = ", ..." if len(different) > _SHOWN else ""
    return [f"{len(items)} {what}: {', '.join(different[:_SHOWN])}{more}"]


def problems_of(config: DataConfig, metadata: Metadata, parts: Sequence[Part], is_complete: bool) -> list[str]:
    """Suspicious things, each a line.

    Args:
        config: settings of the data set.
        metadata: its classes.
        parts: the training part, and the validation part if there is another.
        is_complete: all pictures were read; files that belong to none are searched then only.
    """
    found: list[str] = []
    if len(parts) == 1:
        found.append("there is no validation part: results would be measured on the pictures of training")
    for part in parts:
        found += listed(f"files of {part.split} cannot be used", part.broken)
        found += listed(f"pictures of {part.split} without an object", part.empty)
        found += listed(f"objects of {part.split} with an outline that leaves the picture", part.outside)
        found += listed(f"objects of {part.split} of at most {TINY_AREA} pixels, in", part.tiny)
    found += _class_problems(metadata, parts)
    found += _duplicates(parts)
    if is_complete:
        found += _orphans(config, parts)
    return found


def _class_problems(metadata: Metadata, parts: Sequence[Part]) -> list[str]:
    train, *others = parts
    objects = [(name, train.class_objects[number]) for number, name in enumerate(metadata.class_names)]
    found = listed("classes without an object in training", [name for name, count in objects if count == 0])
    few = [f"{name} ({count})" for name, count in objects if 0 < count < FEW_OBJECTS]
    found += listed(f"classes with fewer than {FEW_OBJECTS} objects in training", few)
    for part in others:
        missing = [name for number, name in enumerate(metadata.class_names)
                   if train.class_objects[number] and not part.class_objects[number]]  # fmt: skip
        found += listed(f"classes without an object in {part.split}", missing)
    return found


def _duplicates(parts: Sequence[Part]) -> list[str]:
    found = []
    for part in parts:
        same = [" = ".join(paths[:_SHOWN]) for paths in part.digests.values() if len(paths) > 1]
        found += listed(f"groups of equal pictures in {part.split}", same)
    if len(parts) > 1:
        train, val = parts[0].digests, parts[1].digests
        common = [f"{train[digest][0]} = {val[digest][0]}" for digest in train if digest in val]
        found += listed("pictures of validation that are in training, too", common)
    return found


def _orphans(config: DataConfig, parts: Sequence[Part]) -> list[str]:
    """Pictures that no label file names, and label files without a picture."""
    root, suffixes = Path(str(config.root)), picture_suffixes(config.channels)
    used = [path for part in parts for path in (*part.paths, *part.unusable)]
    pictures = set(map(os.path.realpath, used))
    folders = {Path(path).parent for part in parts for path in part.paths}
    beside = [
        str(path) for folder in sorted(folders) for path in sorted(folder.iterdir())
        if path.suffix.lower() in suffixes and not path.name.startswith(".")
        and not path.name.endswith("_mask.png") and os.path.realpath(path) not in pictures
    ]  # fmt: skip
    found = [] if config.dataset == "voc" else listed("pictures beside the data set's without a label", beside)
    if config.dataset == "yolo":
        expected = {label_file(Path(path)) for path in used}
        found += listed("pictures without a label file", [str(path) for path in sorted(expected) if not path.exists()])
        there = {path for folder in {path.parent for path in expected} if folder.is_dir()
                 for path in folder.glob("*.txt") if path.name not in _NO_LABELS}  # fmt: skip
        found += listed("label files without a picture", [str(path) for path in sorted(there - expected)])
    if config.dataset == "folder" and (root / "annotations").is_dir():
        for split in dict.fromkeys((config.train_split, config.val_split)):
            names = list_files(root / "images" / split, suffixes)
            stems = {os.path.splitext(name)[0] for name in names}
            labels = list_files(root / "annotations" / split, (".png",))
            found += listed(f"annotations of {split} without a picture",
                            [name for name in labels if os.path.splitext(name)[0] not in stems])  # fmt: skip
    if config.dataset == "voc":
        stems = {os.path.splitext(name)[0] for name in list_files(root / "JPEGImages", suffixes)}
        labels = list_files(root / "SegmentationClass", (".png",))
        found += listed("annotations without a picture",
                        [name for name in labels if os.path.splitext(name)[0] not in stems])  # fmt: skip
    return found
