"""Set criterion of mask classification: class, mask and dice losses of matched pairs (paper section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
from maskformer_fast.distributed import gather_ranks
from maskformer_fast.ops import mask_loss, mask_loss_at_points
from maskformer_fast.ops.mask_loss import at_least_float32
from maskformer_fast.ops.points import PointDraws
from maskformer_fast.structures import LayerPredictions, Predictions, Targets
from maskformer_fast.training.matcher import Matching, match


class Losses(NamedTuple):
    """Losses of a batch. The terms are weighted, and ``total`` is their sum."""

    total: Tensor  # scalar
    terms: dict[str, Tensor]  # scalars: loss_ce, loss_mask, loss_dice; loss_ce_0, ... of the earlier layers
    nonfinite: Tensor  # [L, B] bool: layers and images with a cost (per-pixel: logit) that is not finite
    num_masks: Tensor  # scalar float, normaliser of the mask losses (per-pixel: number of labelled pixels)
    num_matched: Tensor  # scalar int64, matched pairs of all layers (per-pixel: number of labelled pixels)


def term_names(
    names: tuple[str, ...],
    layers: int,
) -> list[tuple[str, ...]]:
    """Names of the losses of each layer: plain for the final layer, with the layer's index for earlier ones."""
    return [tuple(f"{name}_{layer}" for name in names) for layer in range(layers - 1)] + [names]


class Criterion(nn.Module):
    """Loss of matched pairs of queries and targets.

    Class loss: weighted mean over all queries of the cross-entropy. The class of an unmatched query is "no object", of
    weight ``loss.no_object_weight``. Mask and dice losses (`ops.mask_loss`) are divided by the number of targets, at
    least 1. With ``loss.points`` these and the matching are at points (`ops.points`). With ``loss.deep_supervision``
    every decoder layer is matched and compared, otherwise the final one alone.

    Both normalisers are means over all micro-batches and ranks of an optimiser step. So the mean over them of the
    losses, and of the gradients, is that of one batch with all images of the step.
    """

    class_weights: Tensor

    def __init__(self, num_classes: int, loss: LossConfig) -> None:
        super().__init__()
        check(num_classes > 0, "num_classes", "a positive integer", num_classes)
        self.num_classes = num_classes
        self.loss = loss
        weights = torch.ones(num_classes + 1)
        weights[-1] = loss.no_object_weight
        self.register_buffer("class_weights", weights, persistent=False)

    def image_counts(self, targets: Targets) -> Tensor:
        """Number of targets of each image, its part of the normalisers -> [B] int64."""
        return targets.counts

    def forward(
        self,
        predictions: Predictions | LayerPredictions,
        targets: Targets,
        step_counts: Tensor | None = None,  # [N] int64, `image_counts` of all images of the step
        draws: PointDraws | None = None,
    ) -> Losses:
        """Weighted losses of a batch, all in float32. Without ``step_counts``, a step is one such batch on each rank.

        Raises:
            ValueError: class logits of another number of classes, targets of another padded input size, or draws
                missing with ``loss.points`` (or given without).
        """
        loss = self.loss
        check((draws is not None) == (loss.points > 0), "draws",
              f"points exactly where loss.points > 0, here {loss.points}", None if draws is None else "points")
        layered = isinstance(predictions, LayerPredictions)
        parts = predictions.layers if isinstance(predictions, LayerPredictions) else (predictions,)
        for part in parts:
            check(part.class_logits.shape[-1] == self.num_classes + 1, "predictions.class_logits",
                  f"{self.num_classes} classes and no-object in the last dimension", tuple(part.class_logits.shape))
        if not loss.deep_supervision:
            last = parts[-1]
            parts = (last._replace(class_logits=last.class_logits[-1:], mask_embeddings=last.mask_embeddings[-1:]),)
        step_counts = gather_ranks(self.image_counts(targets)) if step_counts is None else step_counts
        num_masks = step_counts.sum().clamp(min=1) * (len(targets.counts) / len(step_counts))
        losses, matchings = zip(*(
            self._weighted(part, targets, step_counts, num_masks, _draws_of(draws, index if layered else None))
            for index, part in enumerate(parts)
        ), strict=True)  # fmt: skip
        weighted = torch.cat(losses)  # [L, 3]
        query = torch.cat([matching.query for matching in matchings])
        nonfinite = torch.cat([matching.nonfinite for matching in matchings])
        names = term_names(("loss_ce", "loss_mask", "loss_dice"), len(weighted))
        terms = {
            name: value
            for layer_names, values in zip(names, weighted.unbind(), strict=True)
            for name, value in zip(layer_names, values.unbind(), strict=True)
        }
        return Losses(weighted.sum(), terms, nonfinite, num_masks, (query >= 0).sum())

    def _weighted(
        self,
        predictions: Predictions,
        targets: Targets,
        step_counts: Tensor,
        num_masks: Tensor,
        draws: PointDraws | None,
    ) -> tuple[Tensor, Matching]:
        """Weighted class, mask and dice losses of layers with common pixel features -> [L, 3], and their matching."""
        loss = self.loss
        matching = match(predictions, targets, loss, None if draws is None else draws.match)
        if draws is None:
            mask, dice = mask_loss(predictions, targets, matching.query, loss)
        else:
            mask, dice = mask_loss_at_points(predictions, targets, matching.query, draws, loss)
        class_loss = self.class_loss(predictions.class_logits, targets.labels, matching.query, step_counts)
        return torch.stack([
            loss.class_weight * class_loss,
            loss.mask_weight * mask / num_masks,
            loss.dice_weight * dice / num_masks,
        ], 1), matching  # fmt: skip

    def class_loss(
        self,
        class_logits: Tensor,  # [L, B, Q, K+1]
        labels: Tensor,  # [B, T]
        query: Tensor,  # [L, B, T], -1 for none
        step_counts: Tensor,  # [N] int64, number of targets of each image of the step
    ) -> Tensor:
        """Weighted mean cross-entropy of each layer -> [L]; the normaliser is a mean over the step (`Criterion`)."""
        layers, batch, queries = class_logits.shape[:3]
        # Unmatched targets write to an extra query, which is then dropped.
        truth = labels.new_full((layers, batch, queries + 1), self.num_classes)
        truth = truth.scatter(2, query.where(query >= 0, queries), labels.expand(layers, -1, -1))[..., :-1]
        logits = at_least_float32(class_logits)
        weights = self.class_weights.to(logits.dtype)
        losses = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), weights, reduction="none")
        # Every image has min(targets, queries) matched queries, except one whose non-finite costs get its step skipped.
        matched = step_counts.clamp(max=queries).sum()
        total_weight = matched + (queries * len(step_counts) - matched) * weights[-1]
        normaliser = (total_weight * (batch / len(step_counts))).clamp(min=torch.finfo(weights.dtype).tiny)
        return losses.view(layers, -1).sum(1) / normaliser


def _draws_of(draws: PointDraws | None, layer: int | None) -> PointDraws | None:
    """Points of one of the layers, which may share them; ``None`` is all layers."""
    if layer is None or draws is None or draws.match.ndim == 3:
        return draws
    return PointDraws(*(points[layer : layer + 1] for points in draws))
