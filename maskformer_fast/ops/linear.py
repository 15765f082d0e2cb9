"""Linear layers in training on a CPU, in float32.

`linear_onednn` is for processors where MKL, by which PyTorch multiplies, is slower than oneDNN: its forward pass and
both products of its backward pass are oneDNN's, and it applies ReLU as it writes. Weights change with each step, so
they are not packed. `gelu_linear` applies GELU to what it reads, whose result is not kept for the backward pass but
computed again; its products are by the faster library. `torch.nn.functional` has the eager twins.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.core.checks import check
from maskformer_fast.core.machine import processor_vendor
from maskformer_fast.ops.registration import register_gradient, register_operator

_MANY_ROWS = 4096
"""Rows above which the gradient of the weights is computed as that of a 1x1 convolution."""
_BLOCK = 2048
"""Rows to which GELU is applied at a time: the results are still in the processor's cache when they are read."""


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL does: on AMD's processors that have AVX-512.

    A rule and not a measurement, because training goes by it: all processes of a run, and those that resume it, must
    compute the same sums. On Intel's processors the steps of training take the same time with either.
    """
    return has_both_libraries() and has_avx512() and processor_vendor() == "AuthenticAMD"


def has_both_libraries() -> bool:
    """Whether PyTorch has MKL and oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def has_avx512() -> bool:
    """Whether PyTorch computes with AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product(
    x: Tensor,  # [M, C] float32
    weight: Tensor,  # [N, C] float32
    bias: Tensor | None = None,  # [N] float32
    relu: bool = False,
) -> Tensor:
    """Linear layer -> [M, N] by the faster library, without a gradient; for the insides of operators."""
    if onednn_is_faster():
        return _linear_cpu(_Arguments(x, weight, bias, relu))
    result = F.linear(x, weight, bias)
    return F.relu_(result) if relu else result


class _Arguments(NamedTuple):
    x: Tensor  # [..., C] float32
    weight: Tensor  # [N, C] float32
    bias: Tensor | None  # [N] float32
    relu: bool = False


class _Gradients(NamedTuple):
    gradient: Tensor  # [M, N] float32
    x: Tensor  # [M, C] float32


def _linear_cpu(arguments: _Arguments) -> Tensor:
    x, weight, bias, relu = arguments
    if not x.numel() or not weight.numel():
        result = F.linear(x, weight, bias)
        return F.relu(result) if relu else result
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_rows(x), weight, bias, "relu" if relu else "none", [], "")
    return product.view(*x.shape[:-1], -1)


def _rows(x: Tensor) -> Tensor:
    """Dense rows [M, C] of [..., C]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _linear_fake(arguments: _Arguments) -> Tensor:
    x, weight = arguments[:2]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(arguments: _Arguments) -> None:
    x, weight, bias, _ = arguments
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
    check(weight.dim() == 2, "weight", "shape [N, C]", tuple(weight.shape))
    fits = x.dim() >= 1 and x.shape[-1] == weight.shape[1]
    check(fits, "x", f"shape [..., {weight.shape[1]}]", tuple(x.shape))
    if bias is not None:
        check(tuple(bias.shape) == (weight.shape[0],), "bias", f"shape [{weight.shape[0]}]", tuple(bias.shape))


def _weight_gradient_cpu(arguments: _Gradients) -> Tensor:
    gradient, x = arguments
    rows, outputs = gradient.shape
    inputs = x.shape[1]
    if rows <= _MANY_ROWS:
        return _linear_cpu(_Arguments(gradient.t(), x.t(), None))
    # oneDNN splits a long sum in the gradient of a convolution, but not in a product. Dilation changes nothing in a 1x1
    # convolution, but that PyTorch gives it to oneDNN on one thread too. These strides are those of channels last,
    # which oneDNN reads without a copy.
    pixels, slopes = (rows_.view(1, rows, 1, -1).permute(0, 3, 1, 2) for rows_ in (x, gradient))
    weight = x.new_empty((outputs, inputs, 1, 1))
    found: Tensor = torch.ops.aten.convolution_backward(
        slopes, pixels, weight, None, [1, 1], [0, 0], [2, 2], False, [0, 0], 1, [False, True, False]
    )[1]
    return found.view(outputs, inputs)


def _weight_gradient_fake(arguments: _Gradients) -> Tensor:
    return arguments.x.new_empty((arguments.gradient.shape[1], arguments.x.shape[1]))


def _check_gradients(arguments: _Gradients) -> None:
    gradient, x = arguments
    fits = gradient.dim() == x.dim() == 2 and gradient.shape[0] == x.shape[0]
    check(fits, "gradient", f"shape [{x.shape[0]}, N]", tuple(gradient.shape))


class _GeluArguments(NamedTuple):
    x: Tensor  # [..., C] float32, before GELU
    weight: Tensor  # [N, C] float32
    bias: Tensor  # [N] float32


class _GeluGradients(NamedTuple):
    gradient: Tensor  # [M, N] float32
    x: Tensor  # [M, C] float32, before GELU
    weight: Tensor  # [N, C] float32


def _check_gelu(arguments: _GeluArguments) -> None:
    _check(_Arguments(*arguments))


def _gelu_linear_cpu(arguments: _GeluArguments) -> Tensor:
    x, weight, bias = arguments
    result = _linear_fake(_Arguments(x, weight, bias))
    for part, written in zip(_rows(x).split(_BLOCK), result.view(-1, weight.shape[0]).split(_BLOCK), strict=True):
        written.copy_(product(F.gelu(part), weight, bias))
    return result


def _gelu_linear_fake(arguments: _GeluArguments) -> Tensor:
    return _linear_fake(_Arguments(*arguments))


def _gelu_backward_cpu(arguments: _GeluGradients) -> tuple[Tensor, Tensor]:
    gradient, x, weight = arguments
    by_x = torch.empty_like(x)
    for parts in zip(*(rows.split(_BLOCK) for rows in (gradient, x, by_x)), strict=True):
        slopes = product(parts[0], weight.t())
        torch.ops.aten.gelu_backward.grad_input(slopes, parts[1], grad_input=parts[2])
    activated = F.gelu(x)
    if onednn_is_faster():
        return by_x, _weight_gradient_cpu(_Gradients(gradient, activated))
    return by_x, gradient.t() @ activated


def _gelu_backward_fake(arguments: _GeluGradients) -> tuple[Tensor, Tensor]:
    return torch.empty_like(arguments.x), arguments.weight.new_empty(arguments.weight.shape)


def _check_gelu_gradients(arguments: _GeluGradients) -> None:
    _check_gradients(_Gradients(*arguments[:2]))
    expected = (arguments.gradient.shape[1], arguments.x.shape[1])
    check(tuple(arguments.weight.shape) == expected, "weight", f"shape {expected}", tuple(arguments.weight.shape))


linear_onednn = register_operator(
    "linear_onednn(Tensor x, Tensor weight, Tensor? bias, bool relu=False) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_linear_cpu,
    fake=_linear_fake,
)
gelu_linear = register_operator(
    "gelu_linear(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _GeluArguments,
    check=_check_gelu,
    cpu=_gelu_linear_cpu,
    fake=_gelu_linear_fake,
)
_weight_gradient = register_operator(
    "linear_onednn_weight_gradient(Tensor gradient, Tensor x) -> Tensor",
    _Gradients,
    check=_check_gradients,
    cpu=_weight_gradient_cpu,
    fake=_weight_gradient_fake,
)
_gelu_backward = register_operator(
    "gelu_linear_backward(Tensor gradient, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    _GeluGradients,
    check=_check_gelu_gradients,
    cpu=_gelu_backward_cpu,
    fake=_gelu_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, relu = inputs
    ctx.save_for_backward(x, weight, *[output] * relu)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *positive = ctx.saved_tensors
    for result in positive:
        gradient = torch.ops.aten.threshold_backward(gradient, result, 0)
    rows = _rows(gradient)
    return (
        linear_onednn(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None,
        _weight_gradient(rows, _rows(x)) if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
        None,
    )


def _setup_gelu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate_gelu(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
    x, weight = ctx.saved_tensors
    rows = _rows(gradient)
    by_x, by_weight = _gelu_backward(rows, _rows(x), weight)
    return by_x.view(x.shape), by_weight, rows.sum(0)


register_gradient("linear_onednn", _backward, _setup_context)
register_gradient("gelu_linear", _differentiate_gelu, _setup_gelu_context)
