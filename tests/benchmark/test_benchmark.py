"""The benchmark of bundles: what is measured, by whom, what is made of it, and that no failure costs the rest."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast.benchmark import __main__ as benchmark
from maskformer_fast.benchmark import report as benchmark_report
from maskformer_fast.benchmark import runners as contestants
from maskformer_fast.benchmark.__main__ import BenchmarkOptions
from maskformer_fast.benchmark.runners import Setting
from maskformer_fast.config import TestConfig
from maskformer_fast.core.metadata import VOID, SegmentInfo
from maskformer_fast.data import dataset_metadata
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.inference.load import with_classes
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.recipes import load_recipe
from tests.support.paths import ROOT
from tests.support.tiny_bundle import tiny_bundle

SIZE = (40, 56)
SURE = TestConfig(short_edge=None, object_mask_threshold=0.2, overlap_threshold=0.1, multi_scale=(0.5, 1.0))
TASKS = ("semantic", "panoptic", "instance")


def setting(kind: Any, path: Path | str, **changes: Any) -> Setting:
    device = "onnxruntime" if kind == "bundle" else "cpu"
    return replace(Setting(kind, str(path), 2, SIZE, "semantic", device, 0, 2, "off"), **changes)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle; PyTorch contestants get the predictor of the same weights, and a compiler that takes no time."""
    bundle, predictor = tiny_bundle(tmp_path / "bundle", SURE)
    for name in ("load", "load_network"):
        monkeypatch.setattr(f"maskformer_fast.inference.predictor.{name}", lambda *_, **options: predictor)
    in_eager = partial(torch.compile, backend="eager")
    monkeypatch.setattr("maskformer_fast.modeling.compile.compile_single_graph", in_eager)
    return bundle


@pytest.mark.parametrize("task", TASKS)
def test_contestants_agree(tiny: Bundle, task: Any) -> None:
    frames = contestants.make_frames(3, SIZE, None)
    maps = {}
    for kind in ("bundle", "eager", "compile"):
        contestant = contestants.open_contestant(setting(kind, tiny.folder, task=task))
        network = getattr(contestant, "network", None)
        if network is not None:
            contestant.predictor.network = network  # the predictor is shared by these tests
        results = contestant.predict(frames)
        maps[kind] = np.stack([contestants.label_map(result, task, SIZE) for result in results])
        stages = contestant.timed(frames[:2])
        assert min(stages) >= 0 and sum(stages[:3]) == pytest.approx(stages.total, rel=0.2)
        if kind == "bundle":
            assert len(list(contestant.stream(iter(frames)))) == 3
        else:
            assert contestant.stream(iter(frames)) is None
            contestant.predictor.network = network.inner
    assert len(np.unique(maps["bundle"])) > 1
    np.testing.assert_array_equal(maps["bundle"], maps["eager"])
    np.testing.assert_array_equal(maps["compile"], maps["eager"])


def test_gpu_memory_of_a_bundle(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    success = object()

    class Cuda(ModuleType):
        cudaError_t = SimpleNamespace(cudaSuccess=success)  # as CUDA spells it

        @staticmethod
        def cudaSetDevice(device: int) -> None:
            calls.append(device)

        @staticmethod
        def cudaMemGetInfo() -> tuple[object, int, int]:
            return success, 600, 1000

    bindings = ModuleType("cuda.bindings")
    bindings.runtime = Cuda("cuda.bindings.runtime")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(contestants, "tensorrt_obstacle", lambda manifest, device: None)
    gpu = setting("bundle", tiny.folder, device="auto", device_index=2)
    assert contestants.device_bytes(gpu) == 400 and calls == [2]
    assert contestants.device_bytes(replace(gpu, device="onnxruntime")) is None
    monkeypatch.setattr(contestants, "tensorrt_obstacle", lambda manifest, device: ValueError("no engine"))
    assert contestants.device_bytes(gpu) is None and calls == [2], "no context is made"


def test_label_maps() -> None:
    labels = np.array([[1, 0], [2, 2]], dtype=np.uint8)
    np.testing.assert_array_equal(contestants.label_map(SimpleNamespace(labels=labels), "semantic", (2, 2)), labels)
    segments = [SegmentInfo(1, 7), SegmentInfo(2, 5)]
    panoptic = SimpleNamespace(id_map=np.array([[1, -1], [2, 1]]), segments=segments)
    np.testing.assert_array_equal(contestants.label_map(panoptic, "panoptic", (2, 2)), [[7, VOID], [5, 7]])
    masks = np.packbits([[[1, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 1, 0]]], axis=-1, bitorder="little")
    instances = SimpleNamespace(labels=np.array([4, 9]), masks=masks)
    found = contestants.label_map(instances, "instance", (2, 3))
    np.testing.assert_array_equal(found, [[4, 4, 9], [VOID, 9, VOID]])


def test_frames_are_the_same_in_every_process(tmp_path: Path) -> None:
    first, second = (contestants.make_frames(5, SIZE, None) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape == (*SIZE, 3) and first[0].dtype == np.uint8 and not np.array_equal(*first[:2])
    with pytest.raises(ValueError, match="pictures: expected a folder with images"):
        contestants.make_frames(1, SIZE, str(tmp_path))
    for name, color in (("b.png", (9, 8, 7)), ("a.jpg", (250, 250, 250)), ("c.txt", None)):
        Image.new("RGB", (30, 20), color).save(tmp_path / name, "PNG" if color else "JPEG")
    pictures = contestants.make_frames(3, SIZE, str(tmp_path))
    assert [int(frame[0, 0, 0]) for frame in pictures] == [250, 9, 250] and pictures[0].shape == (*SIZE, 3)


def test_worker_answers_each_command(tiny: Bundle, tmp_path: Path) -> None:
    maps = tmp_path / "maps.npy"
    requests = [
        {"do": "calls", "seconds": 1.0}, {"do": "open", "setting": asdict(setting("bundle", tiny.folder))},
        {"do": "calls", "seconds": 0.02}, {"do": "calls", "seconds": 0.0}, {"do": "stages"},
        {"do": "stream", "seconds": 0.02}, {"do": "finish", "maps": str(maps)},
        {"do": "open", "setting": asdict(setting("bundle", tmp_path / "nothing"))},
    ]  # fmt: skip
    answers = io.StringIO()
    contestants.serve(io.StringIO("".join(json.dumps(json.loads(json.dumps(r))) + "\n" for r in requests)), answers)
    early, opened, calls, single, stages, stream, finished, wrong = map(json.loads, answers.getvalue().splitlines())
    assert "AttributeError" in early["error"] and "FileNotFoundError" in wrong["error"]
    assert opened["backend"] == "onnxruntime" and opened["gpu_mib"] is None and opened["ready_s"] > 0
    assert len(calls["seconds"]) >= 1 and len(single["seconds"]) == 1 and min(calls["seconds"]) > 0
    assert list(stages["stages"]) == ["preprocess", "network", "postprocess", "total"]
    assert stream["frames_per_s"] > 0
    assert finished["peak_rss_mib"] is None or finished["peak_rss_mib"] > 20
    assert np.load(maps).shape == (4, *SIZE)


def test_a_bundle_alone_needs_no_torch(tiny: Bundle) -> None:
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from maskformer_fast import benchmark, contestants
contestants.serve(sys.stdin, sys.stdout)
"""
    request = json.dumps({"do": "open", "setting": asdict(setting("bundle", tiny.folder))})
    result = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, text=True, timeout=100)
    assert json.loads(result.stdout)["backend"] == "onnxruntime", result.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle, str]:
    """The command on a tiny bundle and a checkpoint of other weights; its folder, the bundle, and what it printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    bundle, _ = tiny_bundle(folder / "bundle", TestConfig(short_edge=None))
    recipe = load_recipe(str(ROOT / "tests" / "tiny.yaml"))
    metadata = dataset_metadata(recipe.data)
    config = with_classes(recipe, metadata)
    save_weights(folder / "model.safetensors", build_model(config.model), config, metadata, 0)
    command = [
        sys.executable, "-m", "maskformer_fast.benchmark", bundle.folder, "--checkpoint", folder / "model.safetensors",
        "--against", "eager", "--batches", "1", "3", "--size", "40x56", "--seconds", "0.05",
        "--output", folder / "report",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder / "report", bundle, result.stdout


def test_report_of_the_command(report: tuple[Path, Bundle, str]) -> None:
    folder, bundle, printed = report
    assert sorted(path.name for path in folder.iterdir()) == ["benchmark.json", "benchmark.md", "benchmark.png"]
    content = json.loads((folder / "benchmark.json").read_text())
    assert content["bundle"]["digest"] == bundle.digest and content["options"]["batches"] == [1, 3]
    assert content["machine"]["numpy"] == np.__version__ and content["machine"]["cores"] >= 1
    names = [(row["contestant"], row["batch"], row["backend"]) for row in content["rows"]]
    assert names == [
        ("bundle", 1, "onnxruntime"), ("PyTorch eager", 1, "cpu"), ("bundle", 3, "onnxruntime"),
        ("PyTorch eager", 3, "cpu"),
    ]  # fmt: skip
    for row in content["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["calls"] >= benchmark.MIN_CALLS
        assert row["images_per_s"] > 0 and ("frames_per_s" in row) == (row["batch"] == 1)
        assert sum(benchmark_report.shares(row)) == pytest.approx(1)
        assert row["labels_equal"] == 1 if row["contestant"] == "PyTorch eager" else row["labels_equal"] < 1
    bundle_row, eager_row = content["rows"][:2]
    if bundle_row["peak_rss_mib"] is not None:
        assert bundle_row["peak_rss_mib"] < eager_row["peak_rss_mib"], "torch takes more than onnxruntime alone"
    page = (folder / "benchmark.md").read_text()
    assert printed.strip() == page.strip() and page.startswith("# tiny: semantic, frames of 40x56\n")
    speed = eager_row["p50_ms"] / bundle_row["p50_ms"]
    assert f"| {speed:.2f}x |" in page and "1.00x" in page
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.format == "PNG" and picture.width > 800


# What becomes of contestants that fail, by a worker whose settings say how.

SCRIPTED = """
import json, os, sys, time
kind = None
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "open":
        kind = request["setting"]["kind"]
        answer = {"backend": "tensorrt", "ready_s": 1.0, "gpu_mib": 5.0, "device": request["setting"]["device"]}
    elif kind == "eager" and do == "calls":
        answer = {"error": "RuntimeError: out of memory"}
    elif kind == "compile" and do == "stages":
        print("last words", file=sys.stderr)
        os._exit(9)
    elif do == "calls":
        with open(os.environ["TURNS"], "a") as file:
            file.write(kind + " ")
        answer = {"seconds": [0.02, 0.04]}
    elif do == "stages":
        answer = {"stages": {"preprocess": 1.0, "network": 2.0, "postprocess": 1.0, "total": 4.0}}
    elif do == "stream":
        answer = {"frames_per_s": 70.0}
    else:
        time.sleep(1000)
    print(json.dumps(answer), flush=True)
"""


def test_a_failure_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(SCRIPTED)
    monkeypatch.setenv("TURNS", str(tmp_path / "turns"))
    monkeypatch.setattr(benchmark, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    monkeypatch.setattr(benchmark, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(benchmark.Process.ask, "__defaults__", (2.0,))
    options = BenchmarkOptions("bundle", checkpoint="weights", seconds=0.1, device=3)
    start = time.monotonic()
    bundle, eager, compiled = benchmark.measure_batch(options, 1)
    assert time.monotonic() - start < 20
    assert bundle["error"] == "no answer after 2 s" and bundle["frames_per_s"] == 70.0
    assert eager["error"] == "RuntimeError: out of memory" and eager["device"] == "cuda:3"
    assert compiled["error"] == "its process ended with status 9: last words"
    assert (tmp_path / "turns").read_text().split()[:4] == ["bundle", "compile", "compile", "bundle"]
    page = benchmark_report.markdown({
        "bundle": {"name": "x", "digest": "0"}, "options": {"task": "semantic", "size": "8x8"}, "machine": {},
        "rows": [bundle, eager, compiled],
    })  # fmt: skip
    assert page.count("FAILED") == 3
    table = [line for line in page.splitlines() if line.startswith("| 1 |")]
    assert len({line.count(" | ") for line in table}) == 1
    canvas = benchmark_report.draw([bundle])
    canvas.print_png(io.BytesIO())


def test_summary() -> None:
    found = benchmark.summary([0.001 * k for k in range(1, 102)], batch=4)
    assert (found["p50_ms"], found["p95_ms"], found["p99_ms"]) == pytest.approx((51.0, 96.0, 100.0))
    assert found["images_per_s"] == pytest.approx(4 * 101 / (0.001 * 101 * 51)) and found["calls"] == 101


def test_labels_are_compared_with_the_first_of_pytorch(tmp_path: Path) -> None:
    maps = np.zeros((2, 4, 5), np.int32)
    np.save(tmp_path / "compile.npy", maps)
    maps[0, 0, :2] = 7
    np.save(tmp_path / "bundle.npy", maps)
    rows: dict[Any, Any] = {"bundle": {}, "eager": {"error": "no"}, "compile": {}}
    benchmark.compare_labels(rows, tmp_path)
    assert rows == {"bundle": {"labels_equal": 0.95}, "eager": {"error": "no"}, "compile": {"labels_equal": 1.0}}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batches": (1, 0)}, "batches: expected positive"), ({"batches": ()}, "batches: expected positive"),
        ({"seconds": 0.0}, "seconds: expected > 0"), ({"in_flight": 0}, "in_flight: expected > 0"),
        ({"size": "512"}, "expected HEIGHTxWIDTH"), ({"size": "2x512x512"}, "size: expected HEIGHTxWIDTH"),
    ],
)  # fmt: skip
def test_wrong_options(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkOptions("bundle", **more)


def test_the_report_does_not_go_into_the_bundle(tiny: Bundle) -> None:
    with pytest.raises(ValueError, match="output: expected a folder outside of the bundle"):
        benchmark.main([str(tiny.folder), "--output", str(tiny.folder / "benchmark")])
    Bundle.open(tiny.folder)


def test_missing_matplotlib_is_said_before_measuring(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install maskformer_fast\[deploy\]"):
        benchmark.main([str(tiny.folder)])
