"""The choice of the best instances, against a sort in plain Python."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.deploy.runtime.ranking import QueryMasks, best_first, best_instances, best_pairs, softmax


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_instances_are_those_of_a_plain_sort(seed: int, queries: int, classes: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (queries, classes + 1)).astype(np.float32)  # so few values that many are equal
    logits[rng.random(queries) < 0.2, 0] = np.nan
    is_thing = rng.random(classes) < 0.6
    packed = rng.integers(0, 256, (queries, 3, 2), dtype=np.uint8)
    boxes, areas = rng.random((queries, 4)).astype(np.float32), rng.integers(0, 3, queries)
    mask_scores = rng.random(queries).astype(np.float32)

    pairs = best_pairs(logits, is_thing.tolist(), top_k)
    got = best_instances(pairs, pairs.queries, QueryMasks(packed, boxes, areas, mask_scores), (3, 11))

    candidates = []
    for query in range(queries):
        row = softmax(logits[query])
        candidates += [(-1.0 if np.isnan(row[c]) else row[c], query, c) for c in np.flatnonzero(is_thing)]
    first = sorted(candidates, key=lambda pair: -pair[0])[:top_k]
    scored = [(p * mask_scores[query], query, c) for p, query, c in first if p >= 0 and areas[query]]
    expected = sorted(scored, key=lambda pair: -pair[0])
    assert got.labels.tolist() == [c for _, _, c in expected] and got.size == (3, 11)
    assert got.scores.tolist() == [score for score, _, _ in expected]
    rows = [query for _, query, _ in expected]
    assert np.array_equal(got.masks, packed[rows]) and np.array_equal(got.boxes, boxes[rows])
    assert not np.shares_memory(got.masks, packed) and not np.shares_memory(got.boxes, boxes)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 50), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_best_first_is_a_stable_sort(seed: int, size: int, count: int, levels: int) -> None:
    values = np.random.default_rng(seed).integers(0, levels, size).astype(np.float32)
    expected = sorted(range(size), key=lambda index: (-values[index], index))[:count]
    assert best_first(values, count).tolist() == expected


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_softmax_equals_pytorchs(rows: list[list[float]]) -> None:
    logits = np.array(rows, dtype=np.float32)
    np.testing.assert_allclose(softmax(logits), torch.from_numpy(logits).softmax(-1).numpy(), atol=1e-6, rtol=1e-5)
