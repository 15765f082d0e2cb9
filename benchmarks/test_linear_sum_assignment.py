"""Batched assignment on the CPU against SciPy in a loop: uniform costs, one time for the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from maskformer_fast.ops import linear_sum_assignment
from maskformer_fast.ops.linear_sum_assignment import linear_sum_assignment_eager

BATCH = 16


@pytest.mark.parametrize("shape", [(100, 20), (100, 100), (300, 300)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(
    "solve", [pytest.param(linear_sum_assignment, id="ours"), pytest.param(linear_sum_assignment_eager, id="scipy")]
)
def test_assignment(
    benchmark: BenchmarkFixture, solve: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    benchmark.group = f"linear_sum_assignment {shape[0]}x{shape[1]} B={BATCH}"
    cost = torch.rand(BATCH, *shape, generator=torch.Generator().manual_seed(0))
    result = benchmark(solve, cost)
    assert torch.equal((result >= 0).sum(-1), torch.full((BATCH,), min(shape)))
