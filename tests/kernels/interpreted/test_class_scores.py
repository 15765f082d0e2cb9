"""Scores and categories of queries against `postprocess.panoptic`'s three steps in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskformer_fast.core.metadata import VOID
from maskformer_fast.kernels.class_scores import class_scores

INF, NAN = float("inf"), float("nan")


def run(class_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    scores = torch.full(class_logits.shape[:2], 7.0)
    categories = torch.full(class_logits.shape[:2], 7)
    class_scores(class_logits, threshold, scores, categories)
    return scores, categories


def eager(class_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    scores, categories = class_logits.to(torch.float32).softmax(-1).max(-1)
    kept = (categories < class_logits.shape[-1] - 1) & (scores > threshold)
    return scores, categories.masked_fill(~kept, VOID)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 1), (torch.float32, 133), (torch.float16, 1500)])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_equals_eager(dtype: torch.dtype, classes: int, threshold: float) -> None:
    logits = (torch.randn(2, 4, classes + 1, generator=torch.Generator().manual_seed(classes)) * 4).to(dtype)
    logits[0, 0, -1] = 30  # no object
    logits[1, 3, 0] = 30
    logits = logits.transpose(0, 1).contiguous().transpose(0, 1)  # strides as they come
    scores, categories = run(logits, threshold)
    expected_scores, expected = eager(logits, threshold)
    assert torch.equal(categories, expected) and len(expected.unique()) > 1
    torch.testing.assert_close(scores, expected_scores, rtol=1e-6, atol=0)


def test_ties_and_values_that_are_not_finite() -> None:
    rows = [
        [3.0, 3.0, 1.0, 0.0], [1.0, 2.0, 2.0, 2.0], [0.0, 1e-9, 0.0, -1.0],  # the lower class
        [NAN, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, NAN], [INF, 0.0, 0.0, 0.0], [-INF] * 4,  # none
        [-INF, 2.0, -INF, -INF], [-INF, -INF, -INF, 2.0],
    ]  # fmt: skip
    logits = torch.tensor([rows])
    scores, categories = run(logits, 0.1)
    expected_scores, expected = eager(logits, 0.1)
    assert categories.tolist() == expected.tolist() == [[0, 1, 0, VOID, VOID, VOID, VOID, 1, VOID]]
    torch.testing.assert_close(scores, expected_scores, equal_nan=True)


def test_a_score_equal_to_the_threshold_is_not_above_it() -> None:
    logits = torch.tensor([[[0.0, 0.0]]])
    assert run(logits, 0.5)[1].item() == VOID and run(logits, 0.4999)[1].item() == 0


def test_no_queries() -> None:
    scores, categories = run(torch.zeros(2, 0, 3), 0.5)
    assert scores.shape == categories.shape == (2, 0)
