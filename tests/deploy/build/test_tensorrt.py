"""Engines: options, profiles and errors with a stand-in library; real builds by TensorRT for RTX, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from onnx import helper

from maskformer_fast.deploy.build.deformable_attention import PLUGIN
from maskformer_fast.deploy.build.tensorrt import (
    EngineConfig,
    EngineError,
    build_engine,
    make_profile,
    plugin_version,
    select_api,
)
from maskformer_fast.deploy.build.tensorrt_worker import Progress
from maskformer_fast.deploy.bundle.manifest import Shape
from tests.support.attention_graph import graph_with_attention
from tests.support.graphs import raw_graph
from tests.support.paths import ROOT

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed (pip install maskformer_fast[rtx])")
SHAPES = {"min_shape": (1, 64, 64), "opt_shape": (1, 128, 160), "max_shape": (2, 256, 256)}


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A fake library ``tensorrt`` and GPU of compute capability 8.7, for this process and its children."""
    (tmp_path / "tensorrt").mkdir()
    shutil.copy(ROOT / "tests/support/fake_tensorrt.py", tmp_path / "tensorrt" / "__init__.py")
    (tmp_path / "cuda" / "bindings").mkdir(parents=True)
    for package in ("cuda", "cuda/bindings"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "cuda" / "bindings" / "driver.py").write_text(
        "from enum import Enum\n"
        "CUdevice_attribute = Enum('A', {'CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR': 8,"
        " 'CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR': 7})\n"
        "def cuInit(flags): return (0,)\n"
        "def cuDeviceGetAttribute(which, device): return (0, which.value)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return monkeypatch


def build(**options: object) -> tuple[dict[str, object], object]:
    """Build the small graph with the stand-in library -> the options that reached it, and the engine's entry."""
    content, engine = build_engine(raw_graph().SerializeToString(), EngineConfig(**options), progress=False)  # type: ignore[arg-type]
    return json.loads(content), engine


@pytest.mark.parametrize("bare", [False, True])
def test_every_option_reaches_the_library(tensorrt: pytest.MonkeyPatch, bare: bool) -> None:
    """The engine's entry in the manifest has the options, too."""
    tensorrt.setenv("FAKE_TENSORRT", "bare" if bare else "")
    told, engine = build(
        precision="fp16", builder_level=5, workspace_mib=256, refittable=True, version_compatible=not bare,
        mask_dtype="float16", **SHAPES,
    )
    assert told["level"] == 5
    assert told["WORKSPACE"] == 256 << 20
    # TF32 is cleared. An engine that allocates while it runs could not be captured as a CUDA graph.
    assert told["flags"] == ([] if bare else ["REQUIRE_USER_ALLOCATION", "VERSION_COMPATIBLE"]) + ["REFIT"]
    assert told["network_flags"] == (0 if bare else 2)
    assert told["profile"] == {"images": [[1, 3, 64, 64], [1, 3, 128, 160], [2, 3, 256, 256]]}
    assert (engine.api, engine.api_version, engine.targets) == ("tensorrt", "11.0.0", ("sm_87",))
    assert engine.file == "engines/fp16_2x256x256_sm_87.engine"
    assert engine.options == {
        "builder_level": 5, "workspace_mib": 256, "refittable": True, "version_compatible": not bare, "loaded": True
    }
    assert [(o.name, o.dtype, o.shape) for o in engine.outputs] == [
        ("class_logits", "float32", ("b", 16, 11)), ("mask_logits", "float16", ("b", 16, "h/4", "w/4"))
    ]


def test_default_options(tensorrt: pytest.MonkeyPatch) -> None:
    told, engine = build(precision="fp32")
    assert told["flags"] == ["REQUIRE_USER_ALLOCATION"] and "WORKSPACE" not in told
    assert told["profile"] == {"images": [[1, 3, 256, 256], [1, 3, 512, 512], [1, 3, 1024, 1024]]}
    assert engine.precision == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_plugin_of_deformable_attention_is_registered_and_parsed(
    tensorrt: pytest.MonkeyPatch, precision: str
) -> None:
    graph = graph_with_attention()
    gathers, plugin = (
        build_engine(graph, EngineConfig(precision=precision, deformable_attention=way, **SHAPES), progress=False)  # type: ignore[arg-type]
        for way in ("gathers", "plugin")
    )
    assert json.loads(gathers[0])["plugins"] == [] and "deformable_attention" not in gathers[1].options
    assert json.loads(plugin[0])["plugins"] == [[PLUGIN, plugin_version()]]
    assert plugin[1].options["deformable_attention"] == "plugin"
    with pytest.raises(EngineError, match="deformable_attention: expected gathers: this network has none"):
        build(precision=precision, deformable_attention="plugin")
    unregistered = {"deformable_attention": ""}
    tensorrt.setattr("maskformer_fast.deploy.build.tensorrt.asdict", lambda config: asdict(config) | unregistered)
    with pytest.raises(EngineError, match=f"cannot translate the graph:\n  {PLUGIN}"):  # where it is not registered
        build_engine(graph, EngineConfig(precision=precision, deformable_attention="plugin"), progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("unparsable", {}, "tensorrt 11.0.0 cannot translate the graph:\n  Einsum 'masks': not known"),
        ("unbuildable", {}, "could not build the engine:\n  no kernel for node conv2"),
        ("crash", {}, "build ended by SIGSEGV in phase 'Timing': the library crashed"),
        ("kill", {}, "build ended by SIGKILL in phase 'Timing': memory has run out"),
        ("foreign", {}, "the engine's inputs and outputs are"),
        ("old", {}, "expected version 10 or later, got 8.6.1"),
        ("bare", {"version_compatible": True}, "version_compatible: tensorrt 11.0.0 does not have it"),
    ],
)  # fmt: skip
def test_failures_are_named(tensorrt: pytest.MonkeyPatch, words: str, options: dict[str, bool], message: str) -> None:
    tensorrt.setenv("FAKE_TENSORRT", words)
    with pytest.raises(EngineError) as caught:
        build(precision="fp32", **options)
    assert message in str(caught.value)


def test_a_precision_that_the_gpu_lacks_is_refused(tensorrt: pytest.MonkeyPatch) -> None:
    path = Path(os.environ["PYTHONPATH"]) / "cuda" / "bindings" / "driver.py"
    path.write_text(path.read_text().replace("MAJOR': 8", "MAJOR': 7"))
    with pytest.raises(EngineError, match="bf16 starts at sm_80"):
        build(precision="bf16")


def test_the_timing_cache_is_extended(tensorrt: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of another GPU is replaced; a failed build does not change the cache."""
    cache = tmp_path / "cache" / "timings"
    build(precision="fp32", timing_cache=str(cache))
    build(precision="fp32", timing_cache=str(cache))
    assert cache.read_bytes() == b"++"
    tensorrt.setenv("FAKE_TENSORRT", "crash")
    with pytest.raises(EngineError):
        build(precision="fp32", timing_cache=str(cache))
    assert cache.read_bytes() == b"++"
    tensorrt.delenv("FAKE_TENSORRT")
    for unusable in (b"other GPU", b"no cache"):
        cache.write_bytes(unusable)
        build(precision="fp32", timing_cache=str(cache))
        assert cache.read_bytes() == b"+"
    assert [path.name for path in cache.parent.iterdir()] == ["timings"]


def test_an_engine_survives_a_cache_that_cannot_be_written(
    tensorrt: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    _, engine = build(precision="fp32", timing_cache=str(tmp_path / "file" / "timings"))
    assert engine.precision == "fp32" and "timing_cache: not written" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp12"}, "precision: expected one of fp32, fp16"),
        ({"opt_shape": (1, 0, 64)}, "opt_shape: expected batch, height and width, each at least 1"),
        ({"builder_level": 6}, "builder_level: expected 0 to 5, got 6"),
        ({"workspace_mib": 0}, "workspace_mib: expected at least 1"),
        ({"targets": ("89",)}, "targets: expected names such as sm_89"),
        ({"targets": ("sm_89", "sm_89")}, "targets: expected different GPUs"),
        ({"targets": ("sm_89",), "api": "tensorrt"}, "tensorrt builds for the GPU that is here"),
        ({"precision": "int8"}, "calibration: expected a folder of images, got None"),
        ({"calibration": "photos"}, "calibration: expected none for fp16"),
        ({"precision": "fp8", "calibration": "photos", "targets": ("sm_86",)}, "fp8 starts at sm_89"),
        ({"precision": "bf16", "targets": ("sm_75",)}, "bf16 starts at sm_80"),
        ({"precision": "fp32", "mask_dtype": "float16"}, "mask_dtype: expected float32 for fp32"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError) as caught:
        EngineConfig(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_the_library_is_chosen_by_targets_and_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert select_api(EngineConfig()) == "tensorrt"
    assert select_api(EngineConfig(targets=("sm_89",))) == "tensorrt_rtx"
    assert select_api(EngineConfig(api="tensorrt_rtx")) == "tensorrt_rtx"
    for option, value in (("timing_cache", "file"), ("version_compatible", True), ("refittable", True)):
        with pytest.raises(EngineError, match=f"{option}: expected"):
            select_api(EngineConfig(targets=("sm_89",), **{option: value}))  # type: ignore[arg-type]
    installed.remove("tensorrt")
    assert select_api(EngineConfig()) == "tensorrt_rtx"
    with pytest.raises(ModuleNotFoundError, match=r"tensorrt: not installed \(pip install maskformer_fast\[tensorrt\]"):
        select_api(EngineConfig(api="tensorrt"))
    installed.clear()
    with pytest.raises(ModuleNotFoundError, match=r"maskformer_fast\[tensorrt\] or maskformer_fast\[rtx\]"):
        select_api(EngineConfig())


def test_profile_follows_the_graph() -> None:
    """Unset shapes are the graph's fixed sizes, or defaults extended to the optimum."""
    profile = make_profile(raw_graph((2, 96, 128)), EngineConfig())
    assert profile.minimum == profile.optimum == profile.maximum == Shape(2, 96, 128)
    profile = make_profile(raw_graph(("b", 96, 128)), EngineConfig(opt_shape=(4, 96, 128)))
    assert (profile.minimum, profile.maximum) == (Shape(1, 96, 128), Shape(4, 96, 128))
    profile = make_profile(raw_graph(), EngineConfig(opt_shape=(2, 128, 2048)))
    assert (profile.minimum, profile.maximum) == (Shape(1, 128, 256), Shape(2, 1024, 2048))
    with pytest.raises(EngineError, match=r"max_shape: expected the graph's fixed sizes \(2, 96, 128\)"):
        make_profile(raw_graph((2, 96, 128)), EngineConfig(max_shape=(4, 96, 128)))
    with pytest.raises(EngineError, match="min_shape, opt_shape, max_shape: height: expected minimum <= optimum"):
        make_profile(raw_graph(), EngineConfig(min_shape=(1, 512, 64), opt_shape=(1, 256, 256)))


def test_graphs_of_other_inputs_or_outputs_are_refused() -> None:
    renamed = raw_graph()
    renamed.graph.input[0].name = "x"
    with pytest.raises(EngineError, match=r"expected one input, images uint8 \[B, 3, H, W\], got \['x'\]"):
        make_profile(renamed, EngineConfig())
    del renamed.graph.output[:]
    renamed.graph.input[0].name = "images"
    with pytest.raises(EngineError, match=r"expected the outputs class_logits, mask_logits, got \[\]"):
        make_profile(renamed, EngineConfig())


def test_progress_of_nested_phases() -> None:
    progress = Progress()
    progress.start("outer", None, 4)
    progress.step("outer", 0)
    progress.start("inner", "outer", 2)
    progress.step("inner", 0)
    assert progress.done() == pytest.approx(0.25 + 0.25 / 2)
    progress.finish("inner")
    progress.step("outer", 3)
    assert progress.done() == 1.0
    progress.finish("outer")
    assert progress.done() == 0.0
    progress.step("never started", 3)


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "sizes"),
    [("fp32", ("b", "h", "w")), ("fp16", ("b", "h", "w")), ("bf16", ("b", "h", "w")), ("fp16", (1, 128, 160))],
)
def test_rtx_builds(precision: str, sizes: tuple[int | str, int | str, int | str]) -> None:
    """Build a real engine for four GPUs that this machine does not have."""
    targets = ("sm_80", "sm_86", "sm_89", "sm_120")
    shapes = SHAPES if sizes[0] == "b" else {}
    config = EngineConfig(precision=precision, targets=targets, **shapes)  # type: ignore[arg-type]
    content, engine = build_engine(raw_graph(sizes).SerializeToString(), config, progress=False)
    assert len(content) > 10_000
    assert (engine.api, engine.targets, engine.options["loaded"]) == ("tensorrt_rtx", targets, False)
    assert {o.dtype for o in engine.outputs} == {"float32"}


@needs_rtx
def test_rtx_names_the_unsupported_node() -> None:
    model = raw_graph()
    model.graph.node[4].CopyFrom(helper.make_node("Mystery", ["x1"], ["x2"], "riddle", domain="elsewhere"))
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    config = EngineConfig(precision="fp32", targets=("sm_89",), **SHAPES)
    with pytest.raises(EngineError, match="(?s)tensorrt_rtx .* cannot translate the graph:.*Mystery 'riddle'"):
        build_engine(model.SerializeToString(), config, progress=False)


@needs_rtx
def test_rtx_names_the_gpus_it_knows() -> None:
    config = EngineConfig(precision="fp32", targets=("sm_50",), **SHAPES)
    with pytest.raises(EngineError, match="targets: expected some of .*sm_89.*, got sm_50"):
        build_engine(raw_graph().SerializeToString(), config, progress=False)


def test_a_file_that_is_no_graph_is_refused() -> None:
    if not HAS_RTX:
        pytest.importorskip("tensorrt")
    with pytest.raises(EngineError, match="raw_onnx: expected an ONNX graph"):
        build_engine(b"\x08not a graph", EngineConfig(targets=("sm_89",)) if HAS_RTX else EngineConfig())
