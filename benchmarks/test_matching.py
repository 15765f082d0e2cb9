"""Assignment, matching and the criterion, beside SciPy, torch-linear-assignment, Hugging Face and the formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import sides
from benchmarks.conftest import Measure
from benchmarks.sides import HUGGINGFACE, OFFICIAL, OURS
from maskformer_fast.ops import linear_sum_assignment
from maskformer_fast.ops.assignment import linear_sum_assignment_eager

BATCH = 16


@pytest.mark.parametrize("shape", [(100, 20), (100, 100), (300, 300)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("solver", ["ours", "scipy", "torch-linear-assignment"])
def test_assignment(measure: Measure, device: str, solver: str, shape: tuple[int, int]) -> None:
    """Uniform costs, one time for the whole batch."""
    if solver == "scipy":
        solve = linear_sum_assignment_eager  # SciPy in a loop
    elif solver == "torch-linear-assignment":
        batched = pytest.importorskip("torch_linear_assignment").batch_linear_assignment

        def solve(cost: torch.Tensor) -> torch.Tensor:
            return batched(cost.mT.contiguous())  # a row a target, as it gives one column to each row
    else:
        solve = linear_sum_assignment
    cost = torch.rand(BATCH, *shape).to(device)
    found = measure(f"assignment {BATCH} x {shape[0]}x{shape[1]}", partial(solve, cost))
    assert torch.equal((found >= 0).sum(-1).cpu(), torch.full((BATCH,), min(shape)))


@pytest.mark.parametrize("side", [OURS, HUGGINGFACE], ids=["ours", "huggingface"])
def test_matching(measure: Measure, device: str, side: str) -> None:
    found = measure("matching 2 images 512x512, Q=100, 20 targets", sides.matching(device=device)[side])
    assert len(found) == 2


@pytest.mark.parametrize("side", [OURS, OFFICIAL], ids=["ours", "official"])
def test_criterion_step(measure: Measure, device: str, side: str) -> None:
    """Matching, losses, and gradients by class logits, mask and pixel embeddings."""
    operations = sides.criterion(device=device)
    if side not in operations:
        pytest.skip("the formula's matcher needs the CPU")
    loss, *gradients = measure("criterion, forward and backward, 2 images 512x512", operations[side])
    expected, *_ = operations[OURS]()
    assert torch.allclose(loss, expected, rtol=1e-3) and all(gradient.any() for gradient in gradients)
