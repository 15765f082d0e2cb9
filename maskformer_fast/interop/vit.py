"""Names of plain ViTs: timm's and Hugging Face's DINOv2 with registers and DINOv3, and inference of their sizes.

The tables end in names below ``backbone.``, as in our EoMT. timm's DINOv2 has our names. DINOv2 was trained with
patches of 14 pixels; EoMT starts from its weights resized to 16 (FlexiViT, Beyer et al., CVPR 2023, section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import BackboneConfig
from maskformer_fast.interop.names import Rule
from maskformer_fast.modeling.backbone import BACKBONES, is_vit

HEAD_DIM = 64
"""Channels of an attention head in all published ViTs."""
PATCH = 16
"""Side of the patches that EoMT takes, to which those of DINOv2 are resized."""
POSITIONS = "backbone.pos_embed"
_BLOCK = "backbone.blocks.{i}"
_PUBLISHED = tuple(name for name, preset in BACKBONES.items() if is_vit(preset) and name != "vit_micro")


def layer_rules(layer: str, gated: bool, projections: bool) -> list[Rule]:
    """Rules of Hugging Face's blocks, whose names begin with ``layer`` (with ``{i}``).

    An MLP has ``up_proj`` and ``down_proj`` with ``projections`` or a gate, otherwise ``fc1`` and ``fc2``.
    Earlier versions of gated DINOv2 have other names.
    """
    if gated:
        mlp = [
            Rule(f"{layer}.mlp.{name}_proj.{{leaf}}", f"{_BLOCK}.mlp.fc1.{{leaf}}", part=(index, 2))
            for index, name in enumerate(("gate", "up"))
        ]
    else:
        mlp = [Rule(f"{layer}.mlp.{'up_proj' if projections else 'fc1'}.{{leaf}}", f"{_BLOCK}.mlp.fc1.{{leaf}}")]
    down = "down_proj" if projections or gated else "fc2"
    return [
        *(Rule(f"{layer}.{name}.{{leaf}}", f"{_BLOCK}.{name}.{{leaf}}") for name in ("norm1", "norm2")),
        *(Rule(f"{layer}.layer_scale{i}.lambda1", f"{_BLOCK}.ls{i}.gamma") for i in (1, 2)),
        *mlp,
        Rule(f"{layer}.mlp.{down}.{{leaf}}", f"{_BLOCK}.mlp.fc2.{{leaf}}"),
        Rule(f"{layer}.mlp.weights_in.{{leaf}}", f"{_BLOCK}.mlp.fc1.{{leaf}}"),
        Rule(f"{layer}.mlp.weights_out.{{leaf}}", f"{_BLOCK}.mlp.fc2.{{leaf}}"),
    ]


def attention_rules(layer: str, names: tuple[str, str, str, str], rotary: bool) -> list[Rule]:
    """Rules of separate projections with the given names of query, key, value and output."""
    packed = [
        Rule(f"{layer}.{name}.weight", f"{_BLOCK}.attn.qkv.weight", part=(index, 3))
        for index, name in enumerate(names[:3])
    ]
    if rotary:
        biases = [
            Rule(f"{layer}.{names[theirs]}.bias", f"{_BLOCK}.attn.qv_bias", part=(index, 2))
            for index, theirs in enumerate((0, 2))
        ]
    else:
        biases = [
            Rule(f"{layer}.{name}.bias", f"{_BLOCK}.attn.qkv.bias", part=(index, 3))
            for index, name in enumerate(names[:3])
        ]
    return [*packed, *biases, Rule(f"{layer}.{names[3]}.{{leaf}}", f"{_BLOCK}.attn.proj.{{leaf}}")]


def is_gated(weights: Mapping[str, Tensor]) -> bool:
    """Whether Hugging Face's names have a gate."""
    return any(".gate_proj." in name for name in weights)


def dinov3_rules(prefix: str, layer: str, gated: bool) -> list[Rule]:
    """Rules of Hugging Face's DINOv3, which the official EoMT uses; ``prefix`` stands before its embeddings."""
    return [
        Rule(f"{prefix}cls_token", "backbone.cls_token"),
        Rule(f"{prefix}register_tokens", "backbone.reg_token"),
        Rule(f"{prefix}mask_token", None),  # of pretraining
        Rule(f"{prefix}patch_embeddings.{{leaf}}", "backbone.patch_embed.proj.{leaf}"),
        *attention_rules(
            layer, ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"), rotary=True
        ),
        *layer_rules(layer, gated, projections=True),
    ]


def backbone_rules(weights: Mapping[str, Tensor]) -> list[Rule] | None:
    """Rules of a ViT's own weights; ``None`` for other networks."""
    names = weights.keys()
    if "embeddings.register_tokens" in names and "embeddings.position_embeddings" in names:
        layer = "encoder.layer.{i}"
        inner = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
        return [
            Rule("embeddings.cls_token", "backbone.cls_token"),
            Rule("embeddings.register_tokens", "backbone.reg_token"),
            Rule("embeddings.mask_token", None),
            Rule("embeddings.position_embeddings", POSITIONS),
            Rule("embeddings.patch_embeddings.projection.{leaf}", "backbone.patch_embed.proj.{leaf}"),
            *attention_rules(layer, (inner[0], inner[1], inner[2], "attention.output.dense"), rotary=False),
            *layer_rules(layer, is_gated(weights), projections=False),
            Rule("layernorm.{leaf}", "backbone.norm.{leaf}"),
        ]
    if "embeddings.register_tokens" in names:
        gated = is_gated(weights)
        layers = ("layer.{i}", "model.layer.{i}")
        return [
            *(rule for layer in layers for rule in dinov3_rules("embeddings.", layer, gated)),
            Rule("norm.{leaf}", "backbone.norm.{leaf}"),
        ]
    if "reg_token" in names:
        block = "blocks.{i}"
        return [
            Rule(f"{block}.attn.q_bias", f"{_BLOCK}.attn.qv_bias", part=(0, 2)),
            Rule(f"{block}.attn.v_bias", f"{_BLOCK}.attn.qv_bias", part=(1, 2)),
            Rule(f"{block}.attn.k_bias", None),
            *(Rule(f"{block}.gamma_{i}", f"{_BLOCK}.ls{i}.gamma") for i in (1, 2)),
            *(Rule(f"{block}.mlp.fc1_{name}.{{leaf}}", f"{_BLOCK}.mlp.fc1.{{leaf}}", part=(index, 2))
              for index, name in enumerate("gx")),
            Rule("rope.{rest*}", None),
            Rule("{rest*}", "backbone.{rest*}"),
        ]
    return None


def complete_vit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ViT under our names as EoMT takes them.

    The position of the class token is added to it, patches are resized to `PATCH`, and absent biases of queries and
    values are zero.
    """
    weights = dict(weights)
    positions, patches = weights.get(POSITIONS), weights.get("backbone.patch_embed.proj.weight")
    if positions is not None and positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1] - 1:
        weights["backbone.cls_token"] = weights["backbone.cls_token"] + positions[:, :1]
        weights[POSITIONS] = positions[:, 1:]
    if patches is not None and patches.ndim == 4 and patches.shape[2] not in (8, PATCH, 32):
        weights["backbone.patch_embed.proj.weight"] = resize_patches(patches, PATCH)
    if positions is None:
        for name, tensor in list(weights.items()):
            if name.endswith(".attn.qkv.weight"):
                bias = name.removesuffix("qkv.weight") + "qv_bias"
                weights.setdefault(bias, tensor.new_zeros(2 * tensor.shape[1]))
    return weights


def resize_patches(
    weight: Tensor,  # [C, 3, p, p]
    size: int,
) -> Tensor:
    """Weights of a patch embedding for patches of another side -> [C, 3, size, size].

    Of all weights they give the nearest embeddings of resized patches: the pseudoinverse of the resizing.
    """
    old = weight.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    resizing = F.interpolate(basis, (size, size), mode="bicubic", antialias=True, align_corners=False).flatten(1)
    return (weight.double().flatten(2) @ torch.linalg.pinv(resizing).T).unflatten(2, (size, size)).to(weight.dtype)


def infer_vit(weights: Mapping[str, Tensor], num_heads: int | None = None) -> BackboneConfig:
    """Infer a ViT from its weights under our names, with ``backbone.``: the nearest preset, and what differs from it.

    Heads have `HEAD_DIM` channels unless their number is given. Positions are taken to be those of a square image;
    rotary ones have no size.
    """
    shapes = {name.removeprefix("backbone."): tuple(tensor.shape) for name, tensor in weights.items()}
    dim = shapes["cls_token"][-1]
    hidden, patch = shapes["blocks.0.mlp.fc2.weight"][1], shapes["patch_embed.proj.weight"][-1]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.") and name.endswith(".norm1.weight")}
    learned = "pos_embed" in shapes
    side = math.isqrt(shapes["pos_embed"][1]) * patch if learned else 640
    fields: dict[str, Any] = {
        "embed_dim": dim, "blocks": len(blocks), "heads": num_heads or max(dim // HEAD_DIM, 1), "mlp_dim": hidden,
        "gated_mlp": shapes["blocks.0.mlp.fc1.weight"][0] == 2 * hidden, "registers": shapes["reg_token"][1],
        "patch_size": patch, "positions": "learned" if learned else "rotary", "image_size": (side, side),
    }  # fmt: skip
    candidates = [BACKBONES[name] for name in _PUBLISHED if BACKBONES[name].positions == fields["positions"]]
    preset = max(candidates, key=lambda one: sum(getattr(one, name) == value for name, value in fields.items()))
    different = {name: value for name, value in fields.items() if getattr(preset, name) != value}
    return BackboneConfig(preset.name, **different)
