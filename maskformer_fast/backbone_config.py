"""Configuration of backbones, a part of `config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maskformer_fast.core.checks import check, check_choice

MAX_LAYERS, MAX_WIDTH = 1000, 1 << 20  # layers; queries and channels: no typo or hostile file demands endless networks
MAX_SIDE = 1 << 14  # pixels of a side for which positions are stored


@dataclass(frozen=True)
class BackboneConfig:
    """Backbone: a preset's name, and settings that differ from the preset's; ``None`` keeps the preset's value."""

    name: str = "resnet50"
    """Preset, a key of `maskformer_fast.modeling.backbone.BACKBONES`."""
    weights: str | None = None
    """File in this package's format with pretrained backbone weights (ImageNet), loaded before training."""
    depths: tuple[int, int, int, int] | None = None
    """Blocks in each of the four stages."""
    stem: Literal["basic", "deep"] | None = None
    """ResNet: one 7x7 convolution, or the three 3x3 ones of ResNet-101c."""
    stem_channels: int | None = None
    """ResNet: channels after the stem."""
    bottleneck_channels: int | None = None
    """ResNet: inner channels of res2; each stage doubles them."""
    res2_channels: int | None = None
    """ResNet: output channels of res2; each stage doubles them."""
    multi_grid: bool | None = None
    """ResNet: dilations 1, 2, 4 in the three blocks of res5, as ResNet-101c has them."""
    norm: Literal["batch", "frozen", "sync"] | None = None
    """ResNet: BatchNorm trained, frozen, or synchronised over the processes of a distributed run."""
    embed_dim: int | None = None
    """Swin: channels of the first stage. ViT: channels."""
    num_heads: tuple[int, int, int, int] | None = None
    """Swin: attention heads of each stage."""
    window_size: int | None = None
    """Swin: window side in tokens."""
    drop_path_rate: float | None = None
    """Swin: stochastic depth of the last block; earlier blocks scale linearly from 0."""
    checkpointing: bool | None = None
    """Swin and ViT: activation checkpointing, with the same results: keep only the input of each block and compute the
    block again in the backward pass. Takes far less memory, and about a third more time in the backbone."""
    blocks: int | None = None
    """ViT: number of blocks."""
    heads: int | None = None
    """ViT: attention heads of each block."""
    mlp_dim: int | None = None
    """ViT: hidden channels of the MLP."""
    gated_mlp: bool | None = None
    """ViT: MLP with a SiLU gate (SwiGLU) in place of GELU."""
    registers: int | None = None
    """ViT: number of register tokens beside the class token."""
    patch_size: int | None = None
    """ViT: side of a patch in pixels, 8, 16 or 32."""
    positions: Literal["learned", "rotary"] | None = None
    """ViT: learned positions of patches (DINOv2), or rotary ones and no bias of the keys (DINOv3)."""
    image_size: tuple[int, int] | None = None
    """ViT: height and width in pixels that learned positions are stored for; other sizes interpolate them."""
    norm_eps: float | None = None
    """ViT: epsilon of the norms."""

    def __post_init__(self) -> None:
        for name in ("stem_channels", "bottleneck_channels", "res2_channels", "embed_dim", "window_size", "blocks",
                     "heads", "mlp_dim", "patch_size"):
            value, limit = getattr(self, name), MAX_LAYERS if name == "blocks" else MAX_WIDTH
            check(value is None or 0 < value <= limit, f"backbone.{name}", f"a positive integer up to {limit}", value)
        check(self.registers is None or 0 <= self.registers <= MAX_WIDTH, "backbone.registers", f"0..{MAX_WIDTH}",
              self.registers)
        sides = self.image_size or (1, 1)
        check(0 < min(sides) <= max(sides) <= MAX_SIDE, "backbone.image_size", f"sides of 1..{MAX_SIDE}", sides)
        check(self.norm_eps is None or 0.0 < self.norm_eps < 1.0, "backbone.norm_eps", "0 < eps < 1", self.norm_eps)
        check_choice("backbone.positions", self.positions, (None, "learned", "rotary"))
        rate = self.drop_path_rate
        check(rate is None or 0.0 <= rate < 1.0, "backbone.drop_path_rate", "0 <= rate < 1", rate)
        check_choice("backbone.norm", self.norm, (None, "batch", "frozen", "sync"))
        check_choice("backbone.stem", self.stem, (None, "basic", "deep"))
