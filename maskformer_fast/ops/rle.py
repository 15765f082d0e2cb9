"""Instance masks straight to compressed COCO run lengths.

On CUDA no mask is stored, dense or packed, on the way (kernels/rle.py); on the CPU each is packed, then encoded, in
C++. The strings are those that pycocotools makes of the masks of `instance_inference`. No function has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_kernels
from maskformer_fast.ops.rle_encoding import encode_packed_masks
from maskformer_fast.ops.segments import check_logits, instance_inference, narrowed

BYTES_PER_COLUMN = 4
"""Of a mask, at first: as much as two runs in every column take, of most objects that is."""


class EncodedMasks(NamedTuple):
    """What `instance_rle` makes."""

    data: Tensor  # [capacity] uint8: mask after mask, then zeros
    starts: Tensor  # [B * N + 1] int64: mask i is data[starts[i]:starts[i+1]]


_library = torch.library.Library("maskformer_fast", "FRAGMENT")
_library.define(
    "instance_rle(Tensor mask_logits, float[2] extent, SymInt[2] output_size, SymInt capacity) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.no_grad()
def instance_rle(
    mask_logits: Tensor,  # [B, N, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
    capacity: int,
) -> EncodedMasks:
    """Compressed COCO run lengths of the masks (logit > 0 after resampling to the output), all in one buffer.

    Nothing waits for the device. The masks fit if ``starts[-1] <= capacity``; if not, ``starts[-1]`` is a capacity at
    which they do, and the other numbers and the bytes mean nothing. `encode_instances` sees to that.

    Args:
        extent: height and width of the images in mask pixels, common to the batch.
        output_size: height H and width W of the masks.
        capacity: bytes of the buffer.

    Raises:
        ValueError: shapes that do not fit, or an output of 2^31 pixels or more.
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    check_logits(mask_logits, extent, output_size)
    check(output_size[0] * output_size[1] < 1 << 31, "output_size", "fewer than 2^31 pixels", output_size)
    check(capacity >= 0, "capacity", "0 or more bytes", capacity)
    return EncodedMasks(*torch.ops.maskformer_fast.instance_rle(mask_logits, extent, output_size, capacity))


def encode_instances(
    mask_logits: Tensor,  # [B, N, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> list[list[dict[str, Any]]]:
    """The same as COCO's objects, {"size": [H, W], "counts": bytes}, for every image and query.

    Errors are those of `instance_rle`. Where the buffer turns out too small, it is run again with one large enough.
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


def _instance_rle_cpu(
    mask_logits: Tensor, extent: Sequence[float], output_size: Sequence[int], capacity: int
) -> tuple[Tensor, Tensor]:
    masks = instance_inference(mask_logits, (extent[0], extent[1]), (output_size[0], output_size[1])).masks
    counts = [rle["counts"] for rle in encode_packed_masks(masks.flatten(0, 1).numpy(), output_size[1])]
    starts = torch.tensor([0, *accumulate(map(len, counts))])
    text = b"".join(counts)
    data = torch.zeros(capacity, dtype=torch.uint8)
    if 0 < len(text) <= capacity:
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data, starts


def _instance_rle_cuda(
    mask_logits: Tensor, extent: Sequence[float], output_size: Sequence[int], capacity: int
) -> tuple[Tensor, Tensor]:
    kernels = load_kernels("rle")
    data, starts = _instance_rle_fake(mask_logits, extent, output_size, capacity)
    data.zero_()
    window = (extent[0], extent[1]), (output_size[0], output_size[1])
    kernels.encode_masks(narrowed(mask_logits), *window, data, starts)
    return data, starts


def _instance_rle_fake(
    mask_logits: Tensor, extent: Sequence[float], output_size: Sequence[int], capacity: int
) -> tuple[Tensor, Tensor]:
    data = mask_logits.new_empty(capacity, dtype=torch.uint8)
    return data, data.new_empty(mask_logits.shape[0] * mask_logits.shape[1] + 1, dtype=torch.int64)


_library.impl("instance_rle", _instance_rle_cpu, "CPU")
_library.impl("instance_rle", _instance_rle_cuda, "CUDA")
torch.library.register_fake("maskformer_fast::instance_rle", _instance_rle_fake, lib=_library)
