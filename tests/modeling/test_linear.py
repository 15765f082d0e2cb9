"""Which library multiplies in a linear layer, and that a compiled layer has the same numbers."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from maskformer_fast.modeling import linear as module
from maskformer_fast.modeling.linear import Linear, linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Our operator on a processor where it is faster, with its calls counted."""
    called = Mock(side_effect=module.linear_onednn)
    monkeypatch.setattr(module, "linear_onednn", called)
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    return called


def test_training_in_float32_takes_onednn_and_nothing_else_does(by_onednn: Mock) -> None:
    layer, x = Linear(6, 4), torch.randn(3, 6)
    layer(x)
    assert by_onednn.call_count == 1
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    layer.double()(x.double())
    layer.float().requires_grad_(False)(x)
    linear(torch.empty(3, 6, device="meta"), torch.empty(4, 6, device="meta", requires_grad=True), None)
    assert by_onednn.call_count == 1


def test_mkl_is_taken_where_it_is_faster(by_onednn: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    Linear(6, 4)(torch.randn(3, 6))
    assert not by_onednn.called


def test_a_compiled_layer_has_the_numbers_of_nn_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    layer, x = Linear(16, 8), torch.randn(5, 16)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, layer.weight, layer.bias).square().sum(), layer.weight)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    gradients = torch.autograd.grad(found.square().sum(), layer.weight)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_is_measured_once_while_it_is_compiled() -> None:
    layer = Linear(16, 8)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(5, 16)).sum().backward()
    assert layer.weight.grad is not None
