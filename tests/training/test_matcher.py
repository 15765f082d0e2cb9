"""Batched matching against every permutation; for the official assignments see tests/interop."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.config import LossConfig
from maskformer_fast.ops import linear_sum_assignment
from maskformer_fast.ops.matching_cost import matching_cost
from maskformer_fast.structures import Predictions, Targets, pack_masks
from maskformer_fast.training.matcher import match


def random_batch(seed: int, counts: list[int], queries: int = 5, layers: int = 2) -> tuple[Predictions, Targets]:
    """Ragged batch of 16x20 pixels and 4 classes."""
    rng = torch.Generator().manual_seed(seed)
    batch, slots = len(counts), max(counts)
    present = torch.arange(slots) < torch.tensor(counts)[:, None]
    masks = (torch.rand(batch, slots, 16, 20, generator=rng) < 0.4) & present[..., None, None]
    valid = torch.tensor([[16 - b, 20] for b in range(batch)])
    labels = torch.randint(4, (batch, slots), generator=rng) * present
    predictions = Predictions(
        torch.randn(layers, batch, queries, 5, generator=rng),
        torch.randn(layers, batch, queries, 6, generator=rng),
        torch.randn(batch, 6, 4, 5, generator=rng),
        valid,
        (16, 20),
    )
    return predictions, Targets(labels, torch.tensor(counts), pack_masks(masks), valid, (16, 20))


def best_total(cost: torch.Tensor) -> float:
    """Least total cost over every assignment of the smaller set to the larger."""
    cost = cost if cost.shape[0] >= cost.shape[1] else cost.T
    columns = range(cost.shape[1])
    return min(float(sum(cost[r, c] for r, c in zip(rows, columns, strict=True)))
               for rows in permutations(range(cost.shape[0]), cost.shape[1]))


@pytest.mark.parametrize("counts", [[3, 1, 0], [2, 5], [6, 2], [1]])
@pytest.mark.parametrize("padding", ["exclude", "include"])
def test_a_matching_has_the_least_total_cost_of_all_permutations(counts, padding):
    predictions, targets = random_batch(sum(counts), counts)
    loss = LossConfig(padding=padding)
    matching = match(predictions, targets, loss)
    assert matching.query.shape == (2, len(counts), max(counts)) and matching.query.dtype == torch.int64
    assert not matching.nonfinite.any() and matching.nonfinite.shape == (2, len(counts))
    cost = matching_cost(predictions, targets, loss)
    for layer in range(2):
        for image, count in enumerate(counts):
            query = matching.query[layer, image]
            columns = (query >= 0).nonzero().squeeze(1)
            assert (query[count:] == -1).all()
            assert len(columns) == min(count, 5) and len(query[columns].unique()) == len(columns)
            total = float(cost[layer, image, query[columns], columns].sum())
            assert total == pytest.approx(best_total(cost[layer, image, :, :count]), abs=1e-4)


@given(st.integers(0, 10_000), st.permutations(range(4)))
@settings(max_examples=25, deadline=None)
def test_permuting_the_targets_permutes_the_matching(seed, order):
    predictions, targets = random_batch(seed, [4, 4])
    permuted = targets._replace(labels=targets.labels[:, order], masks=targets.masks[:, order])
    query = match(predictions, targets, LossConfig()).query
    assert torch.equal(match(predictions, permuted, LossConfig()).query, query[..., order])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_layer_of_an_image_with_a_non_finite_cost_is_reported_and_unmatched(value):
    predictions, targets = random_batch(1, [2, 3, 1])
    clean = match(predictions, targets, LossConfig())
    predictions.mask_embeddings[0, 1, 2, 3] = value
    matching = match(predictions, targets, LossConfig())
    assert matching.nonfinite.tolist() == [[False, True, False], [False] * 3]
    assert (matching.query[0, 1] == -1).all()
    assert torch.equal(matching.query[~matching.nonfinite], clean.query[~matching.nonfinite])


@pytest.mark.parametrize("counts", [[2, 3, 1], [7, 9]])  # fewer and more targets than the five queries
def test_an_image_without_a_finite_assignment_is_reported(monkeypatch, counts):
    predictions, targets = random_batch(1, counts)
    clean = match(predictions, targets, LossConfig())

    def without_one(cost, counts):
        query = linear_sum_assignment(cost, counts)
        query[1, 0] = -1
        return query

    monkeypatch.setattr("maskformer_fast.training.matcher.linear_sum_assignment", without_one)
    matching = match(predictions, targets, LossConfig())
    expected = torch.zeros(2, len(counts), dtype=torch.bool)
    expected[1, 0] = True
    assert torch.equal(matching.nonfinite, expected)
    assert (matching.query[1, 0] == -1).all()
    assert torch.equal(matching.query[~expected], clean.query[~expected])


def test_a_batch_without_targets_has_an_empty_matching():
    predictions, targets = random_batch(2, [0, 0])
    matching = match(predictions, targets, LossConfig())
    assert matching.query.shape == (2, 2, 0) and not matching.nonfinite.any()
