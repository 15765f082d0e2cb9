"""Run lengths of packed masks against pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.ops.rle import encode_masks, encode_packed_masks
from maskformer_fast.structures import pack_masks


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 90), st.integers(1, 200), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    st.integers(1, 40), st.integers(0, 9999),
)  # fmt: skip
def test_equals_pycocotools(count: int, height: int, width: int, share: float, cell: int, seed: int) -> None:
    """Masks of square cells, from single pixels to whole pictures, so that runs are of any length."""
    coarse = np.random.default_rng(seed).random((count, -(-height // cell), -(-width // cell))) < share
    masks = coarse.repeat(cell, 1).repeat(cell, 2)[:, :height, :width]
    packed = pack_masks(torch.from_numpy(masks)).numpy()
    assert encode_packed_masks(packed, width) == encode_masks(np.ascontiguousarray(masks))


def test_padding_bits_are_ignored() -> None:
    masks = np.random.default_rng(0).random((3, 21, 75)) < 0.5
    packed = pack_masks(torch.from_numpy(masks)).numpy()
    packed[..., -1] |= 0b1111_1000  # 75 = 9 bytes and 3 bits
    assert encode_packed_masks(packed, 75) == encode_masks(masks)


def test_any_strides_and_threads() -> None:
    masks = np.random.default_rng(0).random((40, 210, 330)) < 0.01
    packed = pack_masks(torch.from_numpy(masks)).numpy()
    expected = encode_masks(masks)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert encode_packed_masks(np.asfortranarray(packed), 330) == expected
            assert encode_packed_masks(packed[::-2], 330) == expected[::-2]
    finally:
        torch.set_num_threads(threads)


def test_masks_without_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"packed: expected \[N, H, 1\] for width 5"):
        encode_packed_masks(np.zeros((2, 0, 1), np.uint8), 5)
