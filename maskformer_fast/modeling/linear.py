"""Linear layers, whose products in training on a CPU are by the faster of MKL and oneDNN, a rule by the processor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.modeling.cpu_choices import onednn_is_faster
from maskformer_fast.ops.linear import linear_onednn


class Linear(nn.Linear):
    """``nn.Linear`` by `linear`."""

    def forward(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:
        """Output [..., N]."""
        return linear(x, self.weight, self.bias)


def linear(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [N, C]
    bias: Tensor | None,  # [N]
) -> Tensor:
    """Output [..., N] as of ``F.linear``, by oneDNN in training on a CPU in float32 where that is faster."""
    if trains_in_float32_on_cpu(x, weight) and _onednn_pays():
        product: Tensor = linear_onednn(x, weight, bias)
        return product
    return F.linear(x, weight, bias)


def trains_in_float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer is about to be trained so; not in exports, which have other operators."""
    return (
        x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled() and weight.requires_grad
        and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_exporting()
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _onednn_pays() -> bool:
    """`onednn_is_faster`, which `torch.compile` calls while it traces, and takes its result for a constant."""
    return onednn_is_faster()
