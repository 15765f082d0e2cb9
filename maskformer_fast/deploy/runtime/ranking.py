"""Which pairs of query and class are an image's best instances: the same on the host and for what a GPU computed.

The counterpart of the selection in `maskformer_fast.inference.postprocess.instances`, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maskformer_fast.core.results import InstanceResult

Size = tuple[int, int]


class Pairs(NamedTuple):
    """Queries with a thing class each, the likeliest first."""

    queries: np.ndarray  # [N] int64
    labels: np.ndarray  # [N] int64
    probabilities: np.ndarray  # [N] float32; -1 of a query with NaN among its logits


class QueryMasks(NamedTuple):
    """What was computed of the masks of M queries."""

    packed: np.ndarray  # [M, H, ceil(W/8)] uint8
    boxes: np.ndarray  # [M, 4] float32
    areas: np.ndarray  # [M] int64
    scores: np.ndarray  # [M] float32


def best_pairs(
    class_logits: np.ndarray,  # [Q, K+1] float32
    is_thing: Sequence[bool] | np.ndarray,
    top_k: int,
) -> Pairs:
    """The ``top_k`` most probable pairs (or all there are)."""
    things = np.flatnonzero(np.asarray(is_thing, dtype=np.bool_))
    probabilities = np.nan_to_num(softmax(class_logits)[:, things], nan=-1.0).ravel()
    pairs = best_first(probabilities, top_k)
    among = max(1, len(things))
    return Pairs(pairs // among, things[pairs % among].astype(np.int64), probabilities[pairs])


def best_instances(
    pairs: Pairs,
    rows: np.ndarray,  # [N] of each pair, its query's row in the masks
    masks: QueryMasks,
    size: Size,  # height, width of the masks
) -> InstanceResult:
    """Pairs by class probability x mask score, less those with an empty mask; what is kept is copied."""
    scores = pairs.probabilities * masks.scores[rows]
    found = np.flatnonzero((masks.areas[rows] > 0) & (scores >= 0))  # a query of NaN has a score below 0
    chosen = found[np.argsort(-scores[found], kind="stable")]
    used = rows[chosen]
    return InstanceResult(pairs.labels[chosen], scores[chosen], masks.packed[used], masks.boxes[used], size)


def softmax(
    logits: np.ndarray,  # [..., N] float32
) -> np.ndarray:
    """Over the last axis, in float32. NaN, +inf, or nothing but -inf makes a whole row NaN, as in PyTorch."""
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf, and differences beyond float32
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)


def best_first(
    values: np.ndarray,  # [N] float32, no NaN
    count: int,
) -> np.ndarray:
    """Indices of the largest ``count`` values (or all), largest first; of equal ones the lower index first -> int64."""
    if len(values) > count:
        least = np.partition(values, len(values) - count)[len(values) - count]
        above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
        chosen = np.sort(np.concatenate([above, equal[: count - len(above)]]))
    else:
        chosen = np.arange(len(values))
    return chosen[np.argsort(-values[chosen], kind="stable")]
