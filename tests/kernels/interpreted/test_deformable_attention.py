"""The kernels of deformable attention against their eager twins in double precision, on ragged sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maskformer_fast.kernels.deformable_attention import deformable_attention_backward as backward
from maskformer_fast.kernels.deformable_attention import deformable_attention_forward as forward
from maskformer_fast.ops.deformable_attention import (
    Attention,
    AttentionBackward,
    _backward_cuda,
    _backward_eager,
    _forward_cuda,
    _forward_eager,
)

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the largest value


def random_case(batch=2, queries=7, heads=2, dim=8, points=3, level_sizes=(3, 4, 2, 1, 1, 1), dtype=torch.float32,
                spread=2.0) -> Attention:  # fmt: skip
    generator = torch.Generator().manual_seed(dim + queries)
    levels, cells = len(level_sizes) // 2, sum(h * w for h, w in zip(level_sizes[::2], level_sizes[1::2], strict=True))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    reference = torch.rand(batch, queries, levels, 2, generator=generator)
    offsets = spread * normal(batch, queries, heads, levels, points, 2)
    return Attention(normal(batch, cells, heads, dim), level_sizes, reference, offsets,
                     normal(batch, queries, heads, levels, points))  # fmt: skip


def double(case: Attention) -> Attention:
    value, level_sizes, *others = case
    return Attention(value.double(), level_sizes, *[tensor.double() for tensor in others])


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == expected.shape
    if expected.numel():
        assert (got - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1)


def check(case: Attention) -> None:
    dtype = case.value.dtype
    expected = _forward_eager(double(case))
    assert_close(forward(*case), expected, dtype)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = backward(upstream, *case)
    for got, own in zip(gradients, _backward_eager(AttentionBackward(upstream.double(), double(case))), strict=True):
        assert_close(got, own, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape",
    [
        {}, {"dim": 32, "points": 4, "queries": 5}, {"dim": 5, "points": 1, "level_sizes": (1, 1)},
        {"dim": 20, "points": 5, "heads": 3, "batch": 1, "spread": 20.0},
        {"dim": 130, "queries": 3, "level_sizes": (2, 3), "points": 2},
    ],
)  # fmt: skip
def test_equals_eager_twin(shape, dtype: torch.dtype) -> None:
    check(random_case(dtype=dtype, **shape))


@pytest.mark.parametrize("empty", ["batch", "queries", "heads", "dim"])
def test_nothing_to_do(empty: str) -> None:
    case = random_case(**{empty: 0})
    result = forward(*case)
    assert torch.equal(result, _forward_eager(case))
    for gradient, tensor in zip(backward(result, *case), (case.value, case.offsets, case.logits), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


def test_places_outside_read_nothing() -> None:
    case = random_case(queries=9, heads=1, points=1, level_sizes=(4, 6), batch=1)
    case.reference_points.fill_(0.5)
    places = [(-1, 1), (-1.5, 1), (6, 1), (1, -1), (1, 4), (1e30, 1), (-1e30, 1), (math.inf, 1), (math.nan, 1)]
    case.offsets[0, :, 0, 0, 0] = torch.tensor(places) - (torch.tensor([3.0, 2.0]) - 0.5)
    case.value[0, 0] = math.inf
    assert not forward(*case).any()
    assert not any(gradient.any() for gradient in backward(torch.ones(1, 9, 8), *case))


def test_numbers_that_are_not_finite() -> None:
    case = random_case()
    clean = forward(*case)
    case.logits[0, 0, 0, 1, 2] = math.nan
    case.logits[0, 1, 0, 1, 2] = math.inf
    case.logits[0, 2, 0] = -math.inf
    case.offsets[0, 2, 0] = 1e6
    got = forward(*case)
    assert got[0, :3, :8].isnan().all()
    got[0, :3, :8] = clean[0, :3, :8]
    assert torch.equal(got, clean)
    case = random_case()
    case.logits[:, :, :, 1] = -math.inf
    check(case)  # the level has no weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_operator_calls_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA implementation; double precision and deterministic gradients go to the eager twin."""
    case = random_case(dtype=torch.float16)
    case = double(case) if dtype == torch.float64 else case
    result = _forward_cuda(case)
    assert torch.equal(result, _forward_eager(case) if dtype == torch.float64 else forward(*case))
    arguments = AttentionBackward(torch.ones_like(result), case)
    eager = _backward_eager(arguments)
    for got, own in zip(_backward_cuda(arguments), eager if dtype == torch.float64 else backward(*arguments[:1], *case),
                        strict=True):  # fmt: skip
        assert torch.equal(got, own)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for got, own in zip(_backward_cuda(arguments), eager, strict=True):
        assert torch.equal(got, own)


def test_wrong_arguments_are_named() -> None:
    value, *rest = random_case()
    with pytest.raises(ValueError, match="value: expected float16, bfloat16 or float32, got torch.float64"):
        forward(value.double(), *rest)
    huge = torch.zeros(1).expand(1, 1 << 26, 2, 16)
    offsets, logits = torch.zeros(1, 1, 2, 1, 1, 2), torch.zeros(1, 1, 2, 1, 1)
    with pytest.raises(ValueError, match="value: expected fewer than 2\\^31 numbers of an image, got 2147483648"):
        forward(huge, (1 << 13, 1 << 13), torch.zeros(1, 1, 1, 2), offsets, logits)
