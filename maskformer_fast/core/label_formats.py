"""Labels of one image in the formats of labelling tools: COCO's polygons, YOLO's lines, labelme's JSON, GeoJSON.

Coordinates are those of pixels' edges: the first pixel reaches from 0 to 1. Formats without holes get them joined to
the outline by bridges without width, see `rings.joined_ring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from maskformer_fast.core.checks import check
from maskformer_fast.core.exchange import (
    InstanceArrays,
    MapColumns,
    Polygon,
    boxes_of,
    map_to_coco,
    polygons_of,
    unpack,
)
from maskformer_fast.core.rings import joined_ring, simple_polygon, simplified

Transform = tuple[float, float, float, float, float, float]
"""a, b, c, d, e, f: x and y of a map are a x + b y + c and d x + e y + f of a picture."""
_LABELME_VERSION = "5.5.0"
"""Version of labelme whose format is written."""


class LabelledObject(NamedTuple):
    """An object of an image, with its class and its parts."""

    label: int
    score: float
    polygons: list[Polygon]


def objects_of_arrays(arrays: InstanceArrays, size: tuple[int, int]) -> list[LabelledObject]:
    """Objects with the outlines of packed masks, in their order."""
    objects = []
    boxes = boxes_of(arrays.masks, size[1]).astype(np.int64).tolist()
    columns = zip(arrays.labels.tolist(), arrays.scores.tolist(), arrays.masks, boxes, strict=True)
    for label, score, packed, (x0, y0, x1, y1) in columns:
        mask = unpack(packed[y0:y1], size[1])[:, x0:x1]
        objects.append(LabelledObject(label, score, outlines_at(mask, (y0, x0))))
    return objects


def objects_of_map(columns: MapColumns) -> list[LabelledObject]:
    """Objects with the outlines of a map's values, in their order; no mask of the map's size is made."""
    objects = []
    for entry, value in zip(map_to_coco(columns, 0, None), columns.values.tolist(), strict=True):
        x, y, width, height = map(int, entry["bbox"])
        mask = np.asarray(columns.value_map[y : y + height, x : x + width] == value)
        objects.append(LabelledObject(entry["category_id"], entry["score"], outlines_at(mask, (y, x))))
    return objects


def outlines_at(
    mask: np.ndarray,  # [h, w] bool
    corner: tuple[int, int],
) -> list[Polygon]:
    """Outlines of a mask whose first pixel is at the row and column ``corner`` of its image."""
    if mask.size == 0:
        return []
    shift = np.array([corner[1], corner[0]])
    return [Polygon(polygon.exterior + shift, [hole + shift for hole in polygon.holes])
            for polygon in polygons_of(mask)]  # fmt: skip


def with_fewer_corners(objects: Sequence[LabelledObject], tolerance: float) -> list[LabelledObject]:
    """Objects whose outlines are at most ``tolerance`` pixels from the corners left out; 0 keeps all corners."""
    check(0 <= tolerance < float("inf"), "tolerance", "a distance of at least 0 pixels", tolerance)
    if tolerance == 0:
        return list(objects)
    return [one._replace(polygons=[simplified(polygon, tolerance) for polygon in one.polygons]) for one in objects]


def coco_polygons(polygons: Sequence[Polygon]) -> list[list[float]]:
    """COCO's ``segmentation``: x0, y0, x1, y1, ... of each part, with its holes joined to it."""
    return [joined_ring([polygon]).ravel().tolist() for polygon in polygons]


def yolo_lines(objects: Sequence[LabelledObject], size: tuple[int, int]) -> list[str]:
    """YOLO's ``class x0 y0 x1 y1 ...``, relative to width and height: a line for each object that has pixels."""
    divisors = np.array([size[1], size[0]], np.float64)
    return [
        " ".join([str(one.label), *(_decimal(value) for value in (joined_ring(one.polygons) / divisors).ravel())])
        for one in objects if one.polygons
    ]  # fmt: skip


def _decimal(value: float) -> str:
    """Twelve decimals: within a ten-millionth of a pixel in images of up to 100,000 pixels."""
    return f"{value:.12f}".rstrip("0").rstrip(".") or "0"


def labelme_document(
    objects: Sequence[LabelledObject], class_names: Sequence[str], image_path: str, size: tuple[int, int]
) -> dict[str, Any]:
    """Content of labelme's JSON file: polygons; the parts of an object have a ``group_id`` in common."""
    shapes = []
    for number, one in enumerate(objects):
        group = number if len(one.polygons) > 1 else None
        shapes += [
            {"label": class_names[one.label], "points": joined_ring([polygon]).astype(float).tolist(),
             "group_id": group, "description": "", "shape_type": "polygon", "flags": {}, "mask": None}
            for polygon in one.polygons
        ]  # fmt: skip
    return {"version": _LABELME_VERSION, "flags": {}, "shapes": shapes, "imagePath": image_path, "imageData": None,
            "imageHeight": size[0], "imageWidth": size[1]}  # fmt: skip


def geojson_document(
    objects: Sequence[LabelledObject],
    class_names: Sequence[str],
    transform: Transform | None = None,
    crs: str | None = None,
) -> dict[str, Any]:
    """GeoJSON's FeatureCollection (RFC 7946): a polygon or multipolygon for each object that has pixels.

    Args:
        objects: the objects.
        class_names: names of their classes, the property ``class`` of a feature.
        transform: from pixels to a map; without it coordinates are pixels, x to the right and y down.
        crs: name of the map's coordinate reference system, such as ``urn:ogc:def:crs:EPSG::32633``, as GeoJSON had it
            before RFC 7946, which knows longitude and latitude only; GDAL reads and writes it.
    """
    features = []
    for one in objects:
        if not one.polygons:
            continue
        parts = [_geojson_rings(polygon, transform) for polygon in one.polygons]
        single = len(parts) == 1
        features.append({
            "type": "Feature",
            "properties": {"class": class_names[one.label], "class_id": one.label, "score": one.score},
            "geometry": {"type": "Polygon" if single else "MultiPolygon", "coordinates": parts[0] if single else parts},
        })
    document: dict[str, Any] = {"type": "FeatureCollection", "features": features}
    return document if crs is None else {"type": document["type"], "crs": {"type": "name", "properties": {"name": crs}},
                                         "features": features}  # fmt: skip


def _geojson_rings(polygon: Polygon, transform: Transform | None) -> list[list[list[float]]]:
    """Closed rings: the exterior counterclockwise, holes clockwise."""
    simple = simple_polygon(polygon)
    rings = []
    for number, ring in enumerate((simple.exterior, *simple.holes)):
        points = np.asarray(ring, np.float64)
        if transform is not None:
            a, b, c, d, e, f = transform
            points = np.stack([a * points[:, 0] + b * points[:, 1] + c, d * points[:, 0] + e * points[:, 1] + f], 1)
        x, y = (points - points[0]).T
        is_counterclockwise = float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) > 0
        points = points if is_counterclockwise == (number == 0) else points[::-1]
        rings.append([*points.tolist(), points[0].tolist()])
    return rings
