"""Architectures inferred from the shapes of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.interop.architecture import Shapes, check_fit, infer_backbone, infer_model, meta_model
from maskformer_fast.interop.names import ConvertError, Renamed, Rule
from maskformer_fast.modeling import BACKBONES, build_model, resolve_backbone


def meta_weights(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_model(config).state_dict()


WIDTHS = st.sampled_from([1, 2, 3, 5])
RESNETS = st.builds(
    BackboneConfig,
    name=st.sampled_from(["resnet50", "resnet101", "resnet101c"]),
    depths=st.tuples(*[st.integers(1, 3)] * 4),
    stem_channels=st.sampled_from([6, 8, 14]),
    bottleneck_channels=WIDTHS,
    res2_channels=st.sampled_from([4, 9, 16]),
    norm=st.sampled_from(["batch", "frozen"]),
)
SWINS = st.builds(
    BackboneConfig,
    name=st.sampled_from(["swin_tiny", "swin_base"]),
    depths=st.tuples(*[st.integers(1, 3)] * 4),
    embed_dim=st.sampled_from([6, 12, 30]),
    num_heads=st.tuples(*[st.sampled_from([1, 2, 3, 6])] * 4),
    window_size=st.integers(2, 13),
)
MODELS = st.builds(
    ModelConfig,
    type=st.sampled_from(["maskformer", "per_pixel", "per_pixel_plus"]),
    num_classes=st.integers(1, 200),
    backbone=RESNETS | SWINS,
    pixel_decoder=st.builds(
        PixelDecoderConfig,
        conv_dim=st.sampled_from([32, 96]),
        mask_dim=st.integers(1, 70),
        encoder_layers=st.integers(0, 2),
        encoder_ffn_dim=st.integers(1, 50),
    ),
    decoder=st.builds(
        DecoderConfig,
        layers=st.integers(1, 3),
        hidden_dim=st.sampled_from([8, 32, 48]),
        ffn_dim=st.integers(1, 50),
        num_queries=st.integers(1, 30),
    ),
)


@settings(max_examples=12, deadline=None)
@given(MODELS)
def test_any_architecture_is_inferred_from_its_shapes(config: ModelConfig) -> None:
    weights = meta_weights(config)
    found = infer_model(weights)
    check_fit(meta_model(found, "found"), Renamed(weights, {}, []), (), "found")
    assert found.type == config.type and found.num_classes == config.num_classes
    got, expected = resolve_backbone(found.backbone), resolve_backbone(config.backbone)
    same = ("depths", "stem", "stem_channels", "bottleneck_channels", "res2_channels", "multi_grid", "norm")
    same += ("embed_dim", "num_heads", "window_size")
    assert [getattr(got, name) for name in same] == [getattr(expected, name) for name in same]
    if config.type == "maskformer":
        assert found.decoder == config.decoder
    if config.pixel_decoder.encoder_layers:
        assert found.pixel_decoder == config.pixel_decoder
        assert found.size_divisibility == 0


@pytest.mark.parametrize("name", [name for name in BACKBONES if "micro" not in name and not name.startswith("vit")])
def test_presets_are_recognised_without_differences(name: str) -> None:
    weights = meta_weights(ModelConfig(num_classes=2, backbone=BackboneConfig(name)))
    found = infer_backbone(weights, "backbone.")
    assert replace(found, norm=None) == BackboneConfig(name)


def test_properties_that_weights_do_not_show_have_defaults() -> None:
    weights = meta_weights(ModelConfig(num_classes=2))
    assert infer_model(weights).decoder.num_heads == 8
    assert infer_model(weights).size_divisibility == 32
    assert infer_model(weights, size_divisibility=64).size_divisibility == 64
    assert infer_model(weights, num_heads=4).decoder.num_heads == 4
    encoder = meta_weights(ModelConfig(num_classes=2, pixel_decoder=PixelDecoderConfig(encoder_layers=1)))
    assert infer_model(encoder, num_heads=4).pixel_decoder.encoder_heads == 4


def test_batch_counters_mean_a_trained_norm() -> None:
    for norm in ("batch", "frozen"):
        weights = meta_weights(ModelConfig(num_classes=2, backbone=BackboneConfig("resnet50", norm=norm)))
        assert resolve_backbone(infer_model(weights).backbone).norm == norm


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["backbone.stem.conv1.weight"], "no tensor of their heads"),
        (["predictor.class_embed.weight"], "file: backbone: expected tensors of a ResNet or a Swin"),
        (["predictor.class_embed.weight", "backbone.blocks.0.weight"], "got blocks.0.weight"),
        (["predictor.class_embed.weight", "backbone.res2.0.conv1.weight"], "basic blocks"),
    ],
)
def test_other_networks_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        infer_model({name: torch.zeros(2, 2) for name in names}, source="file")


def test_one_misshapen_tensor_does_not_change_the_architecture() -> None:
    shapes = Shapes({"a.0.w": torch.zeros(3), "a.1.w": torch.zeros(3), "a.2.w": torch.zeros(4), "b.w": torch.zeros(())})
    assert shapes.size((r"a\.\d\.w", 0)) == 3
    assert shapes.size((r"a\.2\.w", 0), known=[3, 3]) == 3
    assert shapes.size((r"a\.\d", 0), (r"b\.w", 0), default=7) == 7
    assert shapes.count(r"a\.(\d+)\.") == 3 and shapes.count(r"c\.(\d+)\.") == 0
    assert Shapes({"a.9999.w": torch.zeros(1)}).count(r"a\.(\d{1,4})\.") == 1, "no more than there are tensors"


def test_problems_have_the_names_of_the_source() -> None:
    module = nn.Linear(3, 2)
    rules = [Rule("fc.{leaf}", "{leaf}")]
    weights = {"weight": torch.zeros(2, 4), "other": torch.zeros(1)}
    renamed = Renamed(weights, {"weight": "fc.weight", "other": "fc.other"}, ["unknown: x"])
    with pytest.raises(ConvertError) as caught:
        check_fit(module, renamed, rules, "file")
    assert str(caught.value).splitlines()[1:] == [
        "  unknown: x",
        "  missing: fc.bias",
        "  shape: fc.weight: expected (2, 3), got (2, 4)",
        "  unknown: fc.other",
    ]
    check_fit(module, Renamed({"weight": torch.zeros(2, 3)}, {}, []), rules, "file", optional=["bias"])
