"""Conversion of official checkpoints and ImageNet backbones, bit for bit, with lists of all problems."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.interop import official
from maskformer_fast.interop.files import read_weights
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.interop.official import backbone_to_ours, is_model, model_to_ours, no_object_weight
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.backbone import build_backbone
from maskformer_fast.modeling.swin import WindowAttention
from maskformer_fast.modeling.weights import load_backbone
from tests.support.paths import ORACLES

needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason="no recorded outputs of the official implementation")

FROZEN = BackboneConfig("resnet50", norm="frozen")
ENCODER = PixelDecoderConfig(encoder_layers=6)
PUBLISHED = {
    "r50": ModelConfig(num_classes=150, backbone=FROZEN),
    "r101": ModelConfig(num_classes=19, backbone=replace(FROZEN, name="resnet101")),
    "r101c": ModelConfig(num_classes=171, backbone=replace(FROZEN, name="resnet101c")),
    "r50_trained_norm": ModelConfig(num_classes=7, backbone=BackboneConfig("resnet50")),
    "swin_tiny": ModelConfig(num_classes=150, backbone=BackboneConfig("swin_tiny")),
    "swin_small": ModelConfig(num_classes=150, backbone=BackboneConfig("swin_small")),
    "swin_base": ModelConfig(num_classes=150, backbone=BackboneConfig("swin_base")),
    "swin_base_window_7": ModelConfig(num_classes=150, backbone=BackboneConfig("swin_base", window_size=7)),
    "swin_large": ModelConfig(num_classes=133, backbone=BackboneConfig("swin_large")),
    "r50_panoptic": ModelConfig(num_classes=133, backbone=FROZEN, pixel_decoder=ENCODER, size_divisibility=0),
    "per_pixel": ModelConfig("per_pixel", num_classes=847, backbone=FROZEN, size_divisibility=0),
    "per_pixel_plus": ModelConfig("per_pixel_plus", num_classes=847, backbone=FROZEN, size_divisibility=0),
}
ODD_SWIN = ModelConfig(
    num_classes=5,
    backbone=BackboneConfig("swin_tiny", depths=(1, 2, 1, 1), embed_dim=12, num_heads=(2, 3, 4, 8), window_size=5),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=20, encoder_layers=1, encoder_heads=4, encoder_ffn_dim=24),
    decoder=DecoderConfig(layers=2, hidden_dim=48, num_heads=4, ffn_dim=56, num_queries=9),
    size_divisibility=0,
)
ODD_RESNET = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(
        "resnet101c", depths=(1, 2, 1, 1), stem_channels=12, bottleneck_channels=6, res2_channels=16, norm="frozen"
    ),
    pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=24),
    decoder=DecoderConfig(layers=1, hidden_dim=128, num_heads=4, ffn_dim=40, num_queries=11),
)
CONSTANTS = ("criterion.empty_weight", "relative_position_index")


def official_layout(model: nn.Module) -> dict[str, Tensor]:
    """Weights of our network under the official names, with the official code's constants."""
    theirs = {}
    for name, tensor in model.state_dict().items():
        theirs[name if name.startswith("backbone.") else f"sem_seg_head.{name}"] = tensor
    for name, module in model.named_modules():
        if isinstance(module, WindowAttention):
            theirs[f"{name}.relative_position_index"] = module.relative_position_index
    if model.config.type == "maskformer":
        theirs["criterion.empty_weight"] = torch.ones(model.config.num_classes + 1)
    return theirs


def random_model(config: ModelConfig) -> nn.Module:
    torch.manual_seed(5)
    model = build_model(config)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_recognised(name: str) -> None:
    with torch.device("meta"):
        model = build_model(PUBLISHED[name])
    theirs = official_layout(model)
    assert is_model(theirs)
    weights, config = model_to_ours(theirs, name)
    assert config == replace(PUBLISHED[name], backbone=replace(config.backbone, norm=PUBLISHED[name].backbone.norm))
    assert config.backbone.norm in (None, PUBLISHED[name].backbone.norm, "batch")
    assert (config.backbone.norm == "frozen") == (PUBLISHED[name].backbone.norm == "frozen")
    assert weights.keys() == model.state_dict().keys()
    assert all(weights[key] is theirs[key if key in theirs else f"sem_seg_head.{key}"] for key in weights)


@needs_oracles
@pytest.mark.parametrize(
    ("name", "expected"), [("r50_ade", "r50"), ("swint_ade", "swin_tiny"), ("r50_coco_panoptic", "r50_panoptic")]
)
def test_all_recorded_names_are_converted(name: str, expected: str) -> None:
    shapes = json.loads((ORACLES / "state_dict_keys.json").read_text())[name]
    theirs = {
        key: torch.empty(shape, dtype=torch.int64 if key.endswith("_index") else torch.float32, device="meta")
        for key, shape in shapes.items()
    }
    weights, config = model_to_ours(theirs, name)
    assert config == PUBLISHED[expected]
    assert len(weights) == sum(not key.endswith(CONSTANTS) for key in theirs)


@needs_oracles
@pytest.mark.parametrize("name", ["r50_ade_tiny", "r50_coco_panoptic_tiny"])
def test_recorded_models_are_converted(name: str) -> None:
    theirs = read_weights(ORACLES / name / "model.pkl")
    weights, config = model_to_ours(theirs, name, num_heads=4)
    panoptic = name == "r50_coco_panoptic_tiny"
    heads = {"encoder_layers": 2, "encoder_heads": 4, "encoder_ffn_dim": 96} if panoptic else {}
    assert config == ModelConfig(
        num_classes=133 if panoptic else 13,
        backbone=replace(FROZEN, stem_channels=16, bottleneck_channels=8, res2_channels=32),
        pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=32, **heads),
        decoder=DecoderConfig(layers=3, hidden_dim=64, num_heads=4, ffn_dim=96, num_queries=24),
        size_divisibility=0 if panoptic else 32,
    )
    for key, tensor in theirs.items():
        if not key.endswith(CONSTANTS):
            assert torch.equal(weights[key.removeprefix("sem_seg_head.")], tensor)


@pytest.mark.parametrize("config", [ODD_SWIN, ODD_RESNET], ids=["swin", "resnet"])
def test_models_of_unusual_sizes_are_converted_bit_for_bit(config: ModelConfig) -> None:
    model = random_model(config)
    weights, found = model_to_ours(official_layout(model), "odd", num_heads=4)
    assert found == config
    expected = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_the_older_layout_and_the_stem_of_detectron2_are_converted() -> None:
    model = random_model(ODD_RESNET)
    theirs = {}
    for name, tensor in official_layout(model).items():
        name = name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")
        theirs[re.sub(r"stem\.conv1_(\d)", r"stem.conv\1", name)] = tensor
    assert "sem_seg_head.adapter_1.weight" in theirs and "backbone.stem.conv3.norm.bias" in theirs
    weights, config = model_to_ours(theirs, "old", num_heads=4)
    assert config == ODD_RESNET
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_pixel_statistics_go_to_the_configuration() -> None:
    theirs = official_layout(random_model(ODD_SWIN))
    theirs |= {"pixel_mean": torch.tensor([1.0, 2.0, 3.0])[:, None, None], "pixel_std": torch.full((3, 1, 1), 57.5)}
    weights, config = model_to_ours(theirs, "swin", num_heads=4)
    assert config.pixel_mean == (1.0, 2.0, 3.0) and config.pixel_std == (57.5, 57.5, 57.5)
    assert not any("pixel_mean" in name for name in weights)
    mean = torch.tensor([123.675, 116.28, 103.53])
    assert model_to_ours({**theirs, "pixel_mean": mean}, "swin", num_heads=4)[1].pixel_mean == (123.675, 116.28, 103.53)
    for wrong in (torch.zeros(4), torch.tensor([1.0, float("nan"), 3.0])):
        with pytest.raises(ConvertError, match="pixel_mean: expected three finite numbers"):
            model_to_ours({**theirs, "pixel_mean": wrong}, "swin", num_heads=4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build each network for comparisons only once."""
    for name in ("meta_model", "meta_backbone"):
        monkeypatch.setattr(official, name, functools.lru_cache(getattr(official, name)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 1.0, 0.1], 0.1), ([1.0, 0.4], 0.4), ([1.0, 0.0], 0.0), ([2.0, 0.1], None), ([1.0, -1.0], None),
     ([1.0, float("nan")], None), ([1.0, float("inf")], None)],
)  # fmt: skip
def test_the_weight_of_no_object_is_read(values: list[float], expected: float | None) -> None:
    assert no_object_weight({"criterion.empty_weight": torch.tensor(values)}) == expected
    assert no_object_weight({}) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.no_cover  # the same code hundreds of times
@pytest.mark.parametrize("config", [ODD_SWIN, ODD_RESNET], ids=["swin", "resnet"])
def test_every_missing_tensor_is_named(config: ModelConfig) -> None:
    theirs = official_layout(random_model(config))
    for name in theirs:
        rest = {key: tensor for key, tensor in theirs.items() if key != name}
        if name.endswith(CONSTANTS):
            assert model_to_ours(rest, "file", num_heads=4)[1] == config
            continue
        with pytest.raises(ConvertError, match=f"missing: {re.escape(name)}"):
            model_to_ours(rest, "file", num_heads=4)


@pytest.mark.usefixtures("quick")
@pytest.mark.no_cover
@pytest.mark.parametrize("config", [ODD_SWIN, ODD_RESNET], ids=["swin", "resnet"])
def test_every_misshapen_tensor_is_named(config: ModelConfig) -> None:
    theirs = official_layout(random_model(config))
    for name, tensor in theirs.items():
        wrong = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
        if name.endswith("bias_table"):  # another number of heads or another window would be valid
            wrong = torch.zeros(tensor.shape[0] + 1, tensor.shape[1])
        with pytest.raises(ConvertError) as caught:
            model_to_ours({**theirs, name: wrong}, "file", num_heads=4)
        listed = [line.split(":")[1].strip() for line in str(caught.value).splitlines() if "shape: " in line]
        assert listed == [name]


def test_missing_unknown_and_misshapen_are_listed_together() -> None:
    theirs = official_layout(random_model(ODD_SWIN))
    del theirs["sem_seg_head.predictor.class_embed.weight"], theirs["backbone.norm2.bias"]
    theirs |= {
        "sem_seg_head.predictor.extra": torch.zeros(1),
        "ema.decay": torch.zeros(1),
        "backbone.layers.7.blocks.0.norm1.weight": torch.zeros(1),
        "backbone.layers.0.blocks.99999999999999999999.norm1.weight": torch.zeros(1),
        "sem_seg_head.pixel_decoder.layer_1.weight": torch.zeros(32, 32, 1, 1),
        "sem_seg_head.layer_2.norm.bias": torch.zeros(32),
        "sem_seg_head.predictor.query_embed.weight": torch.zeros(9, 48, dtype=torch.int64),
    }
    with pytest.raises(ConvertError) as caught:
        model_to_ours(theirs, "some/model.pkl", num_heads=4)
    text = str(caught.value)
    for expected in (
        "some/model.pkl: ",
        "missing: sem_seg_head.predictor.class_embed.weight\n",
        "missing: backbone.norm2.bias\n",
        "unknown: sem_seg_head.predictor.extra",
        "unknown: ema.decay",
        "unknown: backbone.layers.7.blocks.0.norm1.weight",
        "unknown: backbone.layers.0.blocks.99999999999999999999.norm1.weight",
        "shape: sem_seg_head.pixel_decoder.layer_1.weight: expected (32, 32, 3, 3), got (32, 32, 1, 1)",
        "twice: sem_seg_head.pixel_decoder.layer_2.norm.bias and sem_seg_head.layer_2.norm.bias",
        "type: sem_seg_head.predictor.query_embed.weight: expected torch.float32, got torch.int64",
    ):
        assert expected in text + "\n"
    assert len(text.splitlines()) == 10


@pytest.mark.parametrize("heads", [0, -1, 5])
def test_impossible_numbers_of_heads_are_refused(heads: int) -> None:
    with pytest.raises(ConvertError, match=r"_heads: expected .*\(see --num-heads\)"):
        model_to_ours(official_layout(random_model(ODD_SWIN)), "swin", num_heads=heads)


def torchvision_layout(backbone: nn.Module) -> dict[str, Tensor]:
    """Weights of our ResNet under torchvision's names, with a classifier and counters."""
    theirs = {"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}
    for name, tensor in backbone.state_dict().items():
        name = name.replace("stem.conv1.norm", "bn1").replace("stem.conv1", "conv1")
        name = re.sub(r"res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
        name = re.sub(r"conv(\d)\.norm", r"bn\1", name)
        name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        theirs[name] = tensor
        if name.endswith("running_var"):
            theirs[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return theirs


def detectron2_layout(backbone: nn.Module) -> dict[str, Tensor]:
    theirs = {re.sub(r"stem\.conv1_(\d)", r"stem.conv\1", name): t for name, t in backbone.state_dict().items()}
    return {**theirs, "stem.fc.weight": torch.zeros(10, 4), "stem.fc.bias": torch.zeros(10)}


def swin_layout(backbone: nn.Module) -> dict[str, Tensor]:
    """Weights of a Swin Transformer as its authors publish it: one norm before the classifier, none for the stages."""
    theirs = {name: t for name, t in backbone.state_dict().items() if not re.match(r"norm\d", name)}
    for name, module in backbone.named_modules():
        if isinstance(module, WindowAttention):
            theirs[f"{name}.relative_position_index"] = module.relative_position_index
    theirs["layers.1.blocks.1.attn_mask"] = torch.zeros(4, 25, 25)
    return {**theirs, "norm.weight": torch.zeros(96), "norm.bias": torch.zeros(96), "head.weight": torch.zeros(10, 96)}


def random_backbone(config: BackboneConfig) -> nn.Module:
    backbone = build_backbone(config)
    for name, tensor in backbone.state_dict().items():
        if tensor.is_floating_point() and not re.match(r"norm\d", name):
            tensor.normal_()
    return backbone


BASIC_STEM = replace(ODD_RESNET.backbone, name="resnet50", norm="frozen")
BACKBONES = {
    "torchvision": (torchvision_layout, BASIC_STEM),
    "detectron2": (detectron2_layout, BASIC_STEM),
    "detectron2_deep": (detectron2_layout, ODD_RESNET.backbone),
    "swin": (swin_layout, ODD_SWIN.backbone),
}


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("layout", BACKBONES)
def test_imagenet_backbones_load_into_recipes(layout: str, prefix: str, tmp_path: Path) -> None:
    if prefix and layout == "torchvision":
        pytest.skip("torchvision has no such prefix")
    rename, config = BACKBONES[layout]
    backbone = random_backbone(config)
    theirs = rename(backbone)
    if prefix:  # the backbone of a detector or segmenter, without a classifier
        classifier = ("head.", "norm.", "stem.fc.")
        theirs = {prefix + name: tensor for name, tensor in theirs.items() if not name.startswith(classifier)}
    weights, found = backbone_to_ours(theirs, "file")
    assert found == config
    save_file(weights, str(tmp_path / "backbone.safetensors"))
    expected = {name: t for name, t in backbone.state_dict().items() if "num_batches" not in name}
    for norm in (None,) if layout == "swin" else ("frozen", "batch"):
        model = build_model(replace(ODD_SWIN, backbone=replace(found, norm=norm)))
        load_backbone(model, tmp_path / "backbone.safetensors")
        got = {name: t for name, t in model.backbone.state_dict().items() if "num_batches" not in name}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("layout", BACKBONES)
def test_backbones_with_other_tensors_are_refused(layout: str) -> None:
    rename, config = BACKBONES[layout]
    theirs = rename(random_backbone(config))
    free = ("fc.", "stem.fc", "head.", "norm.")
    ignored = ("num_batches_tracked", "attn_mask", "_position_index")
    for name in theirs:
        if name.startswith(free) or name.endswith(ignored):
            continue
        with pytest.raises(ConvertError, match=f"missing: {re.escape(name)}") as caught:
            backbone_to_ours({key: t for key, t in theirs.items() if key != name}, "file")
        assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(ConvertError, match=r"(?s)unknown: absolute_pos_embed\n  unknown: res9\.x"):
        backbone_to_ours({**theirs, "absolute_pos_embed": torch.zeros(1), "res9.x": torch.zeros(1)}, "file")


def test_unknown_backbones_are_refused() -> None:
    def names(*listed: str) -> Mapping[str, Tensor]:
        return {name: torch.zeros(1) for name in listed}

    with pytest.raises(ConvertError, match="basic blocks"):
        backbone_to_ours(names("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"), "resnet18")
    with pytest.raises(ConvertError, match="got conv1_w, res_conv1_bn_s"):
        backbone_to_ours(names("conv1_w", "res_conv1_bn_s"), "MSRA/R-50.pkl")
    with pytest.raises(ConvertError, match="no tensor"):
        backbone_to_ours({}, "empty")


def test_a_position_index_of_another_window_is_refused() -> None:
    theirs = official_layout(random_model(ODD_SWIN))
    name = "backbone.layers.1.blocks.0.attn.relative_position_index"
    with pytest.raises(ConvertError, match=rf"shape: {name}: expected \(25, 25\), got \(49, 49\)"):
        model_to_ours({**theirs, name: torch.zeros(49, 49)}, "swin", num_heads=4)
