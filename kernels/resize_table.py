"""Coefficients of Pillow's antialiased bilinear resize, and its order of passes; needs NumPy only, for runtimes."""

from __future__ import annotations

import numpy as np

PRECISION_BITS = 22
"""Fractional bits of a coefficient: of 32 bits, 8 are the result's and 2 are spare for filters with negative lobes."""
MAX_SIDE = (1 << 24) - 1
"""Largest height or width in pixels: Pillow stores the image's box in float32."""


def resize_table(size: int, out_size: int) -> np.ndarray:
    """Start and fixed-point coefficients of each output pixel's filter -> [1 + taps, out_size] int32.

    Row 0 is the first source pixel, row 1 + t the coefficient of source pixel ``first + t`` times 2**PRECISION_BITS.
    Filters shorter than the longest end in zeros, which may be beyond the last source pixel; ``taps`` is as small as
    the filters allow, 1 where the size does not change. Both passes of ``Image.resize(..., BILINEAR)`` use these
    numbers: triangles of half-width max(1, size / out_size), clipped at the border and normalised in float64 in
    Pillow's order of operations (src/libImaging/Resample.c), hence equal to the last bit.

    Raises:
        ValueError: a size outside 1..MAX_SIDE.
    """
    for name, value in (("size", size), ("out_size", out_size)):
        if not 1 <= value <= MAX_SIDE:
            raise ValueError(f"{name}: expected 1..{MAX_SIDE}, got {value}")
    scale = size / out_size
    half_width = max(scale, 1.0)
    center = (np.arange(out_size) + 0.5) * scale
    first = np.maximum((center - half_width + 0.5).astype(np.int64), 0)
    end = np.minimum((center + half_width + 0.5).astype(np.int64), size)
    source = first + np.arange(int((end - first).max()))[:, None]
    weights = np.maximum(1.0 - np.abs((source - center + 0.5) * (1.0 / half_width)), 0.0)
    weights[source >= end] = 0.0
    total = np.cumsum(weights, axis=0)[-1]  # one after another, like Pillow; np.sum would add in pairs
    coefficients = (0.5 + weights / total * (1 << PRECISION_BITS)).astype(np.int32)
    taps = 1 + int(np.max(coefficients.any(axis=1).nonzero()[0], initial=0))  # millions to one: all round to zero
    return np.concatenate([first[None].astype(np.int32), coefficients[:taps]])


def shift_inside(table: np.ndarray, size: int) -> np.ndarray:
    """The same filters, all as long as the longest and inside the source: the last ones begin earlier, with zeros."""
    shifted = np.zeros_like(table)
    taps = len(table) - 1
    shifted[0] = np.minimum(table[0], size - taps)
    source = np.arange(taps)[:, None] + shifted[0] - table[0]
    shifted[1:] = np.where(source >= 0, np.take_along_axis(table[1:], np.maximum(source, 0), 0), 0)
    return shifted


def tile_table(table: np.ndarray, size: int, block: int) -> np.ndarray:
    """Coefficients of tiles of ``block`` output pixels by source pixel -> [tiles, 1 + sources, block] int32.

    In a tile, row 0 begins with the first source pixel and how many there are; row 1 + s has the coefficients of the
    s-th of them in each of the tile's pixels, zeros where it has none.
    """
    taps, out_size = len(table) - 1, table.shape[1]
    tiles = -(-out_size // block)
    last = np.minimum(np.arange(1, tiles + 1) * block, out_size) - 1
    begin = table[0, ::block]
    count = np.minimum(table[0, last] + taps, size) - begin
    result = np.zeros((tiles, 1 + count.max(), block), np.int32)
    result[:, 0, 0], result[:, 0, 1] = begin, count
    pixel = np.arange(out_size)
    tile = pixel // block
    for tap in range(taps):
        source = table[0] + tap - begin[tile]
        inside = source < count[tile]
        result[tile[inside], 1 + source[inside], pixel[inside] % block] = table[1 + tap, inside]
    return result


def columns_first(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Tell whether Pillow, resizing an image of ``shape`` to ``size``, filters its columns before its rows.

    The order matters, because pixels are rounded to 8 bits between the passes. Pillow 13 begins with the columns where
    the height loses more than twice as many pixels as the width (#9549); earlier versions always begin with the rows.
    """
    loss = shape[0] - size[0]
    return loss > 0 and loss > 2 * (shape[1] - size[1])
