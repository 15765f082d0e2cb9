"""Linear layers by either library beside the products in float64, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskformer_fast.ops import linear
from maskformer_fast.ops.linear import gelu_linear, linear_onednn, onednn_is_faster

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "outputs", "bias"),
    [((5,), 3, True), ((1, 1), 1, True), ((2, 7, 33), 65, True), ((3, 5, 9, 16), 48, False), ((0, 4), 8, True)],
)
@pytest.mark.parametrize("many_rows", [0, 4096], ids=["weights as a convolution's", "weights as a product"])
def test_products_equal_those_in_float64(
    shape: tuple[int, ...], outputs: int, bias: bool, many_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_MANY_ROWS", many_rows if shape[0] else 4096)
    ours = [draw(*shape), draw(outputs, shape[-1], seed=1), draw(outputs, seed=2) if bias else None]
    exact = [None if tensor is None else tensor.double() for tensor in ours]
    for tensor in (*ours, *exact):
        if tensor is not None:
            tensor.requires_grad_()
    found, expected = linear_onednn(*ours), torch.nn.functional.linear(*exact)  # type: ignore[arg-type]
    slopes = draw(*found.shape, seed=3)
    found.backward(slopes)
    expected.backward(slopes.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for tensor, reference in zip(ours, exact, strict=True):
        if tensor is not None and reference is not None:
            assert tensor.grad is not None and reference.grad is not None
            torch.testing.assert_close(tensor.grad, reference.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", ["relu", "gelu"])
@pytest.mark.parametrize(("shape", "outputs"), [((5,), 3), ((2, 7, 33), 65), ((3, 5, 9, 16), 48), ((0, 4), 8)])
@pytest.mark.parametrize(("block", "onednn"), [(16, True), (16, False), (2048, True), (2048, False)])
def test_layers_with_an_activation_equal_those_in_float64(
    function: str, shape: tuple[int, ...], outputs: int, block: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_BLOCK", block)
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: onednn)
    ours = [draw(*shape), draw(outputs, shape[-1], seed=1), draw(outputs, seed=2)]
    exact = [tensor.double().requires_grad_() for tensor in ours]
    for tensor in ours:
        tensor.requires_grad_()
    functional = torch.nn.functional
    if function == "relu":
        found, expected = linear_onednn(*ours, True), functional.relu(functional.linear(*exact))
    else:
        found, expected = gelu_linear(*ours), functional.linear(functional.gelu(exact[0]), *exact[1:])
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    slopes = draw(*found.shape, seed=3)
    gradients = torch.autograd.grad(found, ours, slopes), torch.autograd.grad(expected, exact, slopes.double())
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-5)


def test_inputs_of_any_layout_have_the_same_products() -> None:
    x, weight = draw(8, 6, 4).transpose(0, 2), draw(8, 5, seed=1).t()
    x.requires_grad_()
    found = linear_onednn(x, weight, None)
    torch.testing.assert_close(found, x.matmul(weight.t()), rtol=1e-5, atol=1e-5)
    slopes = draw(5, 6, 4, seed=2).transpose(0, 2)
    found.backward(slopes)
    torch.testing.assert_close(x.grad, slopes.matmul(weight), rtol=1e-5, atol=1e-5)


def test_it_follows_the_rules_of_operators() -> None:
    inputs = (draw(3, 5, 8).requires_grad_(), draw(4, 8, seed=1).requires_grad_(), draw(4, seed=2).requires_grad_())
    torch.library.opcheck(torch.ops.maskformer_fast.linear_onednn, inputs)
    torch.library.opcheck(torch.ops.maskformer_fast.linear_onednn, (*inputs, True))
    torch.library.opcheck(torch.ops.maskformer_fast.gelu_linear, inputs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((draw(3, 4).double(), draw(2, 4), None), TypeError, "x: expected torch.float32"),
        ((draw(3, 4), draw(2, 4).bfloat16(), None), TypeError, "weight: expected torch.float32"),
        ((draw(3, 4), draw(2, 5), None), ValueError, r"x: expected shape \[..., 5\]"),
        ((draw(3, 4), draw(4), None), ValueError, r"weight: expected shape \[N, C\]"),
        ((draw(3, 4), draw(2, 4), draw(3)), ValueError, r"bias: expected shape \[2\]"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: tuple[Tensor, Tensor, Tensor | None], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        linear_onednn(*arguments)
    with pytest.raises(error, match=message):
        gelu_linear(*arguments[:2], draw(2) if arguments[2] is None else arguments[2])


def test_gradients_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient: expected shape \[3, N\]"):
        torch.ops.maskformer_fast.linear_onednn_weight_gradient(draw(2, 4), draw(3, 5))
    with pytest.raises(ValueError, match=r"gradient: expected shape \[3, N\]"):
        torch.ops.maskformer_fast.gelu_linear_backward(draw(2, 4), draw(3, 5), draw(4, 5))
    with pytest.raises(ValueError, match=r"weight: expected shape \(4, 5\)"):
        torch.ops.maskformer_fast.gelu_linear_backward(draw(3, 4), draw(3, 5), draw(4, 6))


@pytest.mark.parametrize(
    ("vendor", "isa", "mkl", "mkldnn", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, True, True), ("AuthenticAMD", "AVX2", True, True, False),
        ("GenuineIntel", "AVX512", True, True, False), ("", "AVX512", True, True, False),
        ("AuthenticAMD", "AVX512", False, True, False), ("AuthenticAMD", "AVX512", True, False, False),
    ],
)  # fmt: skip
def test_the_library_goes_by_the_processor_alone(
    vendor: str, isa: str, mkl: bool, mkldnn: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a measurement: processes of one run that chose by their own times would train on different sums."""
    monkeypatch.setattr(linear, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    onednn_is_faster.cache_clear()
    try:
        assert onednn_is_faster() == expected
    finally:
        onednn_is_faster.cache_clear()
