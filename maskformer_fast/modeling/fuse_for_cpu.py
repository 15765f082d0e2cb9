"""Networks for inference on the CPU, made of fused layers.

In convolutions, normalisation, residual and ReLU are part of the convolution; for linear layers, attention and the
blocks of Swin see `fused_linear`, for those of a ViT `fused_vit`, for the layers of Mask2Former `fused_mask2former`.

BatchNorm with its running statistics is a scale and an offset of each channel: the weights are multiplied by the scale,
and the offset becomes the bias. oneDNN adds the residual and applies the ReLU when it writes a convolution's output.
3x3 convolutions use Winograd's algorithm (`ops.convolution`) on maps of sizes where a measurement finds it faster
(`cpu_choices`). oneDNN's other layouts of weights are made for the size of the maps, at the first picture of that size.
Channels are innermost in memory throughout. Results equal the network's up to rounding.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.core.arrays import dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.attention import MultiHeadAttention
from maskformer_fast.modeling.conv import ConvNorm
from maskformer_fast.modeling.cpu_choices import winograd_is_faster
from maskformer_fast.modeling.deformable_encoder import DeformableEncoderLayer, InputProjection
from maskformer_fast.modeling.eomt import UpscaleBlock
from maskformer_fast.modeling.fused_linear import FusedAttention, FusedLayer, FusedLinear, FusedSwinStage
from maskformer_fast.modeling.fused_mask2former import (
    FusedDeformableEncoderLayer,
    FusedFeedForward,
    FusedInputProjection,
)
from maskformer_fast.modeling.fused_vit import FusedBlock, FusedUpscaleBlock
from maskformer_fast.modeling.linear import ReluLinear
from maskformer_fast.modeling.masked_decoder import FeedForwardLayer
from maskformer_fast.modeling.resnet import Bottleneck
from maskformer_fast.modeling.swin import SwinStage
from maskformer_fast.modeling.vit import Block
from maskformer_fast.ops.convolution import PANEL, conv3x3_winograd, pack_winograd_weights

logger = logging.getLogger(__name__)

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

    Raises:
        ValueError: bfloat16 on a processor for which `convolves_bfloat16` is false.
    """
    fits = dtype != torch.bfloat16 or convolves_bfloat16()
    check(fits, "dtype", "torch.float32, as this processor multiplies no bfloat16", dtype)
    _replace_children(network, dtype)
    network.eval().requires_grad_(False)
    logger.info("rebuilt for the CPU: %s", describe_implementations(network))
    network.register_forward_hook(_TellOnce())


def convolves_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products for this processor, which need AVX-512 or similar instructions."""
    return bool(_mkldnn()._is_mkldnn_bf16_supported())


def implementations(network: nn.Module) -> dict[str, str]:
    """What runs each layer of a network that `fuse_for_cpu` has rebuilt, by the layer's name.

    A convolution's is that of its last call, as it depends on the size of the maps; those that were never called are
    left out.
    """
    return {
        name: module.implementation for name, module in network.named_modules()
        if isinstance(module, (FusedConv, FusedLinear)) and module.implementation is not None
    }  # fmt: skip


def describe_implementations(network: nn.Module) -> str:
    """Counts of `implementations` in a line, such as "3 convolutions: 2 Winograd float32, 1 direct bfloat16; ..."."""
    parts = []
    for kind, name in ((FusedConv, "convolutions"), (FusedLinear, "linear layers")):
        modules = [module for module in network.modules() if isinstance(module, kind)]
        counts = Counter(module.implementation or "chosen at the first picture of a size" for module in modules)
        if counts:
            told = ", ".join(f"{count} {implementation}" for implementation, count in counts.most_common())
            parts.append(f"{len(modules)} {name}: {told}")
    return "; ".join(parts)


class _TellOnce:
    """Forward hook that tells the logger `describe_implementations` after the first images of a size, where it changed.

    Copies and pickles of a network have it too.
    """

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        self.told = ""

    def __call__(self, network: nn.Module, arguments: tuple[Any, ...], outputs: object) -> None:
        shape = tuple(arguments[0].shape)
        if shape in self.shapes:
            return
        self.shapes.add(shape)
        text = describe_implementations(network)
        if text != self.told:
            self.told = text
            logger.info("images %s: %s", "x".join(map(str, shape)), text)


def _replace_children(module: nn.Module, dtype: torch.dtype) -> None:
    for name, child in module.named_children():
        fused = next((made for kind, made in _FUSED if isinstance(child, kind)), None)
        if fused is None:
            _replace_children(child, dtype)
        else:
            setattr(module, name, fused(child, dtype))


class _Packed(NamedTuple):
    """Weights in the layout that oneDNN chooses for images of one shape and a number of threads."""

    key: tuple[int, ...]
    weight: Tensor


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
        self.suits_winograd = (
            conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1)
            and conv.in_channels % PANEL == 0 and conv.in_channels * conv.out_channels <= MAX_WINOGRAD_WEIGHTS
        )  # fmt: skip
        # Winograd's transform is of the float32 weights.
        self.weight = weight.to(torch.float32 if self.suits_winograd else dtype)
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.to(dtype)
        self.float_bias = bias if self.suits_winograd else None
        self.implementation: str | None = None  # that of the last call
        self._transformed: Tensor | None = None
        self._direct: _Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "implementation": None, "_transformed": None, "_direct": None}

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        residual: Tensor | None = None,  # [B, N, h, w], overwritten
    ) -> Tensor:
        """Output [B, N, h, w], channels last."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if residual is None and self._takes_winograd(x):
            x = conv3x3_winograd(x, self._winograd_weight(), self.float_bias, self.channels, self.relu)
        elif residual is None:
            after = "relu" if self.relu else "none"
            weight = self._direct_weight(x)
            x = _mkldnn()._convolution_pointwise(x, weight, self.bias, *self.geometry, after, [], "")
        else:
            weight = self._direct_weight(x)
            x = _mkldnn()._convolution_pointwise_.binary(
                residual, x, weight, self.bias, *self.geometry, "add", 1.0, "relu" if self.relu else None, [], ""
            )
        x = x if self.norm is None else self.norm(x)
        return F.relu_(x) if self.late_relu else x

    def _takes_winograd(self, x: Tensor) -> bool:
        if not self.suits_winograd or not x.numel():
            return False
        return winograd_is_faster(x.shape[1], self.channels, self.dtype, x.shape[0] * x.shape[2] * x.shape[3])

    def _winograd_weight(self) -> Tensor:
        self.implementation = "Winograd float32"
        packed = self._transformed
        if packed is None:
            self._transformed = packed = pack_winograd_weights(self.weight)
        return packed

    def _direct_weight(self, x: Tensor) -> Tensor:
        """Weights in oneDNN's layout for these images; threads may call it for images of different sizes."""
        self.implementation = f"direct {dtype_name(x)}"
        if not x.numel():
            return self.weight.to(self.dtype)
        key, packed = (*x.shape, torch.get_num_threads()), self._direct
        if packed is None or packed.key != key:
            weight = self.weight.to(self.dtype)
            weight = _mkldnn()._reorder_convolution_weight(weight, *self.geometry, list(x.shape))
            self._direct = packed = _Packed(key, weight)
        return packed.weight


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


_FUSED: tuple[tuple[type[nn.Module], Callable[[Any, torch.dtype], nn.Module]], ...] = (
    (Bottleneck, FusedBottleneck),
    (ConvNorm, FusedConv),
    (SwinStage, FusedSwinStage),
    (Block, FusedBlock),
    (UpscaleBlock, FusedUpscaleBlock),
    (MultiHeadAttention, FusedAttention),
    (DeformableEncoderLayer, FusedDeformableEncoderLayer),
    (InputProjection, FusedInputProjection),
    (FeedForwardLayer, lambda layer, dtype: FusedFeedForward(layer, layer.norm, dtype)),
    (ReluLinear, lambda layer, dtype: FusedLinear(layer.weight, layer.bias, dtype, "relu")),
    (nn.Linear, lambda layer, dtype: FusedLinear(layer.weight, layer.bias, dtype)),
)
"""Kinds of layers, and what makes the fused one of a layer."""


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
