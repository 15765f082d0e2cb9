"""Definitions in float64 that tests compare operators and kernels with, written without them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskformer_fast.ops.semantic import SemanticMap


def interpolation_weights(source: int, extent: float, output: int) -> Tensor:
    """Bilinear weights of every tap of one axis at every output pixel -> [output, source] float64."""
    place = ((torch.arange(output, dtype=torch.float64) + 0.5) * extent / output - 0.5).clamp(0, source - 1)
    return (1 - (place[:, None] - torch.arange(source)).abs()).clamp(min=0)


def resampled(
    maps: Tensor,  # [..., h, w]
    extent: tuple[float, float],
    size: tuple[int, int],
) -> Tensor:
    """Maps resampled bilinearly to an output -> [..., H, W] float64."""
    rows, columns = (
        interpolation_weights(*axis).to(maps.device) for axis in zip(maps.shape[-2:], extent, size, strict=True)
    )
    return rows @ maps.double() @ columns.T


def semantic_scores(
    mask_logits: Tensor,  # [B, Q, h, w]
    class_logits: Tensor,  # [B, Q, K+1]
    extent: tuple[float, float],
    size: tuple[int, int],
) -> Tensor:
    """Sum over queries of class probability times mask probability -> [B, K, H, W] float64.

    Infinite mask logits count as ±1e30.
    """
    masks = resampled(mask_logits.double().clamp(-1e30, 1e30), extent, size).sigmoid()
    return torch.einsum("bqk,bqyx->bkyx", class_logits.double().softmax(-1)[..., :-1], masks)


def assert_semantic_map(
    result: SemanticMap,
    scores: Tensor,  # [B, K, H, W] float64, by `semantic_scores`
    tolerance: float,  # of scores below 1; above, relative to the score
) -> None:
    """Labels are those of the best score where its lead is decisive; scores and margins are within the tolerance."""
    best = scores.amax(1)
    lead = torch.full_like(best, math.inf)
    if scores.shape[1] > 1:
        first, second = scores.topk(2, 1).values.unbind(1)
        lead = first - second
    allowed = tolerance * best.clamp(min=1)
    decisive = lead > 2 * allowed
    labels = result.labels.long()
    assert torch.equal(labels[decisive], scores.argmax(1)[decisive])
    assert (scores.gather(1, labels[:, None])[:, 0] >= best - 2 * allowed).all()
    if result.scores is not None:
        assert ((result.scores - best).abs() <= allowed).all()
    if result.margins is not None:
        assert torch.equal(result.margins.isinf(), lead.isinf())
        assert (((result.margins - lead).abs() <= 2 * allowed) | lead.isinf()).all()


def random_logits(
    seed: int, batch: int, queries: int, classes: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Mask logits [B, Q, h, w] of about 4 and class logits [B, Q, K+1] of about 3."""
    generator = torch.Generator().manual_seed(seed)
    masks = 4 * torch.randn(batch, queries, *size, generator=generator)
    return masks, 3 * torch.randn(batch, queries, classes + 1, generator=generator)
