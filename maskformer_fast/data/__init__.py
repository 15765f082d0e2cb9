"""Data sets: images and their truth, read from files or generated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from maskformer_fast.config import DataConfig
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.base import BrokenExampleError, SegmentationDataset
from maskformer_fast.data.cache import CachedDataset
from maskformer_fast.data.datasets.coco_instances import coco_instances_dataset
from maskformer_fast.data.datasets.coco_panoptic import coco_panoptic_dataset
from maskformer_fast.data.datasets.folder import folder_dataset
from maskformer_fast.data.datasets.labelme import labelme_dataset
from maskformer_fast.data.datasets.presets import INDEX_PRESETS, PRESETS, preset_metadata
from maskformer_fast.data.datasets.shapes import ShapesDataset
from maskformer_fast.data.datasets.voc import voc_dataset
from maskformer_fast.data.datasets.yolo import yolo_dataset

__all__ = ["DATASETS", "OF_BANDS", "BrokenExampleError", "SegmentationDataset", "build_dataset", "dataset_metadata"]

DATASETS = ("shapes", "folder", "coco_instances", "coco_panoptic", "yolo", "labelme", "voc", *PRESETS)
"""Every value of ``data.dataset``."""

_INSTANCES = {"coco_instances": coco_instances_dataset, "labelme": labelme_dataset, "yolo": yolo_dataset}

OF_BANDS = ("folder", "coco_instances", "coco_panoptic", "yolo", "labelme", "voc")
"""Data sets whose pictures may have any number of bands."""
_COLLECTION = "DETECTRON2_DATASETS"  # environment variable of detectron2: the folder that holds all data sets


def build_dataset(
    config: DataConfig, split: Literal["train", "val"], trained: Metadata | None = None
) -> SegmentationDataset:
    """Open the training or the validation part of the configured data set.

    Images are read later, one example at a time. With ``data.cache`` all examples are read now and kept in memory.

    Args:
        config, split: data set and its part.
        trained: classes of the network that is measured or trained further; a category of such a name stays a class,
            even if it only groups others.

    Raises:
        FileNotFoundError: folders or files are not where the layout has them; the message lists the paths.
        ValueError: an unknown data set, a task that its truth does not allow, no root, or malformed annotations; with
            ``data.cache``, a data set that does not fit into memory.
        ModuleNotFoundError: COCO instances without pycocotools.
    """
    dataset = _open_dataset(config, split, trained.class_names if trained else ())
    return CachedDataset(dataset) if config.cache else dataset


def _open_dataset(
    config: DataConfig, split: Literal["train", "val"], classes: Sequence[str] = ()
) -> SegmentationDataset:
    check_choice("split", split, ("train", "val"))
    name = config.dataset
    check_choice("data.dataset", name, DATASETS)
    if config.ignore_index is not None:
        check(name in ("folder", *INDEX_PRESETS), "data.ignore_index",
              f"None for data set {name!r}, which has no index images", config.ignore_index)
    check(config.channels == 0 or name in OF_BANDS, "data.channels",
          f"0 for data set {name!r}; pictures of bands are read by {', '.join(OF_BANDS)}", config.channels)
    if name == "shapes":
        check(config.root is None, "data.root", "None for the data set 'shapes', which is generated; for files name "
              "theirs, as --data.dataset folder", config.root)
        shapes = ShapesDataset(config.shapes, split)
        shapes.task = config.task or shapes.task
        return shapes
    root = _root(config)
    part = config.train_split if split == "train" else config.val_split
    if name == "folder":
        return folder_dataset(config, root, part)
    if name in _INSTANCES:
        return _INSTANCES[name](config, root, part, split == "train", classes)
    if name == "voc":
        return voc_dataset(config, root, part, split == "train")
    if name == "coco_panoptic":
        return coco_panoptic_dataset(config, root, part, root.resolve().name)
    return PRESETS[name].read(config, root, part)


def dataset_metadata(config: DataConfig) -> Metadata:
    """Return the classes of the configured data set.

    Synthetic data sets, and presets without ``data.root``, need no files for that.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `build_dataset` does, if the files must be opened.
    """
    if config.dataset in PRESETS and config.root is None:
        return preset_metadata(config.dataset)
    return _open_dataset(config, "val").metadata


def _root(config: DataConfig) -> Path:
    if config.root is not None:
        root, source = Path(config.root).expanduser(), "data.root"
    elif config.dataset in PRESETS and os.environ.get(_COLLECTION):
        root, source = Path(os.environ[_COLLECTION]) / PRESETS[config.dataset].folder, f"${_COLLECTION}"
    else:
        other = f" (or ${_COLLECTION} set)" if config.dataset in PRESETS else ""
        raise ValueError(f"data.root: expected the folder of data set {config.dataset!r}{other}, got None")
    if not root.is_dir():
        raise FileNotFoundError(f"{source}: expected the folder of data set {config.dataset!r}, found none at {root}")
    return root
