"""Instances to and from supervision's detections, COCO's annotations and polygons, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.checks import check
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.extension import load_extension

MAP_DTYPES = ("uint8", "int16", "int32", "int64", "float32")
"""Types of maps whose run lengths are encoded in one pass."""
MAP_VALUES = 1 << 20
"""Values of such a map are within that many of one another."""
BAND_PIXELS = 1 << 18
"""Pixels of masks that are compared with a map at a time."""


class Polygon(NamedTuple):
    """Outline of one connected part of a mask, along the edges of its pixels, and its holes.

    A ring is [N, 2] int64: x, y of the corners, the last of which is joined to the first.
    """

    exterior: np.ndarray
    holes: list[np.ndarray]


class InstanceArrays(NamedTuple):
    """Arrays of instances, as `InstanceResult` has them."""

    labels: np.ndarray  # [N] int64
    scores: np.ndarray  # [N] float32
    masks: np.ndarray  # [N, H, ceil(W/8)] uint8, packed
    boxes: np.ndarray  # [N, 4] float32


class MapColumns(NamedTuple):
    """Instances of a map."""

    labels: np.ndarray  # [N]
    scores: np.ndarray  # [N]
    values: np.ndarray  # [N] int64, the pixels' value
    value_map: np.ndarray  # [H, W]


def as_array(
    value: Any,  # torch.Tensor or numpy.ndarray
) -> np.ndarray:
    """Copy a tensor to the host where it is not there, and view it as an array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def pack(
    masks: np.ndarray,  # [N, H, W] bool
) -> np.ndarray:
    """Pack masks 8 pixels to a byte, least significant bit first -> [N, H, ceil(W/8)] uint8."""
    return np.packbits(masks, axis=-1, bitorder="little")


def unpack(
    packed: np.ndarray,  # [..., ceil(W/8)] uint8
    width: int,
) -> np.ndarray:
    """Inverse of `pack` -> [..., width] bool."""
    return np.unpackbits(packed, axis=-1, count=width, bitorder="little").view(np.bool_)


def boxes_of(
    packed: np.ndarray,  # [N, H, ceil(W/8)] uint8
    width: int,
) -> np.ndarray:
    """Boxes x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask -> [N, 4] float32."""
    boxes = np.zeros((len(packed), 4), np.float32)
    across = unpack(np.bitwise_or.reduce(packed, axis=1), width)
    down = np.asarray(packed.any(2))
    for start, lines in ((0, across), (1, down)):
        if lines.shape[1] > 0:
            boxes[:, start] = lines.argmax(1)
            boxes[:, start + 2] = lines.shape[1] - lines[:, ::-1].argmax(1)
    boxes[~down.any(1)] = 0
    return boxes


def instances_of_masks(
    labels: Any,
    scores: Any,
    masks: np.ndarray,  # [N, H, W] bool
) -> InstanceArrays:
    """Arrays of masks with a class and a score each."""
    return _instances(labels, scores, pack(masks), masks.shape[2])


def instances_of_map(columns: MapColumns) -> InstanceArrays:
    """Arrays of the masks where a map has each value, with a class and a score each."""
    value_map = columns.value_map
    values = columns.values.astype(value_map.dtype)
    height, width = value_map.shape
    packed = np.empty((len(values), height, (width + 7) // 8), np.uint8)
    rows = max(1, BAND_PIXELS // (width * len(values))) if packed.size else height + 1
    for start in range(0, height, rows):
        part = slice(start, start + rows)
        packed[:, part] = pack(np.equal(value_map[part], values[:, None, None]))
    return _instances(columns.labels, columns.scores, packed, width)


def _instances(labels: Any, scores: Any, packed: np.ndarray, width: int) -> InstanceArrays:
    return InstanceArrays(
        np.asarray(labels, np.int64).reshape(-1),
        np.asarray(scores, np.float32).reshape(-1),
        packed,
        boxes_of(packed, width),
    )


def to_supervision(instances: InstanceArrays, size: tuple[int, int]) -> Any:
    """``supervision.Detections`` with boxes, boolean masks, confidence and class_id.

    Raises:
        ModuleNotFoundError: supervision is not installed.
    """
    from supervision import Detections

    labels, scores, masks, boxes = instances
    return Detections(xyxy=boxes, mask=unpack(masks, size[1]), confidence=scores, class_id=labels)


def from_supervision(detections: Any) -> InstanceArrays:
    """Instances of ``supervision.Detections`` with masks; without classes they are of class 0, without confidence 1."""
    check(detections.mask is not None, "detections.mask", "masks [N, H, W]", None)
    masks = np.asarray(detections.mask, bool)
    labels = np.zeros(len(masks)) if detections.class_id is None else detections.class_id
    scores = np.ones(len(masks)) if detections.confidence is None else detections.confidence
    return instances_of_masks(labels, scores, masks)


def _run_lengths(
    packed: np.ndarray,  # [N, H, ceil(W/8)] uint8
    size: tuple[int, int],
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Compressed COCO run lengths of packed masks, {"size": [H, W], "counts": text} each, and areas [N] int64."""
    packed, areas = np.ascontiguousarray(packed), np.zeros(len(packed), np.int64)
    counts: list[bytes] = []
    if len(packed):
        counts = load_extension().encode_packed_masks(
            address_of(packed, "masks", "uint8", (len(packed), size[0], (size[1] + 7) // 8)), (len(packed), *size), 1,
            address_of(areas, "areas", "int64", areas.shape),
        )  # fmt: skip
    return [{"size": [*size], "counts": runs.decode("ascii")} for runs in counts], areas


def to_coco(
    instances: InstanceArrays,
    size: tuple[int, int],
    image_id: int | str,
    category_ids: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """Annotations of COCO's format: run lengths, box as x, y, width, height, area, score, category."""
    runs, areas = _run_lengths(instances.masks, size)
    return _annotations((instances.labels, instances.scores, instances.boxes, areas), runs, image_id, category_ids)


def map_to_coco(
    columns: MapColumns,
    image_id: int | str,
    category_ids: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """`to_coco` of the masks where a map has each value, which are encoded in one pass over the map, in C++."""
    labels, scores, values, value_map = columns
    kind = value_map.dtype.name
    if kind not in MAP_DTYPES or value_map.size == 0 or len(values) == 0 or np.ptp(values) >= MAP_VALUES:
        return to_coco(instances_of_map(columns), value_map.shape, image_id, category_ids)
    value_map = np.ascontiguousarray(value_map)
    different, places = np.unique(values, return_inverse=True)
    areas, boxes = np.zeros(len(different), np.int64), np.zeros((len(different), 4), np.int64)
    counts = load_extension().encode_map(
        kind, address_of(value_map, "map", kind, value_map.shape), value_map.shape, different.tolist(),
        address_of(areas, "areas", "int64", areas.shape), address_of(boxes, "boxes", "int64", boxes.shape),
    )  # fmt: skip
    runs = [{"size": [*value_map.shape], "counts": counts[place].decode("ascii")} for place in places.tolist()]
    found = (labels.astype(np.int64), scores.astype(np.float32), boxes[places].astype(np.float32), areas[places])
    return _annotations(found, runs, image_id, category_ids)


def _annotations(
    columns: tuple[np.ndarray, ...],  # labels, scores, boxes and areas of N instances
    runs: list[dict[str, Any]],
    image_id: int | str,
    category_ids: Sequence[int] | None,
) -> list[dict[str, Any]]:
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        {
            "image_id": image_id, "category_id": label if category_ids is None else category_ids[label],
            "segmentation": rle, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "iscrowd": 0, "score": score,
        }
        for (label, score, (x0, y0, x1, y1), area), rle in zip(rows, runs, strict=True)
    ]  # fmt: skip


def from_coco(
    annotations: Sequence[dict[str, Any]],
    size: tuple[int, int],
    category_ids: Sequence[int] | None,
) -> InstanceArrays:
    """Instances of COCO's annotations, whose segmentations are run lengths or polygons; without a score it is 1."""
    places = None if category_ids is None else {category: index for index, category in enumerate(category_ids)}
    tools, masks = coco_tools().mask, np.zeros((len(annotations), *size), np.bool_)
    for mask, annotation in zip(masks, annotations, strict=True):
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            segmentation = tools.merge(tools.frPyObjects(segmentation, *size))
        elif isinstance(segmentation["counts"], list):
            segmentation = tools.frPyObjects(segmentation, *size)
        mask[:] = tools.decode(segmentation)
    labels = [a["category_id"] if places is None else places[a["category_id"]] for a in annotations]
    return instances_of_masks(labels, [a.get("score", 1.0) for a in annotations], masks)


def polygons_of(
    mask: np.ndarray,  # [H, W] bool
) -> list[Polygon]:
    """Outlines of a mask's parts with their holes. Pixels that touch at a corner only are apart."""
    rings = _rings(mask)
    exteriors = [Polygon(ring, []) for ring in rings if mask[ring[0, 1], ring[0, 0]]]
    areas = [abs(_signed_area(polygon.exterior)) for polygon in exteriors]
    for ring in rings:
        x, y = ring[0]
        if mask[y, x]:
            continue
        # The pixel above a hole's upper left corner is of the part that has the hole: its smallest outline around.
        around = [i for i, polygon in enumerate(exteriors) if _contains(polygon.exterior, x + 0.5, y - 0.5)]
        exteriors[min(around, key=areas.__getitem__)].holes.append(ring)
    return exteriors


def _rings(mask: np.ndarray) -> list[np.ndarray]:
    """All outlines, each from its upper left corner."""
    padded = np.pad(mask, 1)
    corners = [padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]]  # pixels around a vertex
    count = sum(corner.astype(np.int8) for corner in corners)
    crossing = (count == 2) & (corners[0] == corners[3])
    y, x = ((count == 1) | (count == 3) | crossing).nonzero()
    twice = crossing[y, x]
    up_left, up_right, down_left = (corner[y, x] for corner in corners[:3])
    # which edges meet at the corner: to the left or right of it, and above or below
    left = twice | (up_left != down_left)
    up = np.where(twice, up_left, up_left != up_right)
    second = twice.nonzero()[0]
    y, x = np.concatenate([y, y[second]]), np.concatenate([x, x[second]])
    left = np.concatenate([left, np.zeros(len(second), bool)])
    up = np.concatenate([up, ~up[second]])
    across, down = np.lexsort((~left, x, y)), np.lexsort((~up, y, x))
    across_to, down_to = np.empty(len(y), np.int64), np.empty(len(y), np.int64)
    for order, partner in ((across, across_to), (down, down_to)):
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    across_list, down_list = across_to.tolist(), down_to.tolist()
    seen = np.zeros(len(y), bool).tolist()
    rings = []
    for start in across.tolist():  # by rows, then columns: the first corner of a ring is its upper left
        if seen[start]:
            continue
        ring, at = [], start
        while not seen[at]:
            to = across_list[at]
            seen[at] = seen[to] = True
            ring += [at, to]
            at = down_list[to]
        rings.append(np.stack([x[ring], y[ring]], 1))
    return rings


def _signed_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def _contains(ring: np.ndarray, x: float, y: float) -> bool:
    """Whether a point that is on no edge lies inside a ring of horizontal and vertical edges."""
    to = np.roll(ring, -1, 0)
    crossed = (ring[:, 0] == to[:, 0]) & (ring[:, 0] < x) & ((ring[:, 1] < y) != (to[:, 1] < y))
    return bool(crossed.sum() % 2)


def mask_of_polygons(
    polygons: Sequence[Polygon],
    size: tuple[int, int],
) -> np.ndarray:
    """Pixels whose centre is inside an odd number of the rings -> [H, W] bool; the inverse of `polygons_of`."""
    height, width = size
    flips = np.zeros((height, width + 1), np.int32)
    for polygon in polygons:
        for ring in (polygon.exterior, *polygon.holes):
            corners = np.asarray(ring, np.float64)
            for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
                first, last = (int(np.clip(np.ceil(v - 0.5), 0, height)) for v in sorted((y0, y1)))
                if first == last:
                    continue
                rows = np.arange(first, last)
                x = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
                flips[rows, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)] ^= 1
    return (flips.cumsum(1)[:, :width] & 1).astype(np.bool_)
