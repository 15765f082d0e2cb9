"""Random points of images, and what masks and maps are there (Mask2Former, Cheng et al., CVPR 2022, section 3.3.2).

Points are (x, y) in 0..1 of an image. Mask2Former compares masks with targets at such points instead of every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
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


def sample_packed_masks(
    masks: Tensor,  # [N, H, ceil(W/8)] uint8, packed
    width: int,
    points: Tensor,  # [N, P, 2]
) -> Tensor:
    """`sample_maps` of packed masks, which are not unpacked -> [N, P] in the points' dtype."""
    height, row_bytes = masks.shape[1:]
    flat = masks.flatten(1)
    position = points * points.new_tensor([width, height]) - 0.5
    corner = position.floor()
    fraction = position - corner
    left, top = corner.long().unbind(-1)
    result = points.new_zeros(points.shape[:-1])
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = left + dx, top + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
            bits = flat.gather(1, y * row_bytes + (x >> 3)) >> (x & 7).to(torch.uint8) & 1
            horizontal = fraction[..., 0] if dx else 1 - fraction[..., 0]
            vertical = fraction[..., 1] if dy else 1 - fraction[..., 1]
            result += bits * inside * horizontal * vertical
    return result


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
