"""Packed masks resized by nearest neighbours, against `F.interpolate` of unpacked ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.ops.nearest_masks import nearest_masks, nearest_masks_eager
from maskformer_fast.structures import pack_masks, unpack_masks

SIDES = st.integers(1, 70)


def check(masks: torch.Tensor, size: tuple[int, int]) -> None:
    """Both implementations give the masks of `F.interpolate`, padding bits of 0, and the boxes of its pixels."""
    expected = F.interpolate(masks[:, None].float(), size)[:, 0] == 1
    packed = pack_masks(masks)
    if extra := masks.shape[2] % 8:
        packed[..., -1] |= 0xFF << extra & 0xFF  # padding bits, which are ignored
    for function in (nearest_masks, nearest_masks_eager):
        found = function(packed, masks.shape[2], size)
        assert torch.equal(unpack_masks(found.masks, size[1]), expected)
        assert torch.equal(found.masks, pack_masks(expected))
        assert found.boxes.dtype == torch.float32 and found.boxes.shape == (len(masks), 4)
        for mask, box in zip(expected, found.boxes.tolist(), strict=True):
            y, x = mask.nonzero().unbind(1)
            assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(y) else [0, 0, 0, 0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9999), st.integers(0, 4), SIDES, SIDES, st.integers(1, 200), st.integers(1, 200),
    st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
)  # fmt: skip
def test_masks_equal_interpolation(
    seed: int, count: int, h: int, w: int, height: int, width: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    check(torch.rand(count, h, w, generator=generator) < share, (height, width))


@pytest.mark.parametrize("size", [(1224, 1632), (97, 384), (383, 385), (20, 10), (1, 1)])
def test_a_blob_in_a_large_mask(size: tuple[int, int]) -> None:
    masks = torch.zeros(3, 384, 384, dtype=torch.bool)
    masks[0, 100:103, 7:250] = True
    masks[1, 383, 383] = masks[1, 0, 0] = True
    check(masks, size)


def test_opcheck_compile_and_strides() -> None:
    masks = torch.randint(256, (2, 9, 3), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.maskformer_fast.nearest_masks.default, (masks, 21, [17, 30]))

    def resize(masks: torch.Tensor) -> torch.Tensor:
        return nearest_masks(masks, 21, (17, 30)).boxes + 1

    assert torch.equal(torch.compile(resize, fullgraph=True, backend="aot_eager")(masks), resize(masks))
    strided = masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(nearest_masks(strided, 21, (17, 30)).masks, nearest_masks(masks, 21, (17, 30)).masks)


@pytest.mark.parametrize(
    "change, error, name",
    [
        ({"masks": torch.zeros(1, 4, 3)}, TypeError, "masks"),
        ({"masks": torch.zeros(4, 3, dtype=torch.uint8)}, ValueError, "masks"),
        ({"width": 25}, ValueError, "masks"),
        ({"masks": torch.zeros(1, 0, 3, dtype=torch.uint8)}, ValueError, "masks"),
        ({"output_size": (3, 0)}, ValueError, "output_size"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], name: str) -> None:
    arguments = {"masks": torch.zeros(1, 4, 3, dtype=torch.uint8), "width": 20, "output_size": (5, 5), **change}
    with pytest.raises(error, match=rf"{name}: expected .*, got "):
        nearest_masks(**arguments)
