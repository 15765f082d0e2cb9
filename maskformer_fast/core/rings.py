"""Rings of polygons: without repeated corners, joined to one, or with fewer corners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskformer_fast.core.exchange import Polygon


def simple_polygon(polygon: Polygon) -> Polygon:
    """The same pixels in rings that pass no corner twice, as OGC's simple features and GeoJSON demand.

    Where pixels touch at a corner, an outline of `exchange.polygons_of` passes it twice; the loop between is then a
    hole of its own. Holes may touch other rings at corners.
    """
    exterior, *pockets = _loops(polygon.exterior)
    return Polygon(exterior, [*pockets, *(loop for hole in polygon.holes for loop in _loops(hole))])


def _loops(ring: np.ndarray) -> list[np.ndarray]:
    """Cut a ring at each corner that it passes twice -> the loop with its first corner, and the others."""
    corners = [tuple(corner) for corner in ring.tolist()]
    if len(set(corners)) == len(corners):
        return [ring]
    loops: list[np.ndarray] = []
    way: list[tuple[int, ...]] = []
    place: dict[tuple[int, ...], int] = {}
    for corner in corners:
        if corner in place:
            start = place[corner]
            loops.append(np.array(way[start:], ring.dtype))
            for passed in way[start + 1 :]:
                del place[passed]
            del way[start + 1 :]
        else:
            place[corner] = len(way)
            way.append(corner)
    return [np.array(way, ring.dtype), *loops]


def joined_ring(polygons: Sequence[Polygon]) -> np.ndarray:
    """One ring [N, 2] with the pixels of all polygons and their holes, for formats that have a single ring.

    Bridges without width join the rings: a horizontal and a vertical line, there and back. A rasteriser that counts
    crossings (even-odd) fills the same pixels; one that also draws the ring as a line draws the bridges, too.
    """
    rings = [np.asarray(ring) for polygon in polygons for ring in (polygon.exterior, *polygon.holes)]
    joined = rings[0]
    for ring in rings[1:]:
        start = ring[0]
        at = int(np.abs(joined - start).sum(1).argmin())
        bend = np.array([start[0], joined[at, 1]], joined.dtype)
        joined = np.concatenate([joined[: at + 1], [bend], ring, [start, bend], joined[at:]])
    return joined


def simplified(polygon: Polygon, tolerance: float) -> Polygon:
    """The polygon with fewer corners, at most ``tolerance`` pixels from those left out (Douglas and Peucker, 1973).

    Holes of fewer than three corners vanish; an exterior that would have fewer keeps all of its corners.
    """
    exterior = _simplified_ring(polygon.exterior, tolerance)
    holes = [_simplified_ring(hole, tolerance) for hole in polygon.holes]
    return Polygon(exterior if len(exterior) > 2 else polygon.exterior, [hole for hole in holes if len(hole) > 2])


def _simplified_ring(ring: np.ndarray, tolerance: float) -> np.ndarray:
    points = np.concatenate([ring, ring[:1]]).astype(np.float64)
    farthest = int(np.square(points - points[0]).sum(1).argmax())
    kept = {0, farthest}
    parts = [(0, farthest), (farthest, len(points) - 1)]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        distance = _distances(points[first + 1 : last], points[first], points[last])
        if (worst := int(distance.argmax())) >= 0 and distance[worst] > tolerance:
            middle = first + 1 + worst
            kept.add(middle)
            parts += [(first, middle), (middle, last)]
    return ring[sorted(kept)]


def _distances(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of each point from the line between two others."""
    along = end - start
    length = float(np.hypot(*along))
    offset = points - start
    if length == 0:
        return np.hypot(offset[:, 0], offset[:, 1])
    share = np.clip(offset @ along / length**2, 0, 1)
    away = offset - share[:, None] * along
    return np.hypot(away[:, 0], away[:, 1])
