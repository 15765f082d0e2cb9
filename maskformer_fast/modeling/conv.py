"""Convolution with normalisation and ReLU, and initial weights, for ResNet and the pixel decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.modeling.linear import trains_in_float32_on_cpu


class ConvNorm(nn.Conv2d):
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
        x = self.norm(self._convolve(x))
        return F.relu(x) if self.relu else x

    def _convolve(self, x: Tensor) -> Tensor:
        if not trains_in_float32_on_cpu(x, self.weight):
            return super().forward(x)
        # oneDNN is faster with channels innermost. Dilation changes nothing in a 1x1 convolution, but that PyTorch
        # gives it to oneDNN on one thread too.
        x = x.contiguous(memory_format=torch.channels_last)
        dilation = (2, 2) if self.kernel_size == (1, 1) else self.dilation
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, dilation)


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
