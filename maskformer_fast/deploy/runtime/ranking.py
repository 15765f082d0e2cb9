"""Choice of an image's best instances among pairs of query and class, for the backends of CPU and GPU.

It is the selection of `maskformer_fast.inference.postprocess.instances` without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maskformer_fast.core.results import InstanceResult

Size = tuple[int, int]


class Pairs(NamedTuple):
    """Pairs of query and thing class, the most probable first."""

    queries: np.ndarray  # [N] int64
    labels: np.ndarray  # [N] int64
    probabilities: np.ndarray  # [N] float32; -1 for a query with NaN among its logits


class QueryMasks(NamedTuple):
    """Packed masks of M queries, with their boxes, areas and scores."""

    packed: np.ndarray  # [M, H, ceil(W/8)] uint8
    boxes: np.ndarray  # [M, 4] float32
    areas: np.ndarray  # [M] int64
    scores: np.ndarray  # [M] float32


def best_pairs(
    class_logits: np.ndarray,  # [Q, K+1] float32
    is_thing: Sequence[bool] | np.ndarray,
    top_k: int,
) -> Pairs:
    """Choose the ``top_k`` most probable pairs, or all where there are fewer."""
    things = np.flatnonzero(np.asarray(is_thing, dtype=np.bool_))
    probabilities = np.nan_to_num(softmax(class_logits)[:, things], nan=-1.0).ravel()
    pairs = best_first(probabilities, top_k)
    count = max(1, len(things))
    return Pairs(pairs // count, things[pairs % count].astype(np.int64), probabilities[pairs])


def best_instances(
    pairs: Pairs,
    rows: np.ndarray,  # [N] row of each pair's query in the masks
    masks: QueryMasks,
    size: Size,  # height, width of the masks
) -> InstanceResult:
    """Instances of the pairs with non-empty masks, by class probability x mask score. Arrays are copies."""
    scores = pairs.probabilities * masks.scores[rows]
    kept = np.flatnonzero((masks.areas[rows] > 0) & (scores >= 0))  # a query of NaN has a score below 0
    chosen = kept[np.argsort(-scores[kept], kind="stable")]
    used = rows[chosen]
    return InstanceResult(pairs.labels[chosen], scores[chosen], masks.packed[used], masks.boxes[used], size)


def softmax(
    logits: np.ndarray,  # [..., N] float32
) -> np.ndarray:
    """Softmax over the last axis in float32. As in PyTorch, NaN, +inf, or -inf alone makes the entire row NaN."""
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf, and differences beyond float32
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)


def best_first(
    values: np.ndarray,  # [N] float32, no NaN
    count: int,
) -> np.ndarray:
    """Indices of the ``count`` largest values (or all), largest first; equal values by index -> int64."""
    if len(values) > count:
        least = np.partition(values, len(values) - count)[len(values) - count]
        above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
        chosen = np.sort(np.concatenate([above, equal[: count - len(above)]]))
    else:
        chosen = np.arange(len(values))
    return chosen[np.argsort(-values[chosen], kind="stable")]
