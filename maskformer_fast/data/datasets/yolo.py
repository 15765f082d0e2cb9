"""Instance labels in YOLO's format: a text file beside each image's folder, outlines relative to the image.

Layout, as ultralytics reads it and Roboflow and CVAT export it::

    root/data.yaml                names: [car, bus], or {0: car, 1: bus};  train: images/train;  val: images/val
    root/images/train/NAME.jpg    root/labels/train/NAME.txt
    root/train/images/NAME.jpg    root/train/labels/NAME.txt    (as well)

A line of a label file is ``class x0 y0 x1 y1 x2 y2 ...``, coordinates divided by width and height. Lines of a box only
are left out and counted. An image without a label file, or with an empty one, has no objects.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from maskformer_fast.config import DataConfig
from maskformer_fast.core.image_files import DICOM_SUFFIX, list_files, picture_suffixes
from maskformer_fast.data.bands import read_layout
from maskformer_fast.data.base import resolve_task
from maskformer_fast.data.datasets.coco_instances import CocoInstances
from maskformer_fast.data.images import image_size

NAMES = ("data.yaml", "data.yml", "dataset.yaml")
"""File that names the classes and folders, unless the root has one YAML file of another name."""
_LOGGER = logging.getLogger("maskformer_fast.data")
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation")}


def yolo_dataset(
    config: DataConfig, root: Path, split: str, training: bool, classes: Collection[str] = ()
) -> CocoInstances:
    """Open a data set in the layout of the module's docstring.

    Raises:
        FileNotFoundError: the YAML file or a folder is missing.
        ValueError: a file is malformed (with ``data.skip_broken`` an image, or the image of labels, is left out with a
            warning), or no object has a usable outline.
        ModuleNotFoundError: pycocotools is not installed.
    """
    resolve_task(config.task, "instance", ("instance",), config.dataset)
    source = _description(root)
    content = _parse(source)
    names = _class_names(content, source)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file in _image_files(content, source, root, split, picture_suffixes(config.channels)):
        try:
            if config.channels or file.suffix.lower() == DICOM_SUFFIX:
                height, width = read_layout(file, config.channels).size
            else:
                height, width = image_size(file, config.exif)
            objects = _objects(label_file(file), len(names))
        except ValueError as error:  # of the image, or of its labels
            if not config.skip_broken:
                raise
            _LOGGER.warning("left out %s", error)
            continue
        number = len(images) + 1
        images.append({"id": number, "file_name": _below(file, root), "height": height, "width": width})
        for category, points in objects:
            # Rounded, so that a pixel's coordinate of few decimals comes back as it was.
            scaled = [round(value * (width, height)[place % 2], 6) for place, value in enumerate(points)]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category,
                                "segmentation": [scaled] if len(points) > 4 else []})  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    found = {"images": images, "annotations": annotations, "categories": categories}
    name = root.resolve().name
    return CocoInstances(source, root, split, training, name, config.keep_empty, config.exif, classes, found,
                         config.channels)


def _description(root: Path) -> Path:
    named = [root / name for name in NAMES if (root / name).is_file()]
    others = sorted(path for ending in ("*.yaml", "*.yml") for path in root.glob(ending))
    if named or len(others) == 1:
        return (named or others)[0]
    listed = f", found {', '.join(path.name for path in others)}" if others else ""
    raise FileNotFoundError(f"{root}: expected {NAMES[0]} with the names of the classes{listed}")


def _parse(source: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(source.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: malformed YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: expected keys and values, got {type(content).__name__}")
    return content


def _class_names(content: dict[str, Any], source: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            got = sorted(names, key=str)[:8]
            raise ValueError(f"{source}: names: expected the numbers 0 to {len(names) - 1}, got {got}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{source}: names: expected the names of the classes, got {names!r}")
    return [str(name) for name in names]


def _image_files(
    content: dict[str, Any], source: Path, root: Path, split: str, suffixes: Sequence[str]
) -> list[Path]:
    """Images of a split, in the order of their names."""
    wanted = _SPLITS.get(split, (split,))
    keys = [key for key, value in content.items() if str(key).lower() in wanted and value]
    entries = content[keys[0]] if keys else split
    files: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        candidates = _places(str(entry), content, root)
        place = next((path for path in candidates if path.exists()), None)
        if place is None:
            looked = ", ".join(map(str, candidates))
            raise FileNotFoundError(f"{source}: {keys[0] if keys else split}: no such folder; looked for {looked}")
        if place.is_dir():
            files += [place / name for name in list_files(place, suffixes)]
        elif place.suffix == ".txt":
            lines = (line.strip() for line in place.read_text("utf-8").splitlines())
            files += [_listed(line, place, root) for line in lines if line]
        elif place.suffix.lower() in suffixes:
            files.append(place)
        else:
            raise ValueError(f"{source}: {split}: expected a folder, or a list of images in a .txt, got {place}")
    if not files:
        raise FileNotFoundError(f"{source}: {split}: expected images, found none")
    return files


def _places(entry: str, content: dict[str, Any], root: Path) -> list[Path]:
    """Where a split's folder may be: tools write it relative to ``path``, to the YAML file, or to another folder."""
    base = str(content.get("path") or ".")
    inner = entry
    while inner.startswith("../"):
        inner = inner[3:]
    return list(dict.fromkeys([root / entry, root / inner, root / base / entry, Path(base) / entry,
                               root / "images" / inner, root / inner / "images"]))  # fmt: skip


def _listed(line: str, source: Path, root: Path) -> Path:
    """Image of a line of a list; CVAT writes ``data/`` before paths below the root."""
    for path in (source.parent / line, root / line, root / line.removeprefix("data/"), Path(line)):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{source}: no such image: {line}")


def _below(file: Path, root: Path) -> str:
    try:
        return file.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise ValueError(f"{file}: expected images below data.root, {root}") from None


def label_file(image: Path) -> Path:
    """The last folder ``images`` on the way to the image becomes ``labels``; without one they are beside each other."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _objects(path: Path, count: int) -> list[tuple[int, list[float]]]:
    """Class and coordinates of each line.

    Raises:
        ValueError: a line is malformed; the message names it.
    """
    if not path.is_file():
        return []
    objects = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text, got {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            values = [float(value) for value in line.split()]
        except ValueError:
            raise ValueError(f"{path}:{number}: expected numbers, got {line[:80]!r}") from None
        if not values:
            continue
        category, points = values[0], values[1:]
        if not category.is_integer() or not 0 <= category < count:
            raise ValueError(f"{path}:{number}: class: expected 0 to {count - 1}, got {line.split()[0]}")
        if len(points) < 4 or len(points) % 2:
            got = f"{len(points)} numbers"
            raise ValueError(f"{path}:{number}: expected pairs of coordinates after the class, got {got}")
        if not all(-0.01 <= value <= 1.01 for value in points):
            raise ValueError(f"{path}:{number}: expected coordinates between 0 and 1, relative to the image, got "
                             f"{min(points)} to {max(points)}")
        objects.append((int(category), [min(max(value, 0.0), 1.0) for value in points]))
    return objects
