"""Which cells of a low-resolution map a pixel reads, and which pixels read a cell, for mask losses.

Coordinates are exactly those of ``F.interpolate(align_corners=False)``, computed as fractions of integers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pixel_taps(index, size, out):
    """Taps of pixels of ``out`` on a map's axis of ``size`` -> tap before, share of the tap after it.

    The coordinate is (index + 1/2) size / out - 1/2, limited to 0..size - 1. `_check` ensures that products fit 32
    bits.
    """
    doubled = (2 * index + 1) * size + out  # coordinate plus 1, times 2 out: never negative, so division is the floor
    floor = doubled // (2 * out)
    share = (doubled - floor * (2 * out)).to(tl.float32) / (2 * out).to(tl.float32)
    return tl.minimum(tl.maximum(floor - 1, 0), size - 1), tl.where((floor > 0) & (floor < size), share, 0.0)


@triton.jit
def first_reader(cell, size, out):
    """First pixel of ``out`` whose coordinate on an axis of ``size`` cells is not below this cell."""
    first = ((2 * cell + 1) * out + size - 1) // (2 * size)
    return tl.where(cell <= 0, 0, tl.where(cell >= size, out, first))


@triton.jit
def reader_after(cell, size, out):
    """`first_reader` of the cell after one, if it exists, and the remainder of the division."""
    place = (2 * cell + 3) * out + size - 1
    reader = place // (2 * size)
    return reader, place - reader * (2 * size)


@triton.jit
def next_reader(reader, remainder, size, out):
    """The same for the next cell, without a division."""
    reader += out // size
    remainder += 2 * (out % size)
    carry = remainder >= 2 * size
    return tl.where(carry, reader + 1, reader), tl.where(carry, remainder - 2 * size, remainder)


@triton.jit
def row_shares(y, cell, size, out, step):
    """Share of the next row of cells in the rows of pixels that are after a row of cells; step is 1 / (2 out)."""
    beyond = (2 * y + 1) * size - (2 * cell + 1) * out
    return tl.maximum(beyond, 0).to(tl.float32) * step


@triton.jit
def cell_weights(x, cell, size, out):
    """Weights of cells in pixels, equal to those of `pixel_taps`, without division -> [pixels, cells]."""
    place = tl.minimum(tl.maximum((2 * x + 1) * size - out, 0), (size - 1) * (2 * out))  # coordinate times 2 out
    distance = tl.abs(place[:, None] - (cell * (2 * out))[None, :]).to(tl.float32)
    return tl.maximum(1.0 - distance * (1.0 / (2 * out).to(tl.float32)), 0.0)
