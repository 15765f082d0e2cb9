"""The backend openvino: the results of onnxruntime, and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maskformer_fast.config import TestConfig
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import BundleError
from maskformer_fast.deploy.runtime import load
from maskformer_fast.deploy.runtime.onnxruntime_session import OnnxruntimeSession
from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession
from tests.support.tiny_bundle import tiny_bundle

openvino = pytest.importorskip("openvino")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("openvino") / "bundle", TestConfig(short_edge=None))[0]


@pytest.mark.parametrize("size", [(37, 50), (64, 33)])
def test_logits_are_those_of_onnxruntime(bundle: Bundle, size: tuple[int, int]) -> None:
    graph = bundle.read(bundle.manifest.graphs["raw"].file)
    images = RNG.integers(0, 256, (2, 3, *size), dtype=np.uint8)
    ours, theirs = OpenvinoSession(graph, 1), OnnxruntimeSession(graph, 1)
    for got, wanted in zip(ours.run(images), theirs.run(images), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_frames_of_any_size_and_a_fixed_batch(bundle: Bundle, tmp_path: Path) -> None:
    frames = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((37, 50), (37, 50), (64, 33))]
    fixed = tiny_bundle(tmp_path / "fixed", TestConfig(short_edge=None), size=(2, 37, 50))[0]
    for opened, pictures in ((bundle, frames), (fixed, frames[:2])):
        with load(opened, "openvino", in_flight=2) as runtime, load(opened, "onnxruntime") as other:
            assert runtime.backend == "openvino"
            for got, wanted in zip(runtime.stream(pictures), other.predict(pictures), strict=True):
                assert (got.labels == wanted.labels).mean() > 0.99  # type: ignore[union-attr]


def test_refusals(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="a graph that OpenVINO runs"):
        OpenvinoSession(b"garbage", 1)
    with pytest.raises(ValueError, match="precision: expected fp32 with the backend onnxruntime, got 'bf16'"):
        load(bundle, "onnxruntime", precision="bf16")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(ValueError, match="precision: expected fp32 or int8, as this processor has no .*'bf16'"):
        load(bundle, "openvino", precision="bf16")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModuleNotFoundError, match=r"maskformer_fast\[openvino\]"):
        load(bundle, "openvino")


def test_it_runs_without_torch_and_onnxruntime(bundle: Bundle) -> None:
    program = f"""
import sys
for name in ("torch", "triton", "onnx", "onnxruntime", "PIL", "tyro"):
    sys.modules[name] = None
import numpy as np
from maskformer_fast.deploy.runtime import load
with load({str(bundle.folder)!r}, "openvino") as runtime:
    print(runtime.predict(np.zeros((37, 50, 3), np.uint8)).labels.shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip().endswith("(37, 50)"), done.stderr
