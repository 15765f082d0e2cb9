"""Coefficient tables and the order of the two passes against Pillow itself."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskformer_fast.kernels.resize_table import (
    MAX_SIDE,
    PRECISION_BITS,
    columns_first,
    resize_table,
    shift_inside,
    tile_table,
)

SIDES = (1, 2, 3, 5, 8, 17, 31, 64, 100, 127, 255, 333)


def resized_by_table(
    lines: np.ndarray,  # [..., size] uint8
    out_size: int,
) -> np.ndarray:
    """One pass of the fixed-point resize, by the table -> [..., out_size] uint8."""
    first, *coefficients = resize_table(lines.shape[-1], out_size).astype(np.int64)
    total = np.full((*lines.shape[:-1], out_size), 1 << (PRECISION_BITS - 1))
    past_the_end = np.full((*lines.shape[:-1], len(coefficients)), 255)  # must not count
    padded = np.concatenate([lines, past_the_end], axis=-1).astype(np.int64)
    for tap, weights in enumerate(coefficients):
        total += weights * padded[..., first + tap]
    return np.minimum(total >> PRECISION_BITS, 255).astype(np.uint8)


def resized_by_pillow(line: np.ndarray, out_size: int, vertical: bool = False) -> np.ndarray:
    image = Image.fromarray(line[:, None] if vertical else line[None])
    size = (1, out_size) if vertical else (out_size, 1)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)).ravel()


@pytest.mark.parametrize("size", SIDES)
def test_every_pair_of_sides(size: int) -> None:
    rng = np.random.default_rng(size)
    for out_size in SIDES:
        for line in (rng.integers(0, 256, size, dtype=np.uint8), rng.integers(0, 2, size, dtype=np.uint8) * 255):
            expected = resized_by_pillow(line, out_size)
            np.testing.assert_array_equal(resized_by_table(line, out_size), expected, err_msg=f"{size} -> {out_size}")
            np.testing.assert_array_equal(resized_by_pillow(line, out_size, vertical=True), expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 2048), st.integers(0, 2**32 - 1))
def test_any_pair_of_sides(size: int, out_size: int, seed: int) -> None:
    line = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    np.testing.assert_array_equal(resized_by_table(line, out_size), resized_by_pillow(line, out_size))


@pytest.mark.parametrize(("size", "out_size"), [(1920, 1138), (1080, 640), (4000, 3), (9000, 1), (1, 5000), (480, 853)])
def test_single_impulses(size: int, out_size: int) -> None:
    """A single white pixel shows its own coefficient, which random lines could hide."""
    for place in np.random.default_rng(0).integers(0, size, 30):
        line = np.zeros(size, np.uint8)
        line[place] = 255
        np.testing.assert_array_equal(resized_by_table(line, out_size), resized_by_pillow(line, out_size))


@pytest.mark.parametrize(("size", "out_size", "taps"), [(64, 64, 1), (1, 1, 1), (3, 1, 3), (30, 10, 5), (10, 30, 2)])
def test_no_more_taps_than_the_longest_filter_has(size: int, out_size: int, taps: int) -> None:
    table = resize_table(size, out_size)
    assert table.shape == (1 + taps, out_size) and table.dtype == np.int32
    assert (table[1:] >= 0).all() and abs(table[1:].sum(0) - (1 << PRECISION_BITS)).max() <= taps


def test_an_unchanged_side_is_copied() -> None:
    np.testing.assert_array_equal(resize_table(7, 7), [np.arange(7), np.full(7, 1 << PRECISION_BITS)])


SIZES = [(64, 64), (1, 1), (3, 1), (1, 9), (30, 11), (10, 33), (1000, 7), (7, 100)]


def matrix(table: np.ndarray, size: int) -> np.ndarray:
    """Coefficients [output pixels, source pixels] of a table."""
    result = np.zeros((table.shape[1], size + len(table)), np.int64)
    for tap, coefficients in enumerate(table[1:]):
        result[np.arange(table.shape[1]), table[0] + tap] += coefficients
    return result


@pytest.mark.parametrize(("size", "out_size"), SIZES)
def test_shifted_filters_are_the_same_and_inside(size: int, out_size: int) -> None:
    table = resize_table(size, out_size)
    shifted = shift_inside(table, size)
    assert shifted.shape == table.shape and shifted[0].min() >= 0 and (shifted[0] + len(table) - 1).max() <= size
    np.testing.assert_array_equal(matrix(shifted, size), matrix(table, size))


@pytest.mark.parametrize(("size", "out_size"), SIZES)
def test_tiles_have_the_same_filters(size: int, out_size: int) -> None:
    table = resize_table(size, out_size)
    tiles = tile_table(table, size, 8)
    result = np.zeros_like(matrix(table, size))
    for number, tile in enumerate(tiles):
        begin, count = tile[0, :2]
        assert 0 <= begin < begin + count <= size and not tile[1 + count :].any()
        for pixel in range(number * 8, min(number * 8 + 8, out_size)):
            result[pixel, begin : begin + count] = tile[1 : 1 + count, pixel % 8]
    np.testing.assert_array_equal(result, matrix(table, size))


@pytest.mark.parametrize(("size", "out_size", "name"), [(0, 4, "size"), (4, 0, "out_size"), (MAX_SIDE + 1, 4, "size")])
def test_sides_out_of_range(size: int, out_size: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected 1"):
        resize_table(size, out_size)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="older versions always begin with the rows")
def test_order_of_the_passes() -> None:
    rng = np.random.default_rng(1)
    orders = []
    for _ in range(400):
        height, width, out_height, out_width = (int(side) for side in rng.integers(1, 70, 4))
        image = rng.integers(0, 256, (height, width), dtype=np.uint8)
        orders.append(columns_first(image.shape, (out_height, out_width)))
        if orders[-1]:
            result = resized_by_table(resized_by_table(image.T, out_height).T, out_width)
        else:
            result = resized_by_table(resized_by_table(image, out_width).T, out_height).T
        expected = np.asarray(Image.fromarray(image).resize((out_width, out_height), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(result, expected, err_msg=f"{image.shape} -> {out_height}, {out_width}")
    assert 100 < sum(orders) < 300
