"""Masks of a tile of output pixels inside the semantic kernels: coordinates, resampling, sigmoid.

Masks are multiplied by `SCALE` and kept as float16, or as the sum of two float16 (high and rest). There are two ways:

- `quick_masks`: few instructions. The weights of the taps are split into parts, whose products with the logits are
  exact, and contain the factor of the base-2 exponential. A logit that is NaN or infinite may give NaN masks to every
  pixel of the tile, and never gives a mask that is wrong but not NaN.
- `masks_of_logits`: for any logits and any number of taps, as `resample` defines it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskformer_fast.kernels.class_probabilities import SCALE
from maskformer_fast.kernels.resample import add_taps, sigmoid, tap_place, tap_weights

_LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Helpers take related values as one tuple, which costs nothing in the compiled code. Parameters of the kernels stay
# single values: compilation ahead of time and recorded launches describe a kernel's interface by them.
#
# geometry: map_size (height, width), output_size (height, width), scales (scale_y, rest_y, scale_x, rest_x), offsets
#     (y, x), tap_counts (rows, columns of a tile), tile_counts (y, x); see `resample.AxisTiles`
# A function returns at its end: Triton goes on after a return under a condition that is known when it compiles.
#
# tile: row and column of its first tap; for each pixel the tap before it and the share of the tap after it, along y, x
# strides: stride_q, stride_y, stride_x of the logits


@triton.jit
def halves(masks):
    """Scaled masks as a sum of two float16."""
    high = masks.to(tl.float16)
    return high, (masks - high.to(tl.float32)).to(tl.float16)


@triton.jit
def load_taps(logits, query, present, tap, tile, strides, geometry):
    """Logits of a tile's taps -> [taps, queries] float32, -inf for queries that are not present; rows, columns."""
    first_y, first_x, _, _, _, _ = tile
    stride_q, stride_y, stride_x = strides
    map_size, _, _, _, tap_counts, _ = geometry
    map_height, map_width = map_size
    _, tap_columns = tap_counts
    row, column = first_y + tap // tap_columns, first_x + tap % tap_columns
    place = tl.minimum(row, map_height - 1) * stride_y + tl.minimum(column, map_width - 1) * stride_x
    source = logits + query.to(tl.int64)[None, :] * stride_q + place[:, None]
    values = tl.load(source, mask=present[None, :], other=float("-inf")).to(tl.float32)
    return values, row, column


@triton.jit
def masks_of_logits(
    logits,  # [Q, h, w] of the tile's image
    query,  # [QUERIES] int32
    present,  # [QUERIES]: the masks of others are 0
    tile,
    strides,
    geometry,
    TAPS: tl.constexpr,
):
    """Masks of the given queries at a tile's pixels, as `halves`; NaN where a tap is NaN."""
    _, _, low_y, share_y, low_x, share_x = tile
    _, _, _, _, tap_counts, _ = geometry
    tap_rows, tap_columns = tap_counts
    resampled = tl.zeros((low_y.shape[0], query.shape[0]), tl.float32)
    for start in tl.range(0, tap_rows * tap_columns, TAPS, num_stages=1):
        tap = start + tl.arange(0, TAPS)
        values, row, column = load_taps(logits, query, present, tap, tile, strides, geometry)
        resampled = add_taps(resampled, tap_weights(row, column, low_y, share_y, low_x, share_x), values)
    return halves(sigmoid(resampled) * SCALE)


@triton.jit
def first_tap(pixel, scale, size):
    """Tap before a tile's first pixel inside the output, and that pixel's distance from it, at least -0.5.

    In float64 once a tile; distances inside a tile of few taps are exact to 4e-6 in float32.
    """
    coordinate = tl.fma(pixel.to(tl.float64) + 0.5, scale, -0.5)
    first = tl.minimum(coordinate.to(tl.int32), size - 1)  # truncation makes -0.5 the first tap
    return first, (coordinate - first.to(tl.float64)).to(tl.float32)


@triton.jit
def tile_axis(start, offset_pixels, scale, double_scale, size):
    """First tap of a tile along one axis, and for each of its pixels the distance from it.

    `start` is the tile's first pixel, which may be before the output, `offset_pixels` [pixels] the others' distances.
    """
    inside = tl.maximum(start, 0)
    first, at = first_tap(inside, double_scale, size)
    at += (start - inside).to(tl.float32) * scale
    at += offset_pixels.to(tl.float32) * scale
    return first, tl.minimum(tl.maximum(at, 0.0), (size - 1 - first).to(tl.float32))


@triton.jit
def near_weights(at_y, at_x, tap_y, tap_x):
    """Bilinear weights of taps for pixels, both by their distances from the first tap -> [pixels, taps] float32."""
    weight_y = tl.maximum(1.0 - tl.abs(at_y[:, None] - tap_y.to(tl.float32)[None, :]), 0.0)
    weight_x = tl.maximum(1.0 - tl.abs(at_x[:, None] - tap_x.to(tl.float32)[None, :]), 0.0)
    return weight_y * weight_x


@triton.jit
def _round_to_tf32(values):
    return ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def exponent_parts(weights, element: tl.constexpr):
    """Weights times -log2(e) as a sum of two or three parts, each exact in a product with logits of the type."""
    weights *= -_LOG2_E
    if element == tl.float32:
        high = _round_to_tf32(weights)
        parts = (high, weights - high)
    else:
        high = weights.to(element)
        rest = weights - high.to(tl.float32)
        low = rest.to(element)
        parts = (high, low)
        if element == tl.bfloat16:
            parts += ((rest - low.to(tl.float32)).to(element),)
    return parts


@triton.jit
def _add_product(total, parts, values):
    """Add the products of weights in `exponent_parts` and logits [taps, queries], the smallest first."""
    if values.dtype == tl.float32:
        high = _round_to_tf32(values)
        total = tl.dot(parts[1], high, total, input_precision="tf32")
        total = tl.dot(parts[0], values - high, total, input_precision="tf32")
        total = tl.dot(parts[0], high, total, input_precision="tf32")
    else:
        for part in tl.static_range(len(parts)):
            total = tl.dot(_operand(parts[len(parts) - 1 - part]), _operand(values), total)
    return total


@triton.jit
def _operand(values):
    """Values as a matrix product takes them: the interpreter's would read bfloat16 as integers."""
    return values.to(tl.float32) if _INTERPRETED else values


@triton.jit
def _reciprocal(values):
    """1 / values to the last bit, 0 of infinity; one instruction where 1.0 / values takes ten."""
    if _INTERPRETED:
        result = 1.0 / values
    else:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def query_groups(ROWS: tl.constexpr):
    """Queries 0..ROWS - 1, a multiple of 16, in groups of 64, 32 and 16."""
    groups = ()
    for group in tl.static_range(ROWS // 64):
        groups += (group * 64 + tl.arange(0, 64),)
    if ROWS % 64 >= 32:
        groups += (ROWS // 64 * 64 + tl.arange(0, 32),)
    if ROWS % 32 == 16:
        groups += (ROWS - 16 + tl.arange(0, 16),)
    return groups


@triton.jit
def quick_masks(
    logits,  # [Q, h, w] of the tile's image
    groups,  # of `query_groups`
    num_queries,
    strides,
    parts,  # `exponent_parts` of the taps' weights, where there is one round of taps
    place,  # [TAPS] offsets of these taps
    top, left, tile_y, tile_x,  # rows and columns of the pixels are top + tile_y, left + tile_x, where MANY
    first_y, first_x, geometry,
    TAPS: tl.constexpr, MANY: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Masks of all queries at a tile's pixels -> high parts of the groups, and where SPLIT the rests."""
    stride_q, stride_y, stride_x = strides
    highs = ()
    rests = ()
    for group in tl.static_range(len(groups)):
        query = groups[group]
        source = logits + query.to(tl.int64)[None, :] * stride_q
        present = (query < num_queries)[None, :]
        exponent = tl.zeros((tile_y.shape[0], query.shape[0]), tl.float32)
        if MANY:
            map_size, _, scales, _, tap_counts, _ = geometry
            map_height, map_width = map_size
            scale_y, rest_y, scale_x, rest_x = scales
            tap_rows, tap_columns = tap_counts
            low_y, share_y = tap_place(top + tile_y, scale_y, rest_y, map_height)
            low_x, share_x = tap_place(left + tile_x, scale_x, rest_x, map_width)
            for start in tl.range(0, tap_rows * tap_columns, TAPS, num_stages=1):
                tap = start + tl.arange(0, TAPS)
                row, column = first_y + tap // tap_columns, first_x + tap % tap_columns
                weights = tap_weights(row, column, low_y, share_y, low_x, share_x)
                here = tl.minimum(row, map_height - 1) * stride_y + tl.minimum(column, map_width - 1) * stride_x
                values = tl.load(source + here[:, None], mask=present, other=0.0)
                exponent = _add_product(exponent, exponent_parts(weights, values.dtype), values)
        else:
            values = tl.load(source + place[:, None], mask=present, other=0.0)
            exponent = _add_product(exponent, parts, values)
        masks = _reciprocal(tl.exp2(exponent) * (1.0 / SCALE) + (1.0 / SCALE))
        if SPLIT:
            high, rest = halves(masks)
            highs += (high,)
            rests += (rest,)
        else:
            highs += (masks.to(tl.float16),)
    return highs, rests
