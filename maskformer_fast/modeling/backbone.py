"""Backbone presets, and backbones built from a preset and settings that differ from it."""

from __future__ import annotations

from dataclasses import fields, replace

from maskformer_fast.config import BackboneConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.resnet import ResNet
from maskformer_fast.modeling.swin import SwinTransformer

RESNET_FIELDS = ("stem", "stem_channels", "bottleneck_channels", "res2_channels", "multi_grid", "norm")
SWIN_FIELDS = ("embed_dim", "num_heads", "window_size", "drop_path_rate", "checkpointing")

_RESNET50 = BackboneConfig(
    "resnet50", depths=(3, 4, 6, 3), stem="basic", stem_channels=64, bottleneck_channels=64, res2_channels=256,
    multi_grid=False, norm="batch",
)
_SWIN_TINY = BackboneConfig(
    "swin_tiny", depths=(2, 2, 6, 2), embed_dim=96, num_heads=(3, 6, 12, 24), window_size=7, drop_path_rate=0.3,
    checkpointing=False,
)
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
    for name in RESNET_FIELDS if is_swin(preset) else SWIN_FIELDS:
        value = getattr(config, name)
        check(value is None, f"backbone.{name}", f"nothing, it does not exist in {config.name}", value)
    filled = {f.name: getattr(preset, f.name) for f in fields(config) if getattr(config, f.name) is None}
    config = replace(config, **filled)
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
    return config.embed_dim is not None


def build_backbone(config: BackboneConfig) -> ResNet | SwinTransformer:
    """Build a backbone with freshly initialised weights; it returns four feature maps of ``channels`` channels."""
    config = resolve_backbone(config)
    names = ("depths", *(SWIN_FIELDS if is_swin(config) else RESNET_FIELDS))
    arguments = {name: getattr(config, name) for name in names}
    return SwinTransformer(**arguments) if is_swin(config) else ResNet(**arguments)
