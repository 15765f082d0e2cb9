"""Label files of many images, for labelling tools and for training: COCO, YOLO, labelme and GeoJSON.

Each format has a folder, which is a data set of its own with copies of the images (GeoJSON has none)::

    coco/annotations/instances_{split}.json    coco/{split}/NAME.jpg
    yolo/data.yaml  yolo/labels/{split}/NAME.txt    yolo/images/{split}/NAME.jpg
    labelme/labels.txt  labelme/{split}/NAME.json    labelme/{split}/NAME.jpg
    geojson/{split}/NAME.geojson
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import yaml

from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.exchange import Polygon
from maskformer_fast.core.files import atomic_write, write_json
from maskformer_fast.core.image_files import result_names
from maskformer_fast.core.label_formats import (
    LabelledObject,
    coco_polygons,
    geojson_document,
    labelme_document,
    with_fewer_corners,
    yolo_lines,
)
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.output.formats import coco_categories

LabelFormat = Literal["coco", "yolo", "labelme", "geojson"]
LabelEntries = Mapping[str, Sequence[dict[str, Any]]]
"""COCO's "images" and "annotations" of an image, without the annotations' ids."""
LABEL_FORMATS: tuple[LabelFormat, ...] = get_args(LabelFormat)


class LabelWriter:
    """Writes label files of one split below a folder; `close` writes those that all images share.

    Args:
        folder: where the folders of the formats are made.
        metadata: the classes.
        formats: one or several of `LABEL_FORMATS`.
        names: names or relative paths of all images; `image_files.result_names` makes NAME.
        images: files of the images, which are copied; `write` may name them instead.
        split: name of the split.
        min_score: leave objects out that have a lower score.
        tolerance: leave corners out that are so near to the outline without them, in pixels; 0 leaves out none.
        georeference: coordinate reference system and transform of an image file; None where it has none. GeoJSON has
            the map's coordinates then, else pixels.

    Raises:
        ValueError: an unknown format, a score or tolerance that cannot be, or classes whose names are equal but for
            spaces and line breaks.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Metadata,
        formats: Sequence[LabelFormat],
        names: Sequence[str],
        images: Sequence[Path] = (),
        split: str = "train",
        min_score: float = 0.5,
        tolerance: float = 0.0,
        georeference: Callable[[Path], Mapping[str, Any] | None] = lambda path: None,
    ) -> None:
        for name in formats:
            check_choice("labels", name, LABEL_FORMATS)
        check(0 <= min_score <= 1, "min_score", "0 to 1", min_score)
        check(0 <= tolerance < float("inf"), "tolerance", "a distance of at least 0 pixels", tolerance)
        self.class_names = [" ".join(name.split()) for name in metadata.class_names]  # one line of labels.txt each
        check(len(set(self.class_names)) == len(self.class_names), "labels", "distinct names of classes",
              self.class_names)
        self.folder, self.metadata, self.formats, self.split = folder, metadata, tuple(formats), split
        self.min_score, self.tolerance = min_score, tolerance
        self._images, self._names, self._georeference = images, result_names(names), georeference

    def write(
        self, number: int, image_id: int | str, size: tuple[int, int], objects: Sequence[LabelledObject],
        image: Path | None = None,
    ) -> LabelEntries:
        """Write the files of one image -> its entries for `close`.

        Args:
            number: index of the image in the list of names.
            image_id: its id in COCO's file.
            size: height, width.
            objects: the objects; those of too low a score are left out.
            image: its file, if it is not the one of the list.

        Raises:
            OSError: a file cannot be read or written.
        """
        kept = [one for one in objects if one.polygons and one.score >= self.min_score]
        kept = with_fewer_corners(kept, self.tolerance)
        source, name = image or self._images[number], self._names[number]
        file_name = f"{name}{source.suffix.lower()}"
        if "coco" in self.formats:
            _copy(source, self.folder / "coco" / self.split / file_name)
        if "yolo" in self.formats:
            _copy(source, self.folder / "yolo" / "images" / self.split / file_name)
            target = self.folder / "yolo" / "labels" / self.split / f"{name}.txt"
            _write_text(target, "".join(f"{line}\n" for line in yolo_lines(kept, size)))
        if "labelme" in self.formats:
            target = self.folder / "labelme" / self.split / f"{name}.json"
            _copy(source, target.with_name(Path(file_name).name))
            write_json(target, labelme_document(kept, self.class_names, Path(file_name).name, size), indent=None)
        if "geojson" in self.formats:
            found = self._georeference(source)
            transform = tuple(found["transform"])[:6] if found else None
            document = geojson_document(kept, self.class_names, transform, _crs_name(found["crs"]) if found else None)
            write_json(self.folder / "geojson" / self.split / f"{name}.geojson", document, indent=None)
        if "coco" not in self.formats:
            return {"images": [], "annotations": []}
        entry = {"id": image_id, "file_name": file_name, "height": size[0], "width": size[1]}
        return {"images": [entry], "annotations": [self._annotation(image_id, one) for one in kept]}

    def _annotation(self, image_id: int | str, one: LabelledObject) -> dict[str, Any]:
        x0, y0, x1, y1 = box_of(one.polygons)
        return {"image_id": image_id, "category_id": self.metadata.category_ids[one.label],
                "segmentation": coco_polygons(one.polygons), "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": area_of(one.polygons), "iscrowd": 0, "score": one.score}  # fmt: skip

    def close(self, entries: Callable[[], Iterable[LabelEntries]]) -> None:
        """Write COCO's file with the entries of all images, and the lists of classes.

        Args:
            entries: returns what `write` gave, image by image; called twice, so that they need not be in memory.

        Raises:
            OSError: a file cannot be written.
        """
        if "coco" in self.formats:
            annotations = ({"id": number, **entry} for number, entry in enumerate(
                (entry for one in entries() for entry in one["annotations"]), 1))  # fmt: skip
            with atomic_write(self.folder / "coco" / "annotations" / f"instances_{self.split}.json") as file:
                file.write(b'{"images": [')
                _write_elements(file, (entry for one in entries() for entry in one["images"]))
                file.write(b'], "annotations": [')
                _write_elements(file, annotations)
                file.write(b'], "categories": ' + json.dumps(coco_categories(self.metadata)).encode() + b"}\n")
        if "labelme" in self.formats:
            _write_text(self.folder / "labelme" / "labels.txt", "".join(f"{name}\n" for name in self.class_names))
        if "yolo" in self.formats:
            self._write_description()

    def _write_description(self) -> None:
        """Write ``data.yaml``; ultralytics wants both splits, so that a single one serves as the other, too."""
        images = self.folder / "yolo" / "images"
        parts = [name for name in ("train", "val") if (images / name).is_dir()] or [self.split]
        content = {"names": dict(enumerate(self.class_names)), "path": ".", "train": f"images/{parts[0]}",
                   "val": f"images/{parts[-1]}"}  # fmt: skip
        _write_text(self.folder / "yolo" / "data.yaml", yaml.safe_dump(content, allow_unicode=True, sort_keys=False))


def box_of(polygons: Sequence[Polygon]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom edge of polygons, in pixels."""
    corners = np.concatenate([polygon.exterior for polygon in polygons])
    (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
    return float(x0), float(y0), float(x1), float(y1)


def area_of(polygons: Sequence[Polygon]) -> float:
    """Area of polygons without their holes, in pixels."""
    return float(sum(
        sign * abs(float(ring[:, 0] @ np.roll(ring[:, 1], -1) - ring[:, 1] @ np.roll(ring[:, 0], -1))) / 2
        for polygon in polygons for sign, ring in ((1, polygon.exterior), *((-1, hole) for hole in polygon.holes))
    ))  # fmt: skip


def _crs_name(crs: Any) -> str | None:
    """Name of rasterio's coordinate reference system as GDAL writes it into GeoJSON; its text where it has no code."""
    if not crs:
        return None
    code = crs.to_epsg()
    return f"urn:ogc:def:crs:EPSG::{code}" if code else str(crs.to_wkt())


def _write_elements(file: IO[bytes], elements: Iterable[object]) -> None:
    """Write the elements of a JSON list."""
    for number, element in enumerate(elements):
        file.write((b", " if number else b"") + json.dumps(element, allow_nan=False).encode())


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as original, atomic_write(target) as copy:
        shutil.copyfileobj(original, copy)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))

