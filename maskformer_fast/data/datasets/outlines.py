"""Outlines of objects in COCO files: polygons and run-length encodings, their checks and their masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.data.datasets.coco_json import as_integer

_COORDINATE_LIMIT = 1e9  # pixels; coordinates beyond it, NaN and infinities are errors
_LENGTH_LIMIT = 1 << 22  # pixels along the polygons of one object; the rasteriser takes about 100 bytes for each
_SHORT_COUNTS = 24  # characters of a compressed encoding that is decoded when a file is opened; empty masks need fewer

_NUMBER_LENGTH = 40  # characters of a number that is written as a text
_LEVELS = 4  # of lists in an outline: polygons of contours of points, of one list more

NO_OUTLINE = "no outline (only a box?)"
FEW_POINTS = "an outline of fewer than three points"
OUTSIDE = "an outline outside of the image"
RELATIVE = "an outline with coordinates between 0 and 1 (relative to the image? pixels are expected)"
NO_PIXEL = "an outline without a pixel"

Outline = list[list[float]] | dict[str, Any]
"""Polygons [[x0, y0, x1, y1, ...], ...] in pixels, or a run-length encoding."""


def normalise_outline(outline: object) -> Outline:
    """Bring the forms in which tools write an outline into one.

    A flat list of numbers is one polygon, and so is a list of points [x, y] or [x, y, visibility]; lists of one list in
    the place of that list make no difference, and neither do numbers that are written as texts. A missing outline
    becomes an empty list.

    Raises:
        ValueError: it is neither polygons nor a run-length encoding.
    """
    if outline is None:
        return []
    outline = _plain(outline)
    if isinstance(outline, list) and len(outline) == 1 and isinstance(outline[0], dict):
        outline = outline[0]
    if isinstance(outline, dict):
        return outline
    if not isinstance(outline, list):
        raise ValueError("polygons or a run-length encoding")
    if _is_point_list(outline) or (outline and all(map(_is_number, outline))):
        outline = [outline]
    if not all(isinstance(part, list) for part in outline):
        raise ValueError("a list of polygons, each a list of numbers")
    return [[value for point in part for value in point[:2]] if _is_point_list(part) else part for part in outline]


def _plain(value: object, levels: int = _LEVELS) -> Any:
    """Put numbers in the place of their texts, and a list in the place of a list that has nothing else."""
    if isinstance(value, str) and len(value) <= _NUMBER_LENGTH:
        try:
            return float(value)
        except ValueError:
            return value
    if not isinstance(value, list) or levels == 0 or set(map(type, value)) <= {int, float}:
        return value
    parts = [_plain(part, levels - 1) for part in value]
    if len(parts) == 1 and isinstance(parts[0], list):
        one_polygon = levels == _LEVELS and not any(isinstance(part, list) for part in parts[0])
        return parts if one_polygon else parts[0]
    return parts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _is_point_list(part: list[Any]) -> bool:
    if len(part) < 3 or not all(isinstance(point, list) and all(map(_is_number, point)) for point in part):
        return False
    return {len(point) for point in part} in ({2}, {3})  # three numbers are no polygon either


def usable_polygons(outline: Outline) -> Outline:
    """Leave out polygons of fewer than three points; a run-length encoding stays as it is."""
    if isinstance(outline, dict):
        return outline
    return [part for part in outline if len(part) >= 6 or not all(map(_is_number, part))]  # `rasterize` refuses others


def is_relative(outline: Outline) -> bool:
    """Tell whether all coordinates of polygons are between 0 and 1."""
    if isinstance(outline, dict) or not outline:
        return False
    return all(_is_number(value) and 0 <= value <= 1 for part in outline for value in part)


def problem_of(
    outline: Outline,  # as `normalise_outline` gives it
    height: int | None,
    width: int | None,
) -> str | None:
    """Say why an outline has no pixel, as far as this is quick to see; None if it seems to have some.

    Only outlines of less than two pixels are rasterised for it. Malformed outlines have no problem here: `rasterize`
    names theirs.
    """
    if not outline:
        return NO_OUTLINE
    polygons = usable_polygons(outline)
    if not polygons:
        return FEW_POINTS
    if height is None or width is None:
        return None
    if isinstance(polygons, dict):
        return NO_PIXEL if _has_no_pixel(polygons, height, width) else None
    if not all(_is_number(value) for part in polygons for value in part):
        return None
    xs, ys = ([value for part in polygons for value in part[axis::2]] for axis in (0, 1))
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    if right <= 0 or left >= width or bottom <= 0 or top >= height:
        return OUTSIDE
    if min(right, width) - max(left, 0) < 2 or min(bottom, height) - max(top, 0) < 2:
        try:
            empty = not rasterize(polygons, height, width).any()
        except ValueError:
            return None
        if empty:
            return RELATIVE if is_relative(polygons) else NO_PIXEL
    return None


def _has_no_pixel(rle: dict[str, Any], height: int, width: int) -> bool:
    counts = rle.get("counts")
    if isinstance(counts, str) and len(counts) > _SHORT_COUNTS:
        return False
    try:
        return not any(_checked_runs(rle, height, width)[1::2])
    except ValueError:
        return False


def rasterize(outline: Outline, height: int, width: int) -> np.ndarray:
    """Rasterise polygons [[x0, y0, x1, y1, ...], ...] in pixels, or a run-length encoding -> bool [height, width].

    Raises:
        ValueError: the outline is malformed, of another size, more than one image width or height outside the image, or
            so long that its pixels would take hundreds of megabytes.
    """
    if isinstance(outline, dict):
        runs = _checked_runs(outline, height, width)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    tools = coco_tools().mask
    polygons = [_checked_polygon(part, height, width) for part in outline]
    if (length := sum(map(_length, polygons))) > _LENGTH_LIMIT:
        raise ValueError(f"segmentation: expected polygons of at most {_LENGTH_LIMIT} pixels length, got {length:.0f}")
    return tools.decode(tools.merge(tools.frPyObjects(polygons, height, width))).view(np.bool_)


def _checked_polygon(part: list[float], height: int, width: int) -> list[float]:
    if len(part) % 2 or not all(isinstance(value, int | float) and abs(value) < _COORDINATE_LIMIT for value in part):
        raise ValueError(f"segmentation: expected pairs of finite numbers, got {str(part)[:80]}")
    # The rasteriser stores every step along the outline: one huge coordinate would take all memory.
    for values, size in ((part[0::2], width), (part[1::2], height)):
        if min(values) < -size or max(values) > 2 * size:
            raise ValueError(
                f"segmentation: expected coordinates near 0..{size}, got {min(values):g}..{max(values):g}"
            )
    return part


def _length(polygon: list[float]) -> float:
    """Measure a closed polygon along the longer axis of each edge, in pixels: the steps that the rasteriser stores."""
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum())


def _checked_runs(rle: dict[str, Any], height: int, width: int) -> list[int]:
    """Read the lengths of alternating runs of 0 and 1, in column-major order."""
    counts, size = rle.get("counts"), rle.get("size")
    if not isinstance(size, list) or [as_integer(side) for side in size] != [height, width]:
        raise ValueError(f"segmentation: size: expected [{height}, {width}], got {size!r}")
    if isinstance(counts, str):
        runs = _decode_counts(counts)
    else:
        given = [as_integer(run) for run in counts] if isinstance(counts, list) else [None]
        runs = [run for run in given if run is not None]
        if len(runs) != len(given):
            raise ValueError(f"segmentation: counts: expected a text or integers, got {str(counts)[:80]}")
    if min(runs, default=0) < 0:
        raise ValueError(f"segmentation: counts: expected runs of 0 pixels and more, got one of {min(runs)}")
    if sum(runs) != height * width:
        raise ValueError(
            f"segmentation: counts: expected runs that add up to {height * width} pixels, got {sum(runs)}"
        )
    return runs


def _decode_counts(text: str) -> list[int]:
    """Decode COCO's compressed run lengths: 5 bits in each character, differences to the run before the last."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"segmentation: counts: expected characters of COCO's encoding, got {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << 1 << shift - 5  # sign of the last group
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("segmentation: counts: expected a complete encoding, got one that ends within a number")
    return runs
