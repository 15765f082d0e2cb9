"""Names and configuration of Hugging Face's ``Mask2FormerForUniversalSegmentation``, which has Swin backbones only.

`RULES` has the names that `transformers` 4 and 5 save. Hugging Face counts the learned queries' own predictions as a
decoder layer: its 10 are our 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.config import (
    BackboneConfig,
    Config,
    DecoderConfig,
    LossConfig,
    ModelConfig,
    PixelDecoderConfig,
    TestConfig,
)
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.interop.huggingface_config import (
    NORM_GROUPS,
    STAGES,
    SWIN_FIXED,
    Section,
    read_backbone,
    read_pixels,
    read_test,
)
from maskformer_fast.interop.names import ConvertError, Rule
from maskformer_fast.modeling.backbone import is_swin, resolve_backbone

MODEL_TYPE = "mask2former"
"""Value of ``model_type`` in ``config.json``."""
FIXED = {
    "activation_function": "relu", "pre_norm": False, "enforce_input_projection": False, "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
}  # fmt: skip
"""Keys with the only value that is implemented here."""

_ENCODER = "model.pixel_level_module.encoder"
_DECODER = "model.pixel_level_module.decoder"
_BLOCK = f"{_ENCODER}.encoder.layers.{{i}}.blocks.{{j}}"
_OUR_BLOCK = "backbone.layers.{i}.blocks.{j}"
_PIXEL_LAYER = f"{_DECODER}.encoder.layers.{{i}}"
_OUR_PIXEL_LAYER = "pixel_decoder.transformer.encoder.layers.{i}"
_LAYER = "model.transformer_module.decoder.layers.{i}"
_CRITERION = "criterion.empty_weight"
_FINAL_NORM = f"{_ENCODER}.swin.layernorm"

_SWIN = [
    Rule(f"{_ENCODER}.embeddings.patch_embeddings.projection.{{leaf}}", "backbone.patch_embed.proj.{leaf}"),
    Rule(f"{_ENCODER}.embeddings.norm.{{leaf}}", "backbone.patch_embed.norm.{leaf}"),
    *(
        Rule(f"{_ENCODER}.hidden_states_norms.{stage}.{{leaf}}", f"backbone.norm{index}.{{leaf}}")
        for index, stage in enumerate(STAGES)
    ),
    Rule(f"{_ENCODER}.encoder.layers.{{i}}.downsample.{{rest*}}", "backbone.layers.{i}.downsample.{rest*}"),
    *(
        Rule(f"{_BLOCK}.attention.self.{name}.{{leaf}}", f"{_OUR_BLOCK}.attn.qkv.{{leaf}}", part=(index, 3))
        for index, name in enumerate(("query", "key", "value"))
    ),
    Rule(f"{_BLOCK}.attention.self.relative_position_bias_table", f"{_OUR_BLOCK}.attn.relative_position_bias_table"),
    *(
        Rule(f"{_BLOCK}.{theirs}.{{leaf}}", f"{_OUR_BLOCK}.{ours}.{{leaf}}")
        for theirs, ours in (
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
        )
    ),
    Rule(f"{_BLOCK}.attention.self.relative_position_index", None),  # follows from the size of the window
    Rule(f"{_FINAL_NORM}.{{leaf}}", None),  # for a pooled output; the features of each stage have their own norm
]
_PIXEL_DECODER = [
    Rule(f"{_DECODER}.level_embed", "pixel_decoder.transformer.level_embed"),
    Rule(f"{_DECODER}.input_projections.{{i}}.{{j}}.{{leaf}}", "pixel_decoder.input_proj.{i}.{j}.{leaf}"),
    *(
        Rule(f"{_DECODER}.{name}.{a}", f"pixel_decoder.{name}.{b}")
        for name in ("adapter_1", "layer_1")
        for a, b in (("0.weight", "weight"), ("1.{leaf}", "norm.{leaf}"))
    ),
    Rule(f"{_DECODER}.mask_projection.{{leaf}}", "pixel_decoder.mask_features.{leaf}"),
    *(
        Rule(f"{_PIXEL_LAYER}.{theirs}.{{leaf}}", f"{_OUR_PIXEL_LAYER}.{ours}.{{leaf}}")
        for theirs, ours in (
            ("self_attn_layer_norm", "norm1"), ("final_layer_norm", "norm2"), ("fc1", "linear1"), ("fc2", "linear2"),
        )
    ),
    Rule(f"{_PIXEL_LAYER}.self_attn.{{name}}.{{leaf}}", f"{_OUR_PIXEL_LAYER}.self_attn.{{name}}.{{leaf}}"),
]  # fmt: skip
_HEAD = [
    Rule("model.transformer_module.queries_embedder.{leaf}", "predictor.query_embed.{leaf}"),
    Rule("model.transformer_module.queries_features.{leaf}", "predictor.query_feat.{leaf}"),
    Rule("model.transformer_module.level_embed.{leaf}", "predictor.level_embed.{leaf}"),
    Rule("model.transformer_module.input_projections.{i}.{leaf}", "predictor.input_proj.{i}.{leaf}"),
    *(
        Rule(
            f"{_LAYER}.self_attn.{part}_proj.{{leaf}}",
            "predictor.transformer_self_attention_layers.{i}.self_attn.in_proj_{leaf}",
            part=(index, 3),
        )
        for index, part in enumerate("qkv")
    ),
    *(
        Rule(f"{_LAYER}.{theirs}.{{leaf}}", f"predictor.transformer_{ours}.{{leaf}}")
        for theirs, ours in (
            ("self_attn.out_proj", "self_attention_layers.{i}.self_attn.out_proj"),
            ("self_attn_layer_norm", "self_attention_layers.{i}.norm"),
            ("cross_attn.out_proj", "cross_attention_layers.{i}.multihead_attn.out_proj"),
            ("cross_attn", "cross_attention_layers.{i}.multihead_attn"),
            ("cross_attn_layer_norm", "cross_attention_layers.{i}.norm"),
            ("fc1", "ffn_layers.{i}.linear1"),
            ("fc2", "ffn_layers.{i}.linear2"),
            ("final_layer_norm", "ffn_layers.{i}.norm"),
        )
    ),
    Rule("model.transformer_module.decoder.layernorm.{leaf}", "predictor.decoder_norm.{leaf}"),
    Rule("class_predictor.{leaf}", "predictor.class_embed.{leaf}"),
    Rule(
        "model.transformer_module.decoder.mask_predictor.mask_embedder.{i}.0.{leaf}",
        "predictor.mask_embed.layers.{i}.{leaf}",
    ),
    Rule(_CRITERION, None),  # follows from the configuration's no_object_weight
]
RULES = [*_SWIN, *_PIXEL_DECODER, *_HEAD]


def read_mask2former(config: Section, processor: Section | None, num_classes: int) -> Config:
    """Configuration of the network, of the loss, and of inference; arguments and errors as of `read_config`."""
    backbone, problems = read_backbone(config.section("backbone_config", {"model_type": "missing"}))
    problems += config.departures(FIXED)
    if problems:
        raise ConvertError("expected a Mask2Former that this network can compute\n  " + "\n  ".join(problems))
    heads, dropout = config.get("num_attention_heads", 8), config.get("dropout", 0.0)
    model = ModelConfig(
        type="mask2former",
        num_classes=num_classes,
        backbone=backbone,
        pixel_decoder=PixelDecoderConfig(
            conv_dim=config.get("feature_size", 256), mask_dim=config.get("mask_feature_size", 256),
            norm_groups=NORM_GROUPS, encoder_layers=config.get("encoder_layers", 6), encoder_heads=heads,
            encoder_ffn_dim=config.get("encoder_feedforward_dim", 1024), encoder_dropout=dropout,
        ),
        decoder=DecoderConfig(
            layers=config.get("decoder_layers", 10) - 1, hidden_dim=config.get("hidden_dim", 256), num_heads=heads,
            ffn_dim=config.get("dim_feedforward", 2048), dropout=dropout, num_queries=config.get("num_queries", 100),
        ),
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
    return Config(model=read_pixels(processor, model), loss=loss, test=test)


def write_mask2former(config: Config, metadata: Metadata) -> dict[str, Any]:
    """Contents of ``config.json``.

    Raises:
        ConvertError: Hugging Face's Mask2Former cannot express the network; every reason is listed.
    """
    model, loss = config.model, config.loss
    backbone = resolve_backbone(model.backbone)
    pixel, decoder = model.pixel_decoder, model.decoder
    _check_expressible(model, backbone, metadata)
    names = dict(enumerate(metadata.class_names))
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": MODEL_TYPE,
        "torch_dtype": "float32",
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": backbone.embed_dim, "depths": backbone.depths, "num_heads": backbone.num_heads,
            "window_size": backbone.window_size, "drop_path_rate": backbone.drop_path_rate,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            **SWIN_FIXED, "out_features": STAGES,
        },
        "feature_size": pixel.conv_dim, "mask_feature_size": pixel.mask_dim, "encoder_layers": pixel.encoder_layers,
        "encoder_feedforward_dim": pixel.encoder_ffn_dim,
        "hidden_dim": decoder.hidden_dim, "decoder_layers": decoder.layers + 1, "dim_feedforward": decoder.ffn_dim,
        "num_attention_heads": decoder.num_heads, "num_queries": decoder.num_queries, "dropout": decoder.dropout,
        **FIXED,
        "class_weight": loss.class_weight, "mask_weight": loss.mask_weight, "dice_weight": loss.dice_weight,
        "no_object_weight": loss.no_object_weight, "train_num_points": loss.points or 12544,
        "oversample_ratio": loss.oversample, "importance_sample_ratio": loss.importance, "use_auxiliary_loss": True,
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
    }  # fmt: skip


def mask2former_constants(theirs: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of their network that ours does not have, so that none is reported as missing."""
    class_weights = torch.ones(theirs["class_predictor.bias"].shape)
    class_weights[-1] = config.loss.no_object_weight
    channels = theirs[f"{_ENCODER}.hidden_states_norms.stage4.weight"].shape
    return {
        _CRITERION: class_weights,
        f"{_FINAL_NORM}.weight": torch.ones(channels),
        f"{_FINAL_NORM}.bias": torch.zeros(channels),
    }


def _check_expressible(model: ModelConfig, backbone: BackboneConfig, metadata: Metadata) -> None:
    pixel, decoder = model.pixel_decoder, model.decoder
    requirements = (
        (is_swin(backbone), "backbone.name", "a Swin Transformer", backbone.name),
        (pixel.norm_groups == NORM_GROUPS, "pixel_decoder.norm_groups", NORM_GROUPS, pixel.norm_groups),
        (pixel.encoder_heads == decoder.num_heads, "pixel_decoder.encoder_heads",
         f"decoder.num_heads={decoder.num_heads}", pixel.encoder_heads),
        (pixel.encoder_dropout == decoder.dropout, "pixel_decoder.encoder_dropout",
         f"decoder.dropout={decoder.dropout}", pixel.encoder_dropout),
        (model.num_classes == metadata.num_classes, "num_classes", f"the {metadata.num_classes} of the metadata",
         model.num_classes),
    )  # fmt: skip
    problems = [f"model.{name}: expected {want}, got {got!r}" for fits, name, want, got in requirements if not fits]
    if problems:
        raise ConvertError("expected a network that Hugging Face's Mask2Former has a form for\n  "
                           + "\n  ".join(problems))  # fmt: skip
