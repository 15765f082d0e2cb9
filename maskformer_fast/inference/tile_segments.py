"""Panoptic segments and instances of a picture from those of its tiles, each object once.

Two tiles see the pixels of their overlap both. There a segment of one and a segment of the other are the same object if
they are the same pixels for the most part: the intersection is half of the union or more. Objects through several tiles
are joined pair by pair. What is drawn at a pixel is decided by the tile whose middle is nearest, but things which a
tile cuts off give way to those that are whole in another. The order in which tiles were computed makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from maskformer_fast.core.exchange import unpack
from maskformer_fast.core.metadata import VOID, SegmentInfo
from maskformer_fast.inference.tile_grid import Box, TileGrid, groups_of

SAME_OBJECT = 0.5
"""Least intersection over union, in the overlap of two tiles, of two segments that are one object."""

Arrays = dict[str, np.ndarray]


class CroppedInstance(NamedTuple):
    """An instance of a large picture, with the mask of its box only."""

    label: int
    score: float
    box: Box
    mask: np.ndarray  # bool, of the box's size


def panoptic_arrays(
    id_map: np.ndarray,  # [h, w] int32
    segments: Sequence[SegmentInfo],
) -> Arrays:
    """What is kept of a tile's panoptic result: indices into the list of segments, and their columns."""
    ids = np.array([segment.id for segment in segments], np.int64)
    table = np.full(int(max(ids, default=0)) + 2, VOID, np.int32)
    table[ids] = np.arange(len(ids))
    return {
        "rows": table[np.where(id_map < 0, len(table) - 1, id_map)],
        "categories": np.array([segment.category for segment in segments], np.int64),
        "scores": np.array([segment.score for segment in segments], np.float64),
    }


def merge_panoptic(
    grid: TileGrid,
    tile: Callable[[int], Arrays],  # `panoptic_arrays` of a tile
    is_thing: Sequence[bool],
    id_map: np.ndarray,  # [H, W] int32, which is filled
) -> list[SegmentInfo]:
    """Draw the segments of all tiles into the id map -> the segments, whose ids count from 1.

    Stuff of one class is one segment. Parts of a thing that their tile cuts off know less of it than parts that are
    whole. If there are whole ones, these alone decide the thing's class and are drawn completely, over what is cut off;
    else all parts decide. The class has the largest area times score; the score is the best of the parts of that class.
    A thing that only one tile found is left out if most of its pixels are nearer to another tile, which saw them better
    and found none.
    """
    flags = np.array(is_thing, bool)
    firsts, categories, scores, areas, wholes, doubtful = [0], [], [], [], [], []
    pairs: list[tuple[int, int]] = []
    for number in range(len(grid)):
        arrays = tile(number)
        count = len(arrays["categories"])
        own = grid.owned[number].within(grid.boxes[number])
        areas.append(_areas(arrays["rows"][own], count))
        doubtful.append(flags[arrays["categories"]] & (2 * areas[-1] < _areas(arrays["rows"], count)))
        wholes.append(flags[arrays["categories"]] & ~_cut_off(grid, number, arrays["rows"], count))
        categories.append(arrays["categories"])
        scores.append(arrays["scores"])
        for other in grid.neighbours(number):
            found = _same_segments(grid, (number, arrays), (other, tile(other)), flags)
            pairs += [(int(firsts[number] + a), int(firsts[other] + b)) for a, b in found]
        firsts.append(firsts[-1] + count)
    category, score, area = np.concatenate(categories), np.concatenate(scores), np.concatenate(areas)
    is_whole = np.concatenate(wholes)
    groups = groups_of(firsts[-1], pairs)
    alone = np.bincount(groups, minlength=firsts[-1])[groups] == 1
    area = np.where(alone & np.concatenate(doubtful), 0, area)
    stuff: dict[int, int] = {}
    for row in np.flatnonzero(~flags[category] & (area > 0)).tolist():
        first = stuff.setdefault(int(category[row]), row)
        pairs.append((first, row))
    numbers, segments = _segments(groups_of(firsts[-1], pairs), category, score, area, is_whole, flags)
    tables = [np.append(numbers[first:last], VOID) for first, last in pairwise(firsts)]
    for number, (box, owned) in enumerate(zip(grid.boxes, grid.owned, strict=True)):
        id_map[owned.slices] = tables[number][tile(number)["rows"][owned.within(box)]]
    has_whole = np.zeros(len(segments) + 2, bool)  # the last is that of VOID
    has_whole[numbers[is_whole & (numbers != VOID)]] = True
    for number, box in enumerate(grid.boxes):
        drawn = np.append(np.where(wholes[number], tables[number][:-1], VOID), VOID)[tile(number)["rows"]]
        part = id_map[box.slices]
        np.copyto(part, drawn, where=(drawn != VOID) & ~has_whole[part])
    return _counted(grid, id_map, segments)


def _areas(
    rows: np.ndarray,  # int32, as of `panoptic_arrays`
    count: int,
) -> np.ndarray:
    """Pixels of each segment of a tile -> [count]."""
    return np.bincount(rows.ravel() + 1, minlength=count + 1)[1:]


def _cut_off(
    grid: TileGrid,
    number: int,
    rows: np.ndarray,  # [h, w], as of `panoptic_arrays`
    count: int,
) -> np.ndarray:
    """Whether each segment of a tile reaches a side of it that is not one of the picture -> [count] bool."""
    box, cut = grid.boxes[number], np.zeros(count + 1, bool)
    for line, is_inner in ((rows[0], box.top > 0), (rows[-1], box.bottom < grid.height),
                           (rows[:, 0], box.left > 0), (rows[:, -1], box.right < grid.width)):  # fmt: skip
        if is_inner:
            cut[line] = True  # the last stands for pixels without a segment
    return cut[:count]


def _segments(
    groups: np.ndarray, category: np.ndarray, score: np.ndarray, area: np.ndarray, is_whole: np.ndarray,
    flags: np.ndarray,
) -> tuple[np.ndarray, list[SegmentInfo]]:  # fmt: skip
    """Id of each part, `VOID` where nothing of it is drawn, and the segments."""
    numbers = np.full(len(groups), VOID, np.int32)
    segments: list[SegmentInfo] = []
    visible = np.flatnonzero(area > 0)
    order = visible[np.argsort(groups[visible], kind="stable")]
    bounds = np.flatnonzero(np.diff(groups[order], prepend=-1))
    for members in np.split(order, bounds[1:]) if len(order) else []:
        known = members[is_whole[members]] if is_whole[members].any() else members
        votes = np.bincount(category[known], weights=area[known] * score[known])
        best = int(votes.argmax())
        numbers[members] = len(segments) + 1
        agreeing = known[category[known] == best]
        segments.append(SegmentInfo(len(segments) + 1, best, bool(flags[best]), score=float(score[agreeing].max())))
    return numbers, segments


def _counted(grid: TileGrid, id_map: np.ndarray, segments: Sequence[SegmentInfo]) -> list[SegmentInfo]:
    """The segments with their areas; those that others cover are left out, and the ids count from 1 again."""
    areas = np.zeros(len(segments) + 1, np.int64)
    for box in grid.owned:
        areas += np.bincount(id_map[box.slices].ravel() + 1, minlength=len(areas) + 1)[1:]
    kept = [segment for segment in segments if areas[segment.id] > 0]
    if len(kept) < len(segments):
        table = np.full(len(segments) + 2, VOID, np.int32)
        table[[segment.id for segment in kept]] = np.arange(1, len(kept) + 1)
        for box in grid.owned:
            id_map[box.slices] = table[id_map[box.slices]]
    return [replace(segment, id=number, area=int(areas[segment.id])) for number, segment in enumerate(kept, start=1)]


def _same_segments(
    grid: TileGrid, first: tuple[int, Arrays], second: tuple[int, Arrays], flags: np.ndarray
) -> list[tuple[int, int]]:
    """Pairs of rows of things in two tiles that are one object."""
    shared = grid.boxes[first[0]].intersect(grid.boxes[second[0]])
    if shared.is_empty:
        return []
    rows = [arrays["rows"][shared.within(grid.boxes[number])].ravel() for number, arrays in (first, second)]
    counts = [len(arrays["categories"]) + 1 for _, arrays in (first, second)]
    joint = np.bincount((rows[0] + 1) * counts[1] + rows[1] + 1, minlength=counts[0] * counts[1]).reshape(counts)
    union = joint.sum(1, keepdims=True) + joint.sum(0, keepdims=True) - joint
    same = joint[1:, 1:] >= SAME_OBJECT * np.maximum(union[1:, 1:], 1)
    things = [flags[arrays["categories"]] for _, arrays in (first, second)]
    same &= things[0][:, None] & things[1]
    return [(int(a), int(b)) for a, b in _one_to_one(joint[1:, 1:] / np.maximum(union[1:, 1:], 1), same)]


def merge_instances(
    grid: TileGrid,
    tile: Callable[[int], Arrays],  # labels, scores, boxes [N, 4] and packed masks of a tile
) -> list[CroppedInstance]:
    """Instances of the picture, best first.

    An instance that its tile cuts off gives way to whole ones of another tile, of any class, that are the same object
    in the overlap. Others of one class that are the same object are joined; the best score counts. An instance that
    only one tile found is left out if most of its pixels are nearer to another tile.
    """
    firsts, labels, scores = [0], [], []
    pairs: list[tuple[int, int]] = []
    replaced: set[int] = set()  # instances that are cut off, and
    chosen: set[int] = set()  # the whole ones for which they are left out
    for number in range(len(grid)):
        arrays = tile(number)
        labels.append(arrays["labels"])
        scores.append(arrays["scores"])
        cut = _instances_cut_off(grid, number, arrays)
        for other in grid.neighbours(number):
            others = tile(other)
            rows, columns, overlap = _overlaps(grid, (number, arrays), (other, others))
            is_cut, is_other_cut = cut[rows], _instances_cut_off(grid, other, others)[columns]
            for a, b in np.argwhere((overlap >= SAME_OBJECT) & (is_cut[:, None] != is_other_cut)).tolist():
                places = firsts[number] + int(rows[a]), firsts[other] + int(columns[b])
                replaced.add(places[0] if is_cut[a] else places[1])
                chosen.add(places[1] if is_cut[a] else places[0])
            same = (overlap >= SAME_OBJECT) & (arrays["labels"][rows][:, None] == others["labels"][columns])
            same &= is_cut[:, None] == is_other_cut
            found = _one_to_one(overlap, same)
            pairs += [(firsts[number] + int(rows[a]), firsts[other] + int(columns[b])) for a, b in found]
        firsts.append(firsts[-1] + len(arrays["labels"]))
    label, score = np.concatenate(labels), np.concatenate(scores)
    groups = groups_of(firsts[-1], [pair for pair in pairs if not replaced.intersection(pair)])
    members = np.bincount(groups, minlength=firsts[-1])
    parts: dict[int, list[tuple[Box, np.ndarray]]] = {}
    for number in range(len(grid)):
        arrays = tile(number)
        for row in range(len(arrays["labels"])):
            place = firsts[number] + row
            if place in replaced:
                continue
            group = int(groups[place])
            part = _part(grid, number, arrays, row, bool(members[group] == 1), place in chosen)
            if part is not None:
                parts.setdefault(group, []).append(part)
    found_ones = []
    for group, pieces in parts.items():
        best = max(float(score[row]) for row in np.flatnonzero(groups == group)) if members[group] > 1 else score[group]
        box, mask = _joined(pieces)
        found_ones.append((group, CroppedInstance(int(label[group]), float(best), box, mask)))
    found_ones.sort(key=lambda one: (-one[1].score, one[0]))
    return [instance for _, instance in found_ones]


def _instances_cut_off(grid: TileGrid, number: int, arrays: Arrays) -> np.ndarray:
    """Whether each instance of a tile reaches a side of it that is not one of the picture -> [N] bool."""
    box = grid.boxes[number]
    height, width = box.size
    x0, y0, x1, y1 = arrays["boxes"].T
    return (
        ((y0 <= 0) & (box.top > 0)) | ((y1 >= height) & (box.bottom < grid.height))
        | ((x0 <= 0) & (box.left > 0)) | ((x1 >= width) & (box.right < grid.width))
    )  # fmt: skip


def _overlaps(
    grid: TileGrid, first: tuple[int, Arrays], second: tuple[int, Arrays]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of two tiles' instances that reach into the overlap of the tiles, and their IoU there [N, M]."""
    shared = grid.boxes[first[0]].intersect(grid.boxes[second[0]])
    rows, masks = [], []
    for number, arrays in (first, second):
        if shared.is_empty:
            rows.append(np.zeros(0, np.int64))
            masks.append(np.zeros((0, 1), np.float32))
            continue
        down, across = shared.within(grid.boxes[number])
        x0, y0, x1, y1 = arrays["boxes"].T
        inside = np.flatnonzero((x1 > across.start) & (x0 < across.stop) & (y1 > down.start) & (y0 < down.stop))
        kept = unpack(arrays["masks"][inside, down], grid.boxes[number].size[1])[..., across]
        rows.append(inside)
        masks.append(kept.reshape(len(inside), shared.size[0] * shared.size[1]).astype(np.float32))
    joint = masks[0] @ masks[1].T
    union = masks[0].sum(1)[:, None] + masks[1].sum(1) - joint
    return rows[0], rows[1], joint / np.maximum(union, 1)


def _one_to_one(overlap: np.ndarray, same: np.ndarray) -> list[tuple[int, int]]:
    """Pairs that may be the same, those of most overlap first, each row and column at most once."""
    candidates = np.argwhere(same)
    order = np.argsort(-overlap[same], kind="stable")
    taken: tuple[set[int], set[int]] = (set(), set())
    pairs = []
    for a, b in candidates[order].tolist():
        if a not in taken[0] and b not in taken[1]:
            taken[0].add(a)
            taken[1].add(b)
            pairs.append((a, b))
    return pairs


def _part(
    grid: TileGrid, number: int, arrays: Arrays, row: int, alone: bool, is_chosen: bool
) -> tuple[Box, np.ndarray] | None:
    """What a tile's instance adds to its object: its owned pixels, or all if it is alone; None for nothing."""
    x0, y0, x1, y1 = (int(side) for side in arrays["boxes"][row])
    outer = grid.boxes[number]
    box = Box(outer.top + y0, outer.left + x0, outer.top + y1, outer.left + x1)
    mask = unpack(arrays["masks"][row, y0:y1], outer.size[1])[:, x0:x1]
    own = box.intersect(grid.owned[number])
    owned = None if own.is_empty else mask[own.within(box)]
    if alone or is_chosen:
        return (box, mask) if is_chosen or (owned is not None and 2 * owned.sum() >= mask.sum()) else None
    return None if owned is None or not owned.any() else (own, owned)


def _joined(pieces: Sequence[tuple[Box, np.ndarray]]) -> tuple[Box, np.ndarray]:
    """The tight box and the mask of pieces, each a box and its mask."""
    boxes = [box for box, _ in pieces]
    outer = Box(min(box.top for box in boxes), min(box.left for box in boxes),
                max(box.bottom for box in boxes), max(box.right for box in boxes))  # fmt: skip
    mask = np.zeros(outer.size, bool)
    for box, part in pieces:
        mask[box.within(outer)] |= part
    down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    tight = Box(outer.top + int(down[0]), outer.left + int(across[0]),
                outer.top + int(down[-1]) + 1, outer.left + int(across[-1]) + 1)  # fmt: skip
    return tight, mask[tight.within(outer)].copy()
