"""Resampled logits of one query's mask, tile by tile: four taps gathered for each pixel, and bounds of complete tiles.

The kernels of segments (`segments_panoptic`, `segments_instances`, `rle`) share these functions. They process queries
one after the other and skip most: bilinear values are between the least and the largest tap of a tile, so that the taps
settle most tiles before any pixel is interpolated. `resample` defines the coordinates of pixels. NaN counts as -1e30,
values beyond ±1e30, also infinities, as ±1e30.

Every kernel interpolates a logit by the same operations, down columns first. So all kernels agree on a pixel's sign,
and between taps that are not positive no pixel is positive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.resample import LIMIT, narrow_maps, scale_parts, tap_place

ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Types of logits -> Triton's names."""
WINDOW = ["num_queries", "map_height", "map_width", "height", "width"]
"""Arguments that are not specialised: a separate kernel for a size of 1 would be compiled without need."""
STRIDES = ["stride_b", "stride_q", "stride_y", "stride_x"]
"""Arguments specialised for the value 1 only: taps are gathered one by one, so that multiples of 16 do not help."""
_HALF = tl.constexpr(1 << 39)
"""Half a tap in the fixed point of `pixel_place`."""
_MOST_PIXELS = 1 << 21
"""Sides that fit that fixed point, and the grids of kernels."""


@triton.jit
def _finite(values):
    values = values.to(tl.float32)
    return tl.where(values == values, tl.minimum(tl.maximum(values, -LIMIT), LIMIT), -LIMIT)


@triton.jit
def pixel_taps(index, scale, rest, size, stride):
    """Taps of output pixels along one axis -> offsets of the taps before and after, share of the tap after."""
    low, share = tap_place(index, scale, rest, size)
    return low * stride, tl.minimum(low + 1, size - 1) * stride, share


@triton.jit
def interpolate(source, rows, columns):
    """Interpolate the map at ``source`` -> logits [rows, columns]; rows and columns are results of `pixel_taps`."""
    upper, lower, share_y = rows
    left, right, share_x = columns
    down = tl.broadcast_to(share_y[:, None], (share_y.shape[0], share_x.shape[0]))
    across = tl.broadcast_to(share_x[None, :], (share_y.shape[0], share_x.shape[0]))
    start = _finite(tl.load(source + upper[:, None] + left[None, :]))
    end = _finite(tl.load(source + lower[:, None] + left[None, :]))
    before = tl.fma(down, end - start, start)
    start = _finite(tl.load(source + upper[:, None] + right[None, :]))
    end = _finite(tl.load(source + lower[:, None] + right[None, :]))
    return tl.fma(across, tl.fma(down, end - start, start) - before, before)


@triton.jit
def tap_range(first, last, scale, rest, size):
    """First and last tap of the output pixels first..last along one axis."""
    low, _ = tap_place(first, scale, rest, size)
    high, _ = tap_place(last, scale, rest, size)
    return low, tl.minimum(high + 1, size - 1)


@triton.jit
def axis_step(scale, rest):
    """Half the distance of output pixels in taps, in units of 2^-40 taps -> int64 scalar."""
    half = tl.full((), _HALF, tl.float64)
    return (half * scale + half * rest + 0.5).to(tl.int64)


@triton.jit
def pixel_place(index, step, size):
    """Output pixels >= 0 along one axis -> int32 tap before each, its share of the tap after as float32 below 1.

    `step` is a result of `axis_step`. Integers of 64 bits are as exact as float64 here, and much less work: the error
    is below 2^-40 taps a pixel, and below 2^-24 where the share becomes float32. All tiles give a pixel the same place.
    """
    coordinate = (tl.zeros((), tl.int64) + 2 * index + 1) * step - _HALF
    low = (coordinate >> 40).to(tl.int32)
    share = ((coordinate >> 16).to(tl.int32) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return tl.minimum(tl.maximum(low, 0), size - 1), tl.where(low < 0, 0.0, share)


@triton.jit
def place_range(first, last, step, size):
    """First and last tap of the output pixels first..last along one axis."""
    low, _ = pixel_place(first, step, size)
    high, _ = pixel_place(last, step, size)
    return low, tl.minimum(high + 1, size - 1)


@triton.jit
def across(row, left, right, share):
    """Interpolate between taps of one row of the map, which begins at ``row`` -> float32, in the shape of `share`.

    `left` and `right` are offsets of the taps.
    """
    start = limited(tl.load(row + left))
    return tl.fma(share, limited(tl.load(row + right)) - start, start)


@triton.jit
def row_logits(source, y, step_y, map_height, stride_y, left, right, share, upper, lower, tap_row):
    """Logits of row `y`, rows being taken in order -> logits, and `upper`, `lower`, `tap_row` for the next row.

    `left`, `right` and `share` are the columns' of `across`. `upper` and `lower` are the rows of taps at and below
    `tap_row`, interpolated across; before the first row `tap_row` is -2.
    """
    low, share_y = pixel_place(y, step_y, map_height)
    if low != tap_row:
        if low == tap_row + 1:
            upper = lower
        else:
            upper = across(source + low * stride_y, left, right, share)
        lower = across(source + tl.minimum(low + 1, map_height - 1) * stride_y, left, right, share)
        tap_row = low
    return tl.fma(tl.zeros_like(upper) + share_y, lower - upper, upper), upper, lower, tap_row


@triton.jit
def tap_signs(source, rows, columns, stride_y, stride_x, TAP_H: tl.constexpr, TAP_W: tl.constexpr):
    """Signs of the taps in two results of `place_range`, reading TAP_H x TAP_W taps at a time -> two numbers.

    The first is 2 if all are positive and every pixel between them too, 1 if all are positive, else 0: interpolation
    rounds, so that between small and huge positive taps it may reach 0. The second is 1 if any is positive, else 0.
    """
    first_row, last_row = rows
    first_column, last_column = columns
    least = tl.full((TAP_H, TAP_W), LIMIT, tl.float32)
    most = tl.full((TAP_H, TAP_W), -LIMIT, tl.float32)
    for left in tl.range(first_column, last_column + 1, TAP_W):
        column = tl.minimum(left + tl.arange(0, TAP_W), last_column) * stride_x
        for top in tl.range(first_row, last_row + 1, TAP_H):
            row = tl.minimum(top + tl.arange(0, TAP_H), last_row) * stride_y
            value = tl.load(source + (row[:, None] + column[None, :])).to(tl.float32)
            value = tl.where(value > -LIMIT, value, -LIMIT)
            least = tl.minimum(least, value)
            most = tl.maximum(most, value)
    least, most = tl.min(least, 0), tl.max(most, 0)
    sign = tl.where(least > 0.0, tl.where((least > 0.01) & (most < 1000.0), 2, 1), 0)
    return tl.min(sign), tl.max((most > 0.0).to(tl.int32))


@triton.jit
def limited(values):
    """Values as float32, NaN as -1e30, limited to +-1e30."""
    values = values.to(tl.float32)
    return tl.minimum(tl.where(values > -LIMIT, values, -LIMIT), LIMIT)


@triton.jit
def tap_bounds(source, rows, columns, stride_y, stride_x, TAP_H: tl.constexpr, TAP_W: tl.constexpr):
    """Least and largest tap in two results of `tap_range`, reading TAP_H x TAP_W taps at a time."""
    first_row, last_row = rows
    first_column, last_column = columns
    least = tl.full((TAP_H, TAP_W), LIMIT, tl.float32)
    most = tl.full((TAP_H, TAP_W), -LIMIT, tl.float32)
    for top in tl.range(first_row, last_row + 1, TAP_H):
        row = tl.minimum(top + tl.arange(0, TAP_H), last_row) * stride_y
        for left in tl.range(first_column, last_column + 1, TAP_W):
            column = tl.minimum(left + tl.arange(0, TAP_W), last_column) * stride_x
            values = _finite(tl.load(source + row[:, None] + column[None, :]))
            least = tl.minimum(least, values)
            most = tl.maximum(most, values)
    return tl.min(least), tl.max(most)


def window_arguments(
    mask_logits: Tensor,  # [B, N, h, w]
    extent: tuple[float, float],
    size: tuple[int, int],
) -> tuple[Tensor | int | float, ...]:
    """Arguments of the kernels from ``logits`` to ``rest_x``.

    Raises ValueError for maps of 2^31 elements and more, for sides of 2^21 and more, and for other dtypes.
    """
    if mask_logits.dtype not in ELEMENTS:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, ELEMENTS))}, got {mask_logits.dtype}")
    sides = max(*mask_logits.shape[2:], *size)
    if sides >= _MOST_PIXELS:
        raise ValueError(f"sides of maps and output: expected fewer than {_MOST_PIXELS} pixels, got {sides}")
    mask_logits = narrow_maps(mask_logits)
    scales = (*scale_parts(float(extent[0]), size[0]), *scale_parts(float(extent[1]), size[1]))
    return mask_logits, *mask_logits.stride(), *mask_logits.shape[1:], *size, *scales


def window_types(dtype: torch.dtype) -> dict[str, str]:
    """Types of `window_arguments` that are not i32, for contiguous logits, whose ``stride_x`` is the constant 1."""
    scales = ("scale_y", "rest_y", "scale_x", "rest_x")
    return {"logits": f"*{ELEMENTS[dtype]}", **dict.fromkeys(scales, "fp32")}
