"""Instance labels as labelme writes them: a JSON file beside each image.

Layout::

    root/train/NAME.json    root/train/NAME.jpg    root/val/...     (or one folder root without parts: of its files in
    root/labels.txt         optional: the classes in their order     order every tenth, from the tenth on, is "val")

Shapes are polygons, rectangles, circles and masks; those of one ``label`` and ``group_id`` are parts of one object.
Lines and points are left out and counted, and so are the labels ``__ignore__`` and ``_background_``. Without
``labels.txt`` the classes are all labels of the training part, sorted.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import math
import os
from collections.abc import Collection
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from maskformer_fast.config import DataConfig
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.image_files import list_files
from maskformer_fast.core.image_resize import MAX_PIXELS
from maskformer_fast.data.base import LeftOut, resolve_task, tenths
from maskformer_fast.data.datasets.coco_instances import CocoInstances
from maskformer_fast.data.datasets.coco_json import as_integer, load_coco, split_names

NO_CLASSES = ("__ignore__", "_background_")
"""Labels that are no class."""
_CIRCLE_CORNERS = 64

_LOGGER = logging.getLogger("maskformer_fast.data")


def labelme_dataset(
    config: DataConfig, root: Path, split: str, training: bool, classes: Collection[str] = ()
) -> CocoInstances:
    """Open a data set in the layout of the module's docstring.

    Raises:
        FileNotFoundError: there are no label files.
        ValueError: a file is malformed (with ``data.skip_broken`` it is left out with a warning), or no object has a
            usable outline.
        ModuleNotFoundError: pycocotools is not installed.
    """
    resolve_task(config.task, "instance", ("instance",), config.dataset)
    files = _files(root, split)
    names = _class_names(root, _files(root, config.train_split), config.skip_broken)
    categories = {name: number for number, name in enumerate(names)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    left_out = LeftOut()
    for file in files:
        try:
            content = load_coco(file)
            image = _image_name(content.get("imagePath"), file, root)
            size = tuple(as_integer(content.get(key)) or 0 for key in ("imageHeight", "imageWidth"))
            objects = _objects(content, file, (size[0], size[1]), left_out)
            if unknown := [name for name, _ in objects if name not in categories]:
                raise ValueError(f"{file}: label: expected one of {', '.join(names[:20])}, got {unknown[0]!r}; the "
                                 f"classes are those of training unless {root / 'labels.txt'} lists them, one a line")
        except ValueError as error:
            if not config.skip_broken:
                raise
            _LOGGER.warning("left out %s", error)
            continue
        number = len(images) + 1
        images.append({"id": number, "file_name": image, "height": size[0], "width": size[1]})
        for name, outline in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": categories[name],
                                "segmentation": outline})  # fmt: skip
    left_out.log(root, "shapes")
    found = {"images": images, "annotations": annotations,
             "categories": [{"id": number, "name": name} for number, name in enumerate(names)]}  # fmt: skip
    name = root.resolve().name
    return CocoInstances(root, root, split, training, name, config.keep_empty, config.exif, classes, found,
                         config.channels)


def _files(root: Path, split: str) -> list[Path]:
    """Label files of a part."""
    folder = next((root / name for name in split_names(split) if (root / name).is_dir()), root)
    files = [folder / name for name in list_files(folder, (".json",))]
    if folder == root and not any((root / name).is_dir() for name in ("train", "val", "valid")):
        files = tenths(files, split == "train")
    if not files:
        raise FileNotFoundError(f"{folder}: expected labelme's JSON files for the part {split!r}, found none")
    return files


def _image_name(name: object, file: Path, root: Path) -> str:
    """Path of the image of a label file below the root; one of another machine is taken to be beside the file."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{file}: imagePath: expected a file name, got {name!r}")
    windows = PureWindowsPath(name)
    relative = windows.name if windows.drive or windows.root else windows.as_posix()
    below = os.path.normpath(file.parent.relative_to(root) / relative)
    if below.startswith(".."):
        raise ValueError(f"{file}: imagePath: expected an image below {root}, got {name!r}")
    return below


def _class_names(root: Path, files: list[Path], skip_broken: bool) -> list[str]:
    listed = root / "labels.txt"
    if listed.is_file():
        lines = (line.strip() for line in listed.read_text("utf-8").splitlines())
        names = [line for line in lines if line and line not in NO_CLASSES]
    else:
        found: set[str] = set()
        for file in files:
            try:
                found |= {str(shape.get("label")) for shape in _shapes(load_coco(file), file)}
            except ValueError:
                if not skip_broken:
                    raise
        names = sorted(found - set(NO_CLASSES))
    if not names:
        raise ValueError(f"{root}: expected labels in labelme's files, or in labels.txt, got none")
    return list(dict.fromkeys(names))


def _shapes(content: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    shapes = content.get("shapes")
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise ValueError(f"{file}: shapes: expected a list of objects; is it a file of labelme?")
    return shapes


def _objects(content: dict[str, Any], file: Path, size: tuple[int, int], left_out: LeftOut) -> list[tuple[str, Any]]:
    """Label and outline, polygons or a run-length encoding, of each object."""
    polygons: dict[tuple[str, Any], list[list[float]]] = {}
    objects: list[tuple[str, Any]] = []
    for index, shape in enumerate(_shapes(content, file)):
        label, kind = str(shape.get("label")), shape.get("shape_type") or "polygon"
        where = f"{file}: shapes[{index}]"
        if label in NO_CLASSES:
            left_out.add(f"the label {label}", file.name)
            continue
        points = _points(shape, where)
        if kind == "mask":
            objects.append((label, _mask_outline(shape, points, size, where)))
            continue
        if kind == "polygon":
            outline = [value for point in points for value in point]
        elif kind == "rectangle" and len(points) == 2:
            (x0, y0), (x1, y1) = points
            outline = [x0, y0, x1, y0, x1, y1, x0, y1]
        elif kind == "circle" and len(points) == 2:
            (x, y), radius = points[0], math.dist(*points)
            turns = [2 * math.pi * corner / _CIRCLE_CORNERS for corner in range(_CIRCLE_CORNERS)]
            outline = [value for turn in turns for value in (x + radius * math.cos(turn), y + radius * math.sin(turn))]
        else:
            left_out.add(f"the shape {kind!r}", file.name)
            continue
        group = shape.get("group_id")
        polygons.setdefault((label, index if group is None else f"group {group}"), []).append(outline)
    return [(label, parts) for (label, _), parts in polygons.items()] + objects


def _points(shape: dict[str, Any], where: str) -> list[tuple[float, float]]:
    points = shape.get("points")
    try:
        return [(float(x), float(y)) for x, y in points]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise ValueError(f"{where}: points: expected a list of [x, y], got {str(points)[:80]}") from None


def _mask_outline(
    shape: dict[str, Any], points: list[tuple[float, float]], size: tuple[int, int], where: str
) -> dict[str, Any]:
    """Run-length encoding of a mask that is stored as a PNG at its box."""
    try:
        content = base64.b64decode(str(shape.get("mask")), validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS} pixels")
            mask = np.asarray(image.convert("L")) > 0
    except (binascii.Error, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: mask: expected a PNG in base64: {error}") from error
    (left, top), height, width = points[0] if points else (0.0, 0.0), *size
    y, x = round(top), round(left)
    fits = height * width <= MAX_PIXELS and 0 <= y <= height - mask.shape[0] and 0 <= x <= width - mask.shape[1]
    if not fits:
        raise ValueError(f"{where}: mask: expected one inside the image of {height} x {width}, got "
                         f"{mask.shape[0]} x {mask.shape[1]} at {y}, {x}")
    whole = np.zeros((height, width), np.uint8, order="F")
    whole[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    rle = coco_tools().mask.encode(whole)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
