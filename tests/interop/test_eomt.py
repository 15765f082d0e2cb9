"""Weights of EoMT: official names, Hugging Face's folders, differences, and backbones of DINOv2 and DINOv3."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig
from maskformer_fast.convert import main
from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.interop.eomt import official_to_ours
from maskformer_fast.interop.huggingface import read_folder, write_folder
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.interop.official import backbone_to_ours
from maskformer_fast.interop.published import published_config
from maskformer_fast.interop.vit import resize_patches
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_weights
from tests.support.paths import ORACLES

VIT = BackboneConfig("vit_small_dinov2", embed_dim=32, blocks=3, heads=2, mlp_dim=64, image_size=(64, 64))
MODEL = ModelConfig(
    type="eomt", num_classes=5, backbone=VIT, decoder=DecoderConfig(layers=2, num_queries=7), padding="black"
)


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = build_model(model).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def official(weights: dict[str, Tensor], dinov3: bool = False) -> dict[str, Tensor]:
    """The weights under official names, written here anew: an oracle of the rules."""
    result: dict[str, Tensor] = {"criterion.empty_weight": torch.ones(6)}
    for name, tensor in weights.items():
        name = name.replace("predictor.query_embed.", "q.").replace("predictor.class_embed.", "class_head.")
        for index in range(3):
            name = name.replace(f"predictor.mask_embed.layers.{index}.", f"mask_head.{2 * index}.")
        name = name.replace("predictor.mask_probability", "attn_mask_probs").replace("pixel_decoder.", "")
        name = name.replace("backbone.", "encoder.backbone.")
        if dinov3:
            for ours, theirs in (
                ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"), ("fc1", "up_proj"),
                ("fc2", "down_proj"), ("attn.proj", "attention.o_proj"),
                ("patch_embed.proj", "patch_embed.patch_embeddings"),
                ("backbone.cls_token", "backbone.patch_embed.cls_token"),
                ("backbone.reg_token", "backbone.patch_embed.register_tokens"),
            ):  # fmt: skip
                name = name.replace(ours, theirs)
            if name.endswith("attn.qkv.weight"):
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    result["network." + name.replace("attn.qkv", f"attention.{letter}_proj")] = part
                continue
            if name.endswith("attn.qv_bias"):
                for letter, part in zip("qv", tensor.chunk(2), strict=True):
                    result["network." + name.replace("attn.qv_bias", f"attention.{letter}_proj.bias")] = part
                continue
        result["network." + name] = tensor
    return result


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_official_weights_have_our_names_and_sizes(positions: str) -> None:
    rotary = positions == "rotary"
    model = replace(MODEL, backbone=replace(VIT, name="vit_small_dinov3")) if rotary else MODEL
    weights = random_weights(model)
    got, config = official_to_ours(official(weights, rotary), "file", num_heads=2)
    assert_equal(got, weights)
    assert config.decoder.layers == 2 and config.decoder.num_queries == 7 and config.num_classes == 5
    assert config.backbone.positions in (None, positions) and build_model(config)
    broken = official(weights, rotary)
    del broken["network.upscale.1.norm.bias"]
    broken["network.extra"] = torch.zeros(1)
    with pytest.raises(ConvertError, match=r"(?s)unknown: network\.extra.*missing: network\.upscale\.1\.norm\.bias"):
        official_to_ours(broken, "file", num_heads=2)


def test_differences_are_added_to_a_backbone(tmp_path: Path) -> None:
    model = replace(MODEL, backbone=replace(VIT, name="vit_small_dinov3", embed_dim=64, heads=1))
    weights = random_weights(model)
    base = {name: tensor + 1 for name, tensor in weights.items() if name.startswith("backbone.")}
    delta = {name: tensor - base.get(name, 0) for name, tensor in weights.items()}
    got, _ = official_to_ours(official(delta, dinov3=True), "file", base=base)
    for name, tensor in weights.items():
        torch.testing.assert_close(got[name], tensor, msg=name)
    with pytest.raises(ConvertError, match=r"(?s)weights of --base do not fit.*backbone\.norm\.bias: expected"):
        official_to_ours(official(delta, dinov3=True), "file", base={"backbone.cls_token": base["backbone.cls_token"]})


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_folders_are_read_as_they_were_written(positions: str, tmp_path: Path) -> None:
    name = "vit_small_dinov3" if positions == "rotary" else "vit_small_dinov2"
    model = replace(MODEL, backbone=replace(VIT, name=name))
    weights, names = random_weights(model), tuple("abcde")
    metadata = Metadata("test", names, (True,) * 5, tuple(range(5)), default_colors(5))
    write_folder(tmp_path / "folder", weights, Config(model=model), metadata)
    got = read_folder(tmp_path / "folder")
    assert_equal(got.weights, weights)
    assert got.class_names == names and build_model(got.config.model).state_dict().keys() == weights.keys()
    assert got.config.model.padding == "black" and got.config.loss.points == 12544
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    kind = "EomtDinov3" if positions == "rotary" else "Eomt"
    network, info = getattr(transformers, f"{kind}ForUniversalSegmentation").from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and network.config.num_queries == 7


def test_backbones_of_hugging_face_give_the_same_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 64, "patch_size": 16}
    two = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(num_register_tokens=3, **sizes))
    three = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(num_register_tokens=3, intermediate_size=96, **sizes)
    )
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for theirs in (two, three):
        theirs.eval()
        for index, value in enumerate(theirs.parameters()):
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(index)) * 0.2
        theirs.save_pretrained(tmp_path / type(theirs).__name__)
        file = tmp_path / type(theirs).__name__ / "model.safetensors"
        assert main([str(file), str(tmp_path / f"{type(theirs).__name__}.safetensors")]) == 0
        weights, config = backbone_to_ours({**_read(file)}, file)
        network = build_model(replace(MODEL, backbone=config)).eval()
        network.backbone.load_state_dict(weights)
        with torch.no_grad():
            x, rotary = network.backbone.embed(images)
            for block in network.backbone.blocks:
                x = block(x, rotary)
            expected = theirs(images).last_hidden_state
        assert (network.backbone.norm(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def _read(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def test_names_of_timm_and_resized_patches() -> None:
    ours = {name.removeprefix("backbone."): tensor for name, tensor in random_weights(MODEL).items()
            if name.startswith("backbone.")}  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(32, 3, 14, 14, generator=generator)
    positions = torch.randn(1, 25, 32, generator=generator)
    got, config = backbone_to_ours(ours | {"patch_embed.proj.weight": patches, "pos_embed": positions}, "timm")
    assert config.image_size == (80, 80) and got["patch_embed.proj.weight"].shape == (32, 3, 16, 16)
    torch.testing.assert_close(got["pos_embed"], positions, rtol=0, atol=0)
    # A patch of 14 pixels that is resized to 16 has the same embedding.
    patch = torch.randn(1, 3, 14, 14, generator=generator, dtype=torch.float64)
    larger = F.interpolate(patch, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    resized = resize_patches(patches.double(), 16)
    torch.testing.assert_close((resized * larger).sum((1, 2, 3)), (patches * patch).sum((1, 2, 3)))
    three = random_weights(replace(MODEL, backbone=replace(VIT, name="vit_small_dinov3")))
    names = {name.removeprefix("backbone."): tensor for name, tensor in three.items() if name.startswith("backbone.")}
    timm = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
            for name, tensor in names.items() if not name.endswith("qv_bias")}  # fmt: skip
    got, config = backbone_to_ours(timm, "timm")  # whose DINOv3 has no biases of the attention
    assert config.name == "vit_small_dinov3" and not got["blocks.1.attn.qv_bias"].any()
    torch.testing.assert_close(got["blocks.2.ls2.gamma"], names["blocks.2.ls2.gamma"], rtol=0, atol=0)
    for index in range(3):  # the larger ones have a gate, apart from the values
        for leaf, gate in (("weight", torch.randn(64, 32, generator=generator)), ("bias", torch.zeros(64))):
            timm[f"blocks.{index}.mlp.fc1_x.{leaf}"] = timm.pop(f"blocks.{index}.mlp.fc1.{leaf}")
            timm[f"blocks.{index}.mlp.fc1_g.{leaf}"] = gate
    got, config = backbone_to_ours(timm, "timm")
    expected = torch.cat((timm["blocks.1.mlp.fc1_g.weight"], timm["blocks.1.mlp.fc1_x.weight"]))
    assert config.gated_mlp and got["blocks.1.mlp.fc1.weight"].equal(expected)


@pytest.mark.parametrize("size", ["small", "base", "large"])
@pytest.mark.parametrize("version", ["dinov2", "dinov3"])
def test_full_size_models_have_the_official_parameters(size: str, version: str) -> None:
    path = ORACLES / "state_dict_keys_eomt.json"
    if not path.is_file():
        pytest.skip("no recordings of the official code")
    shapes = json.loads(path.read_text())[f"eomt_{size}_coco_panoptic_640_{version}"]
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    converted, model = official_to_ours(weights, size)
    assert model.backbone == BackboneConfig(f"vit_{size}_{version}") and model.decoder.num_queries == 200
    config = published_config(model)
    assert config.model.size_divisibility == 640 and config.test.short_edge == config.test.max_size == 640
    with torch.device("meta"):
        assert build_model(config.model).state_dict().keys() == converted.keys()


def test_the_recording_is_reproduced_and_differences_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ORACLES / "eomt_small_coco_panoptic"
    if not folder.is_dir():
        pytest.skip("no recordings of the official code")
    arguments = ["--verify", str(folder)]
    with pytest.raises(ConvertError, match=r"heads: expected their number, as 96 channels .*see --num-heads"):
        main([str(folder / "model.pt"), str(tmp_path / "ours")])
    with pytest.raises(ValueError, match="num-heads: expected 3, as of the network that .* recorded, got 6"):
        main([str(folder / "model.pt"), str(tmp_path / "ours"), "--num-heads", "6", *arguments])
    assert not (tmp_path / "ours").exists()
    assert main([str(folder / "model.pt"), str(tmp_path / "ours"), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("p1.mask_logits.0", "p05.attn_mask.2", "p0.class_logits.3", "train.p05.losses.loss_total",
                 "train.p1.grad_norm", "train.empty_second.losses.loss_dice", "p1.panoptic@0.8,0.8.1",
                 "p1.layer_0.panoptic@0.8,0.8.0", "p1.crops.mask_logits", "p1.semantic.0",
                 "unmasked.semantic.1"):  # fmt: skip
        assert report[name]["ok"], name
    weights = dict(torch.load(folder / "model.pt", weights_only=True))
    weights["network.upscale.1.norm.bias"] = weights["network.upscale.1.norm.bias"] + 1e-3
    torch.save(weights, tmp_path / "changed.pt")
    assert main([str(tmp_path / "changed.pt"), str(tmp_path / "changed"), *arguments]) == 1
    capsys.readouterr()
    # There and back by a Hugging Face folder.
    assert main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "huggingface"]) == 0
    assert main([str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    assert_equal(load_weights(tmp_path / "again").weights, load_weights(tmp_path / "ours").weights)
