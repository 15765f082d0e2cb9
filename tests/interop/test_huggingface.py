"""Folders of Hugging Face's MaskFormer: `transformers` loads the written ones, and its own are read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from maskformer_fast.data.datasets.presets import preset_metadata
from maskformer_fast.data.transforms import resize_image
from maskformer_fast.interop import huggingface
from maskformer_fast.interop.huggingface import RULES, read_folder, write_folder
from maskformer_fast.interop.huggingface_config import Section, read_config, write_config
from maskformer_fast.interop.names import ConvertError, from_ours, to_ours
from maskformer_fast.modeling import BACKBONES, build_model, resolve_backbone
from maskformer_fast.ops.mask_product import layer_mask_logits

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
TheirModel = transformers.MaskFormerForInstanceSegmentation

NAMES = ("road", "sky", "cat", "dog", "tree")
METADATA = Metadata("mine", NAMES, (False, False, True, True, False), tuple(range(5)), ((1, 2, 3),) * 5)
RESNET = BackboneConfig("resnet50", depths=(1, 2, 1, 2), stem_channels=8, bottleneck_channels=4, res2_channels=16)
SWIN = BackboneConfig("swin_tiny", depths=(2, 1, 2, 1), embed_dim=8, num_heads=(1, 2, 4, 8), window_size=5)
DECODER = DecoderConfig(layers=2, hidden_dim=32, num_heads=4, ffn_dim=48, num_queries=7)


def model_config(backbone: BackboneConfig, **changes: Any) -> ModelConfig:
    defaults: dict[str, Any] = {
        "num_classes": 5,
        "pixel_decoder": PixelDecoderConfig(conv_dim=64, mask_dim=16),
        "decoder": DECODER,
    }
    return ModelConfig(backbone=backbone, **(defaults | changes))


@functools.cache
def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Random tensors, so that no two are equal."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in build_model(model).state_dict().items():
        if value.is_floating_point():
            value = torch.rand(value.shape, generator=generator) + 0.5
            value = value if value.ndim == 1 else (value - 1) / value[0].numel() ** 0.5
        weights[name] = value
    return weights


def write(folder: Path, config: Config, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    weights = random_weights(config.model) if weights is None else weights
    write_folder(folder, weights, config, METADATA)
    return weights


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def assert_transformers_agrees(folder: Path, model: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Check that `from_pretrained` reports no missing or unexpected names and computes our logits."""
    theirs, info = TheirModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    network = build_model(model).eval()
    network.load_state_dict(weights)
    images = torch.randint(0, 256, (1, 3, 75, 101), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got = network(images)
        expected = theirs.eval()(network.normalize(images, torch.tensor([[75, 101]])))
    for a, b in (
        (got.class_logits[-1], expected.class_queries_logits),
        (layer_mask_logits(got), expected.masks_queries_logits),
    ):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize("backbone", [RESNET, SWIN], ids=["resnet", "swin"])
@pytest.mark.parametrize("hidden_dim", [32, 128, 64], ids=["projected", "resnet equal", "swin equal"])
def test_a_written_folder_is_read_back(backbone: BackboneConfig, hidden_dim: int, tmp_path: Path) -> None:
    """Neither implementation has an input projection where the memory has the decoder's width."""
    config = Config(
        model=model_config(
            backbone, decoder=replace(DECODER, hidden_dim=hidden_dim), pixel_mean=(1.5, 20.25, 100.0),
            pixel_std=(33.3, 44.4, 55.5), size_divisibility=16,
        ),
        loss=LossConfig(1.5, 5.0, 2.5, no_object_weight=0.25),
        test=TestConfig(short_edge=640, max_size=2560),
    )  # fmt: skip
    weights = write(tmp_path / "model", config)
    got = read_folder(tmp_path / "model")
    assert_equal(got.weights, weights)
    assert replace(got.config, model=replace(got.config.model, backbone=backbone)) == config
    assert resolve_backbone(got.config.model.backbone) == resolve_backbone(backbone)
    assert got.class_names == NAMES
    assert_transformers_agrees(tmp_path / "model", config.model, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny"])
def test_a_folder_of_full_size_is_read_back(name: str, tmp_path: Path) -> None:
    model = ModelConfig(num_classes=5, backbone=BackboneConfig(name), decoder=DecoderConfig(layers=2))
    weights = write(tmp_path / "model", Config(model=model), random_weights.__wrapped__(model))
    got = read_folder(tmp_path / "model")
    assert got.config.model == model
    assert_equal(got.weights, weights)
    assert_transformers_agrees(tmp_path / "model", model, weights)
    (tmp_path / "model/model.safetensors").unlink()


PUBLISHED = [name for name in BACKBONES if "micro" not in name and name != "resnet101c" and not name.startswith("vit")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models_equal_those_of_transformers(name: str) -> None:
    """Names and shapes of full-size models are compared without memory for the values."""
    model = ModelConfig(num_classes=150, backbone=BackboneConfig(name))
    metadata = preset_metadata("ade20k_150")
    content = json.loads(json.dumps(write_config(Config(model=model), metadata)))
    assert read_config(Section("config.json", content), None, 150).model == model
    with torch.device("meta"):
        theirs = TheirModel(transformers.MaskFormerConfig.from_dict(content)).state_dict()
        ours = build_model(model).state_dict()
    renamed = from_ours(ours, RULES)
    assert renamed.problems == []
    written = renamed.weights | huggingface._constants(renamed.weights, resolve_backbone(model.backbone), Config())
    # In the file the decoder has the names of version 4; `transformers` renames them when it loads.
    old = {
        n.replace(".o_proj", ".out_proj").replace(".mlp.fc", ".fc") if ".decoder.layers." in n else n: t.shape
        for n, t in theirs.items()
    }
    assert {n: t.shape for n, t in written.items()} == old
    back = to_ours(theirs, RULES)  # the names in memory
    assert back.problems == []
    assert {n: t.shape for n, t in back.weights.items()} == {n: t.shape for n, t in ours.items()}


@pytest.mark.parametrize("name", ["resnet101", "swin_small", "swin_base", "swin_large"])
def test_folders_of_deep_models_are_read_back(name: str, tmp_path: Path) -> None:
    """The models have the published depths, heads and windows, but small widths."""
    narrow = {"stem_channels": 8, "bottleneck_channels": 4, "res2_channels": 16}
    if name.startswith("swin"):
        narrow = {"embed_dim": BACKBONES[name].num_heads[0]}  # type: ignore[index]
    model = model_config(BackboneConfig(name, **narrow))
    weights = write(tmp_path / "model", Config(model=model))
    got = read_folder(tmp_path / "model")
    assert got.config.model == model
    assert_equal(got.weights, weights)


@pytest.mark.parametrize("backbone", [RESNET, SWIN], ids=["resnet", "swin"])
@pytest.mark.parametrize("form", ["written", "shards", "bin", "memory names", "version 4 config"])
def test_every_form_of_folder_is_read(backbone: BackboneConfig, form: str, tmp_path: Path) -> None:
    config = Config(model=model_config(backbone))
    weights = write(tmp_path / "first", config)
    folder = tmp_path / "second"
    theirs = TheirModel.from_pretrained(tmp_path / "first")
    if form == "shards":
        theirs.save_pretrained(folder, max_shard_size="50KB")
        assert (folder / "model.safetensors.index.json").exists()
    else:
        theirs.save_pretrained(folder)
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif form == "memory names":
        save_file(theirs.state_dict(), folder / "model.safetensors")
        assert any(".mlp.fc1." in name for name in theirs.state_dict())
    elif form == "version 4 config":
        edit(folder / "config.json", as_version_4)
    got = read_folder(folder)
    assert_equal(got.weights, weights)
    assert replace(got.config, test=config.test) == replace(config, model=got.config.model)
    assert got.config.model == replace(config.model, backbone=got.config.model.backbone)
    assert resolve_backbone(got.config.model.backbone) == resolve_backbone(backbone)
    assert got.class_names == NAMES


def as_version_4(config: dict[str, Any]) -> None:
    """Published folders name Swin itself, leave out default values, and number the stages."""
    backbone = config["backbone_config"]
    if backbone["model_type"] == "maskformer-swin":
        backbone["model_type"] = "swin"
        del backbone["out_features"]
    else:
        backbone["out_features"] = None
        assert backbone["out_indices"] == [1, 2, 3, 4]
    for key in ("mlp_ratio", "qkv_bias", "hidden_act", "patch_size", "layer_norm_eps", "layer_type", "num_channels"):
        backbone.pop(key, None)
    for key in ("dropout", "activation_function", "auxiliary_loss"):
        del config["decoder_config"][key]
    for key in ("mask_weight", "dice_weight", "cross_entropy_weight", "no_object_weight"):
        del config[key]


def test_frozen_norms_are_read_back_as_batch_norms(tmp_path: Path) -> None:
    model = model_config(replace(RESNET, norm="frozen"))
    weights = write(tmp_path / "model", Config(model=model))
    assert_transformers_agrees(tmp_path / "model", model, weights)
    got = read_folder(tmp_path / "model")
    assert resolve_backbone(got.config.model.backbone).norm == "batch"
    assert_equal({name: got.weights[name] for name in weights}, weights)
    rest = {name: value for name, value in got.weights.items() if name not in weights}
    assert all(name.endswith("num_batches_tracked") and not value for name, value in rest.items())


def test_constants_are_those_of_the_configuration(tmp_path: Path) -> None:
    write(tmp_path / "model", Config(model=model_config(SWIN), loss=LossConfig(no_object_weight=0.3)))
    written = load_file(tmp_path / "model/model.safetensors")
    config = transformers.MaskFormerConfig.from_pretrained(tmp_path / "model")
    fresh = TheirModel(config).state_dict()
    constant = [name for name in fresh if name.endswith(("relative_position_index", "empty_weight"))]
    assert len(constant) == 7
    assert_equal({name: written[name] for name in constant}, {name: fresh[name] for name in constant})


def test_image_processor_prepares_our_input(tmp_path: Path) -> None:
    config = Config(model=model_config(RESNET), test=TestConfig(short_edge=64, max_size=96))
    write(tmp_path / "model", config)
    processor = transformers.MaskFormerImageProcessor.from_pretrained(tmp_path / "model")
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    got = processor(image.numpy(), return_tensors="pt")["pixel_values"]
    expected = build_model(config.model).normalize(image[None], torch.tensor([[64, 96]]))
    torch.testing.assert_close(torch.as_tensor(got), expected, atol=1e-5, rtol=0)
    assert processor(torch.zeros(3, 32, 40).numpy(), return_tensors="pt")["pixel_values"].shape[-2:] == (64, 96)


@pytest.mark.parametrize("size", [(64, 96), (50, 90)])
def test_a_fixed_height_and_width_gives_the_image_processors_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    write(tmp_path / "model", Config(model=model_config(RESNET), test=TestConfig(size=(64, 64))))
    edit(tmp_path / "model/preprocessor_config.json",
         lambda content: content.update(size={"height": size[0], "width": size[1]}))
    processor = transformers.MaskFormerImageProcessor.from_pretrained(tmp_path / "model")
    config = read_folder(tmp_path / "model").config
    assert config.test.size == (64, 96), "the next multiples of the divisor"
    image = torch.randint(0, 256, (3, 41, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    got = torch.as_tensor(processor(image.numpy(), return_tensors="pt")["pixel_values"])
    resized = resize_image(image.permute(1, 2, 0).numpy(), config.test.edge, config.test.max_size)
    expected = build_model(config.model).normalize(resized[None], torch.tensor([[64, 96]]))
    assert got.shape == expected.shape and (got - expected).abs().max() < 2.5 / 57  # two steps of 8 bits


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_do_not_matter(tmp_path: Path, encoding: str) -> None:
    write(tmp_path / "model", Config(model=model_config(SWIN)))
    expected = read_folder(tmp_path / "model").config
    for name in ("config.json", "preprocessor_config.json"):
        path = tmp_path / "model" / name
        path.write_bytes(path.read_text().encode(encoding))
    assert read_folder(tmp_path / "model").config == expected


def test_the_image_processor_is_read(tmp_path: Path) -> None:
    write(tmp_path / "model", Config(model=model_config(SWIN)))
    content = {"size": 640, "max_size": 2560, "image_mean": [0.5, 0.25, 0.2]}
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(content))
    config = read_folder(tmp_path / "model").config
    assert config.test == TestConfig(short_edge=640, max_size=2560) and config.model.pixel_mean == (127.5, 63.75, 51)
    for wrong in ({"image_std": [0, 1, 1]}, {"size_divisor": -1}):
        (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ConvertError, match="model"):
            read_folder(tmp_path / "model")


def test_generated_class_names_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "model", Config(model=model_config(SWIN)))
    for labels in (None, {str(i): f"LABEL_{i}" for i in range(5)}):
        edit(tmp_path / "model/config.json", lambda config, labels=labels: config.update(id2label=labels))
        assert read_folder(tmp_path / "model").class_names is None
    (tmp_path / "model/preprocessor_config.json").unlink()
    assert read_folder(tmp_path / "model").config.test == TestConfig()


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("backbone_config", "depths", [2, 2, 10**7, 2]),
        ("backbone_config", "window_size", 10**6),
        ("backbone_config", "num_heads", [3, 3, 3, 3]),
        ("decoder_config", "decoder_layers", 10**7),
        ("decoder_config", "decoder_attention_heads", 5),
        ("decoder_config", "d_model", -32),
        (None, "fpn_feature_size", 33),
        (None, "id2label", {"0": "road"}),
        (None, "id2label", {str(i): i for i in range(5)}),
        (None, "id2label", {str(i): f"\x1b[3{i}m" for i in range(5)}),
    ],
)
def test_configurations_of_impossible_networks_are_refused(
    section: str | None, key: str, value: Any, tmp_path: Path
) -> None:
    write(tmp_path / "model", Config(model=model_config(SWIN)))
    edit(tmp_path / "model/config.json", lambda config: (config[section] if section else config).update({key: value}))
    with pytest.raises(ConvertError, match="model"):
        read_folder(tmp_path / "model")


def test_models_that_hugging_face_cannot_express_are_not_written(tmp_path: Path) -> None:
    model = model_config(SWIN, pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=16, encoder_layers=2))
    with pytest.raises(ConvertError, match="encoder_layers"):
        write(tmp_path / "model", Config(model=model))
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_network_are_not_written(tmp_path: Path) -> None:
    weights = dict(random_weights(model_config(SWIN)))
    weights["predictor.class_embed.bias"] = torch.zeros(7)
    del weights["backbone.norm0.weight"]
    weights["surplus"] = torch.zeros(1)
    with pytest.raises(ConvertError) as caught:
        write(tmp_path / "model", Config(model=model_config(SWIN)), weights)
    assert all(name in str(caught.value) for name in ("predictor.class_embed.bias", "backbone.norm0.weight", "surplus"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model=model_config(SWIN))

    def fail(path: Path, content: Any) -> None:
        assert list(tmp_path.glob("*/model.safetensors")) and not (tmp_path / "model").exists()
        raise OSError("disk full")

    monkeypatch.setattr(huggingface, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "model", config)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()

    (tmp_path / "model").mkdir()
    write(tmp_path / "model", config)  # an empty folder may be replaced
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(FileExistsError, match="model"):
        write(tmp_path / "model", config)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_wrong_tensors_are_all_listed_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "model", Config(model=model_config(SWIN)))
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    missing, half = "mask_embedder.2.0.bias", "model.transformer_module.decoder.layers.1.self_attn.k_proj.weight"
    misshapen = "model.transformer_module.queries_embedder.weight"
    del tensors[missing], tensors[half]
    tensors[misshapen] = torch.zeros(9, 32)
    tensors["model.new_module.weight"] = torch.zeros(1)
    twice = "model.transformer_module.decoder.layers.0.mlp.fc1.bias"
    tensors[twice] = tensors[twice.replace(".mlp", "")].clone()
    save_file(tensors, file)
    with pytest.raises(ConvertError) as caught:
        read_folder(tmp_path / "model")
    for kind, name in (
        ("missing", missing), ("missing", half), ("shape", misshapen), ("unknown", "model.new_module.weight"),
        ("twice", twice.replace(".mlp", "")),
    ):  # fmt: skip
        assert f"{kind}: {name}" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"', "[" * 100_000, "\ud800"])
def test_damaged_configuration_is_refused(content: str, tmp_path: Path) -> None:
    write(tmp_path / "model", Config(model=model_config(SWIN)))
    (tmp_path / "model/config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ConvertError, match="config.json"):
        read_folder(tmp_path / "model")


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_folder(tmp_path)
    write(tmp_path / "model", Config(model=model_config(SWIN)))
    save_file({"x": torch.zeros(1)}, tmp_path / "model/model.safetensors")
    with pytest.raises(ConvertError, match="class_predictor.bias"):
        read_folder(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        read_folder(tmp_path / "model")
