"""Recognition of a data set's format by its files, and the settings that train on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path

from maskformer_fast.config import MAX_CHANNELS, DataConfig
from maskformer_fast.core.image_files import list_files, picture_suffixes
from maskformer_fast.data import OF_BANDS
from maskformer_fast.data.bands import read_layout
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.datasets.coco_instances import EXPORTS
from maskformer_fast.data.datasets.folder import ROBOFLOW_CLASSES
from maskformer_fast.data.datasets.yolo import NAMES

_TRAIN = ("train", "training", "default")
"""Names of a training part, the best first."""
_VAL = ("val", "valid", "validation", "dev", "test")
"""Names of a validation part, the best first."""
_PROBED = 20  # JSON files that are searched for labelme's shapes
_PROBED_BYTES = 1 << 16  # of a file that are searched
_HEADERS = 100  # most pictures whose headers are read
_LABEL_FOLDERS = ("annotations", "labels", "SegmentationClass", "SegmentationObject")  # whose pictures are labels


def recognise(root: Path) -> DataConfig:
    """Settings of the data set in a folder, by its files' names and, for ``data.channels``, its pictures' headers.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it that is known; the message lists what was searched.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"folder: expected a folder of images and labels, found none at {root}")
    for find in _FINDERS:
        if found := find(root):
            dataset, train, val = found
            channels = _bands_below(root) if dataset in OF_BANDS else 0
            return DataConfig(dataset=dataset, root=str(root), train_split=train, val_split=val, skip_broken=True,
                              channels=channels)
    hint = ""
    if next(root.glob("labels/**/*.txt"), None) is not None:
        hint = (f"; the texts in labels look like YOLO's, whose classes are not named: write {NAMES[0]} with a line "
                "'names: [car, bus]', and lines 'train: FOLDER' and 'val: FOLDER' with the folders of images")
    raise FileNotFoundError(
        f"{root}: no data set recognised; looked for COCO (annotations/instances_*.json or panoptic_*.json, "
        f"*/{', '.join(EXPORTS)}), YOLO ({NAMES[0]} with names), labelme (*.json with shapes), Pascal VOC "
        "(JPEGImages, SegmentationClass), Cityscapes (leftImg8bit, gtFine), ADE20K and plain folders (images and "
        f"annotations, index PNGs), Mapillary Vistas (training/images, training/labels), Roboflow's masks "
        f"(*/{ROBOFLOW_CLASSES}){hint}"
    )


def _bands_below(root: Path) -> int:
    """Number of bands of the pictures below a folder; 0 where most of them are RGB of 8 bits or become it unharmed."""
    names = [name for name in list_files(root, picture_suffixes(1)) if not _is_label(name)]
    counts: Counter[int] = Counter()
    chosen = names[:: -(-len(names) // _HEADERS)] if names else []
    for name in chosen:
        try:
            layout = read_layout(root / name)
        except (BrokenExampleError, ModuleNotFoundError):  # reading the data set says so
            continue
        if layout.has_bands and layout.channels <= MAX_CHANNELS:
            counts[layout.channels] += 1
    (channels, count), *_ = counts.most_common(1) or [(0, 0)]
    return channels if 2 * count > len(chosen) else 0


def _is_label(name: str) -> bool:
    return name.endswith("_mask.png") or any(part in _LABEL_FOLDERS for part in name.split("/")[:-1])


Found = tuple[str, str, str]
"""``data.dataset``, ``data.train_split``, ``data.val_split``."""


def _split_names(names: Collection[str]) -> tuple[str, str]:
    """Training and validation part, in any case (CVAT's are Train, Validation); the same one if there is no other."""
    ordered = {name.lower(): name for name in sorted(names)}
    train = next((name for name in _TRAIN if name in ordered), next((n for n in ordered if n not in _VAL), ""))
    train = train or next(iter(ordered))
    return ordered[train], ordered[next((name for name in _VAL if name in ordered), train)]


def _of_split(dataset: str, names: Collection[str]) -> Found | None:
    return (dataset, *_split_names(names)) if names else None


def _annotation_splits(root: Path, start: str) -> set[str]:
    names = {path.stem.removeprefix(start) for path in root.glob(f"annotations/{start}*.json")} - {""}
    return {name[:-4] if name.endswith("2017") else name for name in names if name != "coco_categories"}


def _panoptic(root: Path) -> Found | None:
    return _of_split("coco_panoptic", _annotation_splits(root, "panoptic_"))


def _instances(root: Path) -> Found | None:
    beside = {path.parent.name for name in EXPORTS for path in root.glob(f"*/{name}")} - {"annotations"}
    names = _annotation_splits(root, "instances_") or beside
    if names and names != {"default"}:
        train, val = _split_names(names)
        return "coco_instances", train, "val" if val == "valid" else val
    is_single = names or any((root / name).is_file() for name in EXPORTS)
    return ("coco_instances", "train", "val") if is_single else None


def _yolo(root: Path) -> Found | None:
    described = [root / name for name in NAMES if (root / name).is_file()] or sorted(root.glob("*.y*ml"))
    if len(described) != 1 or not _mentions(described[0], b"names"):
        return None
    has_val = _mentions(described[0], b"\nval", b"\nVal") or any((root / "images" / name).is_dir() for name in _VAL[:3])
    return "yolo", "train", "val" if has_val or any((root / name).is_dir() for name in _VAL[:3]) else "train"


def _voc(root: Path) -> Found | None:
    if not (root / "JPEGImages").is_dir() or not (root / "SegmentationClass").is_dir():
        return None
    lists = {path.stem for path in root.glob("ImageSets/Segmentation/*.txt")} - {"trainval"}
    return ("voc", "train", "val") if not lists or lists == {"default"} else _of_split("voc", lists)


def _known_folders(root: Path) -> Found | None:
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        return "cityscapes", "train", "val"
    if (root / "training" / "images").is_dir() and (root / "training" / "labels").is_dir():
        return "mapillary_vistas", "train", "val"
    if (root / "images_detectron2").is_dir() and (root / "annotations_detectron2").is_dir():
        has_tiffs = next(root.glob("annotations_detectron2/*/*.tif"), None) is not None
        return "ade20k_full_847" if has_tiffs else "coco_stuff_10k", "train", "val"
    if (root / "objectInfo150.txt").is_file() and (root / "annotations" / "training").is_dir():
        return "ade20k_150", "train", "val"
    return None


def _folder(root: Path) -> Found | None:
    masks = {path.parent.name for path in root.glob(f"*/{ROBOFLOW_CLASSES}")}
    if masks:
        train, val = _split_names(masks)
        return "folder", train, "val" if val == "valid" else val
    images, annotations = root / "images", root / "annotations"
    if not images.is_dir() or not annotations.is_dir() or not list_files(annotations, (".png",)):
        return None
    parts = {path.name for path in images.iterdir() if path.is_dir() and (annotations / path.name).is_dir()}
    return _of_split("folder", parts or {"."})


def _labelme(root: Path) -> Found | None:
    files = islice(list_files(root, (".json",)), _PROBED)
    if not any(_mentions(root / name, b'"shapes"', b'"imageData"') for name in files):
        return None
    parts = {path.name for path in root.iterdir() if path.is_dir()} & {"train", "val", "valid"}
    return ("labelme", "train", "val") if not parts or parts & {"val", "valid"} else ("labelme", "train", "train")


_FINDERS: tuple[Callable[[Path], Found | None], ...] = (
    _panoptic, _yolo, _voc, _instances, _known_folders, _folder, _labelme,
)  # fmt: skip


def _mentions(path: Path, *texts: bytes) -> bool:
    """Whether the beginning of a file has one of some texts."""
    try:
        with path.open("rb") as file:
            start = b"\n" + file.read(_PROBED_BYTES)
            return any(text in start for text in texts)
    except OSError:
        return False
