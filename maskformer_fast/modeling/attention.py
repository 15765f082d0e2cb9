"""Multi-head attention by `scaled_dot_product_attention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Softmax attention over batch-first sequences, with the parameters of ``nn.MultiheadAttention``."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,  # [B, N, C]
        key: Tensor,  # [B, M, C]
        value: Tensor,  # [B, M, C]
        visible: Tensor | None = None,  # bool, broadcastable to [B, heads, N, M]; None shows everything
    ) -> Tensor:
        """Output [B, N, C]; training applies dropout to the attention weights."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, ., C/heads]
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        x = F.scaled_dot_product_attention(q, k, v, visible, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))
