"""Tensors from pickles, torch files, safetensors and shards; hostile, damaged and foreign files are refused."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from maskformer_fast.interop.files import FOLDER_FILES, read_folder_weights, read_weights
from maskformer_fast.interop.names import ConvertError

WEIGHTS = {
    "a.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a.bias": torch.randn(5, generator=torch.Generator().manual_seed(1)).double(),
    "b.half": torch.tensor([[0.5, -2.0]], dtype=torch.float16),
    "b.count": torch.tensor(3),
    "b.index": torch.arange(6, dtype=torch.int32).reshape(2, 3),
}
FLOAT32 = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in WEIGHTS.items()}


class Trap:
    """A pickle that makes a folder when it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
        assert got[name].is_contiguous()


def write(path: Path, weights: dict[str, Tensor], kind: str, wrapper: str | None) -> None:
    content: dict[str, Any] = dict(weights)
    if kind == "pickle":
        content = {name: tensor.numpy() for name, tensor in weights.items()}
    if wrapper:
        content = {wrapper: content, "iteration": 7, "__author__": "us"}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "safetensors":
        save_file(weights, str(path))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "old_torch", "safetensors"])
@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "model_without_suffix"])
def test_the_content_decides_the_kind_of_a_file(tmp_path: Path, kind: str, wrapper: str | None, name: str) -> None:
    write(tmp_path / name, WEIGHTS, kind, wrapper if kind != "safetensors" else None)
    assert_same(read_weights(tmp_path / name), FLOAT32)


def test_tensors_do_not_share_memory_with_the_file(tmp_path: Path) -> None:
    write(tmp_path / "model.pkl", WEIGHTS, "pickle", "model")
    read_weights(tmp_path / "model.pkl")["a.weight"].add_(1)  # not a view of the file's bytes
    views = {"matrix": torch.arange(12.0).reshape(3, 4)}
    views["column"] = views["matrix"][:, 1]
    torch.save(views, tmp_path / "views.pth")
    got = read_weights(tmp_path / "views.pth")
    assert torch.equal(got["column"], torch.tensor([1.0, 5.0, 9.0])) and got["column"].is_contiguous()


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_values_of_a_training_state_beside_the_weights_are_passed_over(tmp_path: Path, zipped: bool) -> None:
    state = {"best": np.float64(3.5), "step": np.int64(7), "random": ("MT19937", np.arange(624, dtype=np.uint32), 3)}
    content = {"meta": state, "state_dict": WEIGHTS}
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_weights(tmp_path / "m.pth"), FLOAT32)
    torch.save({"w": np.float64(3.5)}, tmp_path / "n.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConvertError, match=r"(?s)n\.pth.*w: a number or array of NumPy"):
        read_weights(tmp_path / "n.pth")


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.5, -3.0], dtype=torch.bfloat16)}, str(tmp_path / "w.safetensors"))
    assert_same(read_weights(tmp_path / "w.safetensors"), {"w": torch.tensor([1.5, -3.0])})


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    for number, names in ((1, ["a.weight", "b.count"]), (2, ["a.bias", "b.half", "b.index"])):
        write(tmp_path / f"part-{number}.safetensors", {name: WEIGHTS[name] for name in names}, "safetensors", None)
    index = tmp_path / "model.safetensors.index.json"
    files = {name: f"part-{1 if name in ('a.weight', 'b.count') else 2}.safetensors" for name in WEIGHTS}
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_same(read_folder_weights(tmp_path), FLOAT32)
    for wrong, message in (
        ({**files, "c": "part-1.safetensors"}, "expected the shards to hold c"),
        ({**files, "a.bias": "../part-2.safetensors"}, "files beside the index"),
        ({**files, "a.bias": "/etc/passwd"}, "files beside the index"),
        ({**files, "a.bias": "part-3.safetensors"}, "shard part-3.safetensors: no such file"),
        ({**files, "a.bias": "model.safetensors.index.json"}, "files beside the index"),
        ({**files, "a.bias": 3}, "not a readable index|files beside"),
        ([1], "not a readable index"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ConvertError, match=message):
            read_weights(index)
    index.write_text("{")
    with pytest.raises(ConvertError, match="not a readable index"):
        read_weights(index)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"{number}.bin", WEIGHTS, "torch", None)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a.bias": "1.bin", "a.weight": "2.bin"}}))
    with pytest.raises(ConvertError, match=r"shard 2\.bin: .*in another shard"):
        read_weights(index)


@pytest.mark.parametrize("name", [name for name in FOLDER_FILES if "index" not in name])
def test_a_folders_weights_are_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin"):
        read_folder_weights(tmp_path)
    write(tmp_path / name, WEIGHTS, "safetensors" if name.endswith("safetensors") else "torch", None)
    assert_same(read_folder_weights(tmp_path), FLOAT32)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "model.model."]
)
def test_a_prefix_of_all_names_is_taken_off_and_said(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "model.pth", {prefix + name: tensor for name, tensor in WEIGHTS.items()}, "torch", "state_dict")
    with caplog.at_level("INFO"):
        assert_same(read_weights(tmp_path / "model.pth"), FLOAT32)
    assert f"model.pth: all names begin with {prefix!r}, which was taken off" in caplog.text


NETWORK = {
    "backbone.stem.conv1.weight": torch.ones(2),
    "backbone.res2.0.conv1.weight": torch.full((2,), 2.0),
    "sem_seg_head.predictor.class_embed.weight": torch.full((2,), 3.0),
}


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        (lambda name: name.replace("backbone.", "backbone._orig_mod."), "'_orig_mod.' taken out of 2 names"),
        (lambda name: name.replace("res2.", "module.res2.module."), "'module.' taken out of 1 names"),
        (lambda name: name.replace("backbone.", "_fsdp_wrapped_module.backbone._checkpoint_wrapped_module."),
         "'_fsdp_wrapped_module.' and '_checkpoint_wrapped_module.' taken out of 2 names"),
        (lambda name: f"{'_orig_mod.' * ('res2' in name)}model.{name}", "all names begin with 'model.'"),
        (lambda name: f"student.net.{name}", "took the names that begin with 'student.net.'"),
    ],
)
def test_what_wrappers_add_to_some_names_or_others_to_all_is_taken_out_and_said(
    tmp_path: Path, renamed: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "model.pth", {renamed(name): tensor for name, tensor in NETWORK.items()}, "torch", "state_dict")
    with caplog.at_level("INFO"):
        assert_same(read_weights(tmp_path / "model.pth"), NETWORK)
    assert said in caplog.text


def test_tensors_beside_a_network_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {f"model.{name}": tensor for name, tensor in NETWORK.items()} | {"val_iou.confmat": torch.ones(3, 3)}
    write(tmp_path / "model.ckpt", names, "torch", "state_dict")
    with caplog.at_level("INFO"):
        assert_same(read_weights(tmp_path / "model.ckpt"), NETWORK)
    assert "begin with 'model.', without that; left out 1 others: val_iou.confmat" in caplog.text


def test_two_networks_in_a_file_are_refused(tmp_path: Path) -> None:
    names = {f"{prefix}.{name}": tensor for name, tensor in NETWORK.items() for prefix in ("student", "teacher")}
    write(tmp_path / "model.pth", names, "torch", None)
    with pytest.raises(ConvertError, match=r"expected one network, got 2, .*'student\.', 'teacher\.': save one"):
        read_weights(tmp_path / "model.pth")


def test_parts_of_wrappers_stay_where_two_names_would_become_one(tmp_path: Path) -> None:
    names = {"a.module.w": torch.ones(1), "a.w": torch.zeros(1)}
    write(tmp_path / "model.pth", names, "torch", None)
    assert_same(read_weights(tmp_path / "model.pth"), names)


def test_a_prefix_of_some_names_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {f"model.{name}" if name.startswith("a.") else name: tensor for name, tensor in WEIGHTS.items()}
    write(tmp_path / "model.pth", names, "torch", None)
    with caplog.at_level("INFO"):
        assert read_weights(tmp_path / "model.pth").keys() == names.keys()
    assert "taken off" not in caplog.text


def test_a_prefix_of_one_shard_alone_stays(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", {"model.w": torch.ones(2)}, "safetensors", None)
    write(tmp_path / "2.safetensors", {"head.w": torch.ones(3)}, "safetensors", None)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.w": "1.safetensors", "head.w": "2.safetensors"}}))
    assert read_weights(index).keys() == {"model.w", "head.w"}
    index.write_text(json.dumps({"weight_map": {"model.w": "1.safetensors"}}))
    assert read_weights(index).keys() == {"w"}
    index.write_text(json.dumps({"weight_map": {}}))
    assert read_weights(index) == {}


@pytest.mark.parametrize("keys", [["model_state_dict"], ["model_state"], ["state", "model"], ["weights"], ["net"],
                                  ["ema"], ["model_ema"], ["ema_state_dict", "module"]])
def test_usual_wrappers_are_opened(tmp_path: Path, keys: list[str]) -> None:
    content: dict[str, Any] = dict(WEIGHTS)
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "model.pth")
    assert_same(read_weights(tmp_path / "model.pth"), FLOAT32)


def test_a_dictionary_under_another_key_is_refused_with_the_keys_that_are_opened(tmp_path: Path) -> None:
    torch.save({"generator": {"w": torch.zeros(2)}}, tmp_path / "model.pth")
    with pytest.raises(ConvertError, match=r"(?s)generator: an object of type dict.*key is one of model, "):
        read_weights(tmp_path / "model.pth")


def test_a_dictionary_that_contains_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ConvertError, match="model: an object of type dict"):
        read_weights(tmp_path / "model.pkl")


@pytest.mark.parametrize(("kind", "bits"), [("F4", 4), ("F8_E4M3", 8), ("F8_E5M2", 8), ("C64", 64), ("U16", 16)])
def test_quantised_and_unusual_numbers_are_refused(tmp_path: Path, kind: str, bits: int) -> None:
    data = bytes(64 * bits // 8)
    header = json.dumps({"w": {"dtype": kind, "shape": [64], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(ConvertError, match=rf"w\.safetensors: .*w: expected one of the types .*, got {kind}"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["pickle", "torch", "old_torch"])
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, kind: str, deep: bool) -> None:
    trap = Trap(tmp_path / "trap")
    fine = np.zeros(2) if kind == "pickle" else torch.zeros(2)
    content = {"model": {"w": fine}, "x": [{"y": trap}] if deep else trap}
    path = tmp_path / "model.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(ConvertError, match=r"model\.pth: refused: .*imports posix\.mkdir") as caught:
        read_weights(path)
    assert "weights_only" not in str(caught.value), "no advice to switch the protection off"
    assert not (tmp_path / "trap").exists()


def test_torch_tensors_in_a_plain_pickle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {"w": torch.zeros(2)}}))
    with pytest.raises(ConvertError, match=r"refused: the pickle imports torch\._utils\._rebuild_tensor_v2"):
        read_weights(tmp_path / "model.pkl")


def test_memory_bombs_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "expanded.pth")
    with pytest.raises(ConvertError, match="same memory again and again"):
        read_weights(tmp_path / "expanded.pth")
    one = torch.zeros(1000)
    torch.save({str(index): one for index in range(1000)}, tmp_path / "shared.pth")
    (tmp_path / "shared.pkl").write_bytes(pickle.dumps(dict.fromkeys(map(str, range(1000)), one.numpy())))
    for name in ("shared.pth", "shared.pkl"):
        with pytest.raises(ConvertError, match="same memory again and again"):
            read_weights(tmp_path / name)
    torch.save({"w": torch.zeros(100)}, tmp_path / "plain.pth")
    plain = zipfile.ZipFile(tmp_path / "plain.pth")
    with plain as source, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for item in source.namelist():
            packed.writestr(item, source.read(item))
    with pytest.raises(ConvertError, match="compressed archive"):
        read_weights(tmp_path / "packed.pth")


@pytest.mark.parametrize(
    "value", [torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta"), "text", 3]
)
def test_values_that_are_no_plain_tensors_are_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"fine": torch.zeros(1), "odd": value}, tmp_path / "model.pth")
    with pytest.raises(ConvertError, match=r"odd: (an object of type|a tensor that is not a plain one)"):
        read_weights(tmp_path / "model.pth")


@pytest.mark.parametrize("kind", ["pickle", "torch", "old_torch", "safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.pth"
    write(path, WEIGHTS, kind, None)
    content = path.read_bytes()
    for end in (0, 1, 2, 9, 17, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(ConvertError, match=r"model\.pth: "):
            read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a text\n", "not a readable pickle"),
        (b"hello\n", "not a readable pickle: Memo value not found"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (pickle.dumps({"w": np.array([1.0, 1e300])}), "w: numbers too large for float32"),
        (b"<!DOCTYPE html>", "got HTML or XML"), (b'{"error": 1}', "got JSON"), (b"\x1f\x8b\x08", "unpack it first"),
        (b"\x89HDF\r\n", "HDF5"), (b"\x08\x07\x12\x07pytorch", "perhaps ONNX"),
        (b"PK\x03\x04 but no archive", "not a readable file of torch.save"),
        (pickle.dumps([1, 2]), "expected a dictionary of named tensors, got list"),
        (pickle.dumps({}), "empty dictionary"),
        (pickle.dumps({"model": {}}), "empty dictionary"),
        (pickle.dumps({3: np.zeros(1), "\x1b[2J": np.zeros(1)}), r"(?s)3: expected a .*'\\x1b\[2J': expected"),
        (pickle.dumps({"w": 1, "v": "x"}), "(?s)w: an object of type int.*v: an object of type str"),
    ],
)
def test_files_without_weights_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(ConvertError, match=message):
        read_weights(tmp_path / "model.pkl")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "missing.pkl")
    with pytest.raises(ConvertError, match="got a folder"):
        read_weights(tmp_path)
