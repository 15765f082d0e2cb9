"""Optimal assignment of targets to queries, for every decoder layer and image at once (paper section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.ops import linear_sum_assignment, matching_cost, matching_cost_at_points
from maskformer_fast.structures import Predictions, Targets


class Matching(NamedTuple):
    """Query that each target is assigned to."""

    query: Tensor  # [L, B, T] int64, -1 for padding and for targets without a query
    nonfinite: Tensor  # [L, B] bool: some cost, or the least total cost, is not finite; nothing is matched


@torch.no_grad()
def match(
    predictions: Predictions,  # L layers
    targets: Targets,
    loss: LossConfig,
    points: Tensor | None = None,  # [B, P, 2] or [L, B, P, 2], at which masks are compared; None takes every pixel
) -> Matching:
    """Match every layer and image in one batched assignment, without a host synchronisation.

    If an image has more targets than there are queries, every query gets one and the other targets stay unmatched.
    A layer of an image with a cost that is not finite, or so large that sums of costs overflow, is marked in
    ``nonfinite`` and left unmatched; no error is raised.
    """
    if points is None:
        cost = matching_cost(predictions, targets, loss)
    else:
        cost = matching_cost_at_points(predictions, targets, points, loss)
    query = linear_sum_assignment(cost, targets.counts.expand(cost.shape[:2]))
    unsolved = (query >= 0).sum(2) < targets.counts.clamp(max=cost.shape[2])
    nonfinite = unsolved | ~cost.isfinite().all(3).all(2)
    return Matching(query.masked_fill(nonfinite.unsqueeze(2), -1), nonfinite)
