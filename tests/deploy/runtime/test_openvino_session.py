"""The backend openvino: the results of onnxruntime, and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskformer_fast.config import TestConfig
from maskformer_fast.core.machine import has_bfloat16
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import BundleError
from maskformer_fast.deploy.runtime import load
from maskformer_fast.deploy.runtime.mask_factors import FactoredMasks
from maskformer_fast.deploy.runtime.onnxruntime_session import OnnxruntimeSession
from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession, find_mask_tail, shared_core
from tests.support.tail_graph import CLASSES, tail_bundle, tail_graph
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


def read(graph: bytes) -> Any:
    return shared_core().read_model(graph)


@pytest.mark.parametrize(
    ("arguments", "product"),
    [({}, False), ({"bias": False}, False), ({"folded": True}, True), ({"folded": True, "channels": 12}, True),
     ({"channels": 12}, True), ({"stride": 2}, True)],
)  # fmt: skip
def test_masks_are_computed_apart_where_the_graph_ends_as_exported(arguments: dict[str, int], product: bool) -> None:
    """In the last two cases the runtime has no such convolution: the product alone is left to it."""
    graph = tail_graph(**arguments)  # type: ignore[arg-type]
    images = RNG.integers(0, 256, (2, 3, 36, 52), dtype=np.uint8)
    session = OpenvinoSession(graph, 1)
    classes, masks = session.run(images)
    expected = OnnxruntimeSession(graph, 1).run(images)
    assert isinstance(masks, FactoredMasks) and (find_mask_tail(read(graph)).projection is None) == product  # type: ignore[union-attr]
    assert [tensor.name for tensor in session.outputs] == ["class_logits", "mask_logits"] and session.inputs
    assert masks.shape == expected[1].shape and masks.dtype == np.float32
    for got, wanted in ((classes, expected[0]), *zip(map(np.asarray, (masks[0], masks[1])), expected[1], strict=True)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    some = np.array([7, 2, 3])
    np.testing.assert_allclose(masks[1][some], expected[1][1][some], rtol=0, atol=1e-4 * np.abs(expected[1]).max())


@pytest.mark.parametrize(("streams", "folded"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_of_all_tasks_in_order_whatever_is_in_flight(
    tmp_path: Path, precision: str, streams: int, folded: bool
) -> None:
    if precision == "bf16" and not has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    bundle = tail_bundle(tmp_path / "bundle", folded)
    rng, tolerance = np.random.default_rng(1), 1e-3 if precision == "fp32" else 0.1
    frames = [rng.integers(0, 256, (36 + 4 * (n % 2), 52, 3), dtype=np.uint8) for n in range(5)]
    with load(bundle, "openvino", in_flight=streams, precision=precision) as runtime:  # type: ignore[arg-type]
        assert runtime.precision == precision
        found = {task: list(runtime.stream(frames, task)) for task in runtime.tasks}
    with load(bundle, "onnxruntime") as runtime:
        wanted = runtime.predict_tasks(frames, runtime.tasks)
    for got, expected in zip(found["semantic"], wanted["semantic"], strict=True):
        assert np.mean(got.labels == expected.labels) >= (0.999 if precision == "fp32" else 0.9)  # type: ignore[union-attr]
    for got, expected in zip(found["panoptic"], wanted["panoptic"], strict=True):
        if precision == "fp32":
            assert np.mean(got.id_map == expected.id_map) >= 0.999  # type: ignore[union-attr]
        assert areas_of_classes(got) == pytest.approx(areas_of_classes(expected), abs=tolerance)
    for got, expected in zip(found["instance"], wanted["instance"], strict=True):
        count = min(len(got.scores), len(expected.scores))  # type: ignore[union-attr]
        assert abs(len(got.scores) - len(expected.scores)) <= 1 and count  # type: ignore[union-attr]
        np.testing.assert_allclose(got.scores[:count], expected.scores[:count], rtol=0, atol=tolerance)  # type: ignore[union-attr]


def areas_of_classes(result: Any) -> list[float]:
    """Share of the pixels in segments of each class: ids depend on the order of scores, which bfloat16 may change."""
    shares = [0.0] * CLASSES
    for segment in result.segments:
        shares[segment.category] += segment.area / result.id_map.size
    return shares


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
        shared_core.__wrapped__()  # without the core that this process keeps


def test_it_runs_without_torch_and_onnxruntime(bundle: Bundle) -> None:
    program = f"""
import sys
for name in ("torch", "triton", "onnx", "onnxruntime", "PIL", "tyro"):
    sys.modules[name] = None
import numpy as np
from maskformer_fast.deploy.runtime import load
from maskformer_fast.deploy.runtime.mask_factors import FactoredMasks
with load({str(bundle.folder)!r}, "openvino") as runtime:
    print(runtime.predict(np.zeros((37, 50, 3), np.uint8)).labels.shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip().endswith("(37, 50)"), done.stderr


SIGNALLED = """
import os, signal, sys, threading
from maskformer_fast.deploy.runtime import load
runtimes = [load(sys.argv[1], "openvino")]
threading.Thread(target=runtimes.pop).start()
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_another_thread_let_a_session_go(bundle: Bundle) -> None:
    command = [sys.executable, "-c", SIGNALLED, str(bundle.folder)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and process.stdout == "handled\n", (process.returncode, process.stderr)


FIRST_BATCHES = """
import sys, threading, time
import numpy as np

class Version(np.lib.NumpyVersion):  # OpenVINO asks for it when it makes its table of types
    def __init__(self, text):
        time.sleep(0.2)  # other threads run meanwhile
        super().__init__(text)

np.lib.NumpyVersion = Version
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession
bundle = Bundle.open(sys.argv[1])
session = OpenvinoSession(bundle.read(bundle.manifest.graphs["raw"].file), 1)
images = np.zeros((1, 3, 64, 64), np.uint8)
for _ in range(2):
    threading.Thread(target=session.run, args=(images,)).start()
"""


def test_first_batches_of_two_threads_do_not_wait_for_each_other(bundle: Bundle) -> None:
    subprocess.run([sys.executable, "-c", FIRST_BATCHES, str(bundle.folder)], check=True, timeout=60)
