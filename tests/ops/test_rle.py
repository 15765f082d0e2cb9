"""COCO run lengths on the CPU, of mask logits and of packed masks, against pycocotools."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.ops import encode_instances, instance_inference, instance_rle
from maskformer_fast.ops.rle import encode_masks, encode_packed_masks
from maskformer_fast.structures import pack_masks, unpack_masks


def coco_counts(logits, extent, size) -> list[bytes]:
    tools = pytest.importorskip("pycocotools.mask")
    masks = unpack_masks(instance_inference(logits, extent, size).masks.flatten(0, 1), size[1]).numpy()
    return [rle["counts"] for rle in tools.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 3), st.integers(1, 40), st.integers(1, 40))
def test_instances_equal_pycocotools(seed: int, queries: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, queries, 5, 6, generator=generator) - seed % 3
    arguments = (logits, (4.3, 6.0), (height, width))
    expected = coco_counts(*arguments) if queries else []
    size = sum(map(len, expected))
    data, starts = instance_rle(*arguments, size + 3)
    assert starts.dtype == torch.int64 and data.dtype == torch.uint8 and len(data) == size + 3
    assert [data[start:end].numpy().tobytes() for start, end in pairwise(starts.tolist())] == expected
    assert instance_rle(*arguments, max(0, size - 1)).starts[-1] == size
    encoded = encode_instances(*arguments)
    assert [len(image) for image in encoded] == [queries] * 2
    assert [rle["counts"] for image in encoded for rle in image] == expected
    assert all(rle["size"] == [height, width] for image in encoded for rle in image)


def test_buffer_grows_once_it_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.randn(1, 3, 9, 9), (9.0, 9.0), (40, 30))
    expected = coco_counts(*arguments)
    monkeypatch.setattr(sys.modules["maskformer_fast.ops.rle"], "BYTES_PER_COLUMN", 0)
    assert [rle["counts"] for rle in encode_instances(*arguments)[0]] == expected


def test_opcheck_and_compile() -> None:
    logits = torch.randn(2, 3, 5, 6)
    operator = torch.ops.maskformer_fast.instance_rle.default
    for capacity in (0, 500):
        torch.library.opcheck(operator, (logits, [5.0, 6.0], [17, 9], capacity))

    def encode(logits: torch.Tensor) -> torch.Tensor:
        return instance_rle(logits - 1, (5.0, 6.0), (17, 9), 500).starts + 1

    assert torch.equal(torch.compile(encode, fullgraph=True, backend="aot_eager")(logits), encode(logits))


@pytest.mark.parametrize(
    "change, name",
    [
        ({"mask_logits": torch.zeros(2, 4, 4)}, "mask_logits"),
        ({"extent": (9, 4)}, "extent"),
        ({"output_size": (46341, 46341)}, "output_size"),
        ({"capacity": -1}, "capacity"),
    ],
)
def test_bad_input_is_named(change, name) -> None:
    arguments = {"mask_logits": torch.zeros(1, 2, 4, 4), "extent": (4, 4), "output_size": (8, 8), "capacity": 9}
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got "):
        instance_rle(**{**arguments, **change})


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 90), st.integers(1, 200), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    st.integers(1, 40), st.integers(0, 9999),
)  # fmt: skip
def test_packed_masks_equal_pycocotools(
    count: int, height: int, width: int, share: float, cell: int, seed: int
) -> None:
    """Masks of square cells, from single pixels to complete images, so that runs are of any length."""
    coarse = np.random.default_rng(seed).random((count, -(-height // cell), -(-width // cell))) < share
    masks = coarse.repeat(cell, 1).repeat(cell, 2)[:, :height, :width]
    packed = pack_masks(torch.from_numpy(masks)).numpy()
    assert encode_packed_masks(packed, width) == encode_masks(np.ascontiguousarray(masks))


def test_padding_bits_are_ignored() -> None:
    masks = np.random.default_rng(0).random((3, 21, 75)) < 0.5
    packed = pack_masks(torch.from_numpy(masks)).numpy()
    packed[..., -1] |= 0b1111_1000  # 75 = 9 bytes and 3 bits
    assert encode_packed_masks(packed, 75) == encode_masks(masks)


def test_packed_masks_of_any_strides_and_threads() -> None:
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
