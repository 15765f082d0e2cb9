"""Post-norm transformer encoder and decoder of DETR (Carion et al., 2020), batch first.

Positions are added to queries and keys of every attention, never to values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskformer_fast.modeling.attention import MultiHeadAttention
from maskformer_fast.modeling.linear import Linear, ReluLinear, relu_layers


class FeedForward(nn.Module):
    """Feed-forward part, a base class since checkpoints name ``linear1`` and ``linear2`` beside the attention."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = ReluLinear(dim, ffn_dim)
        self.linear2 = Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def feed_forward(
        self,
        x: Tensor,  # [B, N, C]
    ) -> Tensor:
        """Output [B, N, C]."""
        if self.dropout.p > 0.0 and self.training:
            return self.linear2(self.dropout(self.linear1(x)))
        return relu_layers(x, self.linear1, self.linear2)


class EncoderLayer(FeedForward):
    """Self-attention, then feed-forward, each with dropout, residual and LayerNorm."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__(dim, ffn_dim, dropout)
        self.self_attn = MultiHeadAttention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        positions: Tensor,  # [1, N, C]
    ) -> Tensor:
        """Output [B, N, C]."""
        located = x + positions
        x = self.norm1(x + self.dropout(self.self_attn(located, located, x)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class TransformerEncoder(nn.Module):
    """Stack of `EncoderLayer`; post-norm, so without a final LayerNorm."""

    def __init__(self, layers: int, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, ffn_dim, dropout) for _ in range(layers))

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        positions: Tensor,  # [1, N, C]
    ) -> Tensor:
        """Output [B, N, C]."""
        for layer in self.layers:
            x = layer(x, positions)
        return x


class DecoderLayer(FeedForward):
    """Self-attention, attention to the memory, feed-forward; each with dropout, residual and LayerNorm."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__(dim, ffn_dim, dropout)
        self.self_attn = MultiHeadAttention(dim, num_heads, dropout)
        self.multihead_attn = MultiHeadAttention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B, Q, C]
        queries: Tensor,  # [Q, C] learned, the positions of x
        memory: Tensor,  # [B, N, C]
        keys: Tensor,  # [B, N, C] memory with its positions added
    ) -> Tensor:
        """Output [B, Q, C]."""
        located = x + queries
        x = self.norm1(x + self.dropout(self.self_attn(located, located, x)))
        x = self.norm2(x + self.dropout(self.multihead_attn(x + queries, keys, memory)))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


class TransformerDecoder(nn.Module):
    """Stack of `DecoderLayer` on zero initial states; all layers share one LayerNorm of the output."""

    def __init__(self, layers: int, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, ffn_dim, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        queries: Tensor,  # [Q, C]
        memory: Tensor,  # [B, N, C]
        positions: Tensor,  # [1, N, C]
        all_layers: bool,
    ) -> Tensor:
        """Query states [L, B, Q, C] of every layer in order, or of the last one only (L = 1)."""
        x = memory.new_zeros(memory.shape[0], *queries.shape)
        keys = memory + positions
        states = []
        for layer in self.layers:
            x = layer(x, queries, memory, keys)
            states.append(x)
        return self.norm(torch.stack(states if all_layers else states[-1:]))
