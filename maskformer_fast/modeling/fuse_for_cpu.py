"""Networks for inference on the CPU, made of fused layers.

In convolutions, normalisation, residual and ReLU are part of the convolution; for linear layers, attention and the
blocks of Swin see `fused_linear`, for those of a ViT `fused_vit`.

BatchNorm with its running statistics is a scale and an offset of each channel: the weights are multiplied by the scale,
and the offset becomes the bias. oneDNN adds the residual and applies the ReLU when it writes a convolution's output.
3x3 convolutions use Winograd's algorithm (`ops.convolution`) where a measurement finds it faster (`cpu_choices`).
Channels are innermost in memory throughout. Results equal the network's up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.modeling.attention import MultiHeadAttention
from maskformer_fast.modeling.conv import ConvNorm
from maskformer_fast.modeling.cpu_choices import winograd_is_faster
from maskformer_fast.modeling.eomt import UpscaleBlock
from maskformer_fast.modeling.fused_linear import FusedAttention, FusedLayer, FusedLinear, FusedSwinStage
from maskformer_fast.modeling.fused_vit import FusedBlock, FusedUpscaleBlock
from maskformer_fast.modeling.resnet import Bottleneck
from maskformer_fast.modeling.swin import SwinStage
from maskformer_fast.modeling.vit import Block
from maskformer_fast.ops.convolution import PANEL, conv3x3_winograd, pack_winograd_weights

MAX_WINOGRAD_WEIGHTS = 2048 * 256
"""Largest product of input and output channels for Winograd's algorithm; above it, the transformed weights take more
memory than the saved multiplications are worth."""


def fuse_for_cpu(network: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace convolutions, linear layers and Swin's stages of a network on the CPU by fused ones, for evaluation.

    Afterwards it cannot be trained, saved, moved or exported, but copied and pickled.

    Args:
        network: a `SegmentationNetwork`; its other layers stay.
        dtype: float32 or bfloat16, of the inputs and outputs of convolutions. For bfloat16, call the network within
            ``torch.autocast("cpu", torch.bfloat16)``.
    """
    _replace_children(network, dtype)
    network.eval().requires_grad_(False)


def convolves_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 convolutions for this processor, which needs AVX-512 or similar instructions."""
    return bool(_mkldnn()._is_mkldnn_bf16_supported())


def _replace_children(module: nn.Module, dtype: torch.dtype) -> None:
    for name, child in module.named_children():
        if isinstance(child, Bottleneck):
            setattr(module, name, FusedBottleneck(child, dtype))
        elif isinstance(child, ConvNorm):
            setattr(module, name, FusedConv(child, dtype))
        elif isinstance(child, SwinStage):
            setattr(module, name, FusedSwinStage(child, dtype))
        elif isinstance(child, Block):
            setattr(module, name, FusedBlock(child, dtype))
        elif isinstance(child, UpscaleBlock):
            setattr(module, name, FusedUpscaleBlock(child, dtype))
        elif isinstance(child, MultiHeadAttention):
            setattr(module, name, FusedAttention(child, dtype))
        elif isinstance(child, nn.Linear):
            setattr(module, name, FusedLinear(child.weight, child.bias, dtype))
        else:
            _replace_children(child, dtype)


class FusedConv(FusedLayer):
    """Fused `ConvNorm` for inference, optionally with a residual added before its ReLU."""

    def __init__(self, conv: ConvNorm, dtype: torch.dtype, relu: bool | None = None) -> None:
        super().__init__()
        weight, bias, self.norm = _folded(conv)
        relu = conv.relu if relu is None else relu
        # A norm that cannot be folded comes between the convolution and its ReLU.
        self.relu, self.late_relu = relu and self.norm is None, relu and self.norm is not None
        self.dtype, self.channels = dtype, conv.out_channels
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), 1)  # type: ignore[arg-type]
        self.winograd = (
            conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1)
            and conv.in_channels % PANEL == 0 and conv.in_channels * conv.out_channels <= MAX_WINOGRAD_WEIGHTS
            and winograd_is_faster(conv.in_channels, conv.out_channels, dtype)
        )  # fmt: skip
        if self.winograd:
            self.weight, self.bias = pack_winograd_weights(weight), bias
        else:
            self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
            if conv.kernel_size != (1, 1):  # some 1x1 convolutions are several times slower with reordered weights
                self.pack()
            self.bias = None if bias is None else bias.to(dtype)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        residual: Tensor | None = None,  # [B, N, h, w], overwritten
    ) -> Tensor:
        """Output [B, N, h, w], channels last."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if self.winograd:
            x = conv3x3_winograd(x, self.weight, self.bias, self.channels, self.relu)
        elif residual is None:
            after = "relu" if self.relu else "none"
            x = _mkldnn()._convolution_pointwise(x, self.weight, self.bias, *self.geometry, after, [], "")
        else:
            x = _mkldnn()._convolution_pointwise_.binary(
                residual, x, self.weight, self.bias, *self.geometry, "add", 1.0, "relu" if self.relu else None, [], ""
            )
        x = x if self.norm is None else self.norm(x)
        return F.relu_(x) if self.late_relu else x

    def pack(self) -> None:
        self.weight = _mkldnn()._reorder_convolution_weight(self.weight, *self.geometry)


class FusedBottleneck(nn.Module):
    """Fused `Bottleneck` for inference. It overwrites its input if the shortcut is the identity."""

    def __init__(self, block: Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        shortcut = block.shortcut
        self.shortcut = FusedConv(shortcut, dtype) if isinstance(shortcut, ConvNorm) else shortcut
        self.conv1, self.conv2 = FusedConv(block.conv1, dtype), FusedConv(block.conv2, dtype)
        self.conv3 = FusedConv(block.conv3, dtype, relu=True)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:
        """Output [B, N, h, w], channels last."""
        inner = self.conv2(self.conv1(x))
        return self.conv3(inner, self.shortcut(x))


def _folded(conv: ConvNorm) -> tuple[Tensor, Tensor | None, nn.Module | None]:
    """Weights and bias that include BatchNorm; or for another norm, the weights, no bias and the norm."""
    norm: Any = conv.norm
    weight = conv.weight.detach()
    if isinstance(norm, nn.GroupNorm):
        return weight, None, norm
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return weight * scale[:, None, None, None], norm.bias.detach() - norm.running_mean * scale, None


def _mkldnn() -> Any:
    """oneDNN's convolutions with fused operations, which PyTorch provides for its compiler."""
    return torch.ops.mkldnn
