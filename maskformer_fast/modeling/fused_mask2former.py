"""Layers of Mask2Former's pixel decoder and decoder for inference on the CPU, by oneDNN's matrix products.

Bias, ReLU and residual are part of the products (`fused_linear`). The layers of the pixel decoder go over their pixels
in blocks, so that the wide activations of a feed-forward part stay in the processor's cache. Results equal the
network's up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskformer_fast.modeling.deformable_encoder import LEVELS, POINTS, DeformableEncoderLayer, InputProjection
from maskformer_fast.modeling.fused_linear import FusedLinear
from maskformer_fast.modeling.transformer import FeedForward
from maskformer_fast.ops.deformable_attention import deformable_attention

_BLOCK = 512
"""Pixels of which the hidden activations (2 MiB at the published width) are in memory at a time."""


class FusedFeedForward(nn.Module):
    """Feed-forward part with its residual and LayerNorm."""

    def __init__(self, layer: FeedForward, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear1 = FusedLinear(layer.linear1.weight, layer.linear1.bias, dtype, "relu")
        self.linear2 = FusedLinear(layer.linear2.weight, layer.linear2.bias, dtype)
        self.norm = norm

    def forward(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:
        """Output [..., C]."""
        return self.norm(self.linear2(self.linear1(x), x.to(self.linear2.dtype)))


class FusedDeformableEncoderLayer(nn.Module):
    """`DeformableEncoderLayer` for inference."""

    def __init__(self, layer: DeformableEncoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        attention = layer.self_attn
        self.num_heads, self.dtype = attention.num_heads, dtype
        self.value, self.offsets, self.logits, self.output = (
            FusedLinear(linear.weight, linear.bias, dtype)
            for linear in (
                attention.value_proj, attention.sampling_offsets, attention.attention_weights, attention.output_proj,
            )
        )  # fmt: skip
        self.norm = layer.norm1
        self.feed_forward = FusedFeedForward(layer, layer.norm2, dtype)

    def forward(
        self,
        x: Tensor,  # [B, S, C]
        positions: Tensor,  # [1, S, C]
        references: Tensor,  # [B, S, LEVELS, 2]
        sizes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Output [B, S, C]."""
        heads = self.num_heads
        x = x.to(self.dtype).contiguous()
        located = x + positions
        attended = deformable_attention(
            self.value(x).unflatten(-1, (heads, -1)), sizes, references,
            self.offsets(located).unflatten(-1, (heads, LEVELS, POINTS, 2)),
            self.logits(located).unflatten(-1, (heads, LEVELS, POINTS)),
        )  # fmt: skip
        result = torch.empty_like(x)
        blocks = (tensor.flatten(0, 1).split(_BLOCK) for tensor in (attended, x, result))
        for rows, residual, written in zip(*blocks, strict=True):
            written.copy_(self.feed_forward(self.norm(self.output(rows, residual))))
        return result


class FusedInputProjection(nn.Module):
    """`InputProjection` for inference."""

    def __init__(self, projection: InputProjection, dtype: torch.dtype) -> None:
        super().__init__()
        conv, norm = projection
        assert isinstance(conv, nn.Conv2d)
        self.linear = FusedLinear(conv.weight.flatten(1), conv.bias, dtype)
        self.norm = norm

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Output [B, dim, h, w], channels last."""
        return self.norm(self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
