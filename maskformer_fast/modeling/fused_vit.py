"""Blocks of a plain ViT and the upscaling of EoMT for inference on the CPU, of fused linear layers.

LayerScale is folded into the weights before it, and the residual is added where the product is written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.modeling.eomt import UpscaleBlock, finish_upscaling
from maskformer_fast.modeling.fused_linear import FusedLinear
from maskformer_fast.modeling.linear import Linear
from maskformer_fast.modeling.vit import Block, LayerScale, Rotary, attend


class FusedBlock(nn.Module):
    """`Block` for inference."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.heads, self.gated = dtype, block.attn.heads, block.mlp.gated
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv = FusedLinear(block.attn.qkv.weight, block.attn.bias(), dtype)
        self.proj = _scaled(block.attn.proj, block.ls1, dtype)
        self.fc1 = FusedLinear(block.mlp.fc1.weight, block.mlp.fc1.bias, dtype, "none" if self.gated else "gelu")
        self.fc2 = _scaled(block.mlp.fc2, block.ls2, dtype)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        rotary: Rotary | None,
        visible: Tensor | None = None,  # [B, Q, M] bool, as for `Block`
    ) -> Tensor:
        """Output [B, N, C] in the layers' dtype."""
        x = x.to(self.dtype).contiguous()
        x = self.proj(attend(self.qkv(self.norm1(x)), self.heads, rotary, visible), x)
        hidden = self.fc1(self.norm2(x))
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        return self.fc2(hidden, x)


class FusedUpscaleBlock(nn.Module):
    """`UpscaleBlock` for inference."""

    def __init__(self, block: UpscaleBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1 = FusedLinear(*block.windows(), dtype, "gelu")
        self.conv2, self.norm = block.conv2, block.norm

    def forward(
        self,
        x: Tensor,  # [B, h, w, C]
    ) -> Tensor:
        """Output [B, 2h, 2w, C]."""
        return finish_upscaling(self.conv1(x).unflatten(-1, (4, -1)), self.conv2, self.norm, gelu=False)


def _scaled(layer: Linear, scale: LayerScale, dtype: torch.dtype) -> FusedLinear:
    """A linear layer with the LayerScale after it."""
    gamma = scale.gamma.detach()
    bias = None if layer.bias is None else layer.bias.detach() * gamma
    return FusedLinear(layer.weight.detach() * gamma[:, None], bias, dtype)
