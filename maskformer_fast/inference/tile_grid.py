"""Overlapping tiles of a large picture: where they lie, which pixels each owns, and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from maskformer_fast.core.checks import check
from maskformer_fast.inference_config import TileBlend


class Box(NamedTuple):
    """A rectangle of pixels; bottom and right are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return self.bottom - self.top, self.right - self.left

    @property
    def is_empty(self) -> bool:
        return self.bottom <= self.top or self.right <= self.left

    def intersect(self, other: Box) -> Box:
        """The pixels of both."""
        return Box(max(self.top, other.top), max(self.left, other.left),
                   min(self.bottom, other.bottom), min(self.right, other.right))  # fmt: skip

    def within(self, outer: Box) -> tuple[slice, slice]:
        """Slices of rows and columns that take this box from an array of the outer one."""
        return (slice(self.top - outer.top, self.bottom - outer.top),
                slice(self.left - outer.left, self.right - outer.left))  # fmt: skip

    @property
    def slices(self) -> tuple[slice, slice]:
        """Slices of rows and columns that take this box from an array of the picture."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


class _Axis:
    """Tiles along one side of a picture."""

    def __init__(self, length: int, tile: int, overlap: int) -> None:
        self.length, self.tile, self.overlap = length, min(tile, length), overlap
        count = 1 if length <= tile else -(-(length - overlap) // (tile - overlap))
        last = length - self.tile
        self.starts = [round(number * last / max(1, count - 1)) for number in range(count)]
        ends = [start + self.tile for start in self.starts]
        middles = [(start + end + 1) // 2 for end, start in zip(ends, self.starts[1:], strict=False)]
        edges = [0, *middles, length]
        self.owned = list(pairwise(edges))
        """Pixels that are nearer to the middle of each tile than to that of another."""
        cuts = sorted({0, length, *self.starts, *ends})
        self.parts = [
            (first, last, [number for number, start in enumerate(self.starts) if start <= first < start + self.tile])
            for first, last in pairwise(cuts)
        ]
        """Stretches, and the numbers of the tiles that cover all of each."""

    def weights(self, number: int, first: int, last: int, blend: TileBlend) -> np.ndarray:
        """Weight of a tile at some pixels, before division by the sum of all tiles' weights -> [last - first]."""
        if blend == "mean":
            return np.ones(last - first, np.float32)
        start, end = self.starts[number], self.starts[number] + self.tile
        place = np.arange(first, last, dtype=np.float32) + 0.5
        before = place - start if number > 0 else np.float32(np.inf)
        after = end - place if number + 1 < len(self.starts) else np.float32(np.inf)
        return np.minimum(np.minimum(before, after), max(1, self.overlap)) * np.ones_like(place)


class Block(NamedTuple):
    """Pixels that are covered by the same tiles."""

    box: Box
    tiles: tuple[int, ...]


@dataclass(frozen=True)
class TileGrid:
    """Tiles of equal size that cover a picture, numbered row by row.

    They lie evenly, so that neighbours overlap by ``overlap`` of a side or somewhat more. A picture that is smaller
    than a tile along a side has tiles of its own length there.
    """

    height: int
    width: int
    tile: int
    overlap: float = 0.25

    def __post_init__(self) -> None:
        check(self.height > 0 and self.width > 0, "size", "positive height and width", (self.height, self.width))
        check(self.tile > 0, "tile", "> 0", self.tile)
        check(0.0 <= self.overlap <= 0.5, "tile_overlap", "0..0.5", self.overlap)

    @cached_property
    def _rows(self) -> _Axis:
        return _Axis(self.height, self.tile, int(self.overlap * self.tile))

    @cached_property
    def _columns(self) -> _Axis:
        return _Axis(self.width, self.tile, int(self.overlap * self.tile))

    @cached_property
    def boxes(self) -> list[Box]:
        """Pixels of each tile."""
        height, width = self._rows.tile, self._columns.tile
        return [Box(y, x, y + height, x + width) for y in self._rows.starts for x in self._columns.starts]

    @cached_property
    def owned(self) -> list[Box]:
        """Pixels of each tile that are nearest to its middle; together they are the picture, without overlap."""
        return [Box(top, left, bottom, right)
                for top, bottom in self._rows.owned for left, right in self._columns.owned]  # fmt: skip

    @cached_property
    def blocks(self) -> list[Block]:
        """Rectangles in which the same tiles count; together they are the picture, without overlap."""
        across = len(self._columns.starts)
        return [
            Block(Box(top, left, bottom, right), tuple(y * across + x for y in rows for x in columns))
            for top, bottom, rows in self._rows.parts for left, right, columns in self._columns.parts
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows.starts) * len(self._columns.starts)

    def neighbours(self, number: int) -> list[int]:
        """Earlier tiles beside a tile, also diagonally."""
        across = len(self._columns.starts)
        y, x = divmod(number, across)
        places = [(y - 1, x - 1), (y - 1, x), (y - 1, x + 1), (y, x - 1)]
        return [row * across + column for row, column in places if row >= 0 and 0 <= column < across]

    def weights(self, block: Block, blend: TileBlend) -> list[tuple[np.ndarray, np.ndarray]]:
        """Share of each of a block's tiles in its pixels' scores: weights of rows and of columns, to be multiplied.

        ``mean`` gives all tiles of a pixel the same weight; ``feather`` lets it fall linearly towards a tile's edges.
        The weights of a pixel add up to 1.
        """
        across, box = len(self._columns.starts), block.box
        rows = {y: self._rows.weights(y, box.top, box.bottom, blend) for y in {t // across for t in block.tiles}}
        columns = {x: self._columns.weights(x, box.left, box.right, blend) for x in {t % across for t in block.tiles}}
        down, along = _normalized(rows), _normalized(columns)
        return [(down[tile // across], along[tile % across]) for tile in block.tiles]


def _normalized(weights: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    total = np.sum(list(weights.values()), axis=0)
    return {number: values / total for number, values in weights.items()}


def groups_of(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Smallest member of the group of each of some numbers, where each pair is of one group -> [count] int64.

    The order of the pairs makes no difference.
    """
    parents = list(range(count))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parents[high] = low
    return np.array([root(number) for number in range(count)], np.int64)
