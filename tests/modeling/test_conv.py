"""Which convolutions in training are by Winograd's algorithm, and that compiled ones have its numbers."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskformer_fast.modeling import conv as module
from maskformer_fast.modeling.conv import Conv2d, ConvNorm


@pytest.fixture
def by_winograd(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The operator, with its calls counted."""
    called = Mock(side_effect=module.conv3x3)
    monkeypatch.setattr(module, "conv3x3", called)
    return called


def gradients(layer: nn.Conv2d, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Result, and gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    assert layer.bias is not None
    result = forward(x)
    return [result, *torch.autograd.grad(result.square().sum(), (x, layer.weight, layer.bias))]


def test_training_in_float32_takes_winograd_and_nothing_else_does(by_winograd: Mock) -> None:
    layer, x = Conv2d(16, 32, 3, padding=1), torch.randn(2, 16, 16, 17)
    layer(x)
    ConvNorm(16, 32, 3, nn.GroupNorm(4, 32), relu=True)(x)
    assert by_winograd.call_count == 2
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    layer.double()(x.double())
    layer.float().requires_grad_(False)(x)
    assert by_winograd.call_count == 2


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Conv2d(16, 16, 3), (2, 16, 20, 20)),
        (Conv2d(16, 16, 3, padding=1, stride=2), (2, 16, 20, 20)),
        (Conv2d(16, 16, 3, padding=2, dilation=2), (2, 16, 20, 20)),
        (Conv2d(16, 16, 1), (2, 16, 20, 20)),
        (Conv2d(16, 24, 3, padding=1), (2, 16, 20, 20)),
        (Conv2d(24, 16, 3, padding=1), (2, 24, 20, 20)),
        (Conv2d(16, 16, 3, padding=1), (2, 16, 10, 10)),
    ],
    ids=["unpadded", "strided", "dilated", "1x1", "output channels", "input channels", "few pixels"],
)
def test_other_convolutions_are_pytorch_s(layer: Conv2d, shape: tuple[int, ...], by_winograd: Mock) -> None:
    x = torch.randn(shape)
    found = gradients(layer, layer, x)
    expected = gradients(layer, lambda x: nn.Conv2d.forward(layer, x), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert not by_winograd.called


def test_a_compiled_and_a_checkpointed_layer_have_the_numbers_of_nn_conv2d() -> None:
    torch.manual_seed(0)
    layer, x = Conv2d(16, 32, 3, padding=1), torch.randn(2, 16, 16, 17)
    expected = gradients(layer, lambda x: nn.Conv2d.forward(layer, x), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for forward in (layer, compiled, lambda x: checkpoint(layer, x, use_reentrant=False)):
        for got, reference in zip(gradients(layer, forward, x), expected, strict=True):
            assert (got - reference).abs().max() <= 1e-5 * reference.abs().max()
