"""Networks: backbone, pixel decoder, transformer decoder, heads."""

from __future__ import annotations

from collections.abc import Callable

from maskformer_fast.config import ModelConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.backbone import BACKBONES, is_vit, resolve_backbone
from maskformer_fast.modeling.eomt import EoMT
from maskformer_fast.modeling.mask2former import Mask2Former
from maskformer_fast.modeling.maskformer import MaskFormer
from maskformer_fast.modeling.network import SegmentationNetwork
from maskformer_fast.modeling.per_pixel import PerPixelBaseline, PerPixelBaselinePlus

__all__ = [
    "BACKBONES",
    "EoMT",
    "Mask2Former",
    "MaskFormer",
    "PerPixelBaseline",
    "PerPixelBaselinePlus",
    "SegmentationNetwork",
    "build_model",
    "resolve_backbone",
]


def build_model(config: ModelConfig) -> SegmentationNetwork:
    """Build a network with freshly initialised weights.

    Raises:
        ValueError: the backbone is unknown, values do not fit together, or ``num_classes`` is 0.
    """
    if config.type != "eomt":
        backbone = resolve_backbone(config.backbone)
        check(not is_vit(backbone), "backbone.name", f"a ResNet or Swin Transformer for {config.type}", backbone.name)
    types: dict[str, Callable[[ModelConfig], SegmentationNetwork]] = {
        "maskformer": MaskFormer,
        "mask2former": Mask2Former,
        "eomt": EoMT,
        "per_pixel": PerPixelBaseline,
        "per_pixel_plus": PerPixelBaselinePlus,
    }
    return types[config.type](config)
