"""Pixel decoder of Mask2Former (Cheng et al., CVPR 2022, section 3.2.2): deformable attention over three levels, FPN.

The encoder is that of Deformable DETR (Zhu et al., ICLR 2021, section 4): each pixel of each level attends to a few
points of every level, whose offsets and weights are linear functions of the pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import PixelDecoderConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.conv import Conv2d, ConvNorm, xavier_fill
from maskformer_fast.modeling.linear import Linear
from maskformer_fast.modeling.position import sine_positions
from maskformer_fast.modeling.transformer import FeedForward
from maskformer_fast.ops.deformable_attention import deformable_attention
from maskformer_fast.structures import Projection

LEVELS = 3
"""Number of feature levels that the encoder works on: res5, res4, res3, in this order everywhere."""
POINTS = 4
"""Number of points of each level that a pixel attends to in each head."""


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention of all pixels of all levels (Deformable DETR, equation 3)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sampling_offsets = Linear(dim, num_heads * LEVELS * POINTS * 2)
        self.attention_weights = Linear(dim, num_heads * LEVELS * POINTS)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(_initial_offsets(num_heads).flatten())

    def forward(
        self,
        located: Tensor,  # [B, S, C] pixels of all levels, with their positions added
        x: Tensor,  # [B, S, C] pixels without positions
        references: Tensor,  # [B, S, LEVELS, 2] x, y of each pixel in 0..1, float32
        sizes: Sequence[tuple[int, int]],  # height, width of each level
    ) -> Tensor:
        """Output [B, S, C]."""
        heads = self.num_heads
        value = self.value_proj(x).unflatten(-1, (heads, -1))  # [B, S, heads, C/heads]
        offsets = self.sampling_offsets(located).unflatten(-1, (heads, LEVELS, POINTS, 2))
        logits = self.attention_weights(located).unflatten(-1, (heads, LEVELS, POINTS))
        return self.output_proj(deformable_attention(value, sizes, references, offsets, logits))


class DeformableEncoderLayer(FeedForward):
    """Deformable attention, then feed-forward, each with dropout, residual and LayerNorm."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__(dim, ffn_dim, dropout)
        self.self_attn = DeformableAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B, S, C]
        positions: Tensor,  # [1, S, C]
        references: Tensor,  # [B, S, LEVELS, 2]
        sizes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Output [B, S, C]."""
        x = self.norm1(x + self.dropout(self.self_attn(x + positions, x, references, sizes)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class DeformableEncoder(nn.Module):
    """Stack of `DeformableEncoderLayer` over the pixels of three levels."""

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        dim = config.conv_dim
        self.level_embed = nn.Parameter(torch.empty(LEVELS, dim).normal_())
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            DeformableEncoderLayer(dim, config.encoder_heads, config.encoder_ffn_dim, config.encoder_dropout)
            for _ in range(config.encoder_layers)
        )

    def forward(
        self,
        levels: Sequence[Tensor],  # each [B, C, h, w], the coarsest first
    ) -> list[Tensor]:
        """Output of the levels' shapes."""
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        embeddings = zip(sizes, self.level_embed, strict=True)
        located = [sine_positions(*size, x.shape[2], x.device) + embedding for size, embedding in embeddings]
        positions = torch.cat(located, dim=1).to(x.dtype)
        centers = torch.cat([_centers(*size, x.device) for size in sizes])
        references = centers[:, None].expand(x.shape[0], -1, LEVELS, -1).to(torch.promote_types(x.dtype, centers.dtype))
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x, positions, references, sizes)
        parts = x.split([height * width for height, width in sizes], dim=1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


class InputProjection(nn.Sequential):
    """1x1 convolution of a backbone's map to the width of the encoder, and GroupNorm."""

    def __init__(self, channels: int, dim: int, groups: int) -> None:
        conv = Conv2d(channels, dim, kernel_size=1)
        super().__init__(conv, nn.GroupNorm(groups, dim))
        nn.init.xavier_uniform_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)


class DeformablePixelDecoder(nn.Module):
    """Deformable encoder on res5, res4 and res3, then one FPN step to pixel embeddings at stride 4."""

    def __init__(self, in_channels: Sequence[int], config: PixelDecoderConfig) -> None:
        """``in_channels`` are those of res2, res3, res4, res5."""
        super().__init__()
        dim, groups = config.conv_dim, config.norm_groups
        check(dim % 4 == 0, "pixel_decoder.conv_dim", "a multiple of 4 (sine positions)", dim)
        check(config.encoder_layers > 0, "pixel_decoder.encoder_layers", "at least 1 for mask2former (published: 6)",
              config.encoder_layers)
        self.input_proj = nn.ModuleList(
            InputProjection(channels, dim, groups) for channels in in_channels[:0:-1]
        )
        self.transformer = DeformableEncoder(config)
        self.adapter_1 = ConvNorm(in_channels[0], dim, 1, nn.GroupNorm(groups, dim))
        self.layer_1 = ConvNorm(dim, dim, 3, nn.GroupNorm(groups, dim), relu=True)
        self.mask_features = Conv2d(dim, config.mask_dim, kernel_size=1)
        self.memory_channels = dim
        for conv in (self.adapter_1, self.layer_1, self.mask_features):
            xavier_fill(conv)

    def forward(
        self,
        features: Sequence[Tensor],  # res2 ... res5, [B, in_channels[i], H/2^(i+2), W/2^(i+2)]
    ) -> tuple[Tensor, list[Tensor]]:
        """Pixel embeddings [B, mask_dim, H/4, W/4], and levels as from `fuse`."""
        x, levels = self.fuse(features)
        return self.mask_features(x), levels

    @property
    def projection(self) -> Projection:
        """Last convolution, in the form that `Predictions` carries."""
        assert self.mask_features.bias is not None
        return Projection(self.mask_features.weight, self.mask_features.bias)

    def fuse(
        self,
        features: Sequence[Tensor],  # as for `forward`
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all but the last convolution -> its input [B, C, H/4, W/4]; levels [B, C, h, w] at 1/32, 1/16, 1/8."""
        res2, *others = features
        inputs = [project(x) for project, x in zip(self.input_proj, reversed(others), strict=True)]
        levels = self.transformer(inputs)
        lateral = self.adapter_1(res2)
        # A view of rows has strides that PyTorch does not take for channels last, and resizes twenty times slower.
        finest = levels[-1].clone(memory_format=torch.channels_last)
        top = F.interpolate(finest, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.layer_1(lateral + top), levels


def _centers(height: int, width: int, device: torch.device) -> Tensor:
    """Centres of the pixels of a map, x and y in 0..1 -> [height*width, 2] float32."""
    y, x = ((torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size for size in (height, width))
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=-1).flatten(0, 1)


def _initial_offsets(num_heads: int) -> Tensor:
    """Offsets in pixels: each head looks in its own direction, 1, 2, ... pixels far -> [heads, LEVELS, POINTS, 2]."""
    angles = torch.arange(num_heads, device="cpu") * (2 * math.pi / num_heads)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, POINTS + 1, device="cpu")[:, None]
    return (directions[:, None, None] * steps).expand(-1, LEVELS, -1, -1)
