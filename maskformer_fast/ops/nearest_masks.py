"""Packed masks resized by nearest neighbours, as ``F.interpolate(mode="nearest")`` resizes masks.

In C++ on the CPU (csrc/nearest_masks): each row is made once for all rows of the result that read it, from tables of
bits, and only where it has pixels. On CUDA it is the eager twin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops.registration import register_operator
from maskformer_fast.structures import pack_masks, unpack_masks


class ResizedMasks(NamedTuple):
    """Result of `nearest_masks`."""

    masks: Tensor  # [N, H, ceil(W/8)] uint8, packed
    boxes: Tensor  # [N, 4] float32: x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask


class _Arguments(NamedTuple):
    masks: Tensor  # [N, h, ceil(w/8)] uint8, packed
    width: int  # w
    output_size: tuple[int, int]


def nearest_positions(
    source: int,
    size: int,
    device: torch.device,
) -> Tensor:
    """Source position of each output of ``F.interpolate(mode="nearest")`` -> [size] int64."""
    # float32, like torch's own: exact integer arithmetic would choose another pixel where the scale rounds down
    return (torch.arange(size, dtype=torch.float32, device=device) * (source / size)).long().clamp(max=source - 1)


def _positions(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    """Rows and columns that the result reads."""
    source = (arguments.masks.shape[1], arguments.width)
    device = arguments.masks.device
    rows, columns = (nearest_positions(s, o, device) for s, o in zip(source, arguments.output_size, strict=True))
    return rows, columns


def _nearest_masks_cpu(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    masks, (rows, columns) = arguments.masks.contiguous(), _positions(arguments)
    result, boxes = _nearest_masks_fake(arguments)
    load_extension().nearest_masks(
        [
            address_of(masks, "masks", "uint8", masks.shape),
            address_of(rows, "rows", "int64", rows.shape),
            address_of(columns, "columns", "int64", columns.shape),
        ],
        [*masks.shape[:2], arguments.width, *arguments.output_size],
        address_of(result, "result", "uint8", result.shape),
        address_of(boxes, "boxes", "float32", boxes.shape),
        torch.get_num_threads(),
    )
    return result, boxes


def _nearest_masks_torch(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    rows, columns = _positions(arguments)
    # columns first: less to unpack, and rows are copied as bytes
    result = pack_masks(unpack_masks(arguments.masks, arguments.width)[:, :, columns])[:, rows]
    sides = (unpack_masks(result, arguments.output_size[1]).any(1), (result != 0).any(2))
    lines = [side.to(torch.int8) for side in sides]
    first = [line.argmax(1) for line in lines]
    last = [line.shape[1] - line.flip(1).argmax(1) for line in lines]
    boxes = torch.stack([*first, *last], 1) * sides[0].any(1)[:, None]
    return result, boxes.to(torch.float32)


def _nearest_masks_fake(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    count, (height, width) = len(arguments.masks), arguments.output_size
    result = arguments.masks.new_empty(count, height, (width + 7) // 8)
    return result, result.new_empty(count, 4, dtype=torch.float32)


def _check(arguments: _Arguments) -> None:
    masks, width, output_size = arguments
    if masks.dtype != torch.uint8:
        raise TypeError(f"masks: expected packed torch.uint8, got {masks.dtype}")
    fits = masks.dim() == 3 and masks.shape[1] > 0 and width > 0 and masks.shape[2] == (width + 7) // 8
    check(fits, "masks", f"shape [N, h, {(width + 7) // 8}] for width {width}, with pixels", tuple(masks.shape))
    check(len(output_size) == 2 and min(output_size) > 0, "output_size", "positive height and width", output_size)


_nearest_masks = register_operator(
    "nearest_masks(Tensor masks, SymInt width, SymInt[2] output_size) -> (Tensor, Tensor)",
    _Arguments,
    check=_check,
    cpu=_nearest_masks_cpu,
    cuda=_nearest_masks_torch,
    fake=_nearest_masks_fake,
)


def nearest_masks(
    masks: Tensor,  # [N, h, ceil(w/8)] uint8, packed
    width: int,
    output_size: tuple[int, int],
) -> ResizedMasks:
    """Resize packed masks of ``width`` pixels by nearest neighbours, and find their boxes.

    Padding bits are ignored; those of the result are 0.

    Raises:
        TypeError: masks are not uint8.
        ValueError: shapes that do not fit, or a size without pixels.
        ImportError: the extension is not built.
    """
    return ResizedMasks(*_nearest_masks(masks, width, list(output_size)))


def nearest_masks_eager(
    masks: Tensor,
    width: int,
    output_size: tuple[int, int],
) -> ResizedMasks:
    """`nearest_masks` in plain PyTorch."""
    arguments = _Arguments(masks, width, output_size)
    _check(arguments)
    return ResizedMasks(*_nearest_masks_torch(arguments))
