"""Bilinear resampling of low-resolution maps inside a kernel, by tiles of output pixels.

A tile reads few taps, so resampling is a product of matrices: weights [pixels, taps] @ maps [taps, channels]. The grid
of tiles is shifted by half the distance of taps, if that makes them fewer: at scale 4, 8 x 16 pixels read 3 x 5.
Coordinates are those of ``F.interpolate(align_corners=False)`` over a window of the maps: output pixel y of H reads
(y + 0.5) * extent / H - 0.5, not below 0; taps beyond the last one are taken from it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LIMIT = tl.constexpr(1e30)
"""Values beyond it, infinities among them, count as ±1e30, so that interpolation never meets inf - inf."""
_NAN_INPUT = tl.constexpr(3e38)
"""Stands for NaN in the product, where NaN times a weight of 0 would reach every pixel of the tile."""
_NAN_OUTPUT = tl.constexpr(2e30)
"""A resampled value above it has met `_NAN_INPUT`."""


@triton.jit
def tap_place(index, scale, scale_rest, size):
    """Where output pixels read the maps along one axis -> tap before, share of the tap after it.

    In float64, of which there is little to do: float32 would be off by 1e-4 of a tap at the far end of a large image.
    One product is fused by name: the compiler might choose another one in every kernel.
    """
    middle = index.to(tl.float64) + 0.5
    coordinate = tl.fma(middle, scale, middle * scale_rest) - 0.5
    coordinate = tl.minimum(tl.maximum(coordinate, 0.0), (size - 1).to(tl.float64))
    low = coordinate.to(tl.int32)  # not negative, so this is the floor
    return low, (coordinate - low.to(tl.float64)).to(tl.float32)


@triton.jit
def tile_of_program(
    map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """`tile_at` where each program makes one tile."""
    return tile_at(
        tl.program_id(0), map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x,
        tiles_y, tiles_x, TILE_H, TILE_W,
    )  # fmt: skip


@triton.jit
def tile_at(
    index, map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """The image of tile `index`, rows and columns of its pixels (some outside the output), the tile's first tap, and
    how the pixels read the maps: tap before and share of the one after, along both axes."""
    top = (index // tiles_x) % tiles_y * TILE_H - offset_y
    left = index % tiles_x * TILE_W - offset_x
    pixel = tl.arange(0, TILE_H * TILE_W)
    y = top + pixel // TILE_W
    x = left + pixel % TILE_W
    low_y, share_y = tap_place(y, scale_y, rest_y, map_height)
    low_x, share_x = tap_place(x, scale_x, rest_x, map_width)
    first_y, _ = tap_place(tl.maximum(top, 0), scale_y, rest_y, map_height)
    first_x, _ = tap_place(tl.maximum(left, 0), scale_x, rest_x, map_width)
    image = (index // (tiles_x * tiles_y)).to(tl.int64)
    return image, y, x, first_y, first_x, low_y, share_y, low_x, share_x


@triton.jit
def tap_weights(row, column, low_y, share_y, low_x, share_x):
    """Bilinear weights of taps at row, column [taps] for pixels [pixels] -> [pixels, taps] float32."""
    below = row[None, :] - low_y[:, None]
    right = column[None, :] - low_x[:, None]
    weight_y = tl.where(below == 0, 1.0 - share_y[:, None], tl.where(below == 1, share_y[:, None], 0.0))
    weight_x = tl.where(right == 0, 1.0 - share_x[:, None], tl.where(right == 1, share_x[:, None], 0.0))
    return weight_y * weight_x


@triton.jit
def add_taps(resampled, weights, values):
    """``resampled`` [pixels, channels] plus weights [pixels, taps] @ values [taps, channels], in float32."""
    return tl.dot(weights, limit_taps(values), resampled, input_precision="tf32x3")


@triton.jit
def limit_taps(values):
    """What `add_taps` makes of float32 logits; `sigmoid` of it is NaN where they are."""
    return tl.where(values == values, tl.minimum(tl.maximum(values, -LIMIT), LIMIT), _NAN_INPUT)


@triton.jit
def sigmoid(resampled):
    """Of what `add_taps` summed; NaN where a tap was NaN. Monotone otherwise."""
    masks = 1.0 / (1.0 + tl.exp2(resampled * -1.4426950408889634))
    return tl.where(resampled > _NAN_OUTPUT, float("nan"), masks)


def narrow_maps(maps: Tensor) -> Tensor:
    """Maps [B, N, h, w] in which a place within one map is counted with 32 bits: copied where strides are too wide.

    Raises ValueError for maps with more elements than that.
    """
    rows, columns = maps.shape[2:]
    if rows * columns >= 1 << 31:
        raise ValueError(f"maps: expected fewer than 2^31 elements each, got {rows} x {columns}")
    return maps if rows * maps.stride(2) + columns * maps.stride(3) < 1 << 31 else maps.contiguous()


class AxisTiles(NamedTuple):
    """How tiles lie along one axis of the output. The scale is float32 in two parts: Triton passes no float64."""

    scale: float
    rest: float
    offset: int
    taps: int  # that a tile reads, at most
    tiles: int


def scale_parts(extent: float, output: int) -> tuple[float, float]:
    """Distance of output pixels in taps, as the sum of two float32."""
    scale = ctypes.c_float(extent / output).value
    return scale, ctypes.c_float(extent / output - scale).value


@functools.lru_cache(maxsize=4096)
def axis_tiles(source: int, extent: float, output: int, tile: int) -> AxisTiles:
    """Tiles of ``tile`` pixels over an axis of ``output`` pixels, which cover ``extent`` of the maps' ``source``."""

    def taps(offset: int) -> int:
        most = 1
        for top in range(-offset, output, tile):
            first, last = (
                min(max((y + 0.5) * extent / output - 0.5, 0.0), source - 1.0)
                for y in (max(top, 0), min(top + tile, output) - 1)
            )
            # the device may round a coordinate at a tap to the other side of it
            most = max(most, math.floor(last + 1e-6) + 2 - math.floor(first - 1e-6))
        return most

    offset = min(0, round(output / extent / 2) % tile, key=taps)
    return AxisTiles(*scale_parts(extent, output), offset, taps(offset), -(-(output + offset) // tile))
