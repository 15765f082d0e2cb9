"""Feed-forward part of transformers: two linear layers with ReLU between them, for training on the CPU.

Rows are taken in blocks, so that the wide activations between the layers stay in the processor's cache. They are not
kept for the backward pass, which computes them again: of six matrix products, one more, for a fraction of the memory.
Products are by the library that is faster on this processor. `feed_forward_eager` is the eager twin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.core.checks import check
from maskformer_fast.ops.linear import product
from maskformer_fast.ops.registration import register_gradient, register_operator

_BLOCK = 1024
"""Rows of a block; at the published width of 1024 its activations take 4 MiB."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x and of both layers' weights and biases."""


class _Arguments(NamedTuple):
    x: Tensor  # [..., C] float32
    weight1: Tensor  # [H, C] float32
    bias1: Tensor  # [H] float32
    weight2: Tensor  # [N, H] float32
    bias2: Tensor  # [N] float32


class _BackwardArguments(NamedTuple):
    gradient: Tensor  # [M, N] float32
    x: Tensor  # [M, C] float32
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor


def _check(arguments: _Arguments) -> None:
    x, weight1, bias1, weight2, bias2 = arguments
    for name, tensor in arguments._asdict().items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
    check(weight1.dim() == 2, "weight1", "shape [H, C]", tuple(weight1.shape))
    hidden, channels = weight1.shape
    check(x.dim() >= 1 and x.shape[-1] == channels, "x", f"shape [..., {channels}]", tuple(x.shape))
    check(weight2.dim() == 2 and weight2.shape[1] == hidden, "weight2", f"shape [N, {hidden}]", tuple(weight2.shape))
    for name, bias, size in (("bias1", bias1, hidden), ("bias2", bias2, weight2.shape[0])):
        check(tuple(bias.shape) == (size,), name, f"shape [{size}]", tuple(bias.shape))


def _check_backward(arguments: _BackwardArguments) -> None:
    gradient, x, weight1, bias1, weight2 = arguments
    _check(_Arguments(x, weight1, bias1, weight2, weight2.new_empty(weight2.shape[0])))
    expected = (len(x), weight2.shape[0])
    check(x.dim() == 2 and tuple(gradient.shape) == expected, "gradient", f"shape {expected}", tuple(gradient.shape))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _forward_cpu(arguments: _Arguments) -> Tensor:
    x, weight1, bias1, weight2, bias2 = arguments
    result = _forward_fake(arguments)
    for part, written in zip(_rows(x).split(_BLOCK), result.view(-1, result.shape[-1]).split(_BLOCK), strict=True):
        written.copy_(product(product(part, weight1, bias1, True), weight2, bias2))
    return result


def _forward_fake(arguments: _Arguments) -> Tensor:
    return arguments.x.new_empty((*arguments.x.shape[:-1], arguments.weight2.shape[0]))


def _backward_cpu(arguments: _BackwardArguments) -> Gradients:
    gradient, x, weight1, bias1, weight2 = arguments
    by_x = torch.empty_like(x)
    by_weight1, by_bias1, by_weight2 = (torch.zeros_like(tensor) for tensor in (weight1, bias1, weight2))
    for slopes, part, written in zip(*(rows.split(_BLOCK) for rows in (gradient, x, by_x)), strict=True):
        hidden = product(part, weight1, bias1, True)
        by_weight2 += product(slopes.t(), hidden.t())
        by_hidden = product(slopes, weight2.t())
        by_hidden = torch.ops.aten.threshold_backward.grad_input(by_hidden, hidden, 0, grad_input=by_hidden)
        by_weight1 += product(by_hidden.t(), part.t())
        by_bias1 += by_hidden.sum(0)
        written.copy_(product(by_hidden, weight1.t()))
    return by_x, by_weight1, by_bias1, by_weight2, gradient.sum(0)


def _backward_fake(arguments: _BackwardArguments) -> Gradients:
    gradient, *others = arguments
    x, weight1, bias1, weight2 = (torch.empty_like(tensor) for tensor in others)
    return x, weight1, bias1, weight2, gradient.new_empty(gradient.shape[1])


_feed_forward = register_operator(
    "feed_forward(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_forward_cpu,
    fake=_forward_fake,
)
_feed_forward_backward = register_operator(
    "feed_forward_backward(Tensor gradient, Tensor x, Tensor weight1, Tensor bias1, Tensor weight2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _BackwardArguments,
    check=_check_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
    x, *layers = ctx.saved_tensors
    by_x, *others = _feed_forward_backward(_rows(gradient), _rows(x), *layers)
    return by_x.view(x.shape), *others


register_gradient("feed_forward", _differentiate, _setup_context)


def feed_forward(
    x: Tensor,  # [..., C] float32, on the CPU
    weight1: Tensor,  # [H, C] float32
    bias1: Tensor,  # [H] float32
    weight2: Tensor,  # [N, H] float32
    bias2: Tensor,  # [N] float32
) -> Tensor:
    """Linear layer, ReLU and linear layer -> [..., N] float32; differentiable.

    Results are those of ``linear(relu(linear(x, weight1, bias1)), weight2, bias2)`` up to rounding.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit.
    """
    return _feed_forward(x, weight1, bias1, weight2, bias2)


def feed_forward_eager(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Eager twin of `feed_forward`, for any dtype."""
    return F.linear(F.relu(F.linear(x, weight1, bias1)), weight2, bias2)
