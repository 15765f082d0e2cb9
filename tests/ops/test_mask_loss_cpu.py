"""The C++ sums of the mask losses on every instruction set, against the eager twin in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskformer_fast.ops.mask_loss import (
    MaskPairs,
    MaskPairsBackward,
    _mask_sums_cuda,
    mask_sums_backward_eager,
    mask_sums_eager,
)
from tests.support.instruction_sets import INSTRUCTION_SETS, instruction_set
from tests.support.missing_modules import hide_triton

operator = torch.ops.maskformer_fast.mask_sums
backward = torch.ops.maskformer_fast.mask_sums_backward
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, int, list[float]]


def random_arguments(
    seed: int,
    cells: tuple[int, int],
    size: tuple[int, int],
    pairs: int = 5,
    gamma: float = 2.0,
    padding: bool = True,
    steepness: float = 3.0,
) -> Arguments:
    """Pairs and targets that fit; masks hold garbage in their padding bits, and the second pair has no target."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size
    logits = steepness * torch.randn(pairs, *cells, generator=rng)
    masks = torch.randint(256, (4, height, (width + 7) // 8), generator=rng, dtype=torch.uint8)
    rows = torch.randint(4, (pairs,), generator=rng)
    rows[1:2] = -1
    valid = torch.stack([torch.randint(side + 1, (4,), generator=rng) for side in size], 1)
    valid[0] = torch.tensor(size)
    return logits, masks, rows, valid if padding else None, width, [0.3, 0.6, gamma]


def assert_equals_float64(arguments: Arguments, tolerance: float = 2e-6) -> None:
    """Sums and gradient, a pair at a time, so that each is held to its own size, and that of what cancels in it."""
    logits, masks, _, _, width, _ = arguments
    exact = MaskPairs(logits.double(), *arguments[1:])
    gradient = torch.randn(len(logits), 4, generator=torch.Generator().manual_seed(1))
    pixels_of_cell = max(1.0, masks.shape[1] * width / logits[0].numel()) if len(logits) else 1.0
    for got, expected, terms in (
        (operator(*arguments), mask_sums_eager(exact), torch.zeros(len(logits))),
        (backward(gradient, *arguments), mask_sums_backward_eager(MaskPairsBackward(gradient.double(), exact)),
         0.2 * pixels_of_cell * gradient.abs().amax(1)),
    ):  # fmt: skip
        assert got.dtype == torch.float32 and got.shape == expected.shape and got.is_contiguous()
        for row, expected_row, size in zip(got.double(), expected, terms.tolist(), strict=True):
            limit = tolerance * (float(expected_row.abs().amax()) + size) + 1e-12
            torch.testing.assert_close(row, expected_row, rtol=0, atol=limit)


# Vectors hold 4, 8 or 16 pixels. Scales below 1, of 1, between 1 and 2 (more cells than a vector holds) and beyond.
SIZES = [
    ((32, 48), (128, 192)),
    ((5, 9), (19, 33)),
    ((7, 40), (9, 47)),
    ((11, 17), (11, 17)),
    ((23, 50), (8, 13)),
    ((1, 1), (1, 1)),
    ((1, 1), (6, 21)),
    ((3, 2), (1, 8)),
]


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 0.7, 3.5])
@pytest.mark.parametrize(("cells", "size"), SIZES)
def test_every_instruction_set_equals_float64(isa, cells, size, gamma):
    for padding in (True, False):
        assert_equals_float64(random_arguments(3, cells, size, gamma=gamma, padding=padding))


@given(
    st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 40), st.integers(1, 70), st.integers(1, 140),
    st.integers(0, 40), st.sampled_from([0.0, 1.0, 2.0, 1.3]), st.booleans(), st.floats(0.1, 30),
    st.sampled_from(INSTRUCTION_SETS),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_random_shapes_equal_float64(seed, h, w, height, width, pairs, gamma, padding, steepness, isa):
    # a pair's logit errs by 1e-7 of itself, and its loss where it is small by as much as that of its probability
    tolerance = 2e-6 + 2e-7 * steepness
    arguments = random_arguments(seed, (h, w), (height, width), pairs, gamma, padding, steepness)
    with instruction_set(isa):
        assert_equals_float64(arguments, tolerance)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 1.3])
def test_gradient_by_finite_differences_of_the_twin(gamma):
    logits, *rest = random_arguments(5, (4, 6), (13, 19), gamma=gamma)
    exact = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: operator(x, *rest), exact)
    # and the float32 gradient through autograd is that of the twin
    single = logits.clone().requires_grad_()
    for inputs in (exact, single):
        (operator(inputs, *rest) * torch.arange(1, 5)).sum().backward()
    for row, expected in zip(single.grad.double(), exact.grad, strict=True):
        torch.testing.assert_close(row, expected, rtol=0, atol=2e-6 * float(expected.abs().amax()) + 1e-12)


def test_padding_bits_are_ignored(isa):
    logits, masks, *rest = random_arguments(6, (6, 11), (21, 42))
    clean = masks.clone()
    clean[..., -1] &= 0b11  # 42 = 5 * 8 + 2
    assert not torch.equal(clean, masks)
    gradient = torch.randn(5, 4)
    assert torch.equal(operator(logits, masks, *rest), operator(logits, clean, *rest))
    assert torch.equal(backward(gradient, logits, masks, *rest), backward(gradient, logits, clean, *rest))


def test_pixels_that_do_not_count_are_not_read(isa):
    logits, masks, rows, _, width, focal = random_arguments(7, (8, 16), (32, 64))
    valid = torch.tensor([[18, 34]] * 4)  # reads cells up to row 4 and column 8
    broken = logits.clone()
    broken[:, 5:], broken[:, :, 9:] = math.nan, math.inf
    arguments = (masks, rows, valid, width, focal)
    assert torch.equal(operator(broken, *arguments), operator(logits, *arguments))
    gradient = torch.randn(5, 4)
    assert torch.equal(backward(gradient, broken, *arguments), backward(gradient, logits, *arguments))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_stay_in_their_pair(isa, value):
    logits, masks, rows, _, width, focal = random_arguments(8, (6, 12), (24, 48))
    broken = logits.clone()
    broken[0, 2, 3] = broken[1] = value  # pair 1 has no target
    arguments = (masks, rows, None, width, focal)
    sums, expected = operator(broken, *arguments), operator(logits, *arguments)
    assert sums[0, :3].isnan().all() and torch.equal(sums[0, 3], expected[0, 3])
    assert torch.equal(sums[1], torch.zeros(4)) and torch.equal(sums[2:], expected[2:])
    upstream = torch.randn(5, 4)
    gradient, expected = (backward(upstream, x, *arguments) for x in (broken, logits))
    assert gradient[0, 2, 3].isnan() and (gradient[1] == 0).all() and torch.equal(gradient[2:], expected[2:])


def test_extreme_logits_are_finite(isa):
    logits, *rest = random_arguments(9, (6, 12), (24, 48), steepness=1e4)
    logits[0, 0, 0], logits[0, 1, 1] = 3e38, -3e38
    for focal in ([0.3, 0.6, 2.0], [1.0, 1.0, 0.0]):
        arguments = (logits, *rest[:-1], focal)
        gradient = backward(torch.randn(5, 4), *arguments)
        assert gradient.isfinite().all() and operator(*arguments)[:, 1:].isfinite().all()
        assert not operator(*arguments)[:, 0].isnan().any()


@pytest.mark.parametrize("pairs", [1, 3, 40])
def test_any_number_of_threads_gives_the_same(isa, pairs):
    arguments = random_arguments(10, (33, 20), (130, 77), pairs)
    gradient = torch.randn(pairs, 4)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((operator(*arguments), backward(gradient, *arguments)))
    finally:
        torch.set_num_threads(threads)
    for sums, slopes in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(slopes, results[0][1])


def test_a_gradient_does_not_depend_on_the_other_pairs(isa):
    arguments = random_arguments(11, (33, 20), (130, 77), 40)
    gradient = torch.randn(40, 4)
    together = backward(gradient, *arguments)
    for k in range(0, 40, 7):  # one pair is worked on in bands
        logits, rows = (arguments[n][k : k + 1] for n in (0, 2))
        alone = backward(gradient[k : k + 1], logits, arguments[1], rows, *arguments[3:])
        assert torch.equal(alone[0], together[k])


def test_any_strides(isa):
    logits, masks, rows, valid, width, focal = random_arguments(12, (9, 14), (30, 50))
    strided = (logits.mT.contiguous().mT, masks.mT.contiguous().mT, rows.repeat_interleave(2)[::2],
               valid.T.contiguous().T, width, focal)  # fmt: skip
    assert not any(tensor.is_contiguous() for tensor in strided[:4])
    plain = (logits, masks, rows, valid, width, focal)
    assert torch.equal(operator(*strided), operator(*plain))
    gradient = torch.randn(4, 5).T
    assert torch.equal(backward(gradient, *strided), backward(gradient.contiguous(), *plain))


def test_no_pairs_and_no_targets_give_empty_results():
    logits, masks, rows, valid, width, focal = random_arguments(13, (4, 5), (16, 20), pairs=0)
    assert operator(logits, masks, rows, valid, width, focal).shape == (0, 4)
    assert backward(torch.zeros(0, 4), logits, masks, rows, valid, width, focal).shape == (0, 4, 5)
    none = (torch.randn(2, 4, 5), masks[:0], torch.tensor([-1, -1]), None, width, focal)  # and no targets at all
    assert torch.equal(operator(*none), torch.zeros(2, 4))
    assert torch.equal(backward(torch.ones(2, 4), *none), torch.zeros(2, 4, 5))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(5, 4, 5, dtype=torch.bfloat16), r"logits: expected torch\.float32 .*got .torch\.bfloat16"),
        (0, torch.zeros(4, 4, 5), r"logits: expected torch\.float32 \(5, 4, 5\), got .*\(4, 4, 5\)"),
        (0, torch.zeros(5, 20), r"logits: expected .*\[P, h, w\], got \(5, 20\)"),
        (0, torch.zeros(5, 0, 5), "sizes: expected pixels, got none"),
        (1, torch.zeros(4, 16, 2, dtype=torch.uint8), r"masks: expected torch\.uint8 \(4, 16, 3\), got .*\(4, 16, 2\)"),
        (1, torch.zeros(4, 16, 3, dtype=torch.int8), r"masks: expected torch\.uint8"),
        (1, torch.zeros(4, 48, dtype=torch.uint8), r"masks: expected .*\[N, H, ceil\(W/8\)\], got \(4, 48\)"),
        (2, torch.zeros(5, dtype=torch.int32), r"rows: expected torch\.int64 \(5,\), got .torch\.int32"),
        (2, torch.tensor([0, 1, -1, 4, 0]), r"rows: expected less than 4 .*got 4 at pair 3"),
        (3, torch.zeros(3, 2, dtype=torch.int64), r"valid_sizes: expected torch\.int64 \(4, 2\), got .*\(3, 2\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(place, value, message):
    arguments = list(random_arguments(14, (4, 5), (16, 20)))
    arguments[place] = value
    for call in (lambda: operator(*arguments), lambda: backward(torch.zeros(5, 4), *arguments)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("gradient", [torch.zeros(5, 3), torch.zeros(5, 4, dtype=torch.float64)])
def test_a_gradient_that_does_not_fit_is_refused(gradient):
    with pytest.raises(ValueError, match=r"gradient: expected torch\.float32 \(5, 4\), got .torch"):
        backward(gradient, *random_arguments(14, (4, 5), (16, 20)))


def test_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_triton(monkeypatch)
    rows = torch.zeros(1, dtype=torch.int64)
    pairs = MaskPairs(torch.zeros(1, 2, 2), torch.zeros(1, 4, 1), rows, None, 4, (1.0, 1.0, 0.0))
    with pytest.raises(ImportError, match=r"No module named 'triton'.*pip install triton"):
        _mask_sums_cuda(pairs)
