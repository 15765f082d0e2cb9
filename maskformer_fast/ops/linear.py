"""Linear layers by oneDNN, for training on CPUs where MKL is slower than it.

The forward pass and both products of the backward pass are oneDNN's; weights change with each step, so they are not
packed. `torch.nn.functional.linear` is the eager twin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.ops.registration import register_gradient, register_operator

_MANY_ROWS = 4096
"""Rows above which the gradient of the weights is computed as that of a 1x1 convolution."""


class _Arguments(NamedTuple):
    x: Tensor  # [..., C] float32
    weight: Tensor  # [N, C] float32
    bias: Tensor | None  # [N] float32


class _Gradients(NamedTuple):
    gradient: Tensor  # [M, N] float32
    x: Tensor  # [M, C] float32


def _linear_cpu(arguments: _Arguments) -> Tensor:
    x, weight, bias = arguments
    if not x.numel() or not weight.numel():
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product.view(*x.shape[:-1], -1)


def _linear_fake(arguments: _Arguments) -> Tensor:
    x, weight, _ = arguments
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(arguments: _Arguments) -> None:
    x, weight, bias = arguments
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


linear_onednn = register_operator(
    "linear_onednn(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_linear_cpu,
    fake=_linear_fake,
)
_weight_gradient = register_operator(
    "linear_onednn_weight_gradient(Tensor gradient, Tensor x) -> Tensor",
    _Gradients,
    check=_check_gradients,
    cpu=_weight_gradient_cpu,
    fake=_weight_gradient_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
    return (
        linear_onednn(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None,
        _weight_gradient(rows, x.reshape(-1, x.shape[-1]).contiguous()) if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
    )


register_gradient("linear_onednn", _backward, _setup_context)
