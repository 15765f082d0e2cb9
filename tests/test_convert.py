"""The command convert: official files and backbones become checkpoints of ours, or are refused with a reason."""

from __future__ import annotations

import collections
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import maskformer_fast
from maskformer_fast import convert
from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_backbone, load_weights
from maskformer_fast.recipes import load_recipe
from tests.support.paths import ORACLES

needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason="no recorded outputs of the official implementation")

SMALL = ModelConfig(
    num_classes=5,
    backbone=BackboneConfig("swin_tiny", depths=(1, 1, 1, 1), embed_dim=8, num_heads=(1, 2, 4, 8), window_size=3),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=16),
    decoder=DecoderConfig(layers=1, hidden_dim=32, num_heads=4, ffn_dim=24, num_queries=6),
)


def official(config: ModelConfig) -> dict[str, Tensor]:
    """File of random weights under the official names."""
    torch.manual_seed(3)
    weights = build_model(config).state_dict()
    theirs = {n if n.startswith("backbone.") else f"sem_seg_head.{n}": t for n, t in weights.items()}
    return {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in theirs.items()}


def write_pickle(path: Path, weights: dict[str, Tensor], **beside: Any) -> Path:
    path.write_bytes(pickle.dumps({"model": {n: t.numpy() for n, t in weights.items()}, "__author__": "us", **beside}))
    return path


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pickle(tmp_path / "small.pkl", official(SMALL))


@needs_oracles
@pytest.mark.parametrize("name", ["r50_ade_tiny", "r50_coco_panoptic_tiny"])
def test_recorded_models_convert_load_and_predict(name: str, tmp_path: Path, capsys: Any) -> None:
    dest = tmp_path / "missing/folder"
    assert run(ORACLES / name / "model.pkl", dest, "--num-heads", 4) == 0
    assert [path.name for path in dest.iterdir()] == ["model.safetensors"]
    predictor = maskformer_fast.load(dest, "cpu")
    assert predictor.config.model.decoder.num_heads == 4
    panoptic = name == "r50_coco_panoptic_tiny"
    assert predictor.metadata.num_classes == (133 if panoptic else 13)
    assert sum(predictor.metadata.is_thing) == (80 if panoptic else 0)
    assert predictor.metadata.class_names[:2] == (("person", "bicycle") if panoptic else ("class_0", "class_1"))
    assert predictor.config.test.short_edge == (800 if panoptic else 512)
    printed = capsys.readouterr().out
    for expected in ("resnet50 (stem_channels 16", "24 queries", f"{133 if panoptic else 13} of ", str(dest)):
        assert expected in printed

    case = torch.load(ORACLES / name / "case.pt", weights_only=True)
    image, size = case["images"][0], case["image_sizes"][0]
    height, width = case["padded_size"]
    padded = torch.nn.functional.pad(image, (0, width - size[1], 0, height - size[0]))[None]
    with torch.no_grad():
        got = predictor.network(padded, torch.tensor([list(size)])).class_logits[0, 0]
    expected = case["f32"]["pred_logits"][0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@needs_oracles
@pytest.mark.parametrize(
    ("name", "ending", "preset", "classes"),
    [
        ("r50_ade", "pkl", "resnet50", "ade20k_150"),
        pytest.param("swint_ade", "pth", "swin_tiny", "ade20k_150", marks=pytest.mark.slow),
        pytest.param("r50_coco_panoptic", "pth", "resnet50", "coco_panoptic_133", marks=pytest.mark.slow),
    ],
)
def test_models_of_full_size_convert(name: str, ending: str, preset: str, classes: str, tmp_path: Path) -> None:
    shapes = json.loads((ORACLES / "state_dict_keys.json").read_text())[name]
    generator = torch.Generator().manual_seed(0)
    theirs = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    path = tmp_path / f"model.{ending}"
    if ending == "pkl":
        write_pickle(path, theirs)
    else:
        torch.save({"model": theirs, "iteration": 1, "optimizer": {"state": {}}}, path)
    assert run(path, tmp_path / "ours.safetensors") == 0
    config, metadata, weights, step = load_weights(tmp_path / "ours.safetensors")
    norm = None if preset == "swin_tiny" else "frozen"
    assert config.model.backbone == BackboneConfig(preset, norm=norm)
    assert config.model.pixel_decoder.encoder_layers == (6 if "panoptic" in name else 0)
    assert (metadata.name, step, config.data.dataset) == (classes, 0, classes)
    constants = ("criterion.empty_weight", "relative_position_index")
    kept = {key.removeprefix("sem_seg_head."): t for key, t in theirs.items() if not key.endswith(constants)}
    assert weights.keys() == kept.keys()
    assert all(torch.equal(weights[key], kept[key]) for key in kept)


def test_a_recipe_takes_the_backbone_of_a_converted_model(tmp_path: Path, source: Path) -> None:
    assert run(source, tmp_path / "ours") == 0
    recipe = load_recipe("ade20k_150/maskformer_swin_tiny").model
    model = build_model(replace(recipe, num_classes=150, backbone=replace(SMALL.backbone, drop_path_rate=0.1)))
    load_backbone(model, tmp_path / "ours")
    weights = load_weights(tmp_path / "ours").weights
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(weights[f"backbone.{name}"], tensor)


def test_an_imagenet_backbone_converts(tmp_path: Path, capsys: Any) -> None:
    weights = {n.removeprefix("backbone."): t for n, t in official(SMALL).items() if n.startswith("backbone.")}
    for index in range(4):
        del weights[f"norm{index}.weight"], weights[f"norm{index}.bias"]
    torch.save({"model": {**weights, "head.weight": torch.zeros(9, 64)}}, tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "backbone.safetensors") == 0
    assert "swin_tiny (depths (1, 1, 1, 1), embed_dim 8" in capsys.readouterr().out
    model = build_model(SMALL)
    load_backbone(model, tmp_path / "backbone.safetensors")
    assert all(torch.equal(model.backbone.state_dict()[name], tensor) for name, tensor in weights.items())
    assert model.backbone.norm3.weight.eq(1).all() and model.backbone.norm3.bias.eq(0).all()
    with safe_open(str(tmp_path / "backbone.safetensors"), framework="pt") as reader:
        assert reader.metadata()["format"] == convert.BACKBONE_FORMAT
    with pytest.raises(ValueError, match="not a readable checkpoint|expected a checkpoint of format"):
        load_weights(tmp_path / "backbone.safetensors")
    for option in (["--num-heads", 4], ["--things", "0"], ["--verify", tmp_path], ["--to", "huggingface"]):
        with pytest.raises(ValueError, match="for a backbone alone"):
            run(tmp_path / "swin.pth", tmp_path / "second", *option)
        assert not (tmp_path / "second").exists()


def test_the_weight_of_no_object_goes_to_the_configuration(tmp_path: Path) -> None:
    constant = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.3])
    write_pickle(tmp_path / "model.pkl", {**official(SMALL), "criterion.empty_weight": constant})
    assert run(tmp_path / "model.pkl", tmp_path / "ours") == 0
    assert load_weights(tmp_path / "ours").config.loss.no_object_weight == 0.3


def test_things_are_those_of_the_option(tmp_path: Path, source: Path) -> None:
    assert run(source, tmp_path / "a", "--num-heads", 4, "--things", "1-2", "4") == 0
    assert load_weights(tmp_path / "a").metadata.is_thing == (False, True, True, False, True)
    assert run(tmp_path / "a", tmp_path / "b", "--things") == 0, "a checkpoint of ours, with other things"
    again = load_weights(tmp_path / "b")
    assert not any(again.metadata.is_thing)
    assert again.config == load_weights(tmp_path / "a").config
    assert all(torch.equal(t, load_weights(tmp_path / "a").weights[n]) for n, t in again.weights.items())
    with pytest.raises(ValueError, match=r"things: expected classes in 0\.\.4, got '3-7'"):
        run(source, tmp_path / "c", "--things", "3-7")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="num-heads: expected nothing for a checkpoint of ours"):
        run(tmp_path / "a", tmp_path / "c", "--num-heads", 4)


@pytest.mark.parametrize("existing", ["file.safetensors", "folder"])
def test_nothing_is_overwritten(existing: str, tmp_path: Path, source: Path) -> None:
    dest = tmp_path / existing
    target = dest if dest.suffix else dest / "model.safetensors"
    target.parent.mkdir(exist_ok=True)
    target.write_text("precious")
    with pytest.raises(FileExistsError, match="expected a path where nothing is yet"):
        run(source, dest)
    assert target.read_text() == "precious"


def test_a_folder_with_other_files_may_be_the_destination(tmp_path: Path, source: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    assert run(source, tmp_path / "folder") == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["model.safetensors", "notes.txt"]


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "model.bin"])
def test_destinations_of_other_formats_are_refused(name: str, tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match="dest: expected a .safetensors file or a folder"):
        run(source, tmp_path / name)


class Call:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("case", ["code", "harmless", "extra", "missing", "truncated", "empty", "text", "absent"])
def test_refusals_leave_nothing_behind(case: str, tmp_path: Path) -> None:
    weights = official(SMALL)
    path = tmp_path / "model.pkl"
    error: type[Exception] = ConvertError
    message = {
        "code": r"model\.pkl: refused: the pickle imports posix\.system",
        "harmless": r"refused: the pickle imports collections\.Counter",
        "extra": r"unknown: sem_seg_head\.predictor\.surplus",
        "missing": r"missing: backbone\.norm3\.bias",
        "truncated": "not a readable pickle",
        "empty": "empty file",
        "text": "got HTML or XML",
        "absent": "found nothing at",
    }[case]
    if case == "code":
        write_pickle(path, weights, scheduler=[{"hook": Call(tmp_path / "trap")}])
    elif case == "harmless":
        write_pickle(path, weights, counts=collections.Counter("ab"))
    elif case == "extra":
        write_pickle(path, {**weights, "sem_seg_head.predictor.surplus": torch.zeros(2)})
    elif case == "missing":
        write_pickle(path, {name: t for name, t in weights.items() if name != "backbone.norm3.bias"})
    elif case == "truncated":
        write_pickle(path, weights)
        path.write_bytes(path.read_bytes()[:-1000])
    elif case == "absent":
        error = FileNotFoundError
    else:
        path.write_text("" if case == "empty" else "<html>not found</html>\n")
    with pytest.raises(error, match=message):
        run(path, tmp_path / "dest/ours.safetensors")
    assert not (tmp_path / "dest").exists() and not (tmp_path / "trap").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_the_names_of_the_file(value: float, tmp_path: Path) -> None:
    weights = official(SMALL)
    name = next(name for name in weights if name.endswith("mask_embed.layers.0.weight"))
    weights[name][:3, 1] = value
    path = write_pickle(tmp_path / "model.pkl", weights)
    with pytest.raises(ConvertError, match=rf"(?s)model\.pkl: .*not finite: {name}: 3 of \d+ numbers are NaN or inf"):
        run(path, tmp_path / "dest/ours.safetensors")
    assert not (tmp_path / "dest").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(convert, "save_weights", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        run(source, tmp_path / "dest.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["small.pkl"]


@pytest.mark.slow
@pytest.mark.no_cover
def test_the_command_runs_in_a_shell(tmp_path: Path, source: Path) -> None:
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "maskformer_fast.convert", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)

    helped = command("--help")
    assert helped.returncode == 0
    for option in ("SOURCE", "DEST", "--to", "--num-heads", "--things", "--verify"):
        assert option in helped.stdout
    done = command(source, tmp_path / "ours.safetensors")
    assert done.returncode == 0, done.stderr
    assert "6 queries" in done.stdout and "ours.safetensors" in done.stdout
    refused = command(source, tmp_path / "ours.safetensors")
    assert refused.returncode == 2 and refused.stderr.startswith("error: dest: ")
    assert "Traceback" not in refused.stderr


def test_half_and_double_precision_become_float32(tmp_path: Path) -> None:
    weights = official(SMALL)
    mixed = {n: t.double() if i % 2 else t.half() for i, (n, t) in enumerate(weights.items())}
    assert run(write_pickle(tmp_path / "mixed.pkl", mixed), tmp_path / "ours") == 0
    for name, tensor in load_weights(tmp_path / "ours").weights.items():
        assert tensor.dtype == torch.float32
        theirs = mixed[name if name in mixed else f"sem_seg_head.{name}"]
        assert np.array_equal(tensor.numpy(), theirs.float().numpy())


@needs_oracles
def test_verification_fails_for_wrong_weights(tmp_path: Path, capsys: Any) -> None:
    folder = ORACLES / "r50_ade_tiny"
    for heads, status in ((4, 0), (8, 1)):
        dest = tmp_path / f"{heads}.safetensors"
        assert run(folder / "model.pkl", dest, "--num-heads", heads, "--verify", folder / "case.pt") == status
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is (status == 0)
        assert dest.exists()
    with pytest.raises(FileNotFoundError, match="expected recorded outputs"):
        run(folder / "model.pkl", tmp_path / "x.safetensors", "--verify", tmp_path / "absent.pt")
    # Recordings that are damaged or of another model are refused before anything is written.
    (tmp_path / "text.pt").write_text("none")
    other = ORACLES / "r50_coco_panoptic_tiny/case.pt"
    write_pickle(tmp_path / "plain.pkl", official(replace(SMALL, type="per_pixel")))
    for source, case, message in (
        (folder / "model.pkl", tmp_path / "text.pt", "not a recording"),
        (folder / "model.pkl", other, "the network's 13 classes"),
        (tmp_path / "plain.pkl", folder / "case.pt", "verify: expected a MaskFormer"),
    ):
        with pytest.raises(ValueError, match=message):
            run(source, tmp_path / "x.safetensors", "--verify", case)
    assert not (tmp_path / "x.safetensors").exists()


def test_tensors_that_share_memory_convert(tmp_path: Path) -> None:
    weights = official(SMALL)
    one = weights["sem_seg_head.pixel_decoder.layer_1.norm.weight"]
    weights["sem_seg_head.pixel_decoder.layer_2.norm.weight"] = one
    torch.save({"model": weights}, tmp_path / "tied.pth")
    assert run(tmp_path / "tied.pth", tmp_path / "ours") == 0
    assert torch.equal(load_weights(tmp_path / "ours").weights["pixel_decoder.layer_2.norm.weight"], one)


def test_weights_are_equal_after_conversion_to_hugging_face_and_back(tmp_path: Path) -> None:
    config = replace(SMALL, backbone=replace(SMALL.backbone, depths=(2, 2, 2, 2)))
    write_pickle(tmp_path / "model.pkl", official(config))
    assert run(tmp_path / "model.pkl", tmp_path / "ours", "--num-heads", 4) == 0
    assert run(tmp_path / "ours", tmp_path / "theirs", "--to", "huggingface") == 0
    assert (tmp_path / "theirs/config.json").is_file()
    assert run(tmp_path / "theirs", tmp_path / "again") == 0
    first, again = load_weights(tmp_path / "ours"), load_weights(tmp_path / "again")
    assert again.config.model.decoder == first.config.model.decoder
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in again.weights.items())
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"source: expected the config\.json"):
        run(tmp_path / "bare", tmp_path / "x")
    with pytest.raises(FileExistsError):
        run(tmp_path / "ours", tmp_path / "theirs", "--to", "huggingface")
    with pytest.raises(ValueError, match="num-heads: expected nothing for a Hugging Face folder"):
        run(tmp_path / "theirs", tmp_path / "x", "--num-heads", 4)
