"""The model repository against the server's own schema, its documented rules, and the graphs that are served."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2 as schema

from maskformer_fast.core.metadata import Metadata
from maskformer_fast.deploy.bundle.folder import Bundle, extend_bundle, write_bundle
from maskformer_fast.deploy.bundle.manifest import (
    BundleError,
    Engine,
    Graph,
    Manifest,
    Postprocess,
    Preprocess,
    Profile,
    Shape,
    TensorSpec,
)
from maskformer_fast.deploy.triton_server import __main__ as command
from maskformer_fast.deploy.triton_server import config as config_module
from maskformer_fast.deploy.triton_server import repository as repository_module
from maskformer_fast.deploy.triton_server.options import TritonServerOptions
from maskformer_fast.deploy.triton_server.repository import write_repository

FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "python": ""}
KINDS = {"tensor(uint8)": "TYPE_UINT8", "tensor(int32)": "TYPE_INT32", "tensor(float)": "TYPE_FP32"}
CLASSES = ("road", 'a "car"', "Straße")
METADATA = Metadata("tiny", CLASSES, (False, True, False), (7, 8, 11), ((0, 0, 0),) * 3)
BATCH, HEIGHT, WIDTH = "batch", "height", "width"


def network(batch: int | str, size: tuple[int | str, int | str]) -> tuple[bytes, Graph]:
    """Graph of the brightest channel, in the place of a trained graph."""
    images, labels = TensorSpec("images", "uint8", (batch, 3, *size)), TensorSpec("labels", "int32", (batch, *size))
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ArgMax", ["floats"], ["best"], axis=1, keepdims=0),
        helper.make_node("Cast", ["best"], ["labels"], to=TensorProto.INT32),
    ]
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("images", TensorProto.UINT8, images.shape)],
        [helper.make_tensor_value_info("labels", TensorProto.INT32, labels.shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content, Graph("complete.onnx", (images,), (labels,), 20, not isinstance(batch, int))


def tiny_bundle(folder: Path, batch: int | str = BATCH, size: tuple[int | str, int | str] = (HEIGHT, WIDTH)) -> Bundle:
    content, complete = network(batch, size)
    low = (HEIGHT + "4", WIDTH + "4") if isinstance(size[0], str) else (16, 16)
    outputs = (
        TensorSpec("class_logits", "float32", (batch, 5, 4)), TensorSpec("mask_logits", "float32", (batch, 5, *low)),
    )  # fmt: skip
    raw = replace(complete, file="raw.onnx", outputs=outputs)
    manifest = Manifest(
        "Tiny net/ö", {"maskformer_fast": "0"}, 5, 3, METADATA, Preprocess((0.0,) * 3, (1.0,) * 3, None, 99, 32),
        Postprocess(0.8, 0.8, 100, "maskformer"), {"complete": complete, "raw": raw},
    )  # fmt: skip
    return write_bundle(folder, manifest, {"complete.onnx": content, "raw.onnx": b"raw"})


def with_engine(
    bundle: Bundle, name: str, api: str = "tensorrt", low: tuple[int, int, int] = (1, 64, 64),
    best: tuple[int, int, int] = (4, 64, 64), high: tuple[int, int, int] = (6, 64, 96),
) -> Bundle:  # fmt: skip
    outputs = tuple(replace(spec, dtype="float16") for spec in bundle.manifest.graphs["raw"].outputs)
    engine = Engine(
        f"engines/{name}.engine", api, "10.3", "fp16", ("sm_87",), Profile(Shape(*low), Shape(*best), Shape(*high)), {},
        outputs,
    )  # fmt: skip
    return extend_bundle(bundle, {engine.file: name.encode()}, engines=(*bundle.manifest.engines, engine))


def options(folder: Path, **more: object) -> TritonServerOptions:
    return TritonServerOptions("unused", output=str(folder / "models"), **more)  # type: ignore[arg-type]


def served(folder: Path, version: int = 1) -> schema.ModelConfig:
    """The configuration, checked against the schema and the rules of the server's documentation."""
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.name == folder.name
    assert sorted(path.name for path in folder.iterdir()) == [str(version), "config.pbtxt"]
    assert config.platform == PLATFORMS[config.backend]
    assert (folder / str(version) / FILES[config.backend]).is_file()
    assert config.input and config.output
    for tensor in (*config.input, *config.output):
        assert tensor.data_type != schema.TYPE_INVALID
        assert tensor.dims and all(size == -1 or size > 0 for size in tensor.dims)
    assert len({tensor.name for tensor in config.output}) == len(config.output)
    assert config.max_batch_size >= 0
    if config.HasField("dynamic_batching"):
        assert config.max_batch_size > 1
        assert all(0 < size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size)
    (group,) = config.instance_group
    assert group.count >= 1 and group.kind in (schema.ModelInstanceGroup.KIND_GPU, schema.ModelInstanceGroup.KIND_CPU)
    return config


def shape_with_batch(config: schema.ModelConfig, tensor: schema.ModelInput | schema.ModelOutput) -> list[int]:
    """Shape of a tensor as the server's documentation forms it."""
    return [-1] * (config.max_batch_size > 0) + list(tensor.dims)


@pytest.mark.parametrize(
    ("batch", "size", "max_batch"),
    [(BATCH, (HEIGHT, WIDTH), 8), (BATCH, (64, 64), 8), (2, (64, 64), 0), (1, (64, 64), 0), (BATCH, (HEIGHT, 64), 1)],
)
def test_onnx_model_runs_as_its_configuration_says(
    batch: int | str, size: tuple[int | str, int | str], max_batch: int, tmp_path: Path
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", batch, size)
    folder = write_repository(bundle, options(tmp_path, max_batch=max_batch or 8, device="cpu"))
    config = served(folder)
    assert folder.name == "Tiny-net-complete" and config.max_batch_size == max_batch
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    for tensors, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in tensors] == [one.name for one in real]
        assert [schema.DataType.Name(tensor.data_type) for tensor in tensors] == [KINDS[one.type] for one in real]
        shapes = [[-1 if isinstance(size, str) else size for size in one.shape] for one in real]
        assert [shape_with_batch(config, tensor) for tensor in tensors] == shapes
    shape = [size if size > 0 else free for size, free in zip(shape_with_batch(config, config.input[0]), (3, 0, 17, 23),
                                                              strict=True)]  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (labels,) = session.run([config.output[0].name], {config.input[0].name: images})
    np.testing.assert_array_equal(labels, images.argmax(axis=1))


def test_settings_are_written(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    more = {"queue_delay_us": 300, "instances": 2, "response_cache": True, "version": 7, "model": "raw", "max_batch": 4}
    folder = write_repository(bundle, options(tmp_path, name="a.b_c-D", **more))
    config = served(folder, version=7)
    assert config.dynamic_batching.max_queue_delay_microseconds == 300 and config.response_cache.enable
    assert config.instance_group[0].count == 2
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    assert [(t.name, shape_with_batch(config, t)) for t in config.output] == [
        ("class_logits", [-1, 5, 4]), ("mask_logits", [-1, 5, -1, -1]),
    ]  # fmt: skip
    assert (folder / "7" / "model.onnx").read_bytes() == b"raw"
    single = served(write_repository(bundle, options(tmp_path, name="single", max_batch=1)))
    assert single.max_batch_size == 1 and not single.HasField("dynamic_batching")


def test_an_engine_is_served_within_its_profile(tmp_path: Path) -> None:
    bundle = with_engine(tiny_bundle(tmp_path / "bundle"), "orin")
    folder = write_repository(bundle, options(tmp_path, model="engine"))
    config = served(folder)
    assert folder.name == "Tiny-net-engine" and (folder / "1" / "model.plan").read_bytes() == b"orin"
    assert config.max_batch_size == 6 and list(config.dynamic_batching.preferred_batch_size) == [4]
    assert list(config.input[0].dims) == [3, 64, -1], "the profile fixes the height"
    assert {tensor.data_type for tensor in config.output} == {schema.TYPE_FP16}
    fewer = served(write_repository(bundle, options(tmp_path, model="engine", max_batch=2, name="fewer")))
    assert fewer.max_batch_size == 2 and list(fewer.dynamic_batching.preferred_batch_size) == [2]
    batches = with_engine(tiny_bundle(tmp_path / "batches"), "batches", low=(2, 64, 64))
    config = served(write_repository(batches, options(tmp_path, model="engine", name="batches")))
    assert config.max_batch_size == 0 and list(config.input[0].dims) == [-1, 3, 64, -1], "no single images"


def test_the_engine_is_chosen_by_name(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    with pytest.raises(ValueError, match=r"expected a bundle with an engine \(.*--engine-only"):
        write_repository(bundle, options(tmp_path, model="engine"))
    bundle = with_engine(bundle, "desktop", api="tensorrt_rtx")
    for name in (None, "desktop.engine"):
        with pytest.raises(ValueError, match="engine: expected one of tensorrt, .* got those of tensorrt_rtx"):
            write_repository(bundle, options(tmp_path, model="engine", engine=name))
    bundle = with_engine(bundle, "orin")
    assert served(write_repository(bundle, options(tmp_path, model="engine"))).max_batch_size == 6
    bundle = with_engine(bundle, "thor", high=(4, 64, 64))
    with pytest.raises(ValueError, match=r"name of one of \['orin.engine', 'thor.engine'\]"):
        write_repository(bundle, options(tmp_path, model="engine", name="two"))
    with pytest.raises(ValueError, match="engine: expected one of the bundle's .*got 'xavier.engine'"):
        write_repository(bundle, options(tmp_path, model="engine", engine="xavier.engine"))
    assert served(write_repository(bundle, options(tmp_path, model="engine", engine="thor.engine", name="thor")))


def test_other_models_and_versions_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    folder = write_repository(bundle, options(tmp_path))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="expected a new version"):
        write_repository(bundle, options(tmp_path))
    with pytest.raises(FileExistsError, match="of the same configuration"):
        write_repository(bundle, options(tmp_path, version=2, instances=3))
    assert write_repository(bundle, options(tmp_path, version=2)) == folder
    assert {path.name for path in folder.iterdir()} == {"1", "2", "config.pbtxt"}
    assert all(path.read_bytes() == content for path, content in before.items())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(repository_module.os, "fsync", fail)
    for more in ({"version": 3}, {"name": "another"}):
        with pytest.raises(OSError, match="disk full"):
            write_repository(bundle, options(tmp_path, **more))
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}, "no partial model is left"
    assert {path.name for path in folder.iterdir()} == {"1", "2", "config.pbtxt"}


def test_a_bundle_that_changed_is_refused(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    (bundle.folder / "complete.onnx").write_bytes(b"x" * bundle.manifest.files["complete.onnx"].bytes)
    with pytest.raises(BundleError, match="SHA-256"):
        write_repository(bundle, options(tmp_path))
    assert not list((tmp_path / "models").glob("*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"name": "../escape"}, "name: expected letters"), ({"name": ".hidden"}, "name: expected letters"),
        ({"name": ""}, "name: expected letters"), ({"version": 0}, "version: expected 1 at least, got 0"),
        ({"max_batch": 0}, "max_batch: expected 1"), ({"instances": 0}, "instances: expected 1"),
        ({"queue_delay_us": -1}, "queue_delay_us: expected 0"), ({"model": "engine", "device": "cpu"}, "device: exp"),
        ({"engine": "a.engine"}, "engine: expected none with --model complete"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(more: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **more)


@given(st.text())
def test_text_format_keeps_any_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate is no text
        return
    written = config_module.text_format([("name", text), ("parameters", [("key", text)])])
    assert text_format.Parse(written, schema.ModelConfig()).name == text


def test_a_repository_inside_a_bundle_is_refused(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    for place in (bundle.folder, bundle.folder / "models"):
        with pytest.raises(ValueError, match="output: expected a folder outside of the bundle"):
            command.main([str(bundle.folder), "-o", str(place), "--model", "raw"])
    Bundle.open(bundle.folder)


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxruntime", "tensorrt", "google", "tritonclient"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from maskformer_fast.deploy.triton_server.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_command_runs_without_torch(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    arguments = [str(bundle.folder), "-o", str(tmp_path / "models"), "--model", "results"]
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert f"--model-repository={tmp_path / 'models'}" in result.stdout
    config = served(tmp_path / "models" / "Tiny-net-results")
    assert config.parameters["task"].string_value == "semantic"
    wrong = subprocess.run([*command, "--digest", "0" * 64, "--name", "b"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode != 0 and "digest: expected 0000" in wrong.stderr
