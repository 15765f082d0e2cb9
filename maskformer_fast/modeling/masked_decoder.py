"""Transformer decoder of Mask2Former (Cheng et al., CVPR 2022, section 3.2): queries attend inside their own masks.

Each layer attends to one level of the pixel decoder, in turn 1/32, 1/16, 1/8. A query sees the pixels of that level
where the mask that it predicted before is on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import DecoderConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.attention import MultiHeadAttention
from maskformer_fast.modeling.conv import xavier_fill
from maskformer_fast.modeling.deformable_encoder import LEVELS
from maskformer_fast.modeling.linear import Linear
from maskformer_fast.modeling.mask_head import MLP
from maskformer_fast.modeling.position import sine_positions
from maskformer_fast.modeling.transformer import FeedForward
from maskformer_fast.structures import Projection

HIDDEN = -3e4
"""Added to attention scores of hidden pixels in exported graphs: softmax gives them 0, in half precision too."""


class CrossAttentionLayer(nn.Module):
    """Masked attention of the queries to one level; with dropout, residual and LayerNorm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.multihead_attn = MultiHeadAttention(config.hidden_dim, config.num_heads, config.dropout)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,  # [B, Q, C]
        queries: Tensor,  # [Q, C] learned, the positions of x
        memory: Tensor,  # [B, N, C]
        keys: Tensor,  # [B, N, C] memory with its positions added
        visible: Tensor,  # [B, Q, N] bool
    ) -> Tensor:
        """Output [B, Q, C]."""
        mask = visible.unsqueeze(1)
        if torch.compiler.is_exporting():  # exporters fill with the least float32, which half precision cannot hold
            mask = torch.where(mask, 0.0, HIDDEN)
        attended = self.multihead_attn(x + queries, keys, memory, mask)
        return self.norm(x + self.dropout(attended))


class SelfAttentionLayer(nn.Module):
    """Attention among the queries; with dropout, residual and LayerNorm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(config.hidden_dim, config.num_heads, config.dropout)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,  # [B, Q, C]
        queries: Tensor,  # [Q, C]
    ) -> Tensor:
        """Output [B, Q, C]."""
        located = x + queries
        return self.norm(x + self.dropout(self.self_attn(located, located, x)))


class FeedForwardLayer(FeedForward):
    """Feed-forward with dropout, residual and LayerNorm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.hidden_dim, config.ffn_dim, config.dropout)
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(
        self,
        x: Tensor,  # [B, Q, C]
    ) -> Tensor:
        """Output [B, Q, C]."""
        return self.norm(x + self.dropout(self.feed_forward(x)))


class LevelMasks:
    """Masks at the sizes of the levels, from mask embeddings: the pixels that queries may attend to.

    Resizing is linear, so the pixel embeddings are resized once to each level instead of every layer's masks
    (``decoder.attention_masks``). Both ways are equal in exact arithmetic; in floating point a pixel whose logit is
    about 0 can differ.
    """

    def __init__(
        self,
        pixel_features: Tensor,  # [B, C, h, w], not yet projected
        projection: Projection,
        sizes: Sequence[tuple[int, int]],
        direct: bool,
    ) -> None:
        self.sizes, self.direct = sizes, direct
        if direct:
            self.embeddings = [projection.embed(pixel_features)]
        else:
            self.embeddings = [projection.embed(_resized(pixel_features, size)) for size in sizes]

    def visible(
        self,
        mask_embeddings: Tensor,  # [B, Q, D]
        level: int,
    ) -> Tensor:
        """Tell which pixels of a level each query sees -> [B, Q, h*w] bool. A query with an empty mask sees all."""
        pixels = self.embeddings[0 if self.direct else level]
        logits = torch.bmm(mask_embeddings.to(pixels.dtype), pixels.flatten(2))
        if self.direct:
            logits = _resized(logits.unflatten(2, pixels.shape[2:]), self.sizes[level]).flatten(2)
        hidden = logits < 0
        return ~hidden | hidden.all(dim=-1, keepdim=True)


class MaskedDecoder(nn.Module):
    """Decoder layers, and the heads for classes and mask embeddings that all layers and the learned queries share."""

    def __init__(self, in_channels: int, num_classes: int, mask_dim: int, config: DecoderConfig) -> None:
        """``in_channels`` are those of the levels."""
        super().__init__()
        dim = config.hidden_dim
        check(dim % 4 == 0, "decoder.hidden_dim", "a multiple of 4 (sine positions)", dim)
        self.direct_masks = config.attention_masks == "direct"
        layers = range(config.layers)
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(config) for _ in layers)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttentionLayer(config) for _ in layers)
        self.transformer_ffn_layers = nn.ModuleList(FeedForwardLayer(config) for _ in layers)
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_feat = nn.Embedding(config.num_queries, dim)
        self.query_embed = nn.Embedding(config.num_queries, dim)
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.input_proj = nn.ModuleList(
            nn.Identity() if in_channels == dim else nn.Conv2d(in_channels, dim, kernel_size=1) for _ in range(LEVELS)
        )
        for projection in self.input_proj:
            if isinstance(projection, nn.Conv2d):
                xavier_fill(projection)
        self.class_embed = Linear(dim, num_classes + 1)
        self.mask_embed = MLP(dim, dim, mask_dim)

    def forward(
        self,
        pixel_features: Tensor,  # [B, C, h, w] at stride 4, not yet projected
        projection: Projection,  # from them to pixel embeddings
        levels: Sequence[Tensor],  # each [B, in_channels, h, w], at 1/32, 1/16, 1/8
        all_layers: bool,
    ) -> tuple[Tensor, Tensor]:
        """Class logits [L, B, Q, K+1] ("no object" last) and mask embeddings [L, B, Q, mask_dim].

        With all layers, L is their number plus one: the first predictions are those of the learned queries.
        """
        states = self.decode(pixel_features, projection, levels, all_layers)
        return self.class_embed(states), self.mask_embed(states)

    def decode(
        self,
        pixel_features: Tensor,
        projection: Projection,
        levels: Sequence[Tensor],
        all_layers: bool,
    ) -> Tensor:
        """Normalised query states [L, B, Q, C]; arguments as for `forward`."""
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        with torch.no_grad():
            masks = LevelMasks(pixel_features.detach(), projection, sizes, self.direct_masks)
        memories, keys = [], []
        for level, (size, project) in enumerate(zip(sizes, self.input_proj, strict=True)):
            x = project(levels[level]).flatten(2).transpose(1, 2)
            memories.append(x + self.level_embed.weight[level].to(x.dtype))
            keys.append(memories[-1] + sine_positions(*size, x.shape[2], x.device).to(x.dtype))
        queries = self.query_embed.weight
        x = self.query_feat.weight.expand(levels[0].shape[0], -1, -1)
        states = [self.decoder_norm(x)]
        layers = zip(
            self.transformer_cross_attention_layers, self.transformer_self_attention_layers,
            self.transformer_ffn_layers, strict=True,
        )  # fmt: skip
        for index, (cross, attend, feed) in enumerate(layers):
            level = index % LEVELS
            with torch.no_grad():
                visible = masks.visible(self.mask_embed(states[-1].detach()), level)
            x = feed(attend(cross(x, queries, memories[level], keys[level], visible), queries))
            states.append(self.decoder_norm(x))
        return torch.stack(states if all_layers else states[-1:])


def _resized(
    maps: Tensor,  # [B, C, h, w]
    size: tuple[int, int],
) -> Tensor:
    """Bilinear resize without antialiasing -> [B, C, *size]."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
