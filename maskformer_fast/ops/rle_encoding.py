"""COCO run-length encoding of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from maskformer_fast.core.extension import load_extension

__all__ = ["coco_tools", "encode_masks", "encode_packed_masks"]

_CHUNK_PIXELS = 8 * 2**20  # masks unpacked at a time: 8 MiB, whatever their number


def coco_tools() -> Any:
    """The pycocotools package with `mask`, `coco` and `cocoeval`, imported on first use.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pycocotools is needed for AP and for COCO run-length encoding; "
            "install it with: pip install pycocotools", name=error.name
        ) from error
    return pycocotools


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
    """Compressed COCO RLE of bit-packed masks, straight from the bits in C++; equal to pycocotools'.

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
    address = packed.__array_interface__["data"][0]
    counts = load_extension().encode_packed_masks(address, (count, height, width), torch.get_num_threads())
    return [{"size": [height, width], "counts": run_lengths} for run_lengths in counts]


def _encode(masks: np.ndarray) -> list[dict[str, Any]]:
    # The encoder reads columns first: [N, W, H] in C order is the [H, W, N] in Fortran order that it asks for.
    columns_first = np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8)
    return list(coco_tools().mask.encode(columns_first.transpose(2, 1, 0)))
