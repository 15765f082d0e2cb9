"""Files of weights that are not ours, damaged or hostile: each error has the file's name and the next step."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.inference.load import load_network
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import (
    BACKBONE_FORMAT,
    FORMAT,
    CheckpointError,
    load_backbone,
    load_initial,
    load_weights,
    on_meta,
    save_weights,
)
from tests.support.memory import at_most

MODEL = ModelConfig(
    num_classes=2,
    backbone=BackboneConfig("swin_micro", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=8),
    decoder=DecoderConfig(layers=1, hidden_dim=8, num_heads=1, ffn_dim=8, num_queries=3),
)
METADATA = Metadata("two", ("a", "b"), (True, False), (1, 2), ((0, 0, 0), (9, 9, 9)))
CONVERT = r"python -m maskformer_fast\.convert "


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "ours.safetensors"
    save_weights(path, build_model(MODEL), Config(model=MODEL), METADATA, step=7)
    return path


def parts_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(path), framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}, reader.metadata()  # noqa: SIM118


def with_header(path: Path, **changes: str) -> None:
    tensors, header = parts_of(path)
    save_file(tensors, str(path), metadata={**header, **changes})


def test_what_was_saved_is_read(ours: Path) -> None:
    config, metadata, weights, step = load_weights(ours)
    assert (config.model, metadata, step) == (MODEL, METADATA, 7)
    network = load_network(ours, "cpu").network
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "model.bin", "model.ckpt", "a name.pt"])
@pytest.mark.parametrize("torch_save", [False, True])
def test_unconverted_weights_name_the_command(tmp_path: Path, name: str, torch_save: bool) -> None:
    path = tmp_path / name
    if torch_save:
        torch.save({"model": {"w": torch.zeros(2)}}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {"w": [0.0]}}))
    network = build_model(MODEL)
    for read in (load_weights, load_network, lambda path: load_initial(network, path, METADATA),
                 lambda path: load_backbone(network, path)):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"{name}: not a readable .*{CONVERT}'?{path}'? '?.*-converted"):
            read(path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hugging_face_folder_names_the_command_for_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "maskformer-swin"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, str(folder / name), metadata={"format": "pt"})
    with pytest.raises((CheckpointError, FileNotFoundError), match=rf"expected .*{CONVERT}{folder} {folder}-converted"):
        load_weights(folder)


def test_a_backbone_alone_names_its_option(tmp_path: Path) -> None:
    path = tmp_path / "r50.safetensors"
    save_file({"w": torch.zeros(2)}, str(path), metadata={"format": BACKBONE_FORMAT})
    with pytest.raises(CheckpointError, match=r"r50\.safetensors: .*got a backbone alone.*--model\.backbone\.weights"):
        load_weights(path)


def test_damage_of_ours_is_not_said_to_need_a_conversion(ours: Path) -> None:
    ours.write_bytes(ours.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"ours\.safetensors: not a readable checkpoint") as caught:
        load_weights(ours)
    assert "convert" not in str(caught.value)


def test_a_header_without_a_network_names_the_file(ours: Path) -> None:
    with_header(ours, config=json.dumps({"output": "runs/x"}))
    with pytest.raises(CheckpointError, match=r"ours\.safetensors: its configuration describes no network: model"):
        load_network(ours, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(ours: Path, value: float) -> None:
    tensors, header = parts_of(ours)
    name = "predictor.mask_embed.layers.0.weight"
    tensors[name][:2, 1] = value
    save_file(tensors, str(ours), metadata=header)
    network = build_model(MODEL)
    for load in (lambda: load_network(ours), lambda: load_initial(network, ours, METADATA)):
        with pytest.raises(CheckpointError, match=rf"ours\.safetensors: .*\n  not finite: {name}: 2 of 64 numbers"):
            load()
    tensors["backbone.norm0.bias"][0] = value
    save_file(tensors, str(ours), metadata=header)
    with pytest.raises(CheckpointError, match=r"ours\.safetensors: .*\n  not finite: norm0\.bias: 1 of 8"):
        load_backbone(network, ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": {"layers": 10**6}},
        {"pixel_decoder": {"encoder_layers": 10**6}},
        {"backbone": {"depths": [1, 1, 10**6, 1]}},
        {"backbone": {"window_size": 500}},
        {"backbone": {"embed_dim": 1 << 20}},
        {"decoder": {"num_queries": 10**8}},
        {"decoder": {"ffn_dim": 10**8}},
    ],
    ids=str,
)
def test_a_header_that_promises_a_large_network_takes_no_memory(ours: Path, changes: dict[str, Any]) -> None:
    config = dataclasses.asdict(Config(model=MODEL))
    for section, fields in changes.items():
        config["model"][section] |= fields
    with_header(ours, config=json.dumps(config))
    with at_most(300), pytest.raises(CheckpointError, match=r"ours\.safetensors: "):
        load_network(ours, "cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", "[" * 10**5 + "]" * 10**5),
        ("config", '{"model":' * 10**4 + "1" + "}" * 10**4),
        ("config", "[]"),
        ("config", "1e999"),
        ("config", "9" * 10**5),
        ("metadata", "[" * 10**5),
        ("metadata", "{}"),
        ("metadata", "null"),
        ("metadata", json.dumps({**dataclasses.asdict(METADATA), "class_names": [["a"], "b"]})),
        ("metadata", json.dumps({**dataclasses.asdict(METADATA), "is_thing": [1, 0]})),
        ("metadata", json.dumps({**dataclasses.asdict(METADATA), "colors": [[0, 0], [1, 1, 1]]})),
        ("metadata", json.dumps({**dataclasses.asdict(METADATA), "colors": [[0, 0, 256], [1, 1, 1]]})),
        ("metadata", json.dumps({**dataclasses.asdict(METADATA), "category_ids": [4, 4]})),
        ("step", "9" * 10**5),
        ("step", "one"),
        ("format", FORMAT + "\n"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_hostile_headers_are_refused(ours: Path, key: str, value: str) -> None:
    with_header(ours, **{key: value})
    with at_most(300), pytest.raises(CheckpointError, match=r"ours\.safetensors: "):
        load_weights(ours)


def test_more_names_than_the_network_has_classes_are_refused(ours: Path) -> None:
    three = Metadata("three", ("a", "b", "c"), (True,) * 3, (1, 2, 3), ((0, 0, 0),) * 3)
    with_header(ours, metadata=json.dumps(dataclasses.asdict(three)))
    with pytest.raises(CheckpointError, match=r"ours\.safetensors: metadata\.class_names: expected the 2 .*, got 3"):
        load_network(ours, "cpu")


def test_integers_in_the_place_of_weights_are_refused(ours: Path) -> None:
    tensors, header = parts_of(ours)
    save_file({name: tensor.int() for name, tensor in tensors.items()}, str(ours), metadata=header)
    name = r"backbone\.norm0\.bias"
    with pytest.raises(CheckpointError, match=rf"type: {name}: expected torch\.float32, got torch\.int32"):
        load_network(ours, "cpu")


def test_another_version_and_an_absent_key_are_named(ours: Path) -> None:
    tensors, header = parts_of(ours)
    save_file(tensors, str(ours), metadata={key: value for key, value in header.items() if key != "step"})
    with pytest.raises(CheckpointError, match=r"ours\.safetensors: expected step in the header, got none"):
        load_weights(ours)
    save_file(tensors, str(ours), metadata={**header, "format": "maskformer_fast/2"})
    with pytest.raises(CheckpointError, match=r"got maskformer_fast/2; it is of another version") as caught:
        load_weights(ours)
    assert "convert" not in str(caught.value)


def test_numbers_of_four_bits_are_refused(ours: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
                         "__metadata__": parts_of(ours)[1]}).encode()  # fmt: skip
    ours.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for read in (load_weights, lambda path: load_backbone(build_model(MODEL), path)):
        with pytest.raises(CheckpointError, match=r"ours\.safetensors: .*w: expected one of the types .*, got F4"):
            read(ours)


HEAVY = """
import sys, torch
heavy = ("torch._dynamo", "torch.distributed.tensor", "triton", "sympy")
before = [name for name in heavy if name in sys.modules]
from maskformer_fast.inference.load import load
predictor = load(sys.argv[1], "cpu")
predictor.predict(torch.zeros(3, 40, 50, dtype=torch.uint8))
print(before, [name for name in heavy if name in sys.modules])
"""


def test_prediction_does_not_import_the_compiler(ours: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HEAVY, str(ours)], capture_output=True, text=True, check=True)
    before, after = done.stdout.strip().split("] [")
    assert before + "]" == "[" + after


def test_names_and_shapes_on_the_meta_device_are_those_of_the_network() -> None:
    for kind in ("maskformer", "mask2former"):
        pixels = dataclasses.replace(MODEL.pixel_decoder, encoder_layers=1, encoder_heads=4)
        config = dataclasses.replace(MODEL, type=kind, pixel_decoder=pixels)
        with on_meta():
            skeleton = build_model(config).state_dict()
        real = build_model(config).state_dict()
        assert list(skeleton) == list(real) and all(tensor.is_meta for tensor in skeleton.values())
        assert [tensor.shape for tensor in skeleton.values()] == [tensor.shape for tensor in real.values()]
