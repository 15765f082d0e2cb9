"""Deformable attention on CUDA against its eager twin in float64, and its deterministic way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from maskformer_fast.ops import deformable_attention
from maskformer_fast.ops.deformable_attention import deformable_attention_eager

pytestmark = pytest.mark.gpu
# Of the largest value. Sums of gradients by atomics have another order in each run.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


class Case(NamedTuple):
    value: Tensor
    level_sizes: tuple[tuple[int, int], ...]
    reference_points: Tensor
    offsets: Tensor
    logits: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        return [self.value, self.reference_points, self.offsets, self.logits]

    def double(self) -> Case:
        return Case(*[x.detach().double().requires_grad_() if isinstance(x, Tensor) else x for x in self])


def random_case(
    dtype: torch.dtype, level_sizes: tuple[tuple[int, int], ...], batch: int = 2, queries: int = 301, heads: int = 8,
    dim: int = 32, points: int = 4,
) -> Case:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(dim + queries)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    levels, cells = len(level_sizes), sum(height * width for height, width in level_sizes)
    reference = torch.rand(batch, queries, levels, 2, generator=generator, device="cuda")
    offsets = 3 * normal(batch, queries, heads, levels, points, 2)
    case = Case(normal(batch, cells, heads, dim), level_sizes, reference, offsets,
                normal(batch, queries, heads, levels, points))  # fmt: skip
    for tensor in case.inputs:
        tensor.requires_grad_()
    return case


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape",
    [
        {"level_sizes": ((64, 64), (32, 32), (16, 16)), "queries": 5376, "batch": 1},
        {"level_sizes": ((5, 7), (3, 2), (1, 1))}, {"level_sizes": ((1, 1),), "points": 1, "dim": 5, "heads": 3},
        {"level_sizes": ((9, 4), (8, 8), (2, 9), (1, 5), (3, 1)), "dim": 100, "points": 5},
    ],
)  # fmt: skip
def test_equals_float64(shape, dtype: torch.dtype) -> None:
    case = random_case(dtype, **shape)
    exact = case.double()
    got, wanted = deformable_attention(*case), deformable_attention_eager(*exact)
    assert got.dtype == dtype
    assert_close(got, wanted, TOLERANCE[dtype])
    upstream = torch.randn(wanted.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(dtype)
    gradients = torch.autograd.grad(got, case.inputs, upstream)
    expected = torch.autograd.grad(wanted, exact.inputs, upstream.double())
    for gradient, own in zip(gradients, expected, strict=True):
        assert_close(gradient, own, 2 * TOLERANCE[dtype])


def test_numbers_that_are_not_finite() -> None:
    case = random_case(torch.float32, ((4, 6), (2, 2)), queries=9)
    with torch.no_grad():
        clean = deformable_attention(*case)
        case.logits[0, 0, 0, 1, 2] = torch.nan
        case.logits[0, 1, 0, 1, 2] = torch.inf
        case.logits[0, 2, 0] = -torch.inf
        case.offsets[0, 3, 0] = torch.nan  # outside
        got = deformable_attention(*case)
    assert got[0, :3, :32].isnan().all() and not got[0, 3, :32].any()
    got[0, :4, :32] = clean[0, :4, :32]
    assert torch.equal(got, clean)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_gradients_are_equal_in_every_run() -> None:
    case = random_case(torch.float32, ((16, 16), (8, 8)), queries=320)
    result = deformable_attention(*case)
    runs = [torch.autograd.grad(result.square().sum(), case.inputs, retain_graph=True) for _ in range(3)]
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert torch.equal(one, other)
