"""Linear layers, whose products in training on a CPU are by the faster of MKL and oneDNN, a rule by the processor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.ops.feed_forward import feed_forward
from maskformer_fast.ops.linear import gelu_linear, linear_onednn, onednn_is_faster


class Linear(nn.Linear):
    """``nn.Linear`` by `linear`."""

    def forward(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:
        """Output [..., N]."""
        return linear(x, self.weight, self.bias)


class ReluLinear(Linear):
    """`Linear`, then ReLU."""

    def forward(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:
        """Output [..., N]."""
        return linear(x, self.weight, self.bias, relu=True)


def linear(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [N, C]
    bias: Tensor | None,  # [N]
    relu: bool = False,
) -> Tensor:
    """Output [..., N] as of ``F.linear``, by oneDNN in training on a CPU in float32 where that is faster."""
    if trains_in_float32_on_cpu(x, weight) and _onednn_pays():
        return linear_onednn(x, weight, bias, relu)
    product = F.linear(x, weight, bias)
    return F.relu(product) if relu else product


def gelu_then(
    layer: nn.Linear,  # with bias
    x: Tensor,  # [..., C]
) -> Tensor:
    """GELU, then a linear layer -> [..., N]; in training on a CPU GELU's result is not kept for the gradient."""
    if trains_in_float32_on_cpu(x, layer.weight):
        return gelu_linear(x, layer.weight, layer.bias)
    result: Tensor = layer(F.gelu(x))
    return result


def relu_layers(
    x: Tensor,  # [..., C]
    first: ReluLinear,
    second: Linear,
) -> Tensor:
    """Both layers -> [..., N]; in training on a CPU what is between them is not kept for the gradient."""
    if trains_in_float32_on_cpu(x, first.weight):
        return feed_forward(x, first.weight, first.bias, second.weight, second.bias)
    result: Tensor = second(first(x))
    return result


def trains_in_float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer is about to be trained so; not in exports, which have other operators."""
    return (
        x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled() and weight.requires_grad
        and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_exporting()
    )  # fmt: skip


def _onednn_pays() -> bool:
    """`onednn_is_faster`, which `torch.compile` calls while it traces, and takes its result for a constant."""
    return onednn_is_faster()


# As `torch.compiler.assume_constant_result` does, which imports the compiler: 100 MiB in every process.
_onednn_pays._dynamo_marked_constant = True  # type: ignore[attr-defined]
