"""Known data sets by name: their folders, classes, ids of unlabelled pixels, and splits.

``data.root`` is the folder that each function's docstring names. The splits "train" and "val" are the data set's
training and validation parts, even if its folders have other names; other splits are folder names. The functions raise
FileNotFoundError with the paths that were searched, if files are missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from maskformer_fast.config import DataConfig
from maskformer_fast.core.image_files import list_files
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.base import SegmentationDataset, first_existing, path_below, resolve_task
from maskformer_fast.data.datasets.class_list import ClassList, read_preset_classes
from maskformer_fast.data.datasets.coco_instances import CocoInstances
from maskformer_fast.data.datasets.coco_json import ImageInfo
from maskformer_fast.data.datasets.coco_panoptic import PANOPTIC_TASKS, CocoPanoptic, coco_panoptic_dataset
from maskformer_fast.data.datasets.folder import SemanticDataset, find_pairs
from maskformer_fast.data.datasets.things import ThingsDataset, things_metadata

_Coco = TypeVar("_Coco", CocoPanoptic, CocoInstances)
_FOLDER_NAMES = {"train": "training", "val": "validation"}  # split -> its folder in ADE20K and Mapillary Vistas


class Preset(NamedTuple):
    """Function that opens a data set, its folder in a detectron2 collection, and its class list."""

    read: Callable[[DataConfig, Path, str], SegmentationDataset]
    """Function of the configuration, the root and the split."""
    folder: str
    """Folder below ``$DETECTRON2_DATASETS``."""
    classes: str
    """Name of the class list, a file of ``data/classes`` without its ending."""
    contiguous: bool = False
    """Whether the data set's category ids are 0, 1, 2... instead of the pixel values in the class list."""
    things_only: bool = False
    """Whether the classes are the things of the class list."""


def preset_metadata(name: str) -> Metadata:
    """Return the published classes of a preset, without reading its files."""
    preset = PRESETS[name]
    metadata = read_preset_classes(preset.classes).metadata(name)
    if preset.contiguous:
        metadata = dataclasses.replace(metadata, category_ids=tuple(range(metadata.num_classes)))
    return things_metadata(metadata, name) if preset.things_only else metadata


def _index_images(
    config: DataConfig,
    images: Path,
    annotations: Path,
    image_ending: str = "",
    annotation_ending: str = ".png",
    classes: ClassList | None = None,
) -> SemanticDataset:
    resolve_task(config.task, "semantic", ("semantic",), config.dataset)
    classes = classes or read_preset_classes(PRESETS[config.dataset].classes)
    if config.ignore_index is not None:
        classes = classes.with_ignore(config.ignore_index)
    pairs = find_pairs(images, annotations, image_ending, annotation_ending, config.skip_broken)
    return SemanticDataset(pairs, classes, config.dataset, config.exif)


def _checked(config: DataConfig, dataset: _Coco) -> _Coco:
    expected, got = preset_metadata(config.dataset).num_classes, dataset.metadata.num_classes
    if got != expected:
        raise ValueError(f"{dataset.path}: categories: expected the {expected} of {config.dataset}, got {got}")
    return dataset


def ade20k_150(config: DataConfig, root: Path, split: str) -> SemanticDataset:
    """ADE20K, 150 classes, as ``ADEChallengeData2016.zip`` unpacks.

    ``images/{training,validation}/*.jpg``, ``annotations/{training,validation}/*.png``: 1..150 are classes 0..149,
    0 (other objects) is unlabelled.
    """
    folder = _FOLDER_NAMES.get(split, split)
    return _index_images(config, root / "images" / folder, root / "annotations" / folder)


def ade20k_full_847(config: DataConfig, root: Path, split: str) -> SemanticDataset:
    """ADE20K-Full, 847 classes, in ``ADE20K_2021_17_01`` as prepared for detectron2.

    ``images_detectron2/{training,validation}/*.jpg``, ``annotations_detectron2/{training,validation}/*.tif`` of 16
    bits: 0..846, unlabelled 65535.
    """
    folder = _FOLDER_NAMES.get(split, split)
    images, annotations = root / "images_detectron2" / folder, root / "annotations_detectron2" / folder
    return _index_images(config, images, annotations, annotation_ending=".tif")


def camvid(config: DataConfig, root: Path, split: str) -> SemanticDataset:
    """CamVid, the 11 classes of the SegNet split.

    ``images/{train,val}/*``, ``annotations/{train,val}/*.png``: 0..10, unlabelled 11.
    """
    return _index_images(config, root / "images" / split, root / "annotations" / split)


def cityscapes(config: DataConfig, root: Path, split: str) -> SemanticDataset:
    """Cityscapes, the 19 classes evaluated, as ``leftImg8bit_trainvaltest.zip`` and ``gtFine_trainvaltest.zip`` unpack.

    ``leftImg8bit/{train,val}/CITY/*_leftImg8bit.png``, ``gtFine/{train,val}/CITY/*_gtFine_labelIds.png``: label ids are
    mapped to the classes, and those that are not evaluated are unlabelled. If there are no ``labelIds``,
    ``labelTrainIds`` (0..18, unlabelled 255) are read.
    """
    annotations = root / "gtFine" / split
    classes, ending = read_preset_classes("cityscapes"), "_gtFine_labelIds.png"
    train_ids = "_gtFine_labelTrainIds.png"
    names = list_files(annotations, (ending.lower(), train_ids.lower())) if annotations.is_dir() else []
    if names and all(name.lower().endswith(train_ids.lower()) for name in names):
        classes = dataclasses.replace(classes, values=tuple(range(len(classes.names))), ignore=(255,))
        ending = train_ids
    return _index_images(config, root / "leftImg8bit" / split, annotations, "_leftImg8bit", ending, classes)


def coco_stuff_10k(config: DataConfig, root: Path, split: str) -> SemanticDataset:
    """COCO-Stuff-10K v1.1, 171 classes, in ``coco_stuff_10k`` as prepared for detectron2.

    ``images_detectron2/{train,test}/*.jpg``, ``annotations_detectron2/{train,test}/*.png``: 0..79 things and 80..170
    stuff, unlabelled 255. The split "val" is ``test``.
    """
    folder = "test" if split == "val" else split
    return _index_images(config, root / "images_detectron2" / folder, root / "annotations_detectron2" / folder)


def mapillary_vistas(config: DataConfig, root: Path, split: str) -> SemanticDataset:
    """Mapillary Vistas v1.2, 65 classes, as the archive unpacks.

    ``{training,validation}/images/*.jpg``, ``{training,validation}/labels/*.png`` (palette images): 0..64, unlabelled
    65.
    """
    folder = _FOLDER_NAMES.get(split, split)
    return _index_images(config, root / folder / "images", root / folder / "labels")


def ade20k_panoptic(config: DataConfig, root: Path, split: str) -> CocoPanoptic:
    """ADE20K panoptic, 100 things and 50 stuff classes, in ``ADEChallengeData2016`` as prepared for detectron2.

    ``ade20k_panoptic_{train,val}.json`` beside folders of PNGs with the same names, and
    ``images/{training,validation}/*.jpg``.
    """
    task = resolve_task(config.task, "panoptic", PANOPTIC_TASKS, config.dataset)
    path = first_existing([root / f"ade20k_panoptic_{split}.json"], "panoptic annotations")
    images = root / "images" / _FOLDER_NAMES.get(split, split)

    def locate(infos: list[ImageInfo]) -> list[Path]:
        return [images / info.file_name for info in infos]

    return _checked(config, CocoPanoptic(path, locate, task, config.dataset, config.skip_broken, config.exif))


def ade20k_instances(config: DataConfig, root: Path, split: str) -> CocoInstances:
    """ADE20K instances, 100 classes, in ``ADEChallengeData2016`` as prepared for detectron2.

    ``ade20k_instance_{train,val}.json``, in the format of COCO's instances, and ``images/{training,validation}/*.jpg``.
    """
    resolve_task(config.task, "instance", ("instance",), config.dataset)
    path = first_existing([root / f"ade20k_instance_{split}.json"], "instance annotations")
    folder = _FOLDER_NAMES.get(split, split)
    dataset = CocoInstances(path, root, folder, split == "train", config.dataset, config.keep_empty, config.exif)
    return _checked(config, dataset)


def cityscapes_instances(config: DataConfig, root: Path, split: str) -> ThingsDataset:
    """Cityscapes instances, 8 classes: the things of `cityscapes_panoptic`, in its layout."""
    resolve_task(config.task, "instance", ("instance",), config.dataset)
    panoptic = dataclasses.replace(config, dataset="cityscapes_panoptic", task="instance")
    return ThingsDataset(cityscapes_panoptic(panoptic, root, split), config.dataset)


def cityscapes_panoptic(config: DataConfig, root: Path, split: str) -> CocoPanoptic:
    """Cityscapes panoptic, 8 things and 11 stuff classes, as ``cityscapesscripts`` prepares it.

    ``gtFine/cityscapes_panoptic_{train,val}.json`` beside folders of PNGs with the same names (or the ``_trainId``
    variant of both), and ``leftImg8bit/{train,val}/CITY/*_leftImg8bit.png``.
    """
    task = resolve_task(config.task, "panoptic", PANOPTIC_TASKS, config.dataset)
    stem = f"cityscapes_panoptic_{split}"
    candidates = [root / "gtFine" / f"{stem}.json", root / "gtFine" / f"{stem}_trainId.json"]
    path = first_existing(candidates, "panoptic annotations (run csCreatePanopticImgs)")
    images = root / "leftImg8bit" / split

    def locate(infos: list[ImageInfo]) -> list[Path]:
        # The listed file names are not those of images (they contain "gtFine"); ids begin with the city.
        stems = [str(info.id) for info in infos]
        return [path_below(images, f"{stem.split('_')[0]}/{stem}_leftImg8bit.png", str(path)) for stem in stems]

    return _checked(config, CocoPanoptic(path, locate, task, config.dataset, config.skip_broken, config.exif))


def coco_panoptic_133(config: DataConfig, root: Path, split: str) -> CocoPanoptic:
    """COCO panoptic 2017, 80 things and 53 stuff classes: `coco_panoptic` with a check of the number of classes.

    ``annotations/panoptic_{train,val}2017.json``, folders of PNGs with the same names, ``{train,val}2017/*.jpg``.
    """
    return _checked(config, coco_panoptic_dataset(config, root, split, config.dataset))


PRESETS = {
    "ade20k_instances": Preset(ade20k_instances, "ADEChallengeData2016", "ade20k_150", True, things_only=True),
    "ade20k_150": Preset(ade20k_150, "ADEChallengeData2016", "ade20k_150"),
    "ade20k_full_847": Preset(ade20k_full_847, "ADE20K_2021_17_01", "ade20k_full_847"),
    "ade20k_panoptic": Preset(ade20k_panoptic, "ADEChallengeData2016", "ade20k_150", contiguous=True),
    "camvid": Preset(camvid, "camvid", "camvid"),
    "cityscapes": Preset(cityscapes, "cityscapes", "cityscapes"),
    "cityscapes_instances": Preset(cityscapes_instances, "cityscapes", "cityscapes", things_only=True),
    "cityscapes_panoptic": Preset(cityscapes_panoptic, "cityscapes", "cityscapes"),
    "coco_panoptic_133": Preset(coco_panoptic_133, "coco", "coco_panoptic"),
    "coco_stuff_10k": Preset(coco_stuff_10k, "coco/coco_stuff_10k", "coco_stuff_10k"),
    "mapillary_vistas": Preset(mapillary_vistas, "mapillary_vistas", "mapillary_vistas"),
}
"""Preset of each name for ``data.dataset``."""

INDEX_PRESETS = ("ade20k_150", "ade20k_full_847", "camvid", "cityscapes", "coco_stuff_10k", "mapillary_vistas")
"""Presets that read index images; only these accept ``data.ignore_index``."""
