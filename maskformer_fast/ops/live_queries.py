"""Queries and classes that settle most pixels of semantic results, and bounds of what all others add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_MISSING = 0.02
"""Most that the dropped queries of a window may add to a class."""
MAX_KEPT = 0.5
"""Largest share of the queries that is kept; with more, all are computed at once."""
LIVE_TOTAL = 0.1
"""Least sum of a class's probabilities in a window with which it is computed everywhere; others only where no class
leads."""
ROUNDING = 1e-5
"""Bound of a score's error in float32."""


class LiveQueries(NamedTuple):
    """Kept queries of each window, live classes, and bounds of all others."""

    orders: list[Tensor]  # of each window [Q] int64, all queries, the kept ones first
    kept: list[int]  # number of each window's kept queries
    classes: Tensor  # [c] int64, the live ones
    slack: Tensor  # [c] float32, most that the dropped queries add to each class
    others: float  # largest score of the other classes


def find_live_queries(
    probabilities: Sequence[Tensor],  # of each window [Q, C] float32; numbers of queries may differ
) -> LiveQueries | None:
    """Choose queries and classes, or None where so many matter that leaving others out would not pay."""
    orders, numbers, dropped = [], [], []
    for window in probabilities:
        order = window.amax(1).argsort()
        missing = window[order].cumsum(0).amax(1)  # nondecreasing; with NaN a query is never dropped
        count = int((missing <= MAX_MISSING).sum())
        orders.append(order.roll(-count))
        numbers.append(len(order) - count)
        dropped.append(window[order[:count]].sum(0))
    if not 0 < sum(numbers) <= MAX_KEPT * sum(map(len, probabilities)):
        return None
    totals = torch.stack([window.sum(0) for window in probabilities]).amax(0)
    live = totals > LIVE_TOTAL
    if not live.any():
        return None
    others = totals[~live].max().item() + ROUNDING if not live.all() else -torch.inf
    classes = live.nonzero()[:, 0]
    return LiveQueries(orders, numbers, classes, torch.stack(dropped).amax(0)[classes] + ROUNDING, others)
