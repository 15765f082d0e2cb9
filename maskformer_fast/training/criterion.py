"""Set criterion of mask classification: class, mask and dice losses of matched pairs (paper section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
from maskformer_fast.distributed import gather_ranks
from maskformer_fast.ops import mask_loss
from maskformer_fast.ops.mask_loss import at_least_float32
from maskformer_fast.structures import Predictions, Targets
from maskformer_fast.training.matcher import match


class Losses(NamedTuple):
    """Losses of a batch. ``terms`` are weighted: ``total`` is their sum."""

    total: Tensor  # scalar
    terms: dict[str, Tensor]  # scalars: loss_ce, loss_mask, loss_dice; loss_ce_0, ... of the earlier layers
    nonfinite: Tensor  # [L, B] bool: layer and image whose costs (per-pixel: logits) are not finite
    num_masks: Tensor  # scalar float, what mask losses were divided by (per-pixel: labelled pixels)
    num_matched: Tensor  # scalar int64, matched pairs of all layers (per-pixel: labelled pixels)


def term_names(
    names: tuple[str, ...],
    layers: int,
) -> list[tuple[str, ...]]:
    """Names of every layer's losses: the final layer's bare, those of earlier layers with their index."""
    return [tuple(f"{name}_{layer}" for name in names) for layer in range(layers - 1)] + [names]


class Criterion(nn.Module):
    """Match predictions with targets and compare them.

    Class loss: cross-entropy over all queries, where an unmatched query should say "no object", whose weight is
    ``loss.no_object_weight``; weighted mean over queries. Mask and dice losses: see `ops.mask_loss`; divided by the
    number of targets, at least 1. With ``loss.deep_supervision`` every decoder layer is matched and compared, otherwise
    the final one alone.

    Both divisors are means over the whole step, all its micro-batches and ranks: so the mean of their losses, and of
    the gradients, is that of one batch which holds all the step's images.
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

    def amounts(self, targets: Targets) -> Tensor:
        """What each image adds to the divisors of its step: its number of targets -> [B] int64."""
        return targets.counts

    def forward(
        self,
        predictions: Predictions,
        targets: Targets,
        whole: Tensor | None = None,  # [N] int64, `amounts` of all images of the step
    ) -> Losses:
        """Weighted losses of a batch, all in float32. Without ``whole`` the step is this batch of every rank.

        Raises:
            ValueError: class logits of another number of classes, or targets of another padded input size.
        """
        check(predictions.class_logits.shape[-1] == self.num_classes + 1, "predictions.class_logits",
              f"{self.num_classes} classes and no-object in the last dimension", tuple(predictions.class_logits.shape))
        loss = self.loss
        if not loss.deep_supervision:
            predictions = predictions._replace(
                class_logits=predictions.class_logits[-1:], mask_embeddings=predictions.mask_embeddings[-1:]
            )
        matching = match(predictions, targets, loss)
        whole = gather_ranks(self.amounts(targets)) if whole is None else whole
        num_masks = whole.sum().clamp(min=1) * (len(targets.counts) / len(whole))
        mask, dice = mask_loss(predictions, targets, matching.query, loss)
        weighted = torch.stack([
            loss.class_weight * self.class_loss(predictions.class_logits, targets.labels, matching.query, whole),
            loss.mask_weight * mask / num_masks,
            loss.dice_weight * dice / num_masks,
        ], 1)  # [L, 3]
        names = term_names(("loss_ce", "loss_mask", "loss_dice"), len(weighted))
        terms = {
            name: value
            for layer_names, values in zip(names, weighted.unbind(), strict=True)
            for name, value in zip(layer_names, values.unbind(), strict=True)
        }
        return Losses(weighted.sum(), terms, matching.nonfinite, num_masks, (matching.query >= 0).sum())

    def class_loss(
        self,
        class_logits: Tensor,  # [L, B, Q, K+1]
        labels: Tensor,  # [B, T]
        query: Tensor,  # [L, B, T], -1 for none
        whole: Tensor,  # [N] int64, targets of every image of the step
    ) -> Tensor:
        """Weighted mean cross-entropy of each layer -> [L]; the mean's total weight is that of the whole step."""
        layers, batch, queries = class_logits.shape[:3]
        # Unassigned targets write to one query too many, which is then dropped.
        truth = labels.new_full((layers, batch, queries + 1), self.num_classes)
        truth = truth.scatter(2, query.where(query >= 0, queries), labels.expand(layers, -1, -1))[..., :-1]
        logits = at_least_float32(class_logits)
        weights = self.class_weights.to(logits.dtype)
        losses = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), weights, reduction="none")
        # As many queries answer for a target as there are targets, but for images that make their step be skipped.
        matched = whole.clamp(max=queries).sum()
        total = matched + (queries * len(whole) - matched) * weights[-1]
        mean = (total * (batch / len(whole))).clamp(min=torch.finfo(weights.dtype).tiny)
        return losses.view(layers, -1).sum(1) / mean
