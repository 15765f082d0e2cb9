"""Transformer decoder and heads (paper section 3.2): from memory to classes and mask embeddings of queries."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from maskformer_fast.config import DecoderConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.conv import xavier_fill
from maskformer_fast.modeling.linear import Linear, ReluLinear
from maskformer_fast.modeling.position import sine_positions
from maskformer_fast.modeling.transformer import TransformerDecoder


class MLP(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReluLinear(a, b) for a, b in pairwise((in_dim, hidden_dim, hidden_dim)))
        self.layers.append(Linear(hidden_dim, out_dim))

    def forward(
        self,
        x: Tensor,  # [..., in_dim]
    ) -> Tensor:
        """Output [..., out_dim]."""
        for layer in self.layers:
            x = layer(x)
        return x


class QueryDecoder(nn.Module):
    """Learned queries that attend to the memory, and a mask embedding of ``mask_dim`` channels for each."""

    def __init__(self, in_channels: int, num_queries: int, mask_dim: int, config: DecoderConfig) -> None:
        """``in_channels`` are those of the memory; ``num_queries`` replaces the config's."""
        super().__init__()
        dim = config.hidden_dim
        check(dim % 4 == 0, "decoder.hidden_dim", "a multiple of 4 (sine positions)", dim)
        decoder = TransformerDecoder(config.layers, dim, config.num_heads, config.ffn_dim, config.dropout)
        self.transformer = nn.ModuleDict({"decoder": decoder})
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj: nn.Module = nn.Identity()
        if in_channels != dim:
            self.input_proj = nn.Conv2d(in_channels, dim, kernel_size=1)
            xavier_fill(self.input_proj)
        self.mask_embed = MLP(dim, dim, mask_dim)

    def decode(
        self,
        memory: Tensor,  # [B, in_channels, h, w]
        all_layers: bool,
    ) -> Tensor:
        """Query states of all decoder layers, or of the last alone -> [L, B, Q, hidden_dim].

        The queries attend to every position, padding included, as in the training of the published weights.
        """
        x = self.input_proj(memory)
        height, width = x.shape[-2:]
        positions = sine_positions(height, width, x.shape[1], x.device).to(x.dtype)
        return self.transformer["decoder"](self.query_embed.weight, x.flatten(2).transpose(1, 2), positions, all_layers)


class MaskHead(QueryDecoder):
    """`QueryDecoder` with a classifier over ``num_classes`` and "no object"."""

    def __init__(self, in_channels: int, num_classes: int, mask_dim: int, config: DecoderConfig) -> None:
        super().__init__(in_channels, config.num_queries, mask_dim, config)
        self.class_embed = Linear(config.hidden_dim, num_classes + 1)

    def forward(
        self,
        memory: Tensor,  # [B, in_channels, h, w]
        all_layers: bool,
    ) -> tuple[Tensor, Tensor]:
        """Class logits [L, B, Q, K+1] ("no object" last) and mask embeddings [L, B, Q, mask_dim]."""
        states = self.decode(memory, all_layers)
        return self.class_embed(states), self.mask_embed(states)
