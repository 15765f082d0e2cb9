"""Backbone presets, and backbones built from a preset and settings that differ from it."""

from __future__ import annotations

from dataclasses import fields, replace

from maskformer_fast.config import BackboneConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.resnet import ResNet
from maskformer_fast.modeling.swin import SwinTransformer
from maskformer_fast.modeling.vit import ViT

RESNET_FIELDS = ("stem", "stem_channels", "bottleneck_channels", "res2_channels", "multi_grid", "norm")
SWIN_FIELDS = ("embed_dim", "num_heads", "window_size", "drop_path_rate", "checkpointing")
VIT_FIELDS = ("embed_dim", "blocks", "heads", "mlp_dim", "gated_mlp", "registers", "patch_size", "positions",
              "image_size", "norm_eps", "checkpointing")

_RESNET50 = BackboneConfig(
    "resnet50", depths=(3, 4, 6, 3), stem="basic", stem_channels=64, bottleneck_channels=64, res2_channels=256,
    multi_grid=False, norm="batch",
)
_SWIN_TINY = BackboneConfig(
    "swin_tiny", depths=(2, 2, 6, 2), embed_dim=96, num_heads=(3, 6, 12, 24), window_size=7, drop_path_rate=0.3,
    checkpointing=False,
)
_VIT = BackboneConfig(
    "vit_small_dinov2", embed_dim=384, blocks=12, heads=6, mlp_dim=1536, gated_mlp=False, registers=4, patch_size=16,
    positions="learned", image_size=(640, 640), norm_eps=1e-6, checkpointing=False,
)
_BASE = replace(_VIT, embed_dim=768, heads=12, mlp_dim=3072)
_LARGE = replace(_VIT, embed_dim=1024, blocks=24, heads=16, mlp_dim=4096)
_GIANT = replace(_VIT, embed_dim=1536, blocks=40, heads=24, mlp_dim=4096, gated_mlp=True)
_PRESETS = (
    _RESNET50,
    replace(_RESNET50, name="resnet101", depths=(3, 4, 23, 3)),
    replace(_RESNET50, name="resnet101c", depths=(3, 4, 23, 3), stem="deep", stem_channels=128, multi_grid=True),
    replace(
        _RESNET50, name="resnet_micro", depths=(1, 1, 1, 1), stem_channels=16, bottleneck_channels=16, res2_channels=32
    ),
    _SWIN_TINY,
    replace(_SWIN_TINY, name="swin_small", depths=(2, 2, 18, 2)),
    replace(
        _SWIN_TINY, name="swin_base", depths=(2, 2, 18, 2), embed_dim=128, num_heads=(4, 8, 16, 32), window_size=12
    ),
    replace(
        _SWIN_TINY, name="swin_large", depths=(2, 2, 18, 2), embed_dim=192, num_heads=(6, 12, 24, 48), window_size=12
    ),
    replace(
        _SWIN_TINY, name="swin_micro", depths=(2, 2, 2, 2), embed_dim=16, num_heads=(1, 2, 4, 8), window_size=4,
        drop_path_rate=0.0,
    ),
    _VIT,
    replace(_BASE, name="vit_base_dinov2"),
    replace(_LARGE, name="vit_large_dinov2"),
    replace(_GIANT, name="vit_giant_dinov2"),
    replace(_VIT, name="vit_small_dinov3", positions="rotary", norm_eps=1e-5),
    replace(_BASE, name="vit_base_dinov3", positions="rotary", norm_eps=1e-5),
    replace(_LARGE, name="vit_large_dinov3", positions="rotary", norm_eps=1e-5),
    replace(
        _VIT, name="vit_micro", embed_dim=64, blocks=4, heads=2, mlp_dim=256, registers=2, patch_size=8,
        image_size=(96, 96),
    ),
)

BACKBONES: dict[str, BackboneConfig] = {preset.name: preset for preset in _PRESETS}
"""Presets by name: those of the published models, and a micro variant of each family for small images and tests."""


def resolve_backbone(config: BackboneConfig) -> BackboneConfig:
    """Fill the fields that are ``None`` from the preset.

    Raises:
        ValueError: the preset is unknown, a field belongs to the other family, or values do not fit together.
    """
    check(config.name in BACKBONES, "backbone.name", "one of " + ", ".join(BACKBONES), config.name)
    preset = BACKBONES[config.name]
    own = fields_of(preset)
    for name in dict.fromkeys((*RESNET_FIELDS, *SWIN_FIELDS, *VIT_FIELDS, "depths")):
        value = None if name in own else getattr(config, name)
        check(value is None, f"backbone.{name}", f"nothing, it does not exist in {config.name}", value)
    filled = {f.name: getattr(preset, f.name) for f in fields(config) if getattr(config, f.name) is None}
    config = replace(config, **filled)
    if is_vit(config):
        dim, patch = config.embed_dim or 0, config.patch_size
        fits = dim % (4 * (config.heads or 1)) == 0
        check(fits, "backbone.heads", f"a divisor of embed_dim / 4 = {dim / 4:g}", config.heads)
        check(patch in (8, 16, 32), "backbone.patch_size", "8, 16 or 32", patch)
        fits = all(side % (patch or 1) == 0 for side in config.image_size or ())
        check(fits, "backbone.image_size", f"multiples of patch_size={patch}", config.image_size)
        return config
    depths = config.depths or ()
    check(len(depths) == 4 and min(depths) > 0, "backbone.depths", "four positive integers", depths)
    if is_swin(config):
        heads = config.num_heads or ()
        check(len(heads) == 4 and min(heads) > 0, "backbone.num_heads", "four positive integers", heads)
        fits = all((config.embed_dim or 0) * 2**stage % h == 0 for stage, h in enumerate(heads))
        check(fits, "backbone.num_heads", f"divisors of embed_dim={config.embed_dim} times 1, 2, 4, 8", heads)
    elif config.stem == "deep":
        check((config.stem_channels or 0) % 2 == 0, "backbone.stem_channels", "an even number", config.stem_channels)
    return config


def is_swin(config: BackboneConfig) -> bool:
    """Whether a preset or resolved configuration describes a Swin Transformer."""
    return config.window_size is not None


def is_vit(config: BackboneConfig) -> bool:
    """Whether a preset or resolved configuration describes a plain Vision Transformer, which only EoMT takes."""
    return config.patch_size is not None


def fields_of(config: BackboneConfig) -> tuple[str, ...]:
    """Fields of the family of a preset or resolved configuration."""
    return VIT_FIELDS if is_vit(config) else ("depths", *(SWIN_FIELDS if is_swin(config) else RESNET_FIELDS))


def build_backbone(config: BackboneConfig) -> ResNet | SwinTransformer | ViT:
    """Build a backbone with freshly initialised weights.

    ResNet and Swin return four feature maps of ``channels`` channels, a ViT tokens.
    """
    config = resolve_backbone(config)
    family = ViT if is_vit(config) else SwinTransformer if is_swin(config) else ResNet
    backbone: ResNet | SwinTransformer | ViT = family(**{name: getattr(config, name) for name in fields_of(config)})
    return backbone
