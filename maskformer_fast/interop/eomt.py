"""Names and configuration of EoMT: official checkpoints, and Hugging Face's ``Eomt`` and ``EomtDinov3`` folders.

Official checkpoints of DINOv3 may be differences to DINOv3's gated weights, which `add_base` adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, LossConfig, ModelConfig, TestConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.interop.architecture import check_fit, meta_model
from maskformer_fast.interop.huggingface_config import Section, read_pixels, read_test
from maskformer_fast.interop.names import ConvertError, Renamed, Rule, to_ours
from maskformer_fast.interop.vit import (
    HEAD_DIM,
    POSITIONS,
    attention_rules,
    dinov3_rules,
    infer_vit,
    is_gated,
    layer_rules,
)
from maskformer_fast.modeling.backbone import resolve_backbone
from maskformer_fast.modeling.weights import CheckpointError, check_depth

MODEL_TYPES = ("eomt", "eomt_dinov3")
"""Values of ``model_type`` in ``config.json``: learned and rotary positions."""
PROBABILITY = "predictor.mask_probability"
THEIR_POSITIONS = "embeddings.position_embeddings.weight"
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_HIDDEN = {"hidden_act": "gelu", "num_channels": 3, "hidden_dropout_prob": 0.0, "attention_dropout": 0.0,
           "drop_path_rate": 0.0}  # fmt: skip
_DINOV3_FIXED = {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True,
                 "pos_embed_shift": None, "pos_embed_jitter": None, "use_gated_mlp": False}  # fmt: skip
"""Keys with the only value that is implemented. Hugging Face's gated MLP has one activation for gate and heads, which
no published network has."""
_ENCODER = "encoder.backbone."
_SIDE = 640


def _official_head() -> list[Rule]:
    return [
        Rule("attn_mask_probs", PROBABILITY),
        Rule("q.weight", "predictor.query_embed.weight"),
        Rule("class_head.{leaf}", "predictor.class_embed.{leaf}"),
        *(Rule(f"mask_head.{2 * i}.{{leaf}}", f"predictor.mask_embed.layers.{i}.{{leaf}}") for i in range(3)),
        Rule("upscale.{rest*}", "pixel_decoder.upscale.{rest*}"),
        Rule("encoder.pixel_mean", None),
        Rule("encoder.pixel_std", None),
        Rule("criterion.empty_weight", None),
    ]


def official_rules(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rules of an official checkpoint, whose names may begin with ``network.``."""
    if any(".patch_embed.patch_embeddings." in name for name in weights):
        encoder = [
            *dinov3_rules(f"{_ENCODER}patch_embed.", f"{_ENCODER}blocks.{{i}}", is_gated(weights)),
            Rule(f"{_ENCODER}norm.{{leaf}}", "backbone.norm.{leaf}"),
            Rule(f"{_ENCODER}rope_embeddings.{{rest*}}", None),
        ]
    else:
        encoder = [Rule(f"{_ENCODER}{{rest*}}", "backbone.{rest*}")]
    rules = [*_official_head(), *encoder]
    if not any(name.startswith("network.") for name in weights):
        return rules
    return [
        rule if rule.theirs.startswith("criterion.") else Rule(f"network.{rule.theirs}", rule.ours, rule.part)
        for rule in rules
    ]


def is_official(names: Iterable[str]) -> bool:
    """Whether the names are those of an official EoMT."""
    return any(name.removeprefix("network.").startswith(_ENCODER) for name in names)


def official_to_ours(
    weights: Mapping[str, Tensor],
    source: object,
    num_heads: int | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Convert an official checkpoint -> weights under our names, configuration of the network.

    Args:
        weights: name -> tensor; ``criterion.empty_weight``, mean and deviation of pixels may be absent.
        source: path for messages.
        num_heads: attention heads, which weights do not show; ``None`` takes 64 channels a head.
        base: weights of a backbone under our names, to which those of the file are differences.

    Raises:
        ConvertError: lists every missing, unknown and misshapen tensor; or channels are no multiple of 64 and the
            number of heads is not given.
    """
    rules = official_rules(weights)
    renamed = to_ours(weights, rules)
    needed = ("backbone.cls_token", "backbone.reg_token", "backbone.patch_embed.proj.weight", PROBABILITY,
              "backbone.blocks.0.mlp.fc1.weight", "backbone.blocks.0.mlp.fc2.weight", "predictor.class_embed.bias",
              "predictor.query_embed.weight")  # fmt: skip
    problems = [f"missing: {_theirs(rules, name)}" for name in needed if name not in renamed.weights]
    if problems:
        raise ConvertError("\n  ".join([f"{source}: expected a complete EoMT:", *renamed.problems, *problems]))
    if base is not None:
        renamed = renamed._replace(weights=add_base(renamed.weights, base, source))
    shapes = renamed.weights
    dim = shapes["backbone.cls_token"].shape[-1]
    if num_heads is None and dim % HEAD_DIM:
        raise ConvertError(f"{source}: backbone.heads: expected their number, as {dim} channels are not a multiple of "
                           f"the published {HEAD_DIM} a head (see --num-heads)")
    backbone = infer_vit({n: t for n, t in shapes.items() if n.startswith("backbone.")}, num_heads)
    try:
        config = ModelConfig(
            type="eomt", num_classes=max(shapes["predictor.class_embed.bias"].shape[0] - 1, 0), backbone=backbone,
            decoder=DecoderConfig(
                layers=shapes[PROBABILITY].shape[0], num_queries=shapes["predictor.query_embed.weight"].shape[0]
            ),
            size_divisibility=resolve_backbone(backbone).patch_size or 0, padding="black",
        )  # fmt: skip
        network = meta_model(config, source)
    except ConvertError:
        raise
    except ValueError as error:
        raise ConvertError(f"{source}: {error} (see --num-heads)") from error
    check_fit(network, renamed, rules, source)
    return renamed.weights, config


def add_base(weights: Mapping[str, Tensor], base: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Add a backbone's weights to differences -> the sum; other tensors are complete and stay as they are.

    Raises:
        ConvertError: tensors of the backbone that the other does not have, or of other shapes.
    """
    names = [name for name in weights if name.startswith("backbone.")]
    problems = [
        f"{name}: expected {tuple(weights[name].shape)}, got {tuple(base[name].shape) if name in base else 'nothing'}"
        for name in names
        if name not in base or base[name].shape != weights[name].shape
    ]
    if problems:
        raise ConvertError("\n  ".join([f"{source}: the weights of --base do not fit the differences:", *problems]))
    return {name: weights[name] + base[name] if name in base else weights[name] for name in weights}


def huggingface_rules(dinov3: bool, gated: bool) -> list[Rule]:
    """Rules of a Hugging Face folder."""
    layer = "layers.{i}"
    if dinov3:
        encoder = dinov3_rules("embeddings.", layer, gated)
    else:
        names = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj")
        encoder = [
            Rule("embeddings.cls_token", "backbone.cls_token"),
            Rule("embeddings.register_tokens", "backbone.reg_token"),
            Rule(THEIR_POSITIONS, POSITIONS),
            Rule("embeddings.patch_embeddings.projection.{leaf}", "backbone.patch_embed.proj.{leaf}"),
            *attention_rules(layer, names, rotary=False),
            *layer_rules(layer, gated, projections=False),
        ]
    return [
        *encoder,
        Rule("layernorm.{leaf}", "backbone.norm.{leaf}"),
        Rule("query.{leaf}", "predictor.query_embed.{leaf}"),
        Rule("class_predictor.{leaf}", "predictor.class_embed.{leaf}"),
        *(Rule(f"mask_head.fc{i + 1}.{{leaf}}", f"predictor.mask_embed.layers.{i}.{{leaf}}") for i in range(3)),
        Rule("upscale_block.block.{i}.layernorm2d.{leaf}", "pixel_decoder.upscale.{i}.norm.{leaf}"),
        Rule("upscale_block.block.{i}.{name}.{leaf}", "pixel_decoder.upscale.{i}.{name}.{leaf}"),
        Rule("attn_mask_probs", PROBABILITY),
        Rule("criterion.empty_weight", None),
    ]


def eomt_to_ours(theirs: Mapping[str, Tensor], config: Config, source: object) -> dict[str, Tensor]:
    """Convert the weights of a folder -> weights under our names, exactly those of the network of ``config.model``.

    Raises:
        ConvertError: lists every missing, unknown and misshapen tensor.
    """
    rules = huggingface_rules(_is_rotary(config.model), is_gated(theirs))
    try:
        check_depth(config.model, len(theirs), source)
        network = meta_model(config.model, source)
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    positions = theirs.get(THEIR_POSITIONS)
    if positions is not None:
        theirs = {**theirs, THEIR_POSITIONS: positions[None]}
    if "attn_mask_probs" not in theirs:  # of folders written before it was saved
        theirs = {**theirs, "attn_mask_probs": torch.zeros(config.model.decoder.layers)}
    renamed: Renamed = to_ours(theirs, rules)
    check_fit(network, renamed, rules, source)
    return renamed.weights


def eomt_from_ours(renamed: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Complete tensors under their names with what the format has in another shape or besides."""
    renamed = dict(renamed)
    if THEIR_POSITIONS in renamed:
        renamed[THEIR_POSITIONS] = renamed[THEIR_POSITIONS][0].clone()
    class_weights = torch.ones(renamed["class_predictor.bias"].shape)
    class_weights[-1] = config.loss.no_object_weight
    return {**renamed, "criterion.empty_weight": class_weights}


def rules_of(model: ModelConfig) -> list[Rule]:
    """Rules by which our network is written to a folder."""
    return huggingface_rules(_is_rotary(model), bool(resolve_backbone(model.backbone).gated_mlp))


def read_eomt(config: Section, processor: Section | None, num_classes: int) -> Config:
    """Configuration of the network, of the loss, and of inference; arguments and errors as of `read_config`."""
    dinov3 = config.get("model_type", "") == MODEL_TYPES[1]
    fixed = _HIDDEN | (_DINOV3_FIXED if dinov3 else {})
    problems = config.departures(fixed)
    patch, side = config.get("patch_size", 16), config.get("image_size", _SIDE)
    doublings = config.get("num_upscale_blocks", 2)
    if 4 << doublings != patch:
        problems.append(f"{config.where}: num_upscale_blocks: expected masks at stride 4 of patch_size={patch}, "
                        f"got {doublings}")  # fmt: skip
    dim = config.get("hidden_size", 1024)
    if dinov3:
        theta = config.section("rope_parameters", {}).get("rope_theta", config.get("rope_theta", 100.0))
        if theta != 100.0:
            problems.append(f"{config.where}: rope_theta: expected 100.0, got {theta}")
        hidden, gated = config.get("intermediate_size", 4096), False
    else:
        hidden, gated = dim * config.get("mlp_ratio", 4), config.get("use_swiglu_ffn", False)
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
    if problems:
        raise ConvertError("expected an EoMT that this network can compute\n  " + "\n  ".join(problems))
    size = side if 0 < side <= 4096 else _SIDE
    presets = {384: "small", 768: "base", 1024: "large"} | ({} if dinov3 else {1536: "giant"})
    preset = f"vit_{presets.get(dim, 'small')}_{'dinov3' if dinov3 else 'dinov2'}"
    fields: dict[str, Any] = {
        "embed_dim": dim, "blocks": config.get("num_hidden_layers", 24), "heads": config.get("num_attention_heads", 16),
        "mlp_dim": hidden, "gated_mlp": gated, "registers": config.get("num_register_tokens", 4), "patch_size": patch,
        "image_size": (size, size), "norm_eps": config.get("layer_norm_eps", 1e-6),
    }  # fmt: skip
    resolved = resolve_backbone(BackboneConfig(preset))
    backbone = BackboneConfig(preset, **{n: v for n, v in fields.items() if getattr(resolved, n) != v})
    model = ModelConfig(
        type="eomt", num_classes=num_classes, backbone=backbone, padding="black", size_divisibility=patch,
        decoder=DecoderConfig(layers=config.get("num_blocks", 4), num_queries=config.get("num_queries", 200)),
    )  # fmt: skip
    loss = LossConfig(
        class_weight=config.get("class_weight", 2.0), mask_weight=config.get("mask_weight", 5.0),
        dice_weight=config.get("dice_weight", 5.0), no_object_weight=config.get("no_object_weight", 0.1),
        mask_loss="bce", points=config.get("train_num_points", 12544),
        oversample=config.get("oversample_ratio", 3.0), importance=config.get("importance_sample_ratio", 0.75),
    )  # fmt: skip
    if processor is None:
        return Config(model=model, loss=loss, test=TestConfig(panoptic_rule="mask2former"))
    test = replace(read_test(processor), panoptic_rule="mask2former")
    splits = processor.get("do_split_image", False)
    model = replace(read_pixels(processor, model), size_divisibility=patch if splits else max(size, patch))
    return Config(model=model, loss=loss, test=test)


def write_eomt(config: Config, metadata: Metadata) -> dict[str, Any]:
    """Contents of ``config.json``.

    Raises:
        ConvertError: Hugging Face's EoMT cannot express the network; every reason is listed.
    """
    model, loss = config.model, config.loss
    vit = resolve_backbone(model.backbone)
    rotary, dim, side = _is_rotary(model), vit.embed_dim or 0, (vit.image_size or (0, 0))[0]
    hidden = vit.mlp_dim or 0
    ratios = [r for r in range(1, 17) if hidden == ((int(dim * r * 2 / 3) + 7) // 8 * 8 if vit.gated_mlp else dim * r)]
    requirements = (
        (vit.image_size == (side, side), "backbone.image_size", "a square", vit.image_size),
        (bool(ratios) or rotary, "backbone.mlp_dim", f"a multiple of embed_dim={dim}", hidden),
        (not (rotary and vit.gated_mlp), "backbone.gated_mlp", "False with rotary positions", vit.gated_mlp),
        (model.num_classes == metadata.num_classes, "num_classes", f"the {metadata.num_classes} of the metadata",
         model.num_classes),
    )  # fmt: skip
    problems = [f"model.{name}: expected {want}, got {got!r}" for fits, name, want, got in requirements if not fits]
    if problems:
        raise ConvertError("expected a network that Hugging Face's EoMT has a form for\n  " + "\n  ".join(problems))
    names = dict(enumerate(metadata.class_names))
    encoder: dict[str, Any] = {"mlp_ratio": (ratios or [4])[0], "use_swiglu_ffn": vit.gated_mlp}
    if rotary:
        encoder = {"intermediate_size": hidden, **_DINOV3_FIXED,
                   "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
                   "pos_embed_rescale": 2.0}  # fmt: skip
    return {
        "architectures": [f"Eomt{'Dinov3' if rotary else ''}ForUniversalSegmentation"],
        "model_type": MODEL_TYPES[rotary],
        "torch_dtype": "float32",
        "hidden_size": dim, "num_hidden_layers": vit.blocks, "num_attention_heads": vit.heads,
        "patch_size": vit.patch_size, "image_size": side, "num_register_tokens": vit.registers,
        "layer_norm_eps": vit.norm_eps, **_HIDDEN, **encoder,
        "num_blocks": model.decoder.layers, "num_queries": model.decoder.num_queries,
        "num_upscale_blocks": ((vit.patch_size or 4) // 4).bit_length() - 1,
        "class_weight": loss.class_weight, "mask_weight": loss.mask_weight, "dice_weight": loss.dice_weight,
        "no_object_weight": loss.no_object_weight, "train_num_points": loss.points or 12544,
        "oversample_ratio": loss.oversample, "importance_sample_ratio": loss.importance,
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
    }  # fmt: skip


def _is_rotary(model: ModelConfig) -> bool:
    return resolve_backbone(model.backbone).positions == "rotary"


def _theirs(rules: Iterable[Rule], ours: str) -> str:
    return next((name for rule in rules if (name := rule.their_name(ours))), ours)
