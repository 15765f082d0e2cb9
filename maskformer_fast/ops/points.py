"""Random points of images, and what masks and maps are there (Mask2Former, Cheng et al., CVPR 2022, section 3.3.2).

Points are (x, y) in 0..1 of an image. Mask2Former compares masks with targets at such points instead of every pixel.
Target masks are sampled where they lie, packed or not, in C++ on the CPU (csrc/points) and in Triton on CUDA
(kernels/points.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.registration import register_operator
from maskformer_fast.structures import Targets


class PointDraws(NamedTuple):
    """Random points of a batch, uniform in 0..1.

    All decoder layers and pairs of an image share its points. For comparison with other implementations each layer can
    have its own to match, and each pair its own for the loss.
    """

    match: Tensor  # [B, P, 2] or [L, B, P, 2]
    candidates: Tensor  # [B, M, 2] or [L, B, T, M, 2], of which the most uncertain are compared
    random: Tensor  # [B, R, 2] or [L, B, T, R, 2], compared whatever the prediction

    def to(self, dtype: torch.dtype) -> PointDraws:
        return PointDraws(*(points.to(dtype) for points in self))


def draw_points(loss: LossConfig, seeds: Sequence[int], device: torch.device | str) -> PointDraws:
    """Draw the points of a batch on the device: those of an image depend on its seed alone, not on the others."""
    check(loss.points > 0, "loss.points", "> 0", loss.points)
    certain = loss.points - int(loss.importance * loss.points)
    counts = (loss.points, int(loss.oversample * loss.points) if certain < loss.points else 0, certain)
    rows = []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed % 2**63)
        rows.append(torch.rand(sum(counts), 2, generator=generator, device=device))
    return PointDraws(*torch.stack(rows).split(counts, dim=1))


def sample_maps(
    maps: Tensor,  # [N, C, h, w] float32/64
    points: Tensor,  # [N, P, 2]
) -> Tensor:
    """Sample maps bilinearly, with zeros outside (``align_corners=False``) -> [N, C, P]; differentiable by the maps."""
    grid = (2 * points - 1).to(maps.dtype).unsqueeze(2)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


class _Arguments(NamedTuple):
    """Arguments of `sample_masks`: M masks of H x W, N results, G groups of P points."""

    masks: Tensor  # [M, H, W] float32 or bool, or [M, H, ceil(W/8)] uint8, packed
    width: int  # W
    rows: Tensor  # [N] int64, the mask of each result, -1 for zeros
    points: Tensor  # [G, P, 2] float32/64
    groups: Tensor  # [N] int64, the points of each result
    extent: tuple[int, int]  # height and width of which points are parts


def _check(arguments: _Arguments) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a shape or type that does not fit."""
    masks, width, rows, points, groups, extent = arguments
    if masks.dtype not in (torch.float32, torch.bool, torch.uint8):
        raise TypeError(f"masks: expected torch.float32, torch.bool or packed torch.uint8, got {masks.dtype}")
    if points.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"points: expected torch.float32 or torch.float64, got {points.dtype}")
    columns = (width + 7) // 8 if masks.dtype == torch.uint8 else width
    check(masks.dim() == 3 and masks.shape[2] == columns, "masks", f"shape [M, H, {columns}]", tuple(masks.shape))
    check(points.dim() == 3 and points.shape[2] == 2, "points", "shape [G, P, 2]", tuple(points.shape))
    for name, tensor in (("rows", rows), ("groups", groups)):
        fits = tensor.dtype == torch.int64 and tensor.dim() == 1 and len(tensor) == len(rows)
        check(fits, name, f"torch.int64 ({len(rows)},)", f"{tensor.dtype} {tuple(tensor.shape)}")
    check(len(extent) == 2, "extent", "height and width", extent)


def _sample_masks_fake(arguments: _Arguments) -> Tensor:
    return arguments.points.new_empty(len(arguments.rows), arguments.points.shape[1])


def _sample_masks_cpu(arguments: _Arguments) -> Tensor:
    if arguments.points.dtype == torch.float64:
        return _sample_masks_torch(arguments)
    result = _sample_masks_fake(arguments)
    masks, rows, points, groups = (
        tensor.contiguous() for tensor in (arguments.masks, arguments.rows, arguments.points, arguments.groups)
    )
    load_extension().sample_masks(
        dtype_name(masks),
        [
            address_of(masks, "masks", dtype_name(masks), masks.shape),
            address_of(rows, "rows", "int64", rows.shape),
            address_of(groups, "groups", "int64", rows.shape),
            address_of(points, "points", "float32", points.shape),
        ],
        [*masks.shape[:2], arguments.width, *arguments.extent, len(rows), *points.shape[:2]],
        address_of(result, "result", "float32", result.shape),
        torch.get_num_threads(),
    )
    return result


def _sample_masks_cuda(arguments: _Arguments) -> Tensor:
    if arguments.points.dtype == torch.float64:
        return _sample_masks_torch(arguments)
    masks, width, rows, points, groups, extent = arguments
    tensors = (tensor.contiguous() for tensor in (rows, points, groups))
    result: Tensor = load_kernels("points").sample_masks_forward(masks.contiguous(), width, *tensors, tuple(extent))
    return result


def _sample_masks_torch(arguments: _Arguments) -> Tensor:
    masks, width, rows, points, groups, extent = arguments
    result = _sample_masks_fake(arguments).zero_()
    if masks.numel() == 0:
        return result
    height, columns = masks.shape[1:]
    is_packed = masks.dtype == torch.uint8
    flat, first = masks.reshape(-1), (rows.clamp(min=0) * (height * columns)).unsqueeze(1)
    position = points * points.new_tensor([extent[1], extent[0]]) - 0.5
    corner = position.floor()
    right, low = (position - corner)[groups.clamp(min=0)].unbind(-1)
    left, top = corner.clamp(-2, max(height, width) + 1).long()[groups.clamp(min=0)].unbind(-1)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = left + dx, top + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
            place = first + y * columns + (x >> 3 if is_packed else x)
            values = flat.index_select(0, place.flatten()).view(place.shape)
            values = values >> (x & 7).to(torch.uint8) & 1 if is_packed else values
            share = (right if dx else 1 - right) * (low if dy else 1 - low)
            result += (values * share).where(inside, 0)
    return result.where((rows >= 0).unsqueeze(1), 0)


_sample_masks = register_operator(
    "sample_masks(Tensor masks, SymInt width, Tensor rows, Tensor points, Tensor groups, SymInt[] extent) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_sample_masks_cpu,
    cuda=_sample_masks_cuda,
    fake=_sample_masks_fake,
)


def sample_masks(
    masks: Tensor,  # [M, H, W] float32 or bool, or [M, H, ceil(W/8)] uint8, packed
    width: int,
    rows: Tensor,  # [N] int64, the mask of each result, -1 for zeros
    points: Tensor,  # [G, P, 2] float32/64
    groups: Tensor,  # [N] int64, the points of each result
    extent: tuple[int, int] | None = None,
) -> Tensor:
    """Sample masks at points as `sample_maps` does, without copies of them -> [N, P] in the dtype of ``points``.

    Points are parts of ``extent`` (height, width), by default of the masks' own size. It begins at the masks' first
    pixel, so masks smaller than it count as padded with zeros at the bottom and right. Points that are not finite give
    0. There is no gradient.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not fit; on the CPU also rows or groups out of range.
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    return _sample_masks(masks, width, rows, points.detach(), groups, list(extent or (masks.shape[1], width)))


def sample_masks_eager(
    masks: Tensor,
    width: int,
    rows: Tensor,
    points: Tensor,
    groups: Tensor,
    extent: tuple[int, int] | None = None,
) -> Tensor:
    """Eager twin of `sample_masks`: oracle of the tests, and the implementation for float64.

    Points that are not finite are not specified.
    """
    return _sample_masks_torch(_Arguments(masks, width, rows, points, groups, extent or (masks.shape[1], width)))


def within_valid(
    points: Tensor,  # [B, P, 2] or [L, B, T, P, 2] or [L, B, P, 2]
    targets: Targets,
    loss: LossConfig,
) -> Tensor:
    """Move points of the padded input into the image where ``loss.padding`` excludes padding -> the points' shape."""
    if loss.padding == "include":
        return points
    height, width = targets.input_size
    extent = (targets.valid_sizes.flip(1) / targets.valid_sizes.new_tensor([width, height])).to(points.dtype)  # [B, 2]
    trailing = points.dim() - (2 if points.dim() == 3 else 3)
    return points * extent.view(len(extent), *[1] * trailing, 2)
