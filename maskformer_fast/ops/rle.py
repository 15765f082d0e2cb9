"""Compressed COCO run lengths (RLE) of masks: of boolean arrays, of packed arrays, and directly of mask logits.

`instance_rle` is the operator. It packs each mask, then encodes it: on the CPU in C++, on CUDA with the bits of a
column in words (kernels/rle.py). The strings are those that pycocotools makes of the masks of `instance_inference`. No
function has a gradient.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.checks import check
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.registration import register_operator
from maskformer_fast.ops.resample import without_float64
from maskformer_fast.ops.segments import check_logits, instance_inference

BYTES_PER_COLUMN = 4
"""Bytes that `encode_instances` first reserves for each column of a mask: enough for two runs."""
_CHUNK_PIXELS = 8 * 2**20
"""Pixels of masks that `encode_masks` encodes at a time."""


class EncodedMasks(NamedTuple):
    """Result of `instance_rle`."""

    data: Tensor  # [capacity] uint8: mask after mask, then zeros
    starts: Tensor  # [B * N + 1] int64: mask i is data[starts[i]:starts[i+1]]


class _Arguments(NamedTuple):
    mask_logits: Tensor  # [B, N, h, w] floating
    extent: tuple[float, float]
    output_size: tuple[int, int]
    capacity: int


def _instance_rle_cpu(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    mask_logits, extent, output_size, capacity = arguments
    masks = instance_inference(mask_logits, extent, output_size).masks
    counts = [rle["counts"] for rle in encode_packed_masks(masks.flatten(0, 1).numpy(), output_size[1])]
    starts = torch.tensor([0, *accumulate(map(len, counts))])
    text = b"".join(counts)
    data = torch.zeros(capacity, dtype=torch.uint8)
    if 0 < len(text) <= capacity:
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data, starts


def _instance_rle_cuda(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    kernels = load_kernels("rle")
    data, starts = _instance_rle_fake(arguments)
    data.zero_()
    kernels.encode_masks(without_float64(arguments.mask_logits), arguments.extent, arguments.output_size, data, starts)
    return data, starts


def _instance_rle_fake(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    mask_logits = arguments.mask_logits
    data = mask_logits.new_empty(arguments.capacity, dtype=torch.uint8)
    return data, data.new_empty(mask_logits.shape[0] * mask_logits.shape[1] + 1, dtype=torch.int64)


def _check(arguments: _Arguments) -> None:
    mask_logits, extent, output_size, capacity = arguments
    check_logits(mask_logits, extent, output_size)
    check(output_size[0] * output_size[1] < 1 << 31, "output_size", "fewer than 2^31 pixels", output_size)
    check(capacity >= 0, "capacity", "0 or more bytes", capacity)


_instance_rle = register_operator(
    "instance_rle(Tensor mask_logits, float[2] extent, SymInt[2] output_size, SymInt capacity) -> (Tensor, Tensor)",
    _Arguments,
    check=_check,
    cpu=_instance_rle_cpu,
    cuda=_instance_rle_cuda,
    fake=_instance_rle_fake,
)


@torch.no_grad()
def instance_rle(
    mask_logits: Tensor,  # [B, N, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
    capacity: int,
) -> EncodedMasks:
    """Compressed COCO run lengths of the masks (logit > 0 after resampling to the output), all in one buffer.

    The host does not wait for the device. The masks fit if ``starts[-1] <= capacity``. If they do not, ``starts[-1]``
    is a sufficient capacity, and the other numbers and the bytes are invalid. `encode_instances` handles both cases.

    Args:
        extent: height and width of the images in mask pixels, common to the batch.
        output_size: height H and width W of the masks.
        capacity: bytes of the buffer.

    Raises:
        ValueError: shapes that do not fit, or an output of 2^31 pixels or more.
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    return EncodedMasks(*_instance_rle(mask_logits, extent, output_size, capacity))


def encode_instances(
    mask_logits: Tensor,  # [B, N, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> list[list[dict[str, Any]]]:
    """Encode the masks of `instance_rle` as COCO's objects, {"size": [H, W], "counts": bytes}, for each image and
    query.

    Raises the errors of `instance_rle`. Where the buffer is too small, the operator runs again with a larger one.
    """
    batch, queries = mask_logits.shape[:2]
    capacity = BYTES_PER_COLUMN * batch * queries * output_size[1]
    data, starts = instance_rle(mask_logits, extent, output_size, capacity)
    places = starts.tolist()
    if places[-1] > capacity:
        data, starts = instance_rle(mask_logits, extent, output_size, places[-1])
        places = starts.tolist()
    text = data[: places[-1]].cpu().numpy().tobytes()
    masks = [{"size": [*output_size], "counts": text[start:end]} for start, end in pairwise(places)]
    return [masks[image * queries : (image + 1) * queries] for image in range(batch)]


def encode_masks(
    masks: np.ndarray,  # [N, H, W] bool
) -> list[dict[str, Any]]:
    """Compressed COCO RLE of each mask -> {"size": [H, W], "counts": bytes}.

    Raises:
        TypeError: masks are not bool.
        ValueError: masks are not of rank 3.
        ModuleNotFoundError: pycocotools is missing.
    """
    if masks.dtype != np.bool_:
        raise TypeError(f"masks: expected bool, got {masks.dtype}")
    if masks.ndim != 3:
        raise ValueError(f"masks: expected [N, H, W], got shape {masks.shape}")
    count, height, width = masks.shape
    step = max(1, _CHUNK_PIXELS // max(1, height * width))
    return [rle for start in range(0, count, step) for rle in _encode(masks[start : start + step])]


def encode_packed_masks(
    packed: np.ndarray,  # [N, H, ceil(W/8)] uint8, as `structures.pack_masks`
    width: int,
) -> list[dict[str, Any]]:
    """Compressed COCO RLE of bit-packed masks, encoded from the bits in C++; equal to pycocotools'.

    Padding bits are ignored. Runs on ``torch.get_num_threads()`` threads.

    Raises:
        TypeError: packed is not uint8.
        ValueError: packed has another rank, no pixels, or another width than `width` packs to.
        ImportError: the extension is not built.
    """
    if packed.dtype != np.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    if packed.ndim != 3 or packed.shape[-1] != (width + 7) // 8 or 0 in packed.shape[1:]:
        raise ValueError(f"packed: expected [N, H, {(width + 7) // 8}] for width {width}, got shape {packed.shape}")
    packed = np.ascontiguousarray(packed)
    count, height = packed.shape[:2]
    counts = load_extension().encode_packed_masks(
        address_of(packed, "packed", "uint8", (count, height, (width + 7) // 8)), (count, height, width),
        torch.get_num_threads(),
    )  # fmt: skip
    return [{"size": [height, width], "counts": run_lengths} for run_lengths in counts]


def _encode(masks: np.ndarray) -> list[dict[str, Any]]:
    # The encoder reads columns first: [N, W, H] in C order is the [H, W, N] in Fortran order that it asks for.
    columns_first = np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8)
    return list(coco_tools().mask.encode(columns_first.transpose(2, 1, 0)))
