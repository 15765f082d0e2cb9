"""Convolution with normalisation and ReLU, and initial weights, for ResNet and the pixel decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.modeling.linear import trains_in_float32_on_cpu
from maskformer_fast.ops.convolution import PANEL, conv3x3

_FEWEST_PIXELS = 512
"""Pixels of a batch from which on Winograd's algorithm spares more than the transform of the weights takes."""


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with zero padding, by the faster ways in training on a CPU in float32.

    3x3 convolutions of stride 1 are then by Winograd's algorithm, which is chosen by their shape and never by a
    measurement: ranks and resumed runs compute the same sums.
    """

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:
        """Output [B, out_channels, ., .]; in training on a CPU with channels last in memory."""
        if not trains_in_float32_on_cpu(x, self.weight):
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)  # oneDNN is faster with channels innermost
        if self._suits_winograd() and x.shape[0] * x.shape[2] * x.shape[3] >= _FEWEST_PIXELS:
            return conv3x3(x, self.weight, self.bias)
        # Dilation changes nothing in a 1x1 convolution, but that PyTorch gives it to oneDNN on one thread too.
        dilation = (2, 2) if self.kernel_size == (1, 1) else self.dilation
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, dilation)

    def _suits_winograd(self) -> bool:
        return (
            self.kernel_size == (3, 3) and self.stride == self.dilation == self.padding == (1, 1)
            and self.in_channels % PANEL == 0 and self.out_channels % PANEL == 0
        )  # fmt: skip


class ConvNorm(Conv2d):
    """2-d convolution without bias, then ``norm``, then optionally ReLU.

    The norm is a child of the convolution, as in the names of checkpoints: ``conv.weight``, ``conv.norm.weight``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, norm: nn.Module, *, stride: int = 1, dilation: int = 1,
        relu: bool = False,
    ) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            in_channels, out_channels, kernel, stride=stride, padding=padding, dilation=dilation, bias=False
        )
        self.norm = norm
        self.relu = relu

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:
        """Output [B, out_channels, ceil(H/stride), ceil(W/stride)]."""
        x = self.norm(super().forward(x))
        return F.relu(x) if self.relu else x


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with constant statistics, scale and shift, which are buffers and not trained."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:
        """Output [B, C, H, W]."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def msra_fill(conv: nn.Conv2d) -> None:
    """Initialise a convolution of the backbone: normal with variance 2 / fan_out, zero bias (He et al., 2015)."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def xavier_fill(conv: nn.Conv2d) -> None:
    """Initialise another convolution: uniform with variance 1 / fan_in, zero bias (Caffe2's Xavier fill)."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
