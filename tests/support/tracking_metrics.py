"""IDF1 and video panoptic quality, written from their definitions with SciPy, apart from the package.

IDF1: Ristani et al., "Performance Measures and a Data Set for Multi-Target, Multi-Camera Tracking", 2016. VPQ: Kim et
al., "Video Panoptic Segmentation", CVPR 2020.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

Labels = tuple[np.ndarray, dict[int, int]]
"""A frame: map of identities [H, W], 0 for none, and the category of each identity."""


def idf1(truth: Sequence[Labels], results: Sequence[Labels], things: int, least: float = 0.5) -> float:
    """IDF1 of things: twice the frames that the best one-to-one mapping of identities explains, over all of both.

    An identity explains another's frame if their masks have an intersection over union of at least ``least``.
    """
    together: Counter[tuple[int, int]] = Counter()
    boxes = 0
    for (true_map, true_kinds), (map_, kinds) in zip(truth, results, strict=True):
        ones = [number for number, kind in true_kinds.items() if kind < things]
        others = [number for number, kind in kinds.items() if kind < things]
        boxes += len(ones) + len(others)
        for one in ones:
            for other in others:
                if true_kinds[one] == kinds[other]:
                    a, b = true_map == one, map_ == other
                    if (a & b).sum() >= least * (a | b).sum():
                        together[one, other] += 1
    rows, columns = (sorted({pair[side] for pair in together}) for side in (0, 1))
    counts = np.zeros((len(rows), len(columns)))
    for (one, other), count in together.items():
        counts[rows.index(one), columns.index(other)] = count
    best = counts[linear_sum_assignment(counts, maximize=True)].sum() if counts.size else 0
    return float(2 * best / boxes) if boxes else 1.0


def vpq(truth: Sequence[Labels], results: Sequence[Labels], window: int) -> float:
    """Video panoptic quality of windows of so many frames: panoptic quality of tubes, averaged over categories."""
    overlap: dict[int, float] = defaultdict(float)
    right: Counter[int] = Counter()
    tubes: Counter[int] = Counter()
    for start in range(len(truth) - window + 1):
        part = slice(start, start + window)
        sides = []
        for frames in (truth[part], results[part]):
            kinds: dict[int, int] = {}
            for _, known in frames:
                kinds |= known
            sides.append((np.stack([map_ for map_, _ in frames]), kinds))
        (true_tube, true_kinds), (tube, kinds) = sides
        pairs = Counter(dict(zip(*_counted(true_tube.astype(np.int64) << 32 | tube.astype(np.int64)), strict=True)))
        sizes, others = (Counter(dict(zip(*_counted(side), strict=True))) for side in (true_tube, tube))
        for number, kind in true_kinds.items():
            tubes[kind] += sizes[number] > 0
        for number, kind in kinds.items():
            tubes[kind] += others[number] > 0
        for key, common in pairs.items():
            one, other = key >> 32, key & 0xFFFFFFFF
            if one in true_kinds and true_kinds[one] == kinds.get(other):
                share = common / (sizes[one] + others[other] - common)
                if share > 0.5:
                    overlap[true_kinds[one]] += share
                    right[true_kinds[one]] += 1
    return float(np.mean([overlap[kind] / (tubes[kind] / 2) for kind in tubes if tubes[kind]]))


def _counted(values: np.ndarray) -> tuple[list[int], list[int]]:
    different, counts = np.unique(values, return_counts=True)
    return different.tolist(), counts.tolist()
