"""The operators of the mask losses on CUDA against their eager twins in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.ops.mask_loss import (
    MaskPairs,
    MaskPairsBackward,
    mask_loss,
    mask_sums_backward_eager,
    mask_sums_eager,
)
from maskformer_fast.structures import Predictions, Targets

pytestmark = pytest.mark.gpu
mask_sums = torch.ops.maskformer_fast.mask_sums
mask_sums_backward = torch.ops.maskformer_fast.mask_sums_backward


def random_case(
    cells: tuple[int, int], size: tuple[int, int], padding: bool, gamma: float, pairs: int = 5
) -> tuple[Any, ...]:
    """Arguments of the operator; pair 1 has no target and NaN logits, bits beyond the width are garbage."""
    rng = torch.Generator().manual_seed(sum(cells) + sum(size))
    logits = 3 * torch.randn(pairs, *cells, generator=rng)
    logits[1] = math.nan
    masks = torch.randint(0, 256, (3, size[0], (size[1] + 7) // 8), generator=rng, dtype=torch.uint8)
    masks[2, : size[0] // 2] = 255
    valid = torch.tensor([[size[0] + 5, size[1] - size[1] // 3], [size[0] // 2, size[1]], [size[0] - 1, size[1] - 1]])
    rows = torch.arange(pairs) % 3
    rows[1] = -1
    return logits.cuda(), masks.cuda(), rows.cuda(), valid.cuda() if padding else None, size[1], [0.3, 0.8, gamma]


def upstream_of(arguments: tuple[Any, ...]) -> Tensor:
    return torch.randn(len(arguments[0]), 4, generator=torch.Generator().manual_seed(5)).cuda()


GRID = [
    ((5, 7), (20, 28), 2.0, True),
    ((128, 128), (512, 512), 2.0, False),
    ((128, 128), (512, 512), 2.0, True),
    ((18, 17), (72, 68), 0.0, False),
    ((70, 134), (277, 533), 1.0, True),
    ((3, 16), (19, 121), 0.0, True),
    ((2, 1), (40, 150), 0.7, False),
    ((1, 2), (3, 200), 1.5, True),
    ((34, 9), (13, 30), 2.0, True),
    ((90, 135), (39, 111), 1.5, False),
    ((64, 65), (64, 65), 1.0, True),
    ((7, 5), (1, 1), 0.0, False),
    ((200, 3), (5000, 61), 2.0, True),
]


@pytest.mark.parametrize("cells, size, gamma, padding", GRID)
def test_operators_equal_eager_twins(cells, size, gamma: float, padding: bool) -> None:
    arguments = random_case(cells, size, padding, gamma)
    logits, *rest = arguments
    sums, expected = mask_sums(*arguments), mask_sums_eager(MaskPairs(logits.double(), *rest))
    torch.testing.assert_close(sums.double(), expected, rtol=2e-5, atol=1e-13)
    upstream = upstream_of(arguments)
    gradient = mask_sums_backward(upstream, *arguments)
    exact = MaskPairsBackward(upstream.double(), MaskPairs(logits.double(), *rest))
    expected = mask_sums_backward_eager(exact)
    for row, expected_row in zip(gradient.flatten(0, 1), expected.flatten(0, 1), strict=True):
        torch.testing.assert_close(row.double(), expected_row, rtol=2e-5, atol=2e-5 * expected_row.abs().max().item())
    assert torch.equal(mask_sums(*arguments), sums)
    assert torch.equal(mask_sums_backward(upstream, *arguments), gradient)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 0.6])
@pytest.mark.parametrize("level", [-40.0, -9.0, 0.0, 9.0])
def test_sums_of_small_terms_keep_their_digits(level: float, gamma: float) -> None:
    logits, *rest = random_case((2, 3), (8, 12), True, gamma)
    logits = level + 1e-3 * logits
    sums, expected = mask_sums(logits, *rest), mask_sums_eager(MaskPairs(logits.double(), *rest))
    torch.testing.assert_close(sums.double(), expected, rtol=2e-5, atol=1e-13)


def test_double_precision_by_finite_differences() -> None:
    logits, masks, rows, *rest = random_case((3, 4), (11, 15), True, 1.5)
    double = logits[2:].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mask_sums(x, masks, rows[2:], *rest), double)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 0.6])
def test_gradient_by_finite_differences(gamma: float) -> None:
    """Compare the kernels' gradient with finite differences along one direction, by steps that float32 can resolve."""
    logits, masks, rows, *rest = random_case((20, 33), (80, 131), True, gamma)
    logits, rows = logits[2:], rows[2:]
    upstream = torch.tensor([1.0, -0.7, 0.4, 0.0], device="cuda").expand(len(logits), 4)
    gradient = mask_sums_backward(upstream, logits, masks, rows, *rest)
    step = 0.02 * gradient / gradient.abs().amax((1, 2), keepdim=True)
    ahead, behind = ((mask_sums(logits + s, masks, rows, *rest).double() * upstream).sum(1) for s in (step, -step))
    expected = (gradient.double() * 2 * step).sum((1, 2))
    assert (expected > 0).all()
    torch.testing.assert_close(ahead - behind, expected, rtol=5e-3, atol=0)


def predicted(dtype: torch.dtype) -> tuple[Predictions, Targets, Tensor]:
    rng = torch.Generator().manual_seed(7)
    size, valid = (53, 75), torch.tensor([[53, 70], [40, 75]])
    masks = torch.randint(0, 256, (2, 4, 53, 10), generator=rng, dtype=torch.uint8)
    predictions = Predictions(
        torch.zeros(2, 2, 6, 3, device="cuda", dtype=dtype),
        torch.randn(2, 2, 6, 16, generator=rng).to("cuda", dtype).requires_grad_(),
        torch.randn(2, 16, 14, 19, generator=rng).to("cuda", dtype).requires_grad_(),
        valid.cuda(),
        size,
    )
    targets = Targets(
        torch.zeros(2, 4, dtype=torch.int64).cuda(), torch.tensor([4, 2]).cuda(), masks.cuda(), valid.cuda(), size
    )
    query = torch.rand(2, 2, 6, generator=rng).argsort(2)[..., :4]
    query[:, 1, 2:] = -1
    return predictions, targets, query.cuda()


def losses_and_gradients(
    predictions: Predictions,
    targets: Targets,
    query: Tensor,
    loss: LossConfig,
    function: Callable[..., Any] = mask_loss,
) -> list[Tensor]:
    losses = function(predictions, targets, query, loss)
    total = sum((weight * values).sum() for weight, values in zip((1.0, 0.3), losses, strict=True))
    inputs = predictions.mask_embeddings, predictions.pixel_features
    return [*losses, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("padding", ["exclude", "include"])
@pytest.mark.parametrize("kind", ["focal", "bce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_losses_equal_double_precision(dtype, kind: str, padding: str) -> None:
    loss = LossConfig(mask_loss=kind, padding=padding)
    predictions, targets, query = predicted(dtype)
    exact = predictions._replace(
        mask_embeddings=predictions.mask_embeddings.double().detach().requires_grad_(),
        pixel_features=predictions.pixel_features.double().detach().requires_grad_(),
    )
    ours = losses_and_gradients(predictions, targets, query, loss)
    expected = losses_and_gradients(exact, targets, query, loss)
    rounding = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]  # of gradients, to the dtype
    for value, wanted, tolerance in zip(ours, expected, (2e-5, 2e-5, rounding, rounding), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("padding", [True, False])
def test_opcheck(padding: bool) -> None:
    logits, *rest = random_case((4, 3), (13, 11), padding, 2.0)
    logits = logits.nan_to_num().requires_grad_()
    torch.library.opcheck(mask_sums.default, (logits, *rest))
    torch.library.opcheck(mask_sums_backward.default, (torch.randn(5, 4, device="cuda"), logits.detach(), *rest))


def test_compiles_in_one_graph() -> None:
    predictions, targets, query = predicted(torch.float32)
    compiled = torch.compile(mask_loss, fullgraph=True)
    ours = losses_and_gradients(predictions, targets, query, LossConfig(), compiled)
    expected = losses_and_gradients(predictions, targets, query, LossConfig())
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_forward_and_backward_in_a_cuda_graph() -> None:
    arguments = random_case((20, 33), (80, 131), True, 2.0)
    logits, rows = arguments[0], arguments[2]
    upstream = upstream_of(arguments)

    def both() -> tuple[Tensor, Tensor]:
        return mask_sums(*arguments), mask_sums_backward(upstream, *arguments)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = both()
    logits.copy_(logits.flip(0))
    rows.copy_(rows.flip(0))
    graph.replay()
    expected = both()
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
    assert torch.equal(replayed[0][-2], torch.zeros(4, device="cuda")) and (replayed[0][-1] != 0).all()


@pytest.mark.parametrize("pairs, targets", [(0, 0), (0, 2), (3, 0)])
def test_nothing_to_do(pairs: int, targets: int) -> None:
    logits = torch.randn(pairs, 3, 4, device="cuda", requires_grad=True)
    masks = torch.zeros(targets, 12, 2, dtype=torch.uint8, device="cuda")
    rows = torch.full((pairs,), -1, device="cuda")
    valid = torch.ones(targets, 2, dtype=torch.int64, device="cuda")
    sums = mask_sums(logits, masks, rows, valid, 16, [0.5, 0.5, 2.0])
    assert torch.equal(sums, torch.zeros_like(sums)) and sums.shape == (pairs, 4)
    (gradient,) = torch.autograd.grad(sums.sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_memory_is_a_tenth_of_plain_pytorch() -> None:
    arguments = random_case((128, 128), (512, 512), False, 2.0, pairs=300)
    upstream, pairs = upstream_of(arguments), MaskPairs(*arguments)

    def fused() -> None:
        mask_sums(*arguments)
        mask_sums_backward(upstream, *arguments)

    def eager() -> None:
        mask_sums_eager(pairs)
        mask_sums_backward_eager(MaskPairsBackward(upstream, pairs))

    def peak(run: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    assert peak(fused) <= peak(eager) / 10
