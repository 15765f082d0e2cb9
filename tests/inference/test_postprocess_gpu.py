"""Postprocessing of predictions on CUDA against the CPU."""

from __future__ import annotations

import pytest
import torch

from maskformer_fast.structures import Predictions
from tests.support.postprocess_cases import INPUT_SIZE, OUTPUT_SIZES, all_results, random_predictions

pytestmark = pytest.mark.gpu


def test_cuda_equals_cpu() -> None:
    predictions = random_predictions(14)
    moved = Predictions(*(t.cuda() for t in predictions[:4]), INPUT_SIZE)
    results = all_results(moved, OUTPUT_SIZES)
    on_cpu = [[v.cpu() if isinstance(v, torch.Tensor) else v for v in result] for result in results]
    for got, want in zip(on_cpu, all_results(predictions, OUTPUT_SIZES), strict=True):
        assert (got[0] == want[0]).float().mean() > 0.999 and (got[2] == want[2]).float().mean() > 0.99
        assert [s.category for s in got[3]] == [s.category for s in want[3]]
        torch.testing.assert_close(got[5], want[5], atol=1e-4, rtol=1e-4)
