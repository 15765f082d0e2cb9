"""Identities of segments across frames: overlap of masks, and a batched assignment for each category."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from maskformer_fast.core.checks import check
from maskformer_fast.core.exchange import as_array
from maskformer_fast.core.results import InstanceResult, PanopticResult
from maskformer_fast.ops.assignment import linear_sum_assignment

GRID_EDGE = 320
"""Pixels of a frame's longer side that masks are compared at: every n-th row and column."""
LEAST_AFFINITY = 0.03
"""Least affinity of a track and a segment that may be the same object."""
SCALE_OF_AGE = 0.5
"""Advantage in affinity of a track that is `FULL_AGE` frames old over a new one."""
FULL_AGE = 10
"""Frames after which a track is no longer preferred for its age."""
WHOLE = 0.6
"""Share of a track's usual area from which a mask is taken for the complete object, and not for its visible part."""
HIDDEN_WEIGHT = 0.6
"""Affinity of a segment that lies within the place of a hidden object, which of it is visible being unknown."""
NEAR_WEIGHT = 0.3
"""Affinity of a segment whose middle is where that of the object is expected, without regard to their masks."""
REACH = 3.0
"""Distance of the middles, in square roots of the object's area, from which on this affinity is 0."""
SMOOTHING = 0.1
"""Weight of the last step in a track's velocity, and of the last mask in its usual area."""


class Segments(NamedTuple):
    """Things of a frame, on the grid."""

    masks: np.ndarray  # [N, h, w] bool
    categories: np.ndarray  # [N] int64
    rows: np.ndarray  # [N] int64, their places in the result


class _Tracks(NamedTuple):
    """Objects that are seen, or were within the gap."""

    ids: np.ndarray  # [T] int64
    categories: np.ndarray  # [T] int64
    masks: np.ndarray  # [T, h, w] bool, last seen
    shapes: np.ndarray  # [T, h, w] bool, last seen as a complete object
    centres: np.ndarray  # [T, 2] float64, of the last mask: y, x in cells
    places: np.ndarray  # [T, 2] float64, of the complete object's middle, moved on while it is hidden
    origins: np.ndarray  # [T, 2] float64, of the middle of `shapes`
    velocities: np.ndarray  # [T, 2] float64, cells a frame
    areas: np.ndarray  # [T] float64, usual number of cells
    ages: np.ndarray  # [T] int64, frames in which it was seen
    missing: np.ndarray  # [T] int64, frames since it was last seen

    def pick(self, keep: np.ndarray) -> _Tracks:
        return _Tracks(*(column[keep] for column in self))


class Tracker:
    """Gives the segments of one frame after another track ids: the same number for the same object.

    A thing's mask is compared with those of the objects of its category: where each was last seen, moved on by its
    velocity, and, of one that was partly or completely hidden, the place of the complete object. Affinity is the
    intersection over union of the two masks. One batched assignment gives every category the pairs of the largest sum.
    A segment without a partner is a new object; an object that is not seen for more than ``gap`` frames has ended, and
    its id does not come back. Stuff has one id for each category. Ids count from 1.
    """

    def __init__(self, gap: int = 30, least_affinity: float = LEAST_AFFINITY) -> None:
        """Start without objects.

        Args:
            gap: frames for which an object that is not seen keeps its id.
            least_affinity: least affinity of a segment and an object, 0 to 1.
        """
        check(gap >= 0, "gap", ">= 0", gap)
        check(0.0 < least_affinity <= 1.0, "least_affinity", "above 0, at most 1", least_affinity)
        self.gap = gap
        self.least_affinity = least_affinity
        self._next = 1
        self._stuff: dict[int, int] = {}
        self._tracks: _Tracks | None = None
        self._size: tuple[int, int] | None = None

    def update(self, result: PanopticResult | InstanceResult) -> list[int]:
        """Track ids of the next frame's segments or instances, in the result's order.

        A frame of another size than the one before it ends all objects.
        """
        segments, size, stuff = _segments_of(result)
        if size != self._size:
            self._tracks, self._size = None, size
        ids = np.zeros(len(segments.rows) + len(stuff), np.int64)
        for row, category in stuff:
            if category not in self._stuff:
                self._stuff[category] = self._new(1)[0]
            ids[row] = self._stuff[category]
        ids[segments.rows] = self._follow(segments)
        return [int(number) for number in ids]

    def _new(self, count: int) -> np.ndarray:
        self._next += count
        return np.arange(self._next - count, self._next)

    def _follow(self, segments: Segments) -> np.ndarray:
        """Ids of things, in their order; the tracks are brought up to date."""
        count = len(segments.rows)
        centres, areas = _centres(segments.masks)
        tracks = self._tracks
        if tracks is None:
            ids = self._new(count)
            self._tracks = _begun(segments, ids, centres, areas)
            return ids
        affinity = _affinities(tracks, segments, centres, areas)
        affinity[affinity < self.least_affinity] = 0
        affinity *= 1 + SCALE_OF_AGE * np.minimum(tracks.ages, FULL_AGE)[:, None] / FULL_AGE
        partner = assign_by_category(affinity, tracks.categories, segments.categories)  # [N], -1 for none
        found = partner >= 0
        ids = np.empty(count, np.int64)
        ids[found] = tracks.ids[partner[found]]
        ids[~found] = self._new(int((~found).sum()))
        self._tracks = self._moved_on(tracks, segments, partner, centres, areas)
        begun = _begun(segments, ids, centres, areas).pick(~found)
        self._tracks = _Tracks(*(np.concatenate(pair) for pair in zip(self._tracks, begun, strict=True)))
        return ids

    def _moved_on(
        self, tracks: _Tracks, segments: Segments, partner: np.ndarray, centres: np.ndarray, areas: np.ndarray
    ) -> _Tracks:
        """The tracks after a frame, without those that have ended."""
        rows = np.flatnonzero(partner >= 0)
        at = partner[rows]
        seen = areas[rows]
        whole = seen >= WHOLE * tracks.areas[at]
        steps = (centres[rows] - tracks.centres[at]) / (1 + tracks.missing[at])[:, None]
        first = tracks.ages[at] == 1
        weight = np.where(first, 1.0, SMOOTHING)[:, None]
        velocities = np.where(whole[:, None], tracks.velocities[at] * (1 - weight) + steps * weight,
                              tracks.velocities[at])  # fmt: skip
        places = tracks.places + tracks.velocities  # hidden and partly hidden objects go on as before
        places[at[whole]] = centres[rows[whole]]
        new = tracks._replace(places=places, missing=tracks.missing + 1)
        new.missing[at] = 0
        new.ages[at] += 1
        new.masks[at], new.centres[at], new.velocities[at] = segments.masks[rows], centres[rows], velocities
        complete = at[whole]
        new.shapes[complete], new.origins[complete] = segments.masks[rows[whole]], centres[rows[whole]]
        # the usual area follows an object that comes nearer at once, and one that is hidden slowly
        new.areas[at] = np.maximum(seen, tracks.areas[at] * np.where(whole, 1 - SMOOTHING, 0.99)
                                   + seen * np.where(whole, SMOOTHING, 0.01))  # fmt: skip
        return new.pick(new.missing <= self.gap)


def track(
    results: Iterable[PanopticResult | InstanceResult], gap: int = 30
) -> list[list[int]]:
    """Track ids of the segments of each frame of a video, in each result's order; see `Tracker`."""
    tracker = Tracker(gap)
    return [tracker.update(result) for result in results]


def assign_by_category(
    affinity: np.ndarray,  # [T, N] float64, 0 where a pair is not allowed
    tracks: np.ndarray,  # [T] int64, category of each track
    segments: np.ndarray,  # [N] int64, category of each segment
) -> np.ndarray:
    """The track of each segment, pairs of one category with the largest sum -> [N] int64, -1 for none.

    All categories are one batch of `ops.assignment.linear_sum_assignment`.
    """
    result = np.full(len(segments), -1, np.int64)
    both = np.intersect1d(tracks, segments)
    if len(both) == 0:
        return result
    row, row_place, rows = _places(tracks, both)
    column, column_place, columns = _places(segments, both)
    batch = np.zeros((len(both), rows, columns))
    mine = np.ix_(row_place[1], column_place[1])
    pairs = row[:, None] == column[None]
    group = np.broadcast_to(row[:, None], pairs.shape)[pairs]
    place = (np.broadcast_to(row_place[0][:, None], pairs.shape)[pairs],
             np.broadcast_to(column_place[0][None], pairs.shape)[pairs])  # fmt: skip
    batch[group, place[0], place[1]] = affinity[mine][pairs]
    chosen = linear_sum_assignment(torch.from_numpy(batch), maximize=True).numpy()[column, column_place[0]]
    back = np.full((len(both), rows), -1, np.int64)
    back[row, row_place[0]] = row_place[1]
    partner = np.where(chosen >= 0, back[column, chosen], -1)
    allowed = (partner >= 0) & (affinity[partner, column_place[1]] > 0)
    result[column_place[1]] = np.where(allowed, partner, -1)
    return result


def _places(
    categories: np.ndarray, both: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], int]:
    """Of the items of common categories: the category's number, (place within it, item), and the largest count."""
    items = np.flatnonzero(np.isin(categories, both))
    group = np.searchsorted(both, categories[items])
    counts = np.bincount(group, minlength=len(both))
    order = np.argsort(group, kind="stable")
    place = np.empty(len(items), np.int64)
    place[order] = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    return group, (place, items), int(counts.max())


def _segments_of(
    result: PanopticResult | InstanceResult,
) -> tuple[Segments, tuple[int, int], list[tuple[int, int]]]:
    """Things of a result on the grid, its size, and place and category of its stuff."""
    if isinstance(result, InstanceResult):
        size = result.size
        packed, step = as_array(result.masks), _step(size)
        columns = np.arange(step // 2, size[1], step)
        masks = (packed[:, step // 2 :: step][:, :, columns >> 3] >> (columns & 7).astype(np.uint8) & 1).astype(bool)
        return Segments(masks, as_array(result.labels).astype(np.int64), np.arange(len(packed))), size, []
    id_map = as_array(result.id_map)
    size = id_map.shape[0], id_map.shape[1]
    step = _step(size)
    things = [row for row, segment in enumerate(result.segments) if segment.is_thing]
    ids = np.array([result.segments[row].id for row in things], id_map.dtype)
    categories = np.array([result.segments[row].category for row in things], np.int64)
    masks = id_map[step // 2 :: step, step // 2 :: step] == ids[:, None, None]
    stuff = [(row, segment.category) for row, segment in enumerate(result.segments) if not segment.is_thing]
    return Segments(masks, categories, np.array(things, np.int64)), size, stuff


def _step(size: Sequence[int]) -> int:
    return max(1, -(-max(size) // GRID_EDGE))


def _centres(
    masks: np.ndarray,  # [N, h, w] bool
) -> tuple[np.ndarray, np.ndarray]:
    """Middle of each mask -> [N, 2] float64 y, x, that of the grid for an empty one; cells -> [N] float64."""
    down, across = masks.sum(2, dtype=np.float64), masks.sum(1, dtype=np.float64)
    areas = down.sum(1)
    height, width = masks.shape[1:]
    least = np.maximum(areas, 1)
    centres = np.stack([down @ np.arange(height) / least, across @ np.arange(width) / least], 1)
    centres[areas == 0] = height / 2, width / 2
    return centres, areas


def _begun(segments: Segments, ids: np.ndarray, centres: np.ndarray, areas: np.ndarray) -> _Tracks:
    """New tracks of all segments."""
    count = len(ids)
    return _Tracks(ids, segments.categories, segments.masks.copy(), segments.masks.copy(), centres.copy(),
                   centres.copy(), centres.copy(), np.zeros((count, 2)), areas.copy(), np.ones(count, np.int64),
                   np.zeros(count, np.int64))  # fmt: skip


def _affinities(tracks: _Tracks, segments: Segments, centres: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Affinity of each track and segment -> [T, N] float64."""
    last = tracks.velocities * (1 + tracks.missing)[:, None]
    overlap, union = _overlaps(_shifted(tracks.masks, last), segments.masks, areas)
    result = overlap / np.maximum(union, 1)
    hidden = np.flatnonzero((tracks.missing > 0) | (tracks.masks.sum((1, 2)) < WHOLE * tracks.areas))
    if len(hidden):
        moves = tracks.places + tracks.velocities - tracks.origins
        overlap, union = _overlaps(_shifted(tracks.shapes[hidden], moves[hidden]), segments.masks, areas)
        within = HIDDEN_WEIGHT * overlap / np.maximum(areas, 1)
        result[hidden] = np.maximum(result[hidden], np.maximum(overlap / np.maximum(union, 1), within))
    distances = np.linalg.norm((tracks.places + tracks.velocities)[:, None] - centres[None], axis=2)
    near = 1 - distances / (REACH * np.sqrt(np.maximum(tracks.areas, 1)))[:, None]
    return np.maximum(result, NEAR_WEIGHT * near)


def _overlaps(
    first: np.ndarray,  # [T, h, w] bool
    second: np.ndarray,  # [N, h, w] bool
    areas: np.ndarray,  # [N] float64, cells of the second
) -> tuple[np.ndarray, np.ndarray]:
    """Cells of the intersections and unions of all pairs -> two of [T, N] float64, by a product of matrices."""
    cells = math.prod(first.shape[1:])
    one, two = (torch.from_numpy(masks.reshape(len(masks), cells)).float() for masks in (first, second))
    overlap = (one @ two.T).double().numpy()  # exact: a grid has fewer than 2^24 cells
    return overlap, first.sum((1, 2))[:, None] + areas[None] - overlap


def _shifted(
    masks: np.ndarray,  # [T, h, w] bool
    moves: np.ndarray,  # [T, 2] float64, y, x in cells
) -> np.ndarray:
    """Each mask moved by whole cells; what leaves the grid is lost."""
    result = np.zeros_like(masks)
    height, width = masks.shape[1:]
    for moved, mask, (dy, dx) in zip(result, masks, np.rint(moves).astype(np.int64).tolist(), strict=True):
        if abs(dy) < height and abs(dx) < width:
            moved[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
                max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)]
    return result
