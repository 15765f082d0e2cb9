"""The runtime: choice of the backend, frames in flight, errors in their order, and running without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.config import Task, TestConfig
from maskformer_fast.core.results import Result, SemanticResult
from maskformer_fast.core.stages import StageSeconds
from maskformer_fast.deploy.bundle.folder import Bundle, extend_bundle
from maskformer_fast.deploy.bundle.manifest import BundleError, Engine, Profile, Shape
from maskformer_fast.deploy.runtime import selection
from maskformer_fast.deploy.runtime import session as runtime_module
from maskformer_fast.deploy.runtime.session import load
from tests.support.fake_cuda import FakeDriver
from tests.support.paths import ROOT
from tests.support.tiny_bundle import tiny_bundle

TEST = TestConfig(short_edge=None, object_mask_threshold=0.3, overlap_threshold=0.3, top_k=6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("runtime") / "bundle", TEST)[0]


def frame_of(number: int, height: int = 2, width: int = 3) -> np.ndarray:
    return np.full((height, width, 3), number, dtype=np.uint8)


class FakeBackend:
    """Backend whose result is a frame's first value. A frame of 13 fails later, a frame of 66 at once."""

    def __init__(self, most: int = 1, max_tasks: int = 1) -> None:
        self.most = most
        self.max_tasks = max_tasks
        self.pending: dict[int, Sequence[np.ndarray]] = {}
        self.batches: list[list[int]] = []
        self.peak = 0  # most batches that were pending at once
        self.closed = False

    def max_batch(self, height: int, width: int, task: Task) -> int:
        return self.most

    def submit(self, frames: Sequence[np.ndarray], *tasks: Task) -> int:
        if frames[0][0, 0, 0] == 66:
            raise ValueError("66 is refused at once")
        assert len(frames) <= self.most and len({frame.shape for frame in frames}) == 1 and not self.closed
        self.batches.append([int(frame[0, 0, 0]) for frame in frames])
        assert 0 < len(tasks) <= self.max_tasks
        self.pending[len(self.batches)] = list(frames) * len(tasks)
        self.peak = max(self.peak, len(self.pending))
        return len(self.batches)

    def collect(self, ticket: int) -> tuple[list[Result], StageSeconds]:
        frames = self.pending.pop(ticket)
        if any(frame[0, 0, 0] == 13 for frame in frames):
            raise RuntimeError("13 fails")
        return [SemanticResult(frame[:, :, 0]) for frame in frames], StageSeconds(1, 2, 3, 6)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    backend = FakeBackend()
    monkeypatch.setattr(runtime_module, "_open_backend", lambda *_: backend)
    return backend


def value(result: Any) -> int:
    return int(result.labels[0, 0])


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_stream_keeps_order_and_as_many_frames_in_flight_as_asked(
    bundle: Bundle, fake: FakeBackend, in_flight: int
) -> None:
    taken = 0

    def camera() -> Iterator[np.ndarray]:
        nonlocal taken
        for taken in range(1, 9):
            yield frame_of(taken, 1 + taken % 3)

    with load(bundle, "onnxruntime", in_flight=in_flight) as runtime:
        results = runtime.stream(camera())
        assert taken == 0  # a frame is not taken before it is needed
        for number in range(1, 9):
            assert value(next(results)) == number
            assert taken == min(number + in_flight - 1, 8)  # and no more
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(results)
        assert fake.peak == in_flight and list(runtime.stream([])) == []
    assert fake.closed and not fake.pending


def test_an_error_is_raised_in_order_and_the_stream_continues(bundle: Bundle, fake: FakeBackend) -> None:
    def camera() -> Iterator[Any]:
        yield from map(frame_of, (1, 13, 2, 66))
        yield from ("text", frame_of(3).astype(float), frame_of(4))
        raise OSError("unplugged")

    runtime = load(bundle, "onnxruntime", in_flight=3)
    results = runtime.stream(camera())
    seen: list[Any] = []
    while True:
        try:
            seen.append(value(next(results)))
        except StopIteration:
            break
        except Exception as error:
            seen.append(str(error))
    assert seen == [1, "13 fails", 2, "66 is refused at once", "frame: expected an array [H, W, 3], got str",
                    "frame: expected uint8, got float64", 4, "unplugged"]  # fmt: skip
    assert [value(result) for result in runtime.predict([frame_of(7), frame_of(8)])] == [7, 8]


def test_abandoned_and_mixed_streams_do_not_fill_the_backend(bundle: Bundle, fake: FakeBackend) -> None:
    runtime = load(bundle, "onnxruntime", in_flight=2)
    for _ in range(5):
        assert value(next(runtime.stream(frame_of(n) for n in range(9)))) == 0  # the rest is never read
    first, second = (runtime.stream(frame_of(n) for n in range(start, start + 4)) for start in (30, 40))
    assert [(value(a), value(b)) for a, b in zip(first, second, strict=True)] == [(n, n + 10) for n in range(30, 34)]
    assert value(runtime.predict(frame_of(5))) == 5
    assert fake.peak <= 2
    left = runtime.stream(frame_of(n) for n in range(30, 34))
    assert value(next(left)) == 30
    runtime.close()
    assert value(next(left)) == 31  # this batch had begun
    with pytest.raises(RuntimeError, match="closed"):
        next(left)


def test_predict_batches_frames_of_one_size(bundle: Bundle, fake: FakeBackend) -> None:
    fake.most = 3
    runtime = load(bundle, "onnxruntime")
    sizes = [1, 2, 1, 1, 2, 1, 1]
    results = runtime.predict([frame_of(20 + index, size) for index, size in enumerate(sizes)])
    assert [value(result) for result in results] == [20 + index for index in range(7)]
    assert fake.batches == [[20, 22, 23], [25, 26], [21, 24]] and fake.peak == 2
    assert runtime.predict([]) == []
    assert value(runtime.predict(frame_of(9))) == 9
    assert [value(r) for r in runtime.predict(np.stack([frame_of(1), frame_of(2)]))] == [1, 2]
    with pytest.raises(RuntimeError, match="13 fails"):
        runtime.predict([frame_of(1), frame_of(13), frame_of(2, 5)])
    assert value(runtime.predict(frame_of(9))) == 9
    found, seconds = runtime.timed([frame_of(3)])
    assert value(found[0]) == 3 and seconds == StageSeconds(1, 2, 3, 6)


@pytest.mark.parametrize(("max_tasks", "passes"), [(1, 3), (2, 2), (3, 1)])
def test_tasks_share_passes_of_the_network(bundle: Bundle, fake: FakeBackend, max_tasks: int, passes: int) -> None:
    fake.most, fake.max_tasks = 2, max_tasks
    runtime = load(bundle, "onnxruntime", in_flight=2)
    images = [frame_of(1), frame_of(2, 4), frame_of(3), frame_of(4)]
    found = runtime.predict_tasks(images, ("instance", "semantic", "panoptic", "semantic"))
    assert list(found) == ["instance", "semantic", "panoptic"]
    assert all([value(result) for result in results] == [1, 2, 3, 4] for results in found.values())
    assert fake.batches == [[1, 3], [4], [2]] * passes and fake.peak <= 2 and not fake.pending
    assert runtime.predict_tasks([], ("semantic",)) == {"semantic": []} and runtime.predict_tasks(images, ()) == {}
    with pytest.raises(ValueError, match="task: expected one of"):
        runtime.predict_tasks(images, ("semantic", "depth"))  # type: ignore[arg-type]


@given(st.lists(st.sampled_from([1, 2, 13, 66, 90]), max_size=12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_any_stream_gives_each_frame_its_own_outcome(bundle: Bundle, numbers: list[int], in_flight: int) -> None:
    backend = FakeBackend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_module, "_open_backend", lambda *_: backend)
        runtime = load(bundle, "onnxruntime", in_flight=in_flight)
    results, seen = runtime.stream(map(frame_of, numbers)), []
    for number in numbers:
        try:
            seen.append(value(next(results)))
        except (RuntimeError, ValueError) as error:
            seen.append(number if str(number) in str(error) else -1)
    assert seen == numbers and next(results, None) is None
    assert backend.peak <= in_flight and not backend.pending


def test_threads_share_a_runtime(bundle: Bundle) -> None:
    frames = [np.random.default_rng(n).integers(0, 256, (30 + n, 40, 3), dtype=np.uint8) for n in range(6)]
    with load(bundle, "onnxruntime", in_flight=3) as runtime:
        expected = [result.labels for result in runtime.predict(frames)]
        wrong: list[int] = []

        def work(order: np.ndarray) -> None:
            for index, result in zip(order, runtime.stream(frames[i] for i in order), strict=True):
                if not np.array_equal(result.labels, expected[index]):
                    wrong.append(int(index))

        threads = [
            threading.Thread(target=work, args=(np.random.default_rng(n).permutation(6).repeat(2),)) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not wrong


def test_wrong_arguments_of_a_runtime_are_refused(bundle: Bundle, fake: FakeBackend) -> None:
    runtime = load(bundle, "onnxruntime")
    for images, error, message in (
        (frame_of(1).astype(np.float32), TypeError, r"images\[0\]: expected uint8, got float32"),
        ([frame_of(1), frame_of(1)[:, :, 0]], ValueError, r"images\[1\]: expected shape \[H, W, 3\], got \(2, 3\)"),
        ([np.zeros((0, 4, 3), np.uint8)], ValueError, "shape"),
        ("photo.jpg", TypeError, "expected an array"),
    ):
        with pytest.raises(error, match=message):
            runtime.predict(images)  # type: ignore[arg-type]
    for call in (runtime.predict, runtime.stream, runtime.timed):
        with pytest.raises(ValueError, match="task: expected one of"):
            call([frame_of(1)], "depth")  # type: ignore[operator]
    assert fake.batches == []
    runtime.close()
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        runtime.predict(frame_of(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"backend": "cuda"}, "backend: expected one of"), ({"in_flight": 0}, "in_flight"), ({"device": -1}, "device")],
)
def test_wrong_arguments_of_load_are_refused(bundle: Bundle, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(bundle, **arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_refused_and_does_not_hang(bundle: Bundle) -> None:
    code = f"""
import os, signal
import numpy as np
from maskformer_fast.deploy.runtime import load
frame = np.zeros((8, 9, 3), np.uint8)
with load({str(bundle.folder)!r}, "onnxruntime") as runtime:
    runtime.predict(frame)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        with runtime:  # closing must not wait for threads that a fork does not copy
            try:
                runtime.predict(frame)
            except RuntimeError as error:
                print(error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(runtime.predict(frame).labels.shape)
"""
    assert run_blocked([], code).splitlines() == [
        "runtime: expected to be used by the process that loaded it, got one forked from it; load the bundle there",
        "(8, 9)",
    ]


def test_damaged_bundles_and_other_digests_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = tiny_bundle(tmp_path / "copy", TEST)[0]
    load(copy.folder, digest=copy.digest).close()
    load(copy, digest=copy.digest).close()
    for where in (copy, copy.folder):
        with pytest.raises(ValueError, match="digest: expected 0000"):
            load(where, digest="0" * 64)
    graph = copy.folder / "raw.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError, match="raw.onnx"):
        load(copy.folder)
    with pytest.raises(BundleError, match="raw.onnx"):
        load(copy)  # opened before it was changed
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


# Choice of the backend.


def with_engine(bundle: Bundle, folder: Path, targets: tuple[str, ...], kernels: tuple[str, ...], api: str) -> Bundle:
    copy = tiny_bundle(folder, TEST)[0]
    one = Shape(1, 64, 64)
    engine = Engine("engines/fp16.engine", api, "1.0", "fp16", targets, Profile(one, one, one), {}, ())  # type: ignore[arg-type]
    return extend_bundle(copy, {"engines/fp16.engine": b"engine"}, engines=(engine,), kernels=kernels)


def test_a_bundle_without_engines_runs_on_the_cpu(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with load(bundle) as runtime:
        assert runtime.backend == "openvino" and runtime.precision == "fp32"
    assert "runs on the CPU by openvino in fp32 (the fastest library), not by tensorrt: engines: " in caplog.text
    with pytest.raises(BundleError, match="without engines; build it with: .* --engine-only"):
        load(bundle, "tensorrt")


@pytest.mark.parametrize(
    ("gpu", "targets", "kernels", "api", "error", "message"),
    [
        ("sm_90", ("sm_87", "sm_120"), ("sm_90",), "json", BundleError, r"\(sm_90\), got those for sm_120, sm_87"),
        ("sm_87", ("sm_87",), ("sm_90",), "json", BundleError, r"kernels.*\(sm_87\), got sm_90; .*--target sm_87"),
        ("sm_87", ("sm_87",), (), "json", BundleError, "got none"),
        ("sm_87", ("sm_87",), ("sm_87",), "tensorrt", ModuleNotFoundError, "pip install tensorrt"),
        (ValueError("device: none"), ("sm_87",), ("sm_87",), "tensorrt", ValueError, "device: none"),
    ],
)  # fmt: skip
def test_the_reason_against_tensorrt_is_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Any, targets: Any, kernels: Any, api: str,
    error: Any, message: str,
) -> None:  # fmt: skip
    def target(device: int) -> str:
        if isinstance(gpu, Exception):
            raise gpu
        return str(gpu)

    monkeypatch.setattr(selection, "gpu_target", target)
    found = selection.importlib.util.find_spec
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: None if name == "tensorrt" else found(name))
    api = "tensorrt_rtx" if api == "json" else api
    ready = with_engine(bundle, tmp_path / "bundle", targets, kernels, api)
    with pytest.raises(error, match=message):
        load(ready, "tensorrt")
    with load(ready) as runtime:
        assert runtime.backend == "openvino"


def test_tensorrt_is_chosen_where_it_can_run(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def make(*arguments: Any) -> FakeBackend:
        made.append(arguments)
        return FakeBackend()

    module = ModuleType("maskformer_fast.deploy.runtime.cuda_backend")
    module.TensorRTBackend = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(selection, "gpu_target", lambda device: "sm_90")
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: name)
    ready = with_engine(bundle, tmp_path / "bundle", ("sm_90",), ("sm_90",), "tensorrt")
    for backend in ("auto", "tensorrt"):
        assert load(ready, backend, device=1, in_flight=3).backend == "tensorrt"  # type: ignore[arg-type]
        assert made.pop() == (ready, 1, 3, None)
    assert load(ready, "onnxruntime").backend == "onnxruntime" and not made


def test_the_target_is_the_gpus_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(lambda *_: None, (11, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    assert selection.gpu_target(0) == "sm_110" and not driver.retained
    with pytest.raises(ValueError, match=r"device: expected 0..0, one of this machine's GPUs, got 1"):
        selection.gpu_target(1)
    driver.failures = {"cuInit": 100}
    with pytest.raises(ValueError, match="device: expected a machine with an NVIDIA GPU .* CUDA_ERROR_100"):
        selection.gpu_target(0)
    driver.failures = {}
    monkeypatch.setattr(driver, "cuInit", lambda _: (_ for _ in ()).throw(RuntimeError("no libcuda")), raising=False)
    with pytest.raises(ValueError, match="device: .* no libcuda"):
        selection.gpu_target(0)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ModuleNotFoundError, match=r"maskformer_fast\[deploy\]"):
        selection.gpu_target(0)


# Running without torch.


def run_blocked(blocked: Sequence[str], code: str) -> str:
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in blocked), code]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_predictions_without_torch_equal_those_with_it(bundle: Bundle, tmp_path: Path) -> None:
    frames = [np.random.default_rng(n).integers(0, 256, (20 + 7 * n, 50, 3), dtype=np.uint8) for n in range(3)]
    np.savez(tmp_path / "frames.npz", *frames)
    out = run_blocked(["torch", "triton", "onnx", "PIL", "cuda", "tensorrt"], f"""
import numpy as np
from maskformer_fast.deploy.runtime import load
frames = list(np.load({str(tmp_path / "frames.npz")!r}).values())
with load({str(bundle.folder)!r}, digest={bundle.digest!r}) as runtime:
    labels = [result.labels for result in runtime.predict(frames)]
    maps = [result.id_map for result in runtime.stream(frames, "panoptic")]
    boxes = [result.boxes for result in runtime.predict(frames, "instance")]
np.savez({str(tmp_path / "results.npz")!r}, *labels, *maps, *boxes)
print(runtime.backend, sorted(name for name in sys.modules if name.startswith("maskformer_fast")))
""")  # fmt: skip
    assert out.startswith("openvino") and "structures" not in out
    with load(bundle) as runtime:
        expected = [result.labels for result in runtime.predict(frames)]
        expected += [result.id_map for result in runtime.predict(frames, "panoptic")]
        expected += [result.boxes for result in runtime.predict(frames, "instance")]
    with np.load(tmp_path / "results.npz") as results:
        for got, wanted in zip(results.values(), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_the_runtime_is_imported_without_any_library(bundle: Bundle) -> None:
    blocked = ["torch", "triton", "onnxruntime", "openvino", "PIL", "cuda", "tensorrt", "tensorrt_rtx", "tyro"]
    out = run_blocked(blocked, f"""
from maskformer_fast.deploy import runtime
try:
    runtime.load({str(bundle.folder)!r})
except ModuleNotFoundError as error:
    print(error)
""")  # fmt: skip
    assert "openvino or onnxruntime is needed" in out and "maskformer_fast[deploy]" in out
