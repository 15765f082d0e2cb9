"""Files of any content: no traceback, memory within `MEBIBYTES`, and the file's name in every error.

Each target mutates an undamaged file, in its structure and in its bytes, or makes one of the format's pieces. An error
that a command shows (``ValueError``, ``OSError``) is right, any other is a fault.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig, PixelDecoderConfig, TestConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.typed import to_plain
from maskformer_fast.deploy.bundle.folder import read_manifest
from maskformer_fast.deploy.bundle.manifest import DIGEST_KEY, MANIFEST_NAME, _canonical, _digest
from maskformer_fast.inference.load import load_network
from maskformer_fast.interop.files import read_weights
from maskformer_fast.interop.huggingface import read_folder, write_folder
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_weights, save_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training.checkpoints import saved_number
from maskformer_fast.training.run_log import RunLog
from tests.interop.test_archive import archive_of, entries_of
from tests.support.memory import at_most
from tests.support.tiny_bundle import tiny_bundle

MEBIBYTES = 400
"""Bound of the memory that any file here takes; each has less than 1 MiB."""
MODEL = ModelConfig(
    num_classes=2,
    backbone=BackboneConfig("swin_micro", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=8),
    decoder=DecoderConfig(layers=1, hidden_dim=8, num_heads=1, ffn_dim=8, num_queries=3),
)
EXAMPLES = [pytest.param(40, id="seconds"), pytest.param(400, id="minutes", marks=pytest.mark.slow)]
every_target = pytest.mark.parametrize("examples", EXAMPLES)

DEEP = st.sampled_from([100, 5000, 100000])
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([0, -1, 1 << 31, 1 << 62, 10**6, 10**30, 1e300, "", "a" * 5000, [], {}, [[]], {"a": {}}]),
    st.just([0] * 2000),
)  # fmt: skip
"""Values in the place of others."""


def fuzz(examples: int, strategy: st.SearchStrategy[bytes], path: Path, read: Callable[[Path], object]) -> None:
    """Write files of the strategy's contents and read them. Each is read, or refused by the file's name."""

    @settings(
        max_examples=examples, deadline=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck), derandomize=True, database=None,
    )  # fmt: skip
    @given(strategy)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with at_most(MEBIBYTES):
            try:
                read(path)
            except (ValueError, OSError) as error:
                assert path.name in str(error) or str(path.parent) in str(error), error

    check()


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with bytes changed, cut off or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(["set", "cut", "insert", "remove", "number"]))
        if kind == "set":
            changed[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(max_size=8))
        elif kind == "remove":
            del changed[place : place + draw(st.integers(1, 64))]
        else:
            changed[place : place + 8] = draw(st.sampled_from([2**63 - 1, 2**32, 2**40, 0])).to_bytes(8, "little")
    return bytes(changed)


def places_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every part of plain containers."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, (dict, list)):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [at, *(place for key, item in items for place in places_of(item, (*at, key)))]


@st.composite
def changed_value(draw: st.DrawFn, value: Any) -> Any:
    """Plain containers of JSON with parts replaced, removed or added."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in places_of(changed) if place]
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        target = changed
        for key in way:
            target = target[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove":
            del target[last]
        elif kind == "add" and isinstance(target, dict):
            target[draw(st.text(max_size=10))] = copy.deepcopy(draw(VALUES))
        else:
            target[last] = copy.deepcopy(draw(VALUES))  # later changes may go into it
    return changed


def nested(draw: st.DrawFn, opening: str, closing: str) -> str:
    depth = draw(DEEP)
    return opening * depth + closing * draw(st.sampled_from([depth, 0]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "ours.safetensors"
    metadata = Metadata("two", ("a", "b"), (True, False), (1, 2), ((0, 0, 0), (9, 9, 9)))
    torch.manual_seed(0)
    save_weights(path, build_model(MODEL), Config(model=MODEL), metadata, step=7)
    return path


@every_target
def test_bytes_of_a_checkpoint(tmp_path: Path, checkpoint: Path, examples: int) -> None:
    content = checkpoint.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    headers = changed_bytes(content[:size]).map(lambda start: start + content[size:])
    fuzz(examples, headers, tmp_path / "file.safetensors", lambda path: load_network(path, "cpu"))


@every_target
def test_header_of_a_checkpoint(tmp_path: Path, checkpoint: Path, examples: int) -> None:
    content = checkpoint.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    with safe_open(str(checkpoint), framework="pt") as reader:
        texts = reader.metadata()
    tensors = {name: entry for name, entry in json.loads(content[8:size]).items() if name != "__metadata__"}

    @st.composite
    def contents(draw: st.DrawFn) -> bytes:
        header = dict(texts)
        key = draw(st.sampled_from(["config", "metadata", "step", "tensors"]))
        if key in ("config", "metadata"):
            value = json.dumps(draw(changed_value(json.loads(texts[key]))))
            header[key] = draw(st.sampled_from([value, value, nested(draw, '{"model":', "}"), nested(draw, "[", "]")]))
        elif key == "step":
            header[key] = draw(st.text(max_size=10) | st.sampled_from(["9" * 5000, "-1", "1e3"]))
        entries = draw(changed_value(tensors)) if key == "tensors" else tensors
        start = json.dumps({"__metadata__": header, **entries}).encode()
        return len(start).to_bytes(8, "little") + start + content[size:]

    fuzz(examples, contents(), tmp_path / "file.safetensors", lambda path: load_network(path, "cpu"))


NAMED = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(4, dtype=torch.float64)}


@every_target
@pytest.mark.parametrize("kind", ["pickle", "torch", "old_torch"])
def test_bytes_of_others_weights(tmp_path: Path, kind: str, examples: int) -> None:
    if kind == "pickle":
        content = pickle.dumps({"model": {name: tensor.numpy() for name, tensor in NAMED.items()}, "iteration": 3})
    else:
        buffer = io.BytesIO()
        torch.save({"model": NAMED, "iteration": 3}, buffer, _use_new_zipfile_serialization=kind == "torch")
        content = buffer.getvalue()
    fuzz(examples, changed_bytes(content), tmp_path / "file.pth", read_weights)


@every_target
def test_pickles_in_an_archive(tmp_path: Path, examples: int) -> None:
    buffer = io.BytesIO()
    torch.save({"model": NAMED, "iteration": 3}, buffer)
    entries = entries_of(buffer.getvalue())
    [original] = [data for name, data in entries if name.endswith("data.pkl")]

    def archive(data: bytes) -> bytes:
        return archive_of([(name, data if name.endswith("data.pkl") else other) for name, other in entries])

    fuzz(examples, (changed_bytes(original) | pickles()).map(archive), tmp_path / "file.pth", read_weights)


@every_target
def test_operations_of_pickles(tmp_path: Path, examples: int) -> None:
    fuzz(examples, pickles(), tmp_path / "file.pkl", read_weights)


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Sequences of a pickle's operations, some of them many times."""
    names = ["__builtin__\nbytearray", "torch\nTensor", "torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage",
             "collections\nOrderedDict", "numpy\nndarray", "numpy.core.multiarray\n_reconstruct", "os\nsystem"]
    piece = st.one_of(
        st.sampled_from([b"(", b")", b"]", b"}", b"N", b"\x88", b"K\x01", b"\x85", b"\x86", b"\x87", b"t", b"l", b"d",
                         b"a", b"e", b"s", b"u", b"R", b"b", b"0", b"1", b"2", b"Q", b"\x81", b"\x8f", b"\x90"]),
        st.sampled_from([b"q\x00", b"h\x00", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f"]),
        st.sampled_from([b"J\xff\xff\xff\x7f", b"X\x01\x00\x00\x00w", b"\x8e" + b"\xff" * 8,
                         b"\x96" + (2**40).to_bytes(8, "little"), b"\x8b" + b"\xff" * 4]),
        st.sampled_from([b"c" + name.encode() + b"\n" for name in names]),
        st.integers(-(2**70), 2**70).map(lambda number: pickle.dumps(number, 2)[2:-1]),
        st.sampled_from([b"\x85", b"]", b"(", b"2", b"K\x01\x86"]).map(lambda operation: operation * 50000),
    )  # fmt: skip
    return b"\x80\x02" + b"".join(draw(st.lists(piece, max_size=14))) + b"."


@every_target
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_json_of_hugging_face_folders(tmp_path: Path, checkpoint: Path, name: str, examples: int) -> None:
    config, metadata, weights, _ = load_weights(checkpoint)
    folder = tmp_path / "model"
    write_folder(folder, weights, config, metadata)
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").rename(folder / "x.safetensors")
        values: Any = {"metadata": {}, "weight_map": dict.fromkeys(list(weights)[:3], "x.safetensors")}
    else:
        values = json.loads((folder / name).read_bytes())

    @st.composite
    def texts(draw: st.DrawFn) -> bytes:
        return nested(draw, *draw(st.sampled_from([("[", "]"), ('{"size":', "}")]))).encode()

    content = json.dumps(values).encode()
    strategy = changed_value(values).map(lambda data: json.dumps(data).encode()) | changed_bytes(content) | texts()
    fuzz(examples, strategy, folder / name, lambda path: read_folder(path.parent))


@every_target
@pytest.mark.parametrize("name", ["log.jsonl", "metrics.json", "best.json"])
def test_side_files_of_a_run_are_read_or_taken_for_absent(tmp_path: Path, name: str, examples: int) -> None:
    content = {"step": 4, "score": 0.5, "loss": 1.0}

    def read(path: Path) -> None:
        if name == "log.jsonl":
            RunLog(path.parent, 2, tensorboard=False).close()
            assert all(json.loads(line)["step"] <= 2 for line in path.read_text().splitlines())
            for aside in path.parent.glob("damaged_*"):
                aside.unlink()
        else:
            saved_number(path, "step")
            saved_number(path, "score")

    lines = "\n".join(json.dumps({**content, "step": step}) for step in range(4)).encode()
    strategy = changed_value(content).map(lambda data: json.dumps(data).encode()) | changed_bytes(lines)
    fuzz(examples, strategy, tmp_path / name, read)


RECIPE = {"base": "small", "model": {"decoder": {"layers": 3}, "pixel_mean": [1.0, 2.0, 3.0]}, "solver": {"lr": 1e-4}}


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """YAML: changed values, pieces of the language, deep nests, and anchors that refer to anchors."""
    kind = draw(st.sampled_from(["values", "all values", "pieces", "bytes", "deep", "aliases", "merges"]))
    if kind == "values":
        return yaml.safe_dump(draw(changed_value(RECIPE))).encode()
    if kind == "all values":
        return yaml.safe_dump(draw(changed_value(to_plain(Config())))).encode()
    if kind == "bytes":
        return draw(changed_bytes(yaml.safe_dump(RECIPE).encode()))
    if kind == "deep":
        return nested(draw, *draw(st.sampled_from([("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")]))).encode()
    if kind in ("aliases", "merges"):
        width, one = draw(st.sampled_from([2, 10])), "k0: &a0 {x: 1, y: 2}\n"
        value = "[{}]" if kind == "aliases" else "{{<<: [{}], z{}: 1}}"
        lines = [f"k{i}: &a{i} " + value.format(", ".join([f"*a{i - 1}"] * width), i) for i in range(1, 25)]
        return (one + "\n".join(lines) + "\n" + draw(st.sampled_from(["", "model: *a24\n", "base: *a24\n"]))).encode()
    pieces = ["a", ": ", "- ", "\n", "  ", "[", "]", "{", "}", "&x ", "*x", "!!int ", "!!float ", "!!bool ",
              "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!python/object:os.system ", "<<: ", "? ", "| ", "'",
              '"', "#", "%YAML 9.9\n", "---\n", "2001-13-45", "0x" + "f" * 5000, "9" * 5000, "1:99:1", "model",
              "solver", "base", "\t", "\ufeff", "\0"]
    return "".join(draw(st.lists(st.sampled_from(pieces), max_size=12))).encode()


@every_target
def test_recipes(tmp_path: Path, examples: int) -> None:
    fuzz(examples, recipes(), tmp_path / "file.yaml", load_recipe)


@every_target
def test_manifests_of_bundles(tmp_path: Path, examples: int) -> None:
    folder = tmp_path / "bundle"
    tiny_bundle(folder, TestConfig(short_edge=None))
    content = (folder / MANIFEST_NAME).read_bytes()
    values = json.loads(content)
    del values[DIGEST_KEY]

    def signed(data: Any) -> bytes:
        try:
            return _canonical({**data, DIGEST_KEY: _digest(data)})
        except ValueError:  # NaN
            return json.dumps(data).encode()

    @st.composite
    def texts(draw: st.DrawFn) -> bytes:
        return nested(draw, *draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))).encode()

    strategy = changed_value(values).map(signed) | changed_bytes(content) | texts()
    fuzz(examples, strategy, folder / MANIFEST_NAME, lambda path: read_manifest(path.parent))
