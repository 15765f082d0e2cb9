"""Swin Transformer backbone (Liu et al., 2021) for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maskformer_fast.modeling.linear import Linear, gelu_then, trains_in_float32_on_cpu
from maskformer_fast.ops.window_attention import pack_window_bias, window_attention

MLP_RATIO = 4
"""Hidden channels of a block's MLP, as a multiple of its channels."""
PATCH = 4
"""Side of a patch in pixels."""
BLOCKED = -100.0
"""Value added to attention scores across the seams of a cyclic shift; finite, as in the training of the published
weights."""


class PatchEmbedding(nn.Module):
    """Embedding of 4x4 patches as tokens; images are padded at the right and below to complete patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W]
    ) -> Tensor:
        """Output [B, ceil(H/4), ceil(W/4), dim]."""
        height, width = x.shape[-2:]
        right, bottom = (padding(size, PATCH) for size in (width, height))
        x = F.pad(x, (0, right, 0, bottom))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Merging of 2x2 tokens into one with twice the channels; maps are padded to even sizes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(
        self,
        x: Tensor,  # [B, H, W, C]
        height: int,
        width: int,
    ) -> Tensor:
        """Output [B, height, width, 2C], where height and width are H/2 and W/2, rounded up."""
        x = F.pad(x, (0, 0, 0, 2 * width - x.shape[2], 0, 2 * height - x.shape[1]))
        x = x.view(x.shape[0], height, 2, width, 2, x.shape[3])
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # columns before rows, as in the published weights
        return self.reduction(self.norm(x))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        y, x = torch.meshgrid(torch.arange(window, device="cpu"), torch.arange(window, device="cpu"), indexing="ij")
        dy, dx = (p.flatten()[:, None] - p.flatten()[None, :] + window - 1 for p in (y, x))
        self.register_buffer("relative_position_index", dy * (2 * window - 1) + dx, persistent=False)  # [N, N]

    def bias(self) -> Tensor:
        """Bias of each pair of tokens -> [heads, N, N]."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def forward(
        self,
        x: Tensor,  # [B, windows, N, C]
        mask: Tensor | None,  # [windows, N, N] added to the scores of every head
    ) -> Tensor:
        """Output [B, windows, N, C]."""
        batch, windows = x.shape[:2]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)  # [B, W, heads, N, d]
        bias = self.bias()
        # The bias broadcasts over one dimension: the batch if windows differ in their mask, else all windows.
        if mask is None:
            start, bias = 0, bias[None]
        else:
            start, bias = 1, (bias + mask[:, None]).flatten(0, 1)[None]
        q, k, v = (t.flatten(start, start + 1) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x.reshape(batch, windows, self.num_heads, *x.shape[-2:])
        return self.proj(x.transpose(2, 3).flatten(3))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, MLP_RATIO * dim)
        self.fc2 = Linear(MLP_RATIO * dim, dim)

    def forward(
        self,
        x: Tensor,  # [..., dim]
    ) -> Tensor:
        """Output [..., dim]."""
        return gelu_then(self.fc2, self.fc1(x))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): a training sample skips the branch with probability ``rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(
        self,
        x: Tensor,  # [B, ...]
    ) -> Tensor:
        """Output [B, ...], scaled so that its expectation is the input."""
        if not self.training or self.rate == 0.0:
            return x
        probability = 1.0 - self.rate
        kept = torch.rand([x.shape[0]] + [1] * (x.ndim - 1), device=x.device) < probability
        return x * (kept / probability).to(x.dtype)


class SwinBlock(nn.Module):
    """Attention in (shifted) windows, then an MLP; pre-norm, with residuals."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(
        self,
        x: Tensor,  # [B, H, W, C]
        mask: Tensor,  # [windows, N, N] for the shifted windows
    ) -> Tensor:
        """Output [B, H, W, C]."""
        x = x + self.drop_path(self.attend(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(
        self,
        x: Tensor,  # [B, H, W, C]
        mask: Tensor,  # [windows, N, N]
    ) -> Tensor:
        """Attend in windows -> [B, H, W, C]: pad to complete windows, shift, attend, shift back, crop.

        In training on a CPU in float32 windows are read and written in place.
        """
        attention = self.attn
        if trains_in_float32_on_cpu(x, attention.qkv.weight):
            bias = pack_window_bias(attention.bias())
            # tokens of padding are zero before the layer
            attended = window_attention(attention.qkv(x), attention.qkv.bias, bias, self.window, self.shift)
            return attention.proj(attended)
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, padding(width, self.window), 0, padding(height, self.window)))
        padded_height, padded_width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        x = attention(to_windows(x, self.window), mask if self.shift else None)
        x = from_windows(x, self.window, padded_height, padded_width)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return dense(x[:, :height, :width])


class SwinStage(nn.Module):
    """Blocks of one resolution, every second one with shifted windows, and downsampling to the next resolution."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        drop_path: Sequence[float],
        downsample: PatchMerging | None,
        checkpointing: bool,
    ) -> None:
        """``drop_path`` has the rate of stochastic depth of each block."""
        super().__init__()
        self.window = window
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window, window // 2 if index % 2 else 0, rate)
            for index, rate in enumerate(drop_path)
        )
        self.downsample = downsample

    def forward(
        self,
        x: Tensor,  # [B, H, W, C]
        next_height: int,
        next_width: int,
    ) -> tuple[Tensor, Tensor]:
        """Output [B, H, W, C] and input of the next stage [B, next_height, next_width, 2C] (unused after the last)."""
        mask = shifted_window_mask(x, self.window)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x, x if self.downsample is None else self.downsample(x, next_height, next_width)


class SwinTransformer(nn.Module):
    """Swin without classifier, with a LayerNorm on each of the four outputs, of ``channels`` channels."""

    def __init__(
        self,
        depths: Sequence[int],
        embed_dim: int,
        num_heads: Sequence[int],
        window_size: int,
        drop_path_rate: float,
        checkpointing: bool = False,
    ) -> None:
        """The arguments are fields of `maskformer_fast.config.BackboneConfig`."""
        super().__init__()
        self.channels = tuple(embed_dim * 2**stage for stage in range(4))
        self.patch_embed = PatchEmbedding(embed_dim)
        total = sum(depths)
        rates = iter([drop_path_rate * block / max(total - 1, 1) for block in range(total)])
        self.layers = nn.ModuleList(
            SwinStage(
                dim, num_heads[stage], window_size, list(islice(rates, depths[stage])),
                PatchMerging(dim) if stage < 3 else None, checkpointing,
            )
            for stage, dim in enumerate(self.channels)
        )
        self.norm0, self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for dim in self.channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W] normalised
    ) -> list[Tensor]:
        """Feature maps res2 ... res5 at strides 4, 8, 16, 32 (sizes rounded up): [B, channels[i], ., .]."""
        image_size = x.shape[-2:]
        x = self.patch_embed(x)
        features = []
        for index, norm in enumerate((self.norm0, self.norm1, self.norm2, self.norm3)):
            # From the image's size, not from this stage's: symbolic sizes would grow more complex at every stage.
            next_stride = PATCH * 2 ** (index + 1)
            next_size = ((size + next_stride - 1) // next_stride for size in image_size)
            output, x = self.layers[index](x, *next_size)
            features.append(norm(output).permute(0, 3, 1, 2))
        return features


def padding(size: int, multiple: int) -> int:
    """Amount that ``size`` lacks to a multiple; without a modulo, so that symbolic sizes simplify."""
    return (size + multiple - 1) // multiple * multiple - size


def dense(x: Tensor) -> Tensor:
    """Copy to contiguous memory; unconditionally, since a check of the layout would split compiled graphs."""
    return x.clone(memory_format=torch.contiguous_format)


def to_windows(
    x: Tensor,  # [B, H, W, C], with H and W multiples of the window
    window: int,
) -> Tensor:
    """Split a map into windows -> [B, windows, N, C], row by row; N = window squared."""
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return dense(x).view(batch, rows * columns, window * window, channels)


def from_windows(
    x: Tensor,  # [B, windows, N, C]
    window: int,
    height: int,
    width: int,
) -> Tensor:
    """Inverse of `to_windows` -> [B, height, width, C]."""
    batch, _, _, channels = x.shape
    x = x.view(batch, height // window, width // window, window, window, channels).transpose(2, 3)
    return dense(x).view(batch, height, width, channels)


def shifted_window_mask(
    x: Tensor,  # [B, H, W, C], before padding
    window: int,
) -> Tensor:
    """Mask to add to the attention scores of shifted windows -> [windows, N, N], 0 or `BLOCKED`.

    After the cyclic shift, the last row and column of windows contain tokens from opposite sides of the image. A token
    attends to tokens of its own side only.
    """
    height, width = (size + padding(size, window) for size in x.shape[1:3])
    rows, columns = (
        (position >= size - window).int() + (position >= size - window // 2).int()
        for size, position in ((size, torch.arange(size, device=x.device)) for size in (height, width))
    )
    region = rows[:, None] * 3 + columns  # [H, W] padded
    region = to_windows(region[None, :, :, None], window)[0, :, :, 0]  # [windows, N]
    return (region[:, :, None] != region[:, None, :]) * BLOCKED
