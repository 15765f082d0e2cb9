"""The runners of the benchmark and the process around one: what they measure, and that they run the same network."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast.benchmark import worker
from maskformer_fast.benchmark.runners import Setting, label_map, make_frames, open_runner
from maskformer_fast.config import TestConfig
from maskformer_fast.core.metadata import VOID, SegmentInfo
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.inference.predictor import Predictor
from tests.support.tiny_bundle import tiny_bundle

SIZE = (40, 56)
SURE = TestConfig(short_edge=None, object_mask_threshold=0.2, overlap_threshold=0.1, multi_scale=(0.5, 1.0))
TASKS = ("semantic", "panoptic", "instance")


def setting(kind: Any, path: Path | str, **changes: Any) -> Setting:
    device = "onnxruntime" if kind == "bundle" else "cpu"
    return replace(Setting(kind, str(path), 2, SIZE, "semantic", device, 0, 2, "off"), **changes)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle; PyTorch runners get predictors of the same weights, and a compiler that takes no time."""
    bundle, predictor = tiny_bundle(tmp_path / "bundle", SURE)

    def load(*_: Any, **__: Any) -> Predictor:
        return Predictor(predictor.network, predictor.config, predictor.metadata, "cpu")

    for name in ("load", "load_network"):
        monkeypatch.setattr(f"maskformer_fast.inference.load.{name}", load)
    in_eager = partial(torch.compile, backend="eager")
    monkeypatch.setattr("maskformer_fast.modeling.compile.compile_single_graph", in_eager)
    return bundle


@pytest.mark.parametrize("task", TASKS)
def test_runners_give_equal_labels_and_the_seconds_of_their_stages(tiny: Bundle, task: Any) -> None:
    frames = make_frames(3, SIZE, None)
    maps = {}
    for kind in ("bundle", "eager", "compile"):
        runner = open_runner(setting(kind, tiny.folder, task=task))
        maps[kind] = np.stack([label_map(result, task, SIZE) for result in runner.predict(frames)])
        stages = runner.timed(frames[:2])
        assert min(stages) > 0 and sum(stages[:3]) == pytest.approx(stages.total, rel=0.2)
        results = runner.stream(iter(frames))
        assert results is None if kind != "bundle" else len(list(results or ())) == 3
    assert len(np.unique(maps["bundle"])) > 1
    np.testing.assert_array_equal(maps["bundle"], maps["eager"])
    np.testing.assert_array_equal(maps["compile"], maps["eager"])


def test_label_map_takes_results_of_every_task() -> None:
    labels = np.array([[1, 0], [2, 2]], dtype=np.uint8)
    np.testing.assert_array_equal(label_map(SimpleNamespace(labels=labels), "semantic", (2, 2)), labels)
    segments = [SegmentInfo(1, 7), SegmentInfo(2, 5)]
    panoptic = SimpleNamespace(id_map=np.array([[1, -1], [2, 1]]), segments=segments)
    np.testing.assert_array_equal(label_map(panoptic, "panoptic", (2, 2)), [[7, VOID], [5, 7]])
    masks = np.packbits([[[1, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 1, 0]]], axis=-1, bitorder="little")
    instances = SimpleNamespace(labels=np.array([4, 9]), masks=masks)
    labels_of_best = label_map(instances, "instance", (2, 3))
    np.testing.assert_array_equal(labels_of_best, [[4, 4, 9], [VOID, 9, VOID]])


def test_frames_are_the_same_in_every_process(tmp_path: Path) -> None:
    first, second = (make_frames(5, SIZE, None) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape == (*SIZE, 3) and first[0].dtype == np.uint8 and not np.array_equal(*first[:2])
    with pytest.raises(ValueError, match="pictures: expected a folder with images"):
        make_frames(1, SIZE, str(tmp_path))
    for name, color in (("b.png", (9, 8, 7)), ("a.jpg", (250, 250, 250)), ("c.txt", None)):
        Image.new("RGB", (30, 20), color).save(tmp_path / name, "PNG" if color else "JPEG")
    pictures = make_frames(3, SIZE, str(tmp_path))
    assert [int(frame[0, 0, 0]) for frame in pictures] == [250, 9, 250] and pictures[0].shape == (*SIZE, 3)


def test_gpu_memory_of_a_bundle_is_that_in_use_on_its_device(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(worker, "tensorrt_obstacle", lambda *_: None)
    gpu = setting("bundle", tiny.folder, device="auto", device_index=2)
    assert worker.device_bytes(gpu) == 400 and calls == [2]
    assert worker.device_bytes(replace(gpu, device="onnxruntime")) is None
    monkeypatch.setattr(worker, "tensorrt_obstacle", lambda *_: ValueError("no engine"))
    assert worker.device_bytes(gpu) is None and calls == [2], "no context is made"


def test_worker_answers_each_command(tiny: Bundle, tmp_path: Path) -> None:
    maps = tmp_path / "maps.npy"
    requests = [
        {"do": "calls", "seconds": 1.0}, {"do": "open", "setting": asdict(setting("bundle", tiny.folder))},
        {"do": "calls", "seconds": 0.02}, {"do": "calls", "seconds": 0.0}, {"do": "stages"},
        {"do": "stream", "seconds": 0.02}, {"do": "finish", "maps": str(maps)},
        {"do": "open", "setting": asdict(setting("bundle", tmp_path / "nothing"))},
    ]  # fmt: skip
    answers = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
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
from maskformer_fast.benchmark import __main__, worker
worker.serve(sys.stdin, sys.stdout)
"""
    request = json.dumps({"do": "open", "setting": asdict(setting("bundle", tiny.folder))})
    result = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, text=True, timeout=100)
    assert json.loads(result.stdout)["backend"] == "onnxruntime", result.stderr
