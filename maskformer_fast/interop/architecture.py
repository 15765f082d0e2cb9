"""Inference of the network's architecture from names and shapes of weights, and the strict check that they match.

Every size is the most frequent value among all tensors that show it. So one misshapen tensor is reported as such and
does not change the architecture. Properties that no tensor shows have the official defaults:

- attention heads of the transformers: 8, unless given (Swin's are in its position bias tables, those of Mask2Former's
  encoder in its attention weights, and its decoder has as many);
- groups of the pixel decoder's norms: 32; dropout: 0.1, in Mask2Former 0; stochastic depth of Swin: that of its preset;
- padding: to a multiple of 32 for the semantic models and Mask2Former, none for MaskFormers with an encoder and
  per-pixel baselines;
- BatchNorm: trained where the weights count its batches (``num_batches_tracked``), as Hugging Face's do; frozen where
  they do not, as in the published official models. Inference is the same;
- ResNet with three convolutions in its stem: dilated res5 ("multi-grid"), as in the published ResNet-101c.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, ModelType, PixelDecoderConfig
from maskformer_fast.interop.names import ConvertError, Renamed, Rule, their_name
from maskformer_fast.modeling import BACKBONES, build_model
from maskformer_fast.modeling.backbone import build_backbone
from maskformer_fast.modeling.deformable_encoder import LEVELS, POINTS
from maskformer_fast.modeling.weights import not_finite, on_meta

BATCH_COUNTER = "num_batches_tracked"
_STAGES = range(4)
_PUBLISHED = ("resnet50", "resnet101", "resnet101c", "swin_tiny", "swin_small", "swin_base", "swin_large")
_ENCODER = r"pixel_decoder\.transformer\.encoder\."
_DECODER = r"predictor\.transformer\.decoder\."
_MASKED_DECODER = r"predictor\.transformer_(self_attention|cross_attention|ffn)_layers\."


class Shapes:
    """Shapes of tensors by name, with queries by patterns of names."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}

    def has(self, pattern: str) -> bool:
        """Whether any name starts with the pattern (a regular expression)."""
        return any(re.match(pattern, name) for name in self.shapes)

    def size(self, *where: tuple[str, int], default: int = 0, known: Sequence[int] = ()) -> int:
        """Most frequent size among dimensions of tensors whose names match patterns fully, and the ``known`` sizes.

        Without any size it is ``default``.
        """
        votes = Counter(known)
        for pattern, dimension in where:
            for name, shape in self.shapes.items():
                if len(shape) > dimension and shape[dimension] > 0 and re.fullmatch(pattern, name):
                    votes[shape[dimension]] += 1
        return votes.most_common(1)[0][0] if votes else default

    def count(self, pattern: str) -> int:
        """One more than the largest index that the pattern's group captures at the start of a name; 0 without any.

        The count is limited by the number of tensors, so that a wrong name cannot demand an endless network.
        """
        matches = (re.match(pattern, name) for name in self.shapes)
        return min(max((int(match[1]) + 1 for match in matches if match), default=0), len(self.shapes))


def infer_model(
    weights: Mapping[str, Tensor],
    *,
    source: object = "weights",
    num_heads: int | None = None,
    num_classes: int | None = None,
    size_divisibility: int | None = None,
    pixel_mean: tuple[float, float, float] | None = None,
    pixel_std: tuple[float, float, float] | None = None,
) -> ModelConfig:
    """Infer the architecture of a model from its weights under our names.

    Args:
        weights: name -> tensor; only shapes are read.
        source: name of the weights in messages, usually a path.
        num_heads: heads of the transformer decoder and encoder; ``None`` is the official 8.
        num_classes: number of classes by the official criterion's weights, if present. They also show a network that
            classifies masks.
        size_divisibility, pixel_mean, pixel_std: as in `ModelConfig`; ``None`` is the official value.

    Raises:
        ConvertError: weights of another network, or sizes that the configuration refuses.
    """
    shapes = Shapes(weights)
    kind = _model_type(shapes, num_classes is not None, source)
    of_masks = shapes.size(
        (r"predictor\.class_embed\.(weight|bias)", 0),
        known=[] if num_classes is None else [num_classes + 1],
        default=1,
    ) - 1
    classes = {
        "maskformer": of_masks,
        "mask2former": of_masks,
        "per_pixel": shapes.size((r"predictor\.(weight|bias)", 0)),
        "per_pixel_plus": shapes.size((r"predictor\.query_embed\.weight", 0)),
    }[kind]
    backbone = infer_backbone(weights, "backbone.", source)
    encoder_layers = shapes.count(_ENCODER + r"layers\.(\d{1,4})\.")
    if size_divisibility is None:
        size_divisibility = 32 if kind == "mask2former" or (kind == "maskformer" and not encoder_layers) else 0
    try:
        return ModelConfig(
            type=kind,
            num_classes=classes,
            backbone=backbone,
            pixel_decoder=_pixel_decoder(shapes, encoder_layers, num_heads, kind == "mask2former"),
            decoder=_masked_decoder(shapes, num_heads) if kind == "mask2former" else _decoder(shapes, kind, num_heads),
            size_divisibility=size_divisibility,
            pixel_mean=ModelConfig.pixel_mean if pixel_mean is None else pixel_mean,
            pixel_std=ModelConfig.pixel_std if pixel_std is None else pixel_std,
        )
    except ValueError as error:
        hint = " (see --num-heads)" if "_heads" in str(error) else ""
        raise ConvertError(f"{source}: {error}{hint}") from error


def infer_backbone(weights: Mapping[str, Tensor], prefix: str = "", source: object = "weights") -> BackboneConfig:
    """Infer a backbone from its weights under our names: the nearest preset, and the fields that differ from it.

    Raises:
        ConvertError: neither a bottleneck ResNet nor a Swin Transformer.
    """
    shapes = Shapes({name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)})
    if shapes.has(r"(patch_embed|layers)\."):
        fields = _swin(shapes)
    elif shapes.has(r"(stem|res\d)\."):
        if not shapes.has(r"res\d\.\d+\.conv3\."):
            raise ConvertError(f"{source}: backbone: expected a ResNet of bottleneck blocks (50 layers or more), "
                               "got one of basic blocks")
        fields = _resnet(shapes)
    else:
        listed = ", ".join(list(shapes.shapes)[:3]) or "no tensor"
        raise ConvertError(f"{source}: backbone: expected tensors of a ResNet or a Swin Transformer, got {listed}")
    return nearest_preset(fields)


def meta_model(config: ModelConfig, source: object) -> nn.Module:
    """Build a network on the meta device, without memory for weights, for comparisons of names and shapes.

    Raises:
        ConvertError: sizes from which no network can be built.
    """
    try:
        with on_meta():
            return build_model(config)
    except ValueError as error:
        raise ConvertError(f"{source}: {error}") from error


def meta_backbone(config: BackboneConfig, source: object) -> nn.Module:
    """Build a backbone as `meta_model` builds a network."""
    try:
        with on_meta():
            return build_backbone(config)
    except ValueError as error:
        raise ConvertError(f"{source}: {error}") from error


def check_fit(
    module: nn.Module, renamed: Renamed, rules: Sequence[Rule], source: object, optional: Collection[str] = ()
) -> None:
    """Check that weights under our names are exactly the module's, with the same shapes, and finite.

    Args:
        module: the network, which may be on the meta device.
        renamed: weights under our names, with the problems so far.
        rules: table by which they were renamed, for the names in messages.
        source: path for the message.
        optional: our names that may be missing.

    Raises:
        ConvertError: lists every problem, by the names of the source.
    """
    expected = module.state_dict()
    weights, problems = renamed.weights, list(renamed.problems)
    reported = {name for name, known in renamed.origin.items() if name not in weights}
    for name in expected:
        if name not in weights and name not in reported and name not in optional:
            problems.append(f"missing: {their_name(rules, name)}")
    for name, tensor in weights.items():
        theirs = renamed.origin.get(name, name)
        if name not in expected:
            problems.append(f"unknown: {theirs}")
        elif expected[name].shape != tensor.shape:
            problems.append(f"shape: {theirs}: expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)}")
        elif expected[name].is_floating_point() != tensor.is_floating_point():
            problems.append(f"type: {theirs}: expected {expected[name].dtype}, got {tensor.dtype}")
    for name, count in not_finite(weights).items():
        problems.append(f"not finite: {renamed.origin.get(name, name)}: {count}")
    if problems:
        raise ConvertError("\n  ".join(
            [f"{source}: the weights do not fit the network that they or their configuration describe:", *problems]
        ))  # fmt: skip


def _model_type(shapes: Shapes, classifies_masks: bool, source: object) -> ModelType:
    if shapes.has(_MASKED_DECODER) or shapes.has(r"predictor\.query_feat\."):
        return "mask2former"
    if classifies_masks or shapes.has(r"predictor\.class_embed\."):
        return "maskformer"
    if shapes.has(r"predictor\.(weight|bias)$"):
        return "per_pixel"
    if shapes.has(r"predictor\.(query_embed|transformer)\."):
        return "per_pixel_plus"
    raise ConvertError(f"{source}: expected a MaskFormer, a Mask2Former or a per-pixel baseline, got no tensor of "
                       "their heads")


def _pixel_decoder(
    shapes: Shapes, encoder_layers: int, num_heads: int | None, is_deformable: bool
) -> PixelDecoderConfig:
    config = PixelDecoderConfig(
        conv_dim=shapes.size((r"pixel_decoder\.(adapter|layer)_\d\.norm\.(weight|bias)", 0), default=256),
        mask_dim=shapes.size(
            (r"pixel_decoder\.mask_features\.(weight|bias)", 0),
            (r"predictor\.mask_embed\.layers\.2\.(weight|bias)", 0),
            (r"predictor\.weight", 1),
            default=256,
        ),
    )
    if not encoder_layers:
        return config
    if is_deformable:
        config = replace(config, encoder_heads=_deformable_heads(shapes), encoder_dropout=0.0)
    heads = config.encoder_heads if num_heads is None else num_heads
    ffn_dim = _ffn_dim(shapes, _ENCODER)
    return replace(config, encoder_layers=encoder_layers, encoder_heads=heads, encoder_ffn_dim=ffn_dim)


def _deformable_heads(shapes: Shapes) -> int:
    """Heads of the deformable encoder: it has a weight for each head, level and point."""
    weights = _ENCODER + r"layers\.\d+\.self_attn\.attention_weights\.(weight|bias)"
    return max(shapes.size((weights, 0), default=8 * LEVELS * POINTS) // (LEVELS * POINTS), 1)


def _masked_decoder(shapes: Shapes, num_heads: int | None) -> DecoderConfig:
    """Decoder of Mask2Former."""
    default = DecoderConfig()
    layer = _MASKED_DECODER + r"\d+\."
    return DecoderConfig(
        layers=shapes.count(r"predictor\.transformer_\w+_layers\.(\d{1,4})\.") or default.layers,
        hidden_dim=shapes.size((layer + r"norm\.(weight|bias)", 0), default=default.hidden_dim),
        num_heads=_deformable_heads(shapes) if num_heads is None else num_heads,
        ffn_dim=shapes.size((layer + r"linear1\.(weight|bias)", 0), (layer + r"linear2\.weight", 1), default=2048),
        dropout=0.0,
        num_queries=shapes.size((r"predictor\.query_(feat|embed)\.weight", 0), default=default.num_queries),
    )


def _decoder(shapes: Shapes, kind: ModelType, num_heads: int | None) -> DecoderConfig:
    default = DecoderConfig()
    if kind == "per_pixel":
        return default
    queries = shapes.size((r"predictor\.query_embed\.weight", 0), default=default.num_queries)
    return DecoderConfig(
        layers=shapes.count(_DECODER + r"layers\.(\d{1,4})\.") or default.layers,
        hidden_dim=shapes.size((_DECODER + r"(layers\.\d+\.)?norm\d?\.(weight|bias)", 0), default=default.hidden_dim),
        num_heads=default.num_heads if num_heads is None else num_heads,
        ffn_dim=_ffn_dim(shapes, _DECODER),
        num_queries=queries if kind == "maskformer" else default.num_queries,  # per_pixel_plus has one for each class
    )


def _ffn_dim(shapes: Shapes, prefix: str) -> int:
    layer = prefix + r"layers\.\d+\."
    return shapes.size((layer + r"linear1\.(weight|bias)", 0), (layer + r"linear2\.weight", 1), default=2048)


def _resnet(shapes: Shapes) -> dict[str, Any]:
    deep = shapes.has(r"stem\.conv1_\d\.")
    leaf = r"\.(weight|norm\.(weight|bias|running_mean|running_var))"
    return {
        "depths": tuple(shapes.count(rf"res{stage + 2}\.(\d{{1,4}})\.") or 1 for stage in _STAGES),
        "stem": "deep" if deep else "basic",
        "stem_channels": shapes.size(
            (r"stem\.conv1_3" + leaf if deep else r"stem\.conv1" + leaf, 0),
            (r"res2\.0\.(conv1|shortcut)\.weight", 1),
        ) or 64,
        "bottleneck_channels": shapes.size((r"res2\.\d+\.conv[12]" + leaf, 0)) or 64,
        "res2_channels": shapes.size((r"res2\.\d+\.(conv3|shortcut)" + leaf, 0)) or 256,
        "norm": "batch" if any(name.endswith(BATCH_COUNTER) for name in shapes.shapes) else "frozen",
    }


def _swin(shapes: Shapes) -> dict[str, Any]:
    table = r"\.blocks\.\d+\.attn\.relative_position_bias_table"
    embed_dim = shapes.size((r"patch_embed\.(proj|norm)\.(weight|bias)", 0)) or 96
    positions = shapes.size((r"layers\.\d+" + table, 0), default=13 * 13)
    return {
        "depths": tuple(shapes.count(rf"layers\.{stage}\.blocks\.(\d{{1,4}})\.") or 1 for stage in _STAGES),
        "embed_dim": embed_dim,
        "num_heads": tuple(shapes.size((rf"layers\.{stage}{table}", 1), default=1) for stage in _STAGES),
        "window_size": (math.isqrt(positions) + 1) // 2,
    }


def nearest_preset(fields: dict[str, Any]) -> BackboneConfig:
    """The published preset that agrees in most fields, with the fields that differ from it."""
    family = [BACKBONES[name] for name in _PUBLISHED if (BACKBONES[name].embed_dim is None) == ("stem" in fields)]
    compared = {name: value for name, value in fields.items() if name != "norm"}
    preset = max(family, key=lambda preset: sum(getattr(preset, name) == value for name, value in compared.items()))
    different = {name: value for name, value in fields.items() if getattr(preset, name) != value}
    return BackboneConfig(preset.name, **different)
