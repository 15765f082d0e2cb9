"""Conversion of Hugging Face's configuration files, without weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig, PixelDecoderConfig, TestConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.datasets.presets import preset_metadata
from maskformer_fast.interop.huggingface_config import Section, read_config, write_config, write_processor
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.modeling import resolve_backbone

METADATA = Metadata("mine", tuple("abcde"), (True,) * 5, tuple(range(5)), ((1, 2, 3),) * 5)
RESNET = BackboneConfig("resnet50", depths=(1, 2, 1, 2), stem_channels=8, bottleneck_channels=4, res2_channels=16)
SWIN = BackboneConfig("swin_tiny", depths=(2, 1, 2, 1), embed_dim=8, num_heads=(1, 2, 4, 8), window_size=5)


def model_config(backbone: BackboneConfig, **changes: Any) -> ModelConfig:
    return ModelConfig(backbone=backbone, **({"num_classes": 5} | changes))


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content, allow_nan=False))


def read(config: dict[str, Any], processor: dict[str, Any] | None = None) -> Config:
    section = None if processor is None else Section("preprocessor_config.json", processor)
    return read_config(Section("config.json", config), section, 5)


def test_a_swin_of_defaults_is_swin_tiny() -> None:
    model = read({"backbone_config": {"model_type": "swin"}}).model
    assert model == ModelConfig(num_classes=5, backbone=BackboneConfig("swin_tiny", drop_path_rate=0.1))


widths = st.sampled_from([32, 64, 96])
backbones = st.one_of(
    st.builds(
        lambda depths, stem, width: BackboneConfig(
            "resnet101", depths=depths, stem_channels=stem, bottleneck_channels=width, res2_channels=4 * width
        ),
        st.tuples(*[st.integers(1, 30)] * 4), st.integers(1, 99), st.integers(1, 99),
    ),
    st.builds(
        lambda depths, heads, width, window, rate: BackboneConfig(
            "swin_base", depths=depths, num_heads=(heads,) * 4, embed_dim=heads * width, window_size=window,
            drop_path_rate=rate,
        ),
        st.tuples(*[st.integers(1, 30)] * 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 14),
        st.floats(0, 0.9),
    ),
)  # fmt: skip
def sizes_of(edge: int | tuple[int, int] | None, divisor: int) -> TestConfig:
    if isinstance(edge, tuple):  # their images have sides that are multiples
        height, width = (side * max(1, divisor) for side in edge)
        return TestConfig(min(height, width), max(2048, height, width), size=(height, width))
    return TestConfig(short_edge=edge, max_size=edge or 2048)


configs = st.builds(
    lambda backbone, conv, mask, layers, heads, ffn, queries, dropout, divisor, mean, edge: Config(
        model=model_config(
            backbone, pixel_decoder=PixelDecoderConfig(conv_dim=conv, mask_dim=mask), size_divisibility=divisor,
            decoder=DecoderConfig(layers, 4 * heads, heads, ffn, dropout, queries), pixel_mean=(mean,) * 3,
        ),
        test=sizes_of(edge, divisor),
    ),
    backbones, widths, st.integers(1, 99), st.integers(1, 9), st.integers(1, 9), st.integers(1, 99),
    st.integers(1, 300), st.floats(0, 0.9), st.integers(0, 64), st.floats(0, 255).map(lambda mean: round(mean, 3)),
    st.none() | st.integers(1, 3000) | st.tuples(st.integers(1, 99), st.integers(1, 99)),
)  # fmt: skip


@given(configs)
@settings(max_examples=60, deadline=None)
def test_any_configuration_is_converted_back_and_forth(config: Config) -> None:
    got = read(as_json(write_config(config, METADATA)), as_json(write_processor(config, METADATA)))
    assert resolve_backbone(got.model.backbone) == replace(
        resolve_backbone(config.model.backbone), name=got.model.backbone.name
    )
    assert replace(got, model=replace(got.model, backbone=config.model.backbone)) == config


@pytest.mark.parametrize(
    "dataset, expected",
    [
        ("ade20k_150", (255, True)),  # 0 is unlabelled, classes count from 1
        ("ade20k_panoptic", (255, False)),
        ("ade20k_full_847", (65535, False)),
        ("cityscapes", (255, False)),  # train ids, as their processor cannot map label ids
        ("coco_panoptic_133", (255, False)),
        ("coco_stuff_10k", (255, False)),
        ("mapillary_vistas", (65, False)),
        ("camvid", (11, False)),
    ],
)
def test_label_values_are_those_of_the_data_set(dataset: str, expected: tuple[int, bool]) -> None:
    metadata = preset_metadata(dataset)
    processor = write_processor(Config(), metadata)
    assert (processor["ignore_index"], processor["do_reduce_labels"]) == expected
    config = write_config(Config(model=ModelConfig(num_classes=metadata.num_classes)), metadata)
    assert tuple(config["id2label"].values()) == metadata.class_names


@pytest.mark.parametrize(
    "content, short_edge, max_size, divisibility",
    [
        ({"size": 640, "max_size": 2560, "size_divisibility": 32}, 640, 2560, 32),  # version 4.17
        ({"size": {"shortest_edge": 640, "longest_edge": 2560}, "size_divisor": 0}, 640, 2560, 0),
        ({"size": {"shortest_edge": 384}, "_max_size": 1000}, 384, 1000, 32),
        ({"size": {"height": 384, "width": 384}}, (384, 384), 2048, 32),
        ({"size": {"height": 500.0, "width": 4096}}, (512, 4096), 4096, 32),  # the next multiples, as they do
        ({"size": {"height": 500, "width": 10}, "size_divisor": 0}, (500, 10), 2048, 0),
        ({"size": [96, 64]}, (96, 64), 2048, 32),
        ({"size": None}, 800, 1333, 32),
        ({"size": {"longest_edge": 96}}, 512, 2048, 32),
        ({"do_resize": False, "size_divisor": 16}, None, 2048, 16),
        ({}, 800, 1333, 32),  # their defaults
    ],
)
def test_sizes_of_the_image_processor_are_read(
    content: dict[str, Any], short_edge: int | tuple[int, int] | None, max_size: int, divisibility: int
) -> None:
    mean = torch.tensor([0.485, 0.456, 0.406]).tolist()  # as published: rounded to float32
    config = read({"backbone_config": {"model_type": "swin"}}, {"image_mean": mean, **content})
    assert (config.test.edge, config.test.max_size) == (short_edge, max_size)
    assert config.model.size_divisibility == divisibility
    assert config.model.pixel_mean == (123.675, 116.28, 103.53) and config.model.pixel_std == (58.395, 57.12, 57.375)


def test_a_resize_that_is_replaced_is_named(caplog: pytest.LogCaptureFixture) -> None:
    for size, shown in (({"longest_edge": 77}, '{"longest_edge": 77}'), ([1, 2, 3], "[1, 2, 3]"),
                        ({"height": 0, "width": 9}, '"height": 0'), ({"height": 9.5, "width": 9}, "9.5")):
        caplog.clear()
        read({"backbone_config": {"model_type": "swin"}}, {"size": size})
        assert shown in caplog.text and "--test.short-edge" in caplog.text
    caplog.clear()
    read({"backbone_config": {"model_type": "swin"}}, {"size": {"shortest_edge": 96}, "resample": 3})
    assert "resample: expected 2, got 3; images are resized bilinearly" in caplog.text
    caplog.clear()
    for size in ({"shortest_edge": 96}, {"height": 96, "width": 128}):
        read({"backbone_config": {"model_type": "swin"}}, {"size": size, "resample": 2})
    assert not caplog.text


@pytest.mark.parametrize(
    "model, message",
    [
        (model_config(SWIN, type="per_pixel"), "model.type: expected maskformer"),
        (model_config(SWIN, type="per_pixel_plus"), "model.type: expected maskformer"),
        (
            model_config(RESNET, pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=16, encoder_layers=2)),
            "model.pixel_decoder.encoder_layers: expected 0, got 2",
        ),
        (
            model_config(SWIN, pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=16, norm_groups=16)),
            "model.pixel_decoder.norm_groups: expected 32",
        ),
        (model_config(replace(RESNET, stem="deep")), "model.backbone.stem: expected basic"),
        (model_config(replace(RESNET, multi_grid=True)), "model.backbone.multi_grid: expected False"),
        (model_config(replace(RESNET, bottleneck_channels=8)), "model.backbone.bottleneck_channels: expected"),
        (model_config(SWIN, num_classes=4), "model.num_classes: expected the 5 of the metadata"),
    ],
)
def test_models_that_hugging_face_cannot_express_are_refused(model: ModelConfig, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        write_config(Config(model=model), METADATA)


def test_all_reasons_are_listed() -> None:
    model = ModelConfig(backbone=BackboneConfig("resnet101c"), pixel_decoder=PixelDecoderConfig(encoder_layers=6))
    with pytest.raises(ConvertError) as caught:
        write_config(Config(model=model), METADATA)
    assert all(word in str(caught.value) for word in ("encoder_layers", "backbone.stem", "multi_grid", "num_classes"))


@pytest.mark.parametrize(
    "backbone, section, key, value",
    [
        (RESNET, "backbone_config", "layer_type", "basic"),
        (RESNET, "backbone_config", "hidden_act", "gelu"),
        (RESNET, "backbone_config", "downsample_in_first_stage", True),
        (RESNET, "backbone_config", "downsample_in_bottleneck", True),
        (RESNET, "backbone_config", "hidden_sizes", [16, 32, 64, 100]),
        (RESNET, "backbone_config", "out_features", ["stage2", "stage3", "stage4"]),
        (RESNET, "backbone_config", "model_type", "timm_backbone"),
        (SWIN, "backbone_config", "hidden_act", "relu"),
        (SWIN, "backbone_config", "mlp_ratio", 2.0),
        (SWIN, "backbone_config", "qkv_bias", False),
        (SWIN, "backbone_config", "patch_size", 2),
        (SWIN, "backbone_config", "use_absolute_embeddings", True),
        (SWIN, "backbone_config", "layer_norm_eps", 1e-6),
        (SWIN, "decoder_config", "activation_function", "gelu"),
        (SWIN, "decoder_config", "auxiliary_loss", True),
        (SWIN, "decoder_config", "model_type", "conditional_detr"),
        (SWIN, None, "model_type", "mask2former"),
        (SWIN, None, "backbone_config", None),
        # Values of a wrong type, and absurd values.
        (SWIN, "backbone_config", "depths", [2, 2, "6", 2]),
        (SWIN, "backbone_config", "depths", [2, 2]),
        (SWIN, "backbone_config", "embed_dim", 10**40),
        (SWIN, "backbone_config", "embed_dim", True),
        (SWIN, "decoder_config", "dropout", float("nan")),
        (SWIN, None, "decoder_config", "detr"),
    ],
)
def test_configurations_of_other_computations_are_refused(
    backbone: BackboneConfig, section: str | None, key: str, value: Any
) -> None:
    content = as_json(write_config(Config(model=model_config(backbone)), METADATA))
    (content[section] if section else content)[key] = value
    with pytest.raises(ConvertError, match=f"config.json.*{'model_type' if value is None else key}"):
        read(content)


@pytest.mark.parametrize(
    "content", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 0}, {"size": "x"}]
)
def test_image_processors_of_other_computations_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ConvertError, match=f"preprocessor_config.json: {next(iter(content))}"):
        read({"backbone_config": {"model_type": "swin"}}, content)
