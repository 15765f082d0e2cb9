"""Plain Vision Transformer (Dosovitskiy et al., 2021) with registers and LayerScale, for images of any size.

With learned positions it is that of DINOv2 (Oquab et al., 2023), with rotary ones that of DINOv3 (Siméoni et al.,
2025). Tensors have timm's names for DINOv2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maskformer_fast.core.checks import check
from maskformer_fast.modeling.linear import Linear, gelu_then, linear
from maskformer_fast.ops.attention import DTYPES as ATTENTION_DTYPES
from maskformer_fast.ops.attention import attention

BASE = 100.0
"""Ratio of the longest to the shortest period of rotary positions, but for one step."""
RESCALE = 2.0
"""Largest factor by which the coordinates of rotary positions are stretched or shrunk in training, at random."""


class Rotary(NamedTuple):
    """Cosines and sines of the patches' positions: [N, C/heads/2] float32."""

    cosine: Tensor
    sine: Tensor

    def turn(
        self,
        x: Tensor,  # [B, prefix + N, heads, C/heads]
    ) -> Tensor:
        """Turn pairs of channels of the patches, which are the last tokens, by the angles of their positions."""
        prefix = x.shape[1] - self.cosine.shape[0]
        cosine, sine = self.cosine.to(x.dtype).unsqueeze(1), self.sine.to(x.dtype).unsqueeze(1)
        first, second = x[:, prefix:].chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
        return torch.cat((x[:, :prefix], turned), dim=1)


class Attention(nn.Module):
    """Self-attention of tokens. With rotary positions the keys have no bias."""

    def __init__(self, dim: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=not rotary)
        self.qv_bias = nn.Parameter(torch.zeros(2 * dim)) if rotary else None
        self.proj = Linear(dim, dim)

    def bias(self) -> Tensor | None:
        """Bias of queries, keys and values -> [3C]."""
        if self.qv_bias is None:
            return self.qkv.bias
        query, value = self.qv_bias.chunk(2)
        return torch.cat((query, torch.zeros_like(query), value))

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        rotary: Rotary | None,
        visible: Tensor | None = None,  # [B, Q, M] bool: which of the last M tokens the first Q may attend to
    ) -> Tensor:
        """Output [B, N, C]."""
        qkv = linear(x, self.qkv.weight, self.bias())
        return self.proj(attend(qkv, self.heads, rotary, visible))


def attend(
    qkv: Tensor,  # [B, N, 3C]
    heads: int,
    rotary: Rotary | None,
    visible: Tensor | None,  # [B, Q, M] bool, as of `Attention.forward`
) -> Tensor:
    """Softmax attention -> [B, N, C]. Only the first Q rows have a mask: the others need no memory for one."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # each [B, N, heads, C/heads]
    if rotary is not None:
        q, k = rotary.turn(q), rotary.turn(k)
    if _has_operator(qkv):
        return attention(q, k, v, visible).flatten(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if visible is None:
        x = F.scaled_dot_product_attention(q, k, v)
    else:
        rows, others = visible.shape[1], q.shape[2] - visible.shape[2]
        mask = F.pad(visible, (others, 0), value=True).unsqueeze(1)
        x = torch.cat((
            F.scaled_dot_product_attention(q[:, :, :rows], k, v, mask),
            F.scaled_dot_product_attention(q[:, :, rows:], k, v),
        ), dim=2)  # fmt: skip
    return x.transpose(1, 2).flatten(2)


def _has_operator(x: Tensor) -> bool:
    """Whether `ops.attention` computes this; graphs have PyTorch's function, and gradients are in float32 only."""
    dtypes = (torch.float32,) if x.requires_grad else ATTENTION_DTYPES
    return x.device.type == "cpu" and x.dtype in dtypes and not torch.compiler.is_exporting()


class FeedForward(nn.Module):
    """Two linear layers with GELU, or with a gate of SiLU, whose first half of ``fc1`` is the gate."""

    def __init__(self, dim: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = Linear(dim, 2 * hidden if gated else hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
    ) -> Tensor:
        """Output [B, N, C]."""
        x = self.fc1(x)
        if not self.gated:
            return gelu_then(self.fc2, x)
        gate, value = x.chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """Learned factor of each channel, 1 at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:
        """Output [..., C]."""
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP, each with a norm before it, LayerScale after it, and a residual."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, gated_mlp: bool, rotary: bool, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads, rotary)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = FeedForward(dim, mlp_dim, gated_mlp)
        self.ls2 = LayerScale(dim)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        rotary: Rotary | None,
        visible: Tensor | None = None,  # [B, Q, M] bool, as of `Attention.forward`
    ) -> Tensor:
        """Output [B, N, C]."""
        x = x + self.ls1(self.attn(self.norm1(x), rotary, visible))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """One token for each patch."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W]
    ) -> Tensor:
        """Output [B, C, H/patch, W/patch]."""
        return self.proj(x)


class ViT(nn.Module):
    """Tokens of an image, in the order class token, registers, patches row by row; and blocks that transform them.

    The caller runs the blocks by `run`, as EoMT adds tokens on the way, and applies ``norm`` at the end.
    """

    def __init__(
        self,
        embed_dim: int,
        blocks: int,
        heads: int,
        mlp_dim: int,
        gated_mlp: bool,
        registers: int,
        patch_size: int,
        positions: Literal["learned", "rotary"],
        image_size: tuple[int, int],
        norm_eps: float,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.channels = (embed_dim,)
        self.patch_size, self.checkpointing = patch_size, checkpointing
        self.prefix = 1 + registers
        self.head_dim = embed_dim // heads
        rotary = positions == "rotary"
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = PatchEmbedding(embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim))
        patches = self.grid[0] * self.grid[1]
        self.pos_embed = None if rotary else nn.Parameter(torch.zeros(1, patches, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, heads, mlp_dim, gated_mlp, rotary, norm_eps) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights: normal, of deviation 0.02, and zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tokens in (self.cls_token, self.reg_token, self.pos_embed):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)

    def embed(
        self,
        images: Tensor,  # [B, 3, H, W] normalised; sides are multiples of the patch size
    ) -> tuple[Tensor, Rotary | None]:
        """Tokens [B, prefix + N, C] with learned positions added, and rotary positions.

        Raises:
            ValueError: sides that are not multiples of the patch size.
        """
        height, width = images.shape[2:]
        check(height % self.patch_size == 0 and width % self.patch_size == 0, "images",
              f"height and width that are multiples of {self.patch_size}: see model.size_divisibility", (height, width))
        x = self.patch_embed(images)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + resample_positions(self.pos_embed, self.grid, grid)
        prefix = torch.cat((self.cls_token, self.reg_token), dim=1).expand(x.shape[0], -1, -1)
        return torch.cat((prefix.to(x.dtype), x), dim=1), self._rotary(grid, x.device)

    def run(
        self,
        block: nn.Module,
        x: Tensor,  # [B, N, C]
        rotary: Rotary | None,
        visible: Tensor | None = None,  # [B, Q, M] bool, as of `Attention.forward`
    ) -> Tensor:
        """Run a block -> [B, N, C], with activation checkpointing if it is on."""
        if self.checkpointing and self.training:
            output: Tensor = checkpoint(block, x, rotary, visible, use_reentrant=False)
            return output
        return block(x, rotary, visible)

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of such a ViT, their learned positions resampled from a square image to ``grid``."""
        positions = weights.get("pos_embed")
        if self.pos_embed is None or positions is None or positions.ndim != 3:
            return dict(weights)
        side = math.isqrt(positions.shape[1])
        if side * side != positions.shape[1]:
            return dict(weights)
        return {**weights, "pos_embed": resample_positions(positions, (side, side), self.grid)}

    def _rotary(self, grid: tuple[int, int], device: torch.device) -> Rotary | None:
        """Rotary positions of a grid of patches, whose centres' coordinates go from -1 to 1 on both sides."""
        if self.pos_embed is not None:
            return None
        rows, columns = (2 * _centres(side, device) - 1 for side in grid)
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
        if self.training:
            limit = math.log(RESCALE)
            centres = centres * torch.empty(1, device=device).uniform_(-limit, limit).exp()
        steps = torch.arange(0, 1, 4 / self.head_dim, device=device)
        angles = (2 * math.pi * centres.unsqueeze(2) * BASE**-steps).flatten(1)  # [N, C/heads/2]
        return Rotary(angles.cos(), angles.sin())


def resample_positions(
    positions: Tensor,  # [1, h*w, C]
    old: tuple[int, int],  # h, w
    new: tuple[int, int],
) -> Tensor:
    """Learned positions for a grid of another size, by antialiased bicubic interpolation -> [1, new h*w, C].

    It is that of ``F.interpolate``, as products, which graphs of any size have too.
    """
    if not torch.compiler.is_exporting() and old == new:
        return positions
    rows, columns = (_resampling(*sides, positions.device) for sides in zip(old, new, strict=True))
    maps = torch.einsum("ph,qw,hwc->pqc", rows, columns, positions[0].float().unflatten(0, old))
    return maps.flatten(0, 1).unsqueeze(0).to(positions.dtype)


def _resampling(old: int, new: int, device: torch.device) -> Tensor:
    """Weights of the old places for each new one along a side -> [new, old] float32."""
    places, old_places = old * _centres(new, device), old * _centres(old, device)
    distances = (old_places - places.unsqueeze(1)).abs()
    x = distances / (2 * places.amin(0)).clamp(min=1)  # the first place is half a step
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys' kernel, a = -1/2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def _centres(count: int, device: torch.device) -> Tensor:
    """Centres of so many equal parts of 0..1 -> [count] float32; a graph need not know how many."""
    centres = torch.arange(count, device=device, dtype=torch.float32) + 0.5
    return centres / (centres.amax(0) + 0.5)
