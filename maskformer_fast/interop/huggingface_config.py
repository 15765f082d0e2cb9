"""Conversion between Hugging Face's ``config.json`` and ``preprocessor_config.json`` and our configuration.

Absent keys have the defaults of their classes, which `transformers` leaves out when it saves. A value that means
another computation than ours is an error. The exception is dropout, which matters in training alone: Hugging Face
applies ``dropout`` to residuals and has other rates for attention and FFN; only the first is read. Hugging Face
stretches images to multiples of ``size_divisor``, ours are padded to them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

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
from maskformer_fast.data.datasets.class_list import read_preset_classes
from maskformer_fast.data.datasets.presets import PRESETS
from maskformer_fast.interop.architecture import nearest_preset
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.modeling.backbone import is_swin, resolve_backbone

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=bool | float | str | tuple[float, ...])

STAGES = ["stage1", "stage2", "stage3", "stage4"]
NORM_GROUPS = 32
BOTTLENECK = 4
"""Ratio of the widths of a bottleneck's output and of the bottleneck."""
_BILINEAR = 2  # of Pillow's filters
_LIMIT = 2**24
"""Limit of numbers in a configuration; real ones are smaller."""

# Keys with the only value that is implemented here, which is their default. Other values mean other computations.
SWIN_FIXED = {
    "num_channels": 3, "patch_size": 4, "mlp_ratio": 4.0, "qkv_bias": True, "hidden_act": "gelu",
    "use_absolute_embeddings": False, "layer_norm_eps": 1e-5,
}  # fmt: skip
RESNET_FIXED = {
    "num_channels": 3, "layer_type": "bottleneck", "hidden_act": "relu", "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}  # fmt: skip
DETR_FIXED = {"activation_function": "relu", "auxiliary_loss": False}
PROCESSOR_FIXED = {"do_normalize": True, "do_rescale": True}


class Section:
    """One JSON object of a file; errors name the file and the key."""

    def __init__(self, where: str, values: object) -> None:
        if not isinstance(values, dict):
            raise ConvertError(f"{where}: expected a JSON object, got {_shown(values)}")
        self.where = where
        self.values: dict[str, Any] = values

    def section(self, key: str, default: Mapping[str, object]) -> Section:
        """The object of a key."""
        values = self.values.get(key)
        return Section(f"{self.where}: {key}", dict(default) if values is None else values)

    def get(self, key: str, default: T) -> T:
        """The value of a key, of the default's type (or int for float); the default where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        typed = _typed(value, default)
        if typed is None:
            example = list(default) if isinstance(default, tuple) else default
            raise ConvertError(f"{self.where}: {key}: expected a value such as {json.dumps(example)}, "
                               f"got {_shown(value)}")  # fmt: skip
        return typed

    def departures(self, fixed: Mapping[str, object]) -> list[str]:
        """Problems: one text for each key with another value than the fixed one."""
        return [
            f"{self.where}: {key}: expected {value!r}, got {_shown(self.values[key])}"
            for key, value in fixed.items()
            if self.values.get(key) is not None and self.values[key] != value
        ]


def read_config(config: Section, processor: Section | None, num_classes: int) -> Config:
    """Configuration of the network, of the loss weights, and of inference.

    Args:
        config: ``config.json``.
        processor: ``preprocessor_config.json``; None takes ImageNet's mean and deviation and our default sizes.
        num_classes: number of classes of the classifier.

    Raises:
        ConvertError: a value of a wrong type, or values that mean other computations than ours (all are listed).
        ValueError: contradicting widths.
    """
    problems = []
    if config.get("model_type", "maskformer") != "maskformer":
        problems.append(f"{config.where}: model_type: expected 'maskformer', got {config.values['model_type']!r}")
    decoder = config.section("decoder_config", {"model_type": "detr"})
    if decoder.get("model_type", "detr") != "detr":
        problems.append(f"{decoder.where}: model_type: expected 'detr', got {decoder.values['model_type']!r}")
    problems += decoder.departures(DETR_FIXED)
    backbone, wrong = read_backbone(config.section("backbone_config", {"model_type": "missing"}))
    problems += wrong
    if processor is not None:
        problems += processor.departures(PROCESSOR_FIXED)
    if problems:
        raise ConvertError("expected a MaskFormer that this network can compute\n  " + "\n  ".join(problems))

    model = ModelConfig(
        num_classes=num_classes,
        backbone=backbone,
        pixel_decoder=PixelDecoderConfig(
            conv_dim=config.get("fpn_feature_size", 256), mask_dim=config.get("mask_feature_size", 256),
            norm_groups=NORM_GROUPS,
        ),
        decoder=DecoderConfig(
            layers=decoder.get("decoder_layers", 6), hidden_dim=decoder.get("d_model", 256),
            num_heads=decoder.get("decoder_attention_heads", 8), ffn_dim=decoder.get("decoder_ffn_dim", 2048),
            dropout=decoder.get("dropout", 0.1), num_queries=decoder.get("num_queries", 100),
        ),
    )  # fmt: skip
    loss = LossConfig(
        class_weight=config.get("cross_entropy_weight", 1.0), mask_weight=config.get("mask_weight", 20.0),
        dice_weight=config.get("dice_weight", 1.0), no_object_weight=config.get("no_object_weight", 0.1),
    )  # fmt: skip
    if processor is None:
        return Config(model=model, loss=loss)
    return Config(model=read_pixels(processor, model), loss=loss, test=read_test(processor))


def read_class_names(config: Section, num_classes: int) -> tuple[str, ...] | None:
    """Names in ``id2label``; ``None`` without it, or where Hugging Face generated the names (``LABEL_0``)."""
    labels = config.values.get("id2label")
    if labels is None:
        return None
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(num_classes)}:
        keys = sorted(labels) if isinstance(labels, dict) else labels
        raise ConvertError(
            f"{config.where}: id2label: expected the keys '0' to '{num_classes - 1}' (the classifier has "
            f"{num_classes} classes and no-object), got {_shown(keys)}"
        )
    names = tuple(labels[str(index)] for index in range(num_classes))
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ConvertError(f"{config.where}: id2label: expected printable texts, got {_shown(labels)}")
    return None if names == tuple(f"LABEL_{index}" for index in range(num_classes)) else names


def write_config(config: Config, metadata: Metadata) -> dict[str, Any]:
    """Contents of ``config.json``.

    Raises:
        ConvertError: Hugging Face's MaskFormer cannot express the network; every reason is listed.
    """
    model, loss = config.model, config.loss
    backbone = resolve_backbone(model.backbone)
    _check_expressible(model, backbone, metadata)
    decoder = model.decoder
    swin = {
        "model_type": "swin",  # every version reads it as MaskFormer's own variant of Swin
        "embed_dim": backbone.embed_dim, "depths": backbone.depths, "num_heads": backbone.num_heads,
        "window_size": backbone.window_size, "drop_path_rate": backbone.drop_path_rate,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        **SWIN_FIXED,
    }  # fmt: skip
    resnet = {
        "model_type": "resnet", "embedding_size": backbone.stem_channels, "depths": backbone.depths,
        "hidden_sizes": [(backbone.res2_channels or 0) * 2**stage for stage in range(4)],
        **RESNET_FIXED,
    }  # fmt: skip
    names = dict(enumerate(metadata.class_names))
    return {
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "model_type": "maskformer",
        "torch_dtype": "float32",
        "backbone_config": {**(swin if is_swin(backbone) else resnet), "out_features": STAGES},
        "decoder_config": {
            "model_type": "detr",
            "d_model": decoder.hidden_dim, "decoder_layers": decoder.layers, "decoder_ffn_dim": decoder.ffn_dim,
            "decoder_attention_heads": decoder.num_heads, "num_queries": decoder.num_queries,
            # Our network has one rate for all three.
            "dropout": decoder.dropout, "attention_dropout": decoder.dropout, "activation_dropout": decoder.dropout,
            **DETR_FIXED,
        },
        "fpn_feature_size": model.pixel_decoder.conv_dim,
        "mask_feature_size": model.pixel_decoder.mask_dim,
        "cross_entropy_weight": loss.class_weight,
        "mask_weight": loss.mask_weight,
        "dice_weight": loss.dice_weight,
        "no_object_weight": loss.no_object_weight,
        "use_auxiliary_loss": False,  # with true their inference fails, unless all hidden states are requested
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
    }  # fmt: skip


def write_processor(config: Config, metadata: Metadata) -> dict[str, Any]:
    """Contents of ``preprocessor_config.json``. The data set decides ``ignore_index`` and ``do_reduce_labels``."""
    model, test = config.model, config.test
    ignore_index, reduce_labels = _label_values(metadata)
    kind = {"mask2former": "Mask2Former", "eomt": "Eomt"}.get(model.type, "MaskFormer")
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": test.edge is not None,
        "size": _write_size(test),
        "size_divisor": model.size_divisibility,
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in model.pixel_mean],
        "image_std": [value / 255 for value in model.pixel_std],
        "ignore_index": ignore_index,
        "do_reduce_labels": reduce_labels,
        "num_labels": metadata.num_classes,
    }


def _write_size(test: TestConfig) -> dict[str, Any]:
    if test.size is not None:
        return {"height": test.size[0], "width": test.size[1]}
    return {"shortest_edge": test.short_edge or TestConfig().short_edge, "longest_edge": test.max_size}


def read_backbone(backbone: Section) -> tuple[BackboneConfig, list[str]]:
    """The nearest preset with the fields that differ from it, and problems."""
    kind = backbone.get("model_type", "missing")
    fields: dict[str, Any]
    if kind in ("swin", "maskformer-swin"):
        problems = backbone.departures(SWIN_FIXED)
        fields = {
            "depths": backbone.get("depths", (2, 2, 6, 2)),
            "embed_dim": backbone.get("embed_dim", 96),
            "num_heads": backbone.get("num_heads", (3, 6, 12, 24)),
            "window_size": backbone.get("window_size", 7),
            "drop_path_rate": backbone.get("drop_path_rate", 0.1),
        }
    elif kind == "resnet":
        problems = backbone.departures(RESNET_FIXED)
        widths = backbone.get("hidden_sizes", (256, 512, 1024, 2048))
        if widths[0] % BOTTLENECK or widths != tuple(widths[0] * 2**stage for stage in range(4)):
            problems.append(f"{backbone.where}: hidden_sizes: expected widths that double, the first a multiple of "
                            f"{BOTTLENECK}, got {list(widths)}")  # fmt: skip
        fields = {
            "depths": backbone.get("depths", (3, 4, 6, 3)),
            "stem": "basic",
            "stem_channels": backbone.get("embedding_size", 64),
            "res2_channels": widths[0],
            "bottleneck_channels": widths[0] // BOTTLENECK,
        }
    else:
        return BackboneConfig(), [f"{backbone.where}: model_type: expected resnet, swin or maskformer-swin, got {kind}"]
    # For "swin", Hugging Face sets the stages itself.
    stages = backbone.values.get("out_features") or [f"stage{i}" for i in backbone.values.get("out_indices") or ()]
    if kind != "swin" and stages != STAGES:
        problems.append(f"{backbone.where}: out_features: expected {STAGES}, got {_shown(stages)}")
    return nearest_preset(fields), problems


def read_pixels(processor: Section, model: ModelConfig) -> ModelConfig:
    factor = processor.get("rescale_factor", 1 / 255)
    if factor < 1 / _LIMIT:
        raise ConvertError(f"{processor.where}: rescale_factor: expected a value such as 1 / 255, got {factor}")
    scale = 1 / factor

    def pixels(key: str, default: tuple[float, ...]) -> tuple[float, float, float]:
        # Folders have 123.675 / 255 rounded to float32; five decimals restore the value.
        red, green, blue = (round(v * scale, 5) for v in processor.get(key, tuple(v / scale for v in default)))
        return red, green, blue

    return replace(
        model,
        pixel_mean=pixels("image_mean", model.pixel_mean),
        pixel_std=pixels("image_std", model.pixel_std),
        size_divisibility=_size_divisor(processor),
    )


def _size_divisor(processor: Section) -> int:
    return processor.get("size_divisor", processor.get("size_divisibility", 32))


def read_test(processor: Section) -> TestConfig:
    """Sizes at inference."""
    for problem in processor.departures({"resample": _BILINEAR}):
        logger.warning("%s; images are resized bilinearly, so that results may differ", problem)
    size = processor.values.get("size")
    if processor.values.get("do_resize") is False:
        return TestConfig(short_edge=None)
    if isinstance(size, list) or (isinstance(size, dict) and "shortest_edge" not in size):
        return _read_fixed_size(processor, size)
    if size is None or isinstance(size, int):
        size = {"shortest_edge": size}
    edges = Section(f"{processor.where}: size", size)
    return TestConfig(
        short_edge=edges.get("shortest_edge", 800),
        max_size=edges.get("longest_edge", processor.get("_max_size", processor.get("max_size", 1333))),
    )


def _read_fixed_size(processor: Section, size: list[Any] | dict[str, Any]) -> TestConfig:
    """Height and width that images are brought to, whatever their shape: the next multiples of the divisor."""
    given: list[Any] = [size.get("height"), size.get("width")] if isinstance(size, dict) else size
    sides = [int(side) for side in given if type(side) in (int, float) and 0 < side < _LIMIT and side == int(side)]
    if len(given) != 2 or len(sides) != 2:
        test = TestConfig()
        logger.warning("%s: size: expected shortest_edge, or height and width, got %s; images are resized to a "
                       "short edge of %s, at most %s: see --test.short-edge", processor.where, _shown(size),
                       test.short_edge, test.max_size)  # fmt: skip
        return test
    step = max(1, _size_divisor(processor))
    height, width = (-(-side // step) * step for side in sides)
    return TestConfig(min(sides), max(TestConfig.max_size, *sides), size=(height, width))


def _check_expressible(model: ModelConfig, backbone: BackboneConfig, metadata: Metadata) -> None:
    pixel_decoder = model.pixel_decoder
    problems = []

    def need(condition: bool, name: str, expected: str, got: object) -> None:
        if not condition:
            problems.append(f"model.{name}: expected {expected}, got {got!r}")

    need(model.type == "maskformer", "type", "maskformer", model.type)
    need(pixel_decoder.encoder_layers == 0, "pixel_decoder.encoder_layers", "0", pixel_decoder.encoder_layers)
    need(pixel_decoder.norm_groups == NORM_GROUPS, "pixel_decoder.norm_groups", "32", pixel_decoder.norm_groups)
    if not is_swin(backbone):
        need(backbone.stem == "basic", "backbone.stem", "basic", backbone.stem)
        need(backbone.multi_grid is False, "backbone.multi_grid", "False", backbone.multi_grid)
        inner, outer = backbone.bottleneck_channels or 0, backbone.res2_channels or 0
        need(inner * BOTTLENECK == outer, "backbone.bottleneck_channels", f"res2_channels={outer} / 4", inner)
    need(model.num_classes == metadata.num_classes, "num_classes", f"the {metadata.num_classes} of the metadata",
         model.num_classes)  # fmt: skip
    if problems:
        raise ConvertError("expected a network that Hugging Face's MaskFormer has a form for\n  "
                           + "\n  ".join(problems))  # fmt: skip


def _label_values(metadata: Metadata) -> tuple[int, bool]:
    """Value of unlabelled pixels in label images, and whether 1 is the first class (and 0 unlabelled)."""
    preset = PRESETS.get(metadata.name)
    if preset is None or preset.contiguous:
        return 255, False
    classes = read_preset_classes(preset.classes)
    count = len(classes.values)
    if classes.values == tuple(range(count)):
        return classes.ignore[0], False
    return 255, classes.values == tuple(range(1, count + 1)) and 0 in classes.ignore


def _typed(value: Any, example: object) -> Any:
    """The value as the example's type (a list of equal length for a tuple); ``None`` where it has another type."""
    if isinstance(example, tuple):
        if not isinstance(value, list) or len(value) != len(example):
            return None
        items = tuple(_typed(item, like) for item, like in zip(value, example, strict=True))
        return None if None in items else items
    if type(value) in (int, float) and not abs(value) < _LIMIT:  # true for NaN, too
        return None
    if isinstance(example, float) and type(value) is int:
        return float(value)
    return value if type(value) is type(example) else None


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
