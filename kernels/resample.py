"""Bilinear resampling of low-resolution maps inside a kernel, by tiles of output pixels.

A tile reads few taps, so resampling is a product of matrices: weights [pixels, taps] @ maps [taps, channels]. The grid
of tiles is shifted by half the distance of taps where tiles then read fewer taps: at scale 4, 8 x 16 pixels read 3 x 5.
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
"""Largest magnitude of a value: values beyond it, also infinities, count as ±1e30, so that inf - inf never occurs."""
_NAN_INPUT = tl.constexpr(3e38)
"""Value that replaces NaN in the product, where NaN times a weight of 0 would reach every pixel of the tile."""
_NAN_OUTPUT = tl.constexpr(2e30)
"""Threshold of resampled values: above it a tap was `_NAN_INPUT`."""


@triton.jit
def tap_place(index, scale, scale_rest, size):
    """Taps of output pixels along one axis -> tap before each pixel, share of the tap after it.

    Computed in float64, which is little work: float32 would be wrong by 1e-4 of a tap at the far end of a large image.
    The fused multiply-add is explicit, because the compiler might fuse differently in every kernel.
    """
    middle = index.to(tl.float64) + 0.5
    coordinate = tl.fma(middle, scale, middle * scale_rest) - 0.5
    coordinate = tl.minimum(tl.maximum(coordinate, 0.0), (size - 1).to(tl.float64))
    low = coordinate.to(tl.int32)  # not negative, so this is the floor
    return low, (coordinate - low.to(tl.float64)).to(tl.float32)


@triton.jit
def tile_at(
    index, map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Place tile `index` -> nine values.

    These are its image, the rows and columns of its pixels (some outside the output), row and column of its first tap,
    and for each pixel the tap before and the share of the tap after it, along both axes.
    """
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
    """Bilinear weights of the taps at row, column [taps] for all pixels -> [pixels, taps] float32."""
    below = row[None, :] - low_y[:, None]
    right = column[None, :] - low_x[:, None]
    weight_y = tl.where(below == 0, 1.0 - share_y[:, None], tl.where(below == 1, share_y[:, None], 0.0))
    weight_x = tl.where(right == 0, 1.0 - share_x[:, None], tl.where(right == 1, share_x[:, None], 0.0))
    return weight_y * weight_x


@triton.jit
def add_taps(resampled, weights, values):
    """Add weights [pixels, taps] @ values [taps, channels] to ``resampled`` [pixels, channels], in float32."""
    return tl.dot(weights, limit_taps(values), resampled, input_precision="tf32x3")


@triton.jit
def limit_taps(values):
    """Limit float32 logits to ±1e30 and replace NaN, as `add_taps` does; `sigmoid` turns the replacement into NaN."""
    return tl.where(values == values, tl.minimum(tl.maximum(values, -LIMIT), LIMIT), _NAN_INPUT)


@triton.jit
def sigmoid(resampled):
    """Sigmoid of the sums of `add_taps`: NaN where a tap was NaN, elsewhere monotone."""
    masks = 1.0 / (1.0 + tl.exp2(resampled * -1.4426950408889634))
    return tl.where(resampled > _NAN_OUTPUT, float("nan"), masks)


def narrow_maps(maps: Tensor) -> Tensor:
    """Make offsets within one map of [B, N, h, w] fit 32 bits: copies maps whose strides are too wide.

    Raises ValueError for maps of 2^31 elements and more.
    """
    rows, columns = maps.shape[2:]
    if rows * columns >= 1 << 31:
        raise ValueError(f"maps: expected fewer than 2^31 elements each, got {rows} x {columns}")
    return maps if rows * maps.stride(2) + columns * maps.stride(3) < 1 << 31 else maps.contiguous()


class AxisTiles(NamedTuple):
    """Tiles along one axis of the output. The scale is the sum of two float32, because Triton passes no float64."""

    scale: float
    rest: float
    offset: int  # pixels of the first tile that are before the output
    taps: int  # most taps that a tile reads
    tiles: int


def scale_parts(extent: float, output: int) -> tuple[float, float]:
    """Distance of output pixels in taps, as two float32 whose sum it is."""
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
            # the device may round a coordinate at a tap to either side
            most = max(most, math.floor(last + 1e-6) + 2 - math.floor(first - 1e-6))
        return most

    offset = min(0, round(output / extent / 2) % tile, key=taps)
    return AxisTiles(*scale_parts(extent, output), offset, taps(offset), -(-(output + offset) // tile))
