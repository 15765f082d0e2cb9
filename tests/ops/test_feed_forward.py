"""The feed-forward part by either library beside its eager twin in float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskformer_fast.ops import linear
from maskformer_fast.ops.feed_forward import feed_forward, feed_forward_eager

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def draw(shape: tuple[int, ...], hidden: int, outputs: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (hidden, shape[-1]), (hidden,), (outputs, hidden), (outputs,))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("shape", "hidden", "outputs"), [((5,), 7, 3), ((2, 7, 33), 65, 16), ((3, 5, 9, 16), 48, 17), ((0, 4), 8, 4)]
)
@pytest.mark.parametrize(("block", "onednn"), [(16, True), (16, False), (1024, True), (1024, False)])
def test_results_and_gradients_equal_those_in_float64(
    shape: tuple[int, ...], hidden: int, outputs: int, block: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskformer_fast.ops.feed_forward._BLOCK", block)
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: onednn)
    ours = draw(shape, hidden, outputs)
    exact = [tensor.double().requires_grad_() for tensor in ours]
    for tensor in ours:
        tensor.requires_grad_()
    found, expected = feed_forward(*ours), feed_forward_eager(*exact)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=2e-5)
    slopes = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, ours, slopes.float()), torch.autograd.grad(expected, exact, slopes)
    for got, wanted in zip(*gradients, strict=True):
        assert got.shape == wanted.shape
        assert not got.numel() or (got - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)


def test_it_follows_the_rules_of_operators() -> None:
    inputs = draw((3, 5, 8), 6, 4)
    torch.library.opcheck(
        torch.ops.maskformer_fast.feed_forward, tuple(tensor.requires_grad_() for tensor in inputs)
    )


def test_inputs_of_any_layout_have_the_same_results() -> None:
    x, *layers = draw((4, 6, 8), 6, 4)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = feed_forward(strided, *layers)
    torch.testing.assert_close(found, feed_forward_eager(x, *layers), rtol=1e-5, atol=1e-5)
    slopes = torch.ones(()).expand(found.shape)
    (gradient,) = torch.autograd.grad(found, strided, slopes)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(feed_forward_eager(x, *layers), x, slopes)[0])


@pytest.mark.parametrize(
    ("index", "tensor", "error", "message"),
    [
        (0, torch.zeros(3, 8).double(), TypeError, r"x: expected torch.float32, got torch.float64"),
        (0, torch.zeros(3, 7), ValueError, r"x: expected shape \[\.\.\., 8\]"),
        (1, torch.zeros(6), ValueError, r"weight1: expected shape \[H, C\]"),
        (2, torch.zeros(5), ValueError, r"bias1: expected shape \[6\]"),
        (3, torch.zeros(4, 5), ValueError, r"weight2: expected shape \[N, 6\]"),
        (4, torch.zeros(3), ValueError, r"bias2: expected shape \[4\]"),
    ],
)
def test_bad_arguments_are_refused(index: int, tensor: Tensor, error: type[Exception], message: str) -> None:
    arguments = draw((3, 8), 6, 4)
    arguments[index] = tensor
    with pytest.raises(error, match=message):
        feed_forward(*arguments)


def test_gradients_of_other_rows_are_refused() -> None:
    x, *layers, _ = draw((3, 8), 6, 4)
    with pytest.raises(ValueError, match=r"gradient: expected shape \(3, 4\)"):
        torch.ops.maskformer_fast.feed_forward_backward(torch.zeros(2, 4), x, *layers)
