"""Conversion of the official implementations' models and of ImageNet backbones.

Models: the detectron2 layout of MaskFormer, its per-pixel baselines and Mask2Former, including the older layout in
which the tensors of the pixel decoder have the prefix ``sem_seg_head.``. Backbones: detectron2's ResNet pickles,
torchvision's ResNets, and the Swin Transformers of their authors.

The models of detectron2 and torchvision have the stride in the 3x3 convolution, as ours do. (The Caffe2 models of
detectron2 have it in the 1x1 convolution. Their names differ, and they are refused.) All take RGB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from maskformer_fast.config import BackboneConfig, ModelConfig
from maskformer_fast.interop.architecture import (
    BATCH_COUNTER,
    check_fit,
    infer_backbone,
    infer_model,
    meta_backbone,
    meta_model,
)
from maskformer_fast.interop.names import ConvertError, Renamed, Rule, to_ours
from maskformer_fast.interop.vit import backbone_rules, complete_vit, infer_vit

EMPTY_WEIGHT = "criterion.empty_weight"
_POSITION_INDEX = "relative_position_index"

# Swin stores constants beside its weights. They follow from the size of the window, and ours are computed.
_SWIN_CONSTANTS = [
    Rule("{path*}.attn.relative_position_index", None),
    Rule("{path*}.attn_mask", None),
]


def _deep_stem(weights: Mapping[str, Tensor], ours: str) -> list[Rule]:
    """Rules for ResNet-101c's stem of three convolutions, which detectron2 numbers as those of a block."""
    for theirs in ("", "backbone."):
        if any(name.startswith((f"{theirs}stem.conv2.", f"{theirs}stem.conv3.")) for name in weights):
            return [Rule(f"{theirs}stem.conv{i}.{{leaf*}}", f"{ours}stem.conv1_{i}.{{leaf*}}") for i in (1, 2, 3)]
    return []


def _early_queries(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rule for Mask2Former's learned queries under the name that early files have."""
    early = "sem_seg_head.predictor.static_query."
    has_it = any(name.startswith(early) for name in weights)
    return [Rule(early + "{leaf}", "predictor.query_feat.{leaf}")] if has_it else []


MODEL_RULES = [
    Rule(EMPTY_WEIGHT, None),  # see `no_object_weight`
    Rule("pixel_mean", None),  # mean and deviation go to the configuration
    Rule("pixel_std", None),
    *_SWIN_CONSTANTS,
    Rule("backbone.{rest*}", "backbone.{rest*}"),
    Rule("sem_seg_head.predictor.{rest*}", "predictor.{rest*}"),
    Rule("sem_seg_head.pixel_decoder.{rest*}", "pixel_decoder.{rest*}"),
    Rule("sem_seg_head.{rest*}", "pixel_decoder.{rest*}"),
]
"""Rules of the official MaskFormer, its baselines and Mask2Former."""

# Fine-tuning starts to count batches from zero.
_CLASSIFIER_AND_COUNTERS = [
    Rule("{path*}." + BATCH_COUNTER, None),
    Rule("fc.{leaf}", None),
    Rule("stem.fc.{leaf}", None),
]

TORCHVISION_RULES = [
    *_CLASSIFIER_AND_COUNTERS,
    Rule("conv1.weight", "stem.conv1.weight"),
    Rule("bn1.{leaf}", "stem.conv1.norm.{leaf}"),
    *(
        Rule(f"layer{stage - 1}.{{block}}.{theirs}", f"res{stage}.{{block}}.{ours}")
        for stage in (2, 3, 4, 5)
        for theirs, ours in (
            ("conv{i}.weight", "conv{i}.weight"),
            ("bn{i}.{leaf}", "conv{i}.norm.{leaf}"),
            ("downsample.0.weight", "shortcut.weight"),
            ("downsample.1.{leaf}", "shortcut.norm.{leaf}"),
        )
    ),
]
"""Rules of torchvision's ResNets."""

SWIN_RULES = [
    *_SWIN_CONSTANTS,
    Rule("norm.{leaf}", None),  # norm and head of the classifier
    Rule("head.{leaf}", None),
]
"""Rules of Swin Transformers as their authors publish them; all other names equal ours."""


def is_model(names: Iterable[str]) -> bool:
    """Whether the names are those of an official model, and not of a backbone alone."""
    return any(name.startswith("sem_seg_head.") for name in names)


def model_to_ours(
    weights: Mapping[str, Tensor], source: object, num_heads: int | None = None
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Convert the weights of an official model -> weights under our names, configuration of the network.

    Constants may be absent (``criterion.empty_weight``, ``relative_position_index``, ``pixel_mean``, ``pixel_std``).
    Where they are present, their values and shapes are checked.

    Args:
        weights: name -> tensor.
        source: path for messages.
        num_heads: heads of the transformer decoder and encoder, which weights do not show; ``None`` is the official 8.

    Raises:
        ConvertError: lists every missing, unknown and misshapen tensor.
    """
    rules = [*_deep_stem(weights, "backbone."), *_early_queries(weights), *MODEL_RULES]
    renamed = to_ours(weights, rules)
    empty_weight = weights.get(EMPTY_WEIGHT)
    pixel = {name: weights[name] for name in ("pixel_mean", "pixel_std") if name in weights}
    wrong = [
        f"{name}: expected three finite numbers, got {tuple(value.shape)}: {value.flatten()[:4].tolist()}"
        for name, value in pixel.items()
        if value.numel() != 3 or not value.isfinite().all()
    ]
    config = infer_model(
        renamed.weights,
        source=source,
        num_heads=num_heads,
        num_classes=None if empty_weight is None else max(empty_weight.numel() - 1, 0),
        pixel_mean=_triple(pixel.get("pixel_mean")),
        pixel_std=_triple(pixel.get("pixel_std")),
    )
    if empty_weight is not None and empty_weight.shape != (config.num_classes + 1,):
        wrong.append(f"shape: {EMPTY_WEIGHT}: expected {(config.num_classes + 1,)}, got {tuple(empty_weight.shape)}")
    renamed = renamed._replace(problems=renamed.problems + wrong + _wrong_positions(weights))
    check_fit(meta_model(config, source), renamed, rules, source)
    return renamed.weights, config


def no_object_weight(weights: Mapping[str, Tensor]) -> float | None:
    """Weight of "no object" in the classification loss, by the criterion's constant, in which other classes have 1."""
    constant = weights.get(EMPTY_WEIGHT)
    if constant is None or constant.ndim != 1 or not constant[:-1].eq(1).all() or not 0 <= constant[-1] < math.inf:
        return None
    return _decimal(constant[-1])


def backbone_to_ours(weights: Mapping[str, Tensor], source: object) -> tuple[dict[str, Tensor], BackboneConfig]:
    """Convert the weights of a backbone -> weights under the names of our backbone, its preset.

    The classifier is dropped. A Swin Transformer of ImageNet lacks the four norms of the features, which are added with
    their initial ones and zeros. BatchNorm is frozen, as in the published recipes; `load_backbone` also loads the
    weights for a trained BatchNorm. Plain ViTs are DINOv2 with registers and DINOv3 of timm and Hugging Face, see
    `interop.vit`.

    Raises:
        ConvertError: an unknown layout, or a list of every missing, unknown and misshapen tensor.
    """
    if (vit_rules := backbone_rules(weights)) is not None:
        return _vit_to_ours(weights, vit_rules, source)
    optional: list[str] = []
    prefix = "backbone." if any(name.startswith("backbone.") for name in weights) else ""
    same_names = Rule(f"{prefix}{{rest*}}", "{rest*}")
    if "conv1.weight" in weights or any(name.startswith("layer1.") for name in weights):
        rules = TORCHVISION_RULES
    elif any(name.startswith((f"{prefix}stem.", f"{prefix}res2.")) for name in weights):
        rules = [*_CLASSIFIER_AND_COUNTERS, *_deep_stem(weights, ""), same_names]
    elif any(name.startswith(f"{prefix}patch_embed.") for name in weights):
        rules = [*SWIN_RULES, same_names]
        optional = [f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")]
    else:
        listed = ", ".join(list(weights)[:5]) or "no tensor"
        raise ConvertError(f"{source}: expected the tensors of an official model (sem_seg_head...), of a ResNet "
                           f"(stem..., layer1...) or of a Swin Transformer (patch_embed...), got {listed}; "
                           "of a Hugging Face model, name the folder and not its file; a prefix such as module. or "
                           "model. is taken off where all names begin with it")
    renamed = to_ours(weights, rules)
    config = infer_backbone(renamed.weights, source=source)
    backbone = meta_backbone(config, source)
    renamed = renamed._replace(problems=renamed.problems + _wrong_positions(weights))
    check_fit(backbone, renamed, rules, source, optional)
    expected = backbone.state_dict()
    for name in optional:
        fill = torch.ones if name.endswith("weight") else torch.zeros
        renamed.weights.setdefault(name, fill(expected[name].shape))
    return renamed.weights, config


def _vit_to_ours(
    weights: Mapping[str, Tensor], rules: list[Rule], source: object
) -> tuple[dict[str, Tensor], BackboneConfig]:
    """Convert the weights of a plain ViT, as `backbone_to_ours`."""
    renamed = to_ours(weights, rules)
    renamed = renamed._replace(weights=complete_vit(renamed.weights))
    needed = ("cls_token", "reg_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    if problems := [f"missing: {name}" for name in needed if f"backbone.{name}" not in renamed.weights]:
        raise ConvertError("\n  ".join([f"{source}: expected a complete ViT:", *renamed.problems, *problems]))
    config = infer_vit(renamed.weights)
    renamed = Renamed(
        {name.removeprefix("backbone."): tensor for name, tensor in renamed.weights.items()},
        {name.removeprefix("backbone."): origin for name, origin in renamed.origin.items()}, renamed.problems,
    )  # fmt: skip
    check_fit(meta_backbone(config, source), renamed, rules, source)
    return renamed.weights, config


def _triple(value: Tensor | None) -> tuple[float, float, float] | None:
    if value is None or value.numel() != 3 or not value.isfinite().all():
        return None
    first, second, third = map(_decimal, value.flatten())
    return first, second, third


def _decimal(value: Tensor) -> float:
    """Shortest decimal number that rounds to this float32, as 0.1."""
    return float(str(np.float32(float(value))))


def _wrong_positions(weights: Mapping[str, Tensor]) -> list[str]:
    """Problems of position indices whose window differs from that of their bias table."""
    problems = []
    for name, index in weights.items():
        if not name.endswith(_POSITION_INDEX):
            continue
        table = weights.get(name.removesuffix(_POSITION_INDEX) + "relative_position_bias_table")
        if table is None or table.ndim != 2:
            continue  # reported by `check_fit`
        window = (round(table.shape[0] ** 0.5) + 1) // 2
        if index.shape != (window**2, window**2):
            problems.append(f"shape: {name}: expected {(window**2, window**2)}, got {tuple(index.shape)}")
    return problems
