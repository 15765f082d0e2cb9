"""The onnxruntime backend: batches at once, graphs of fixed size, and refusals."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskformer_fast.config import TestConfig
from maskformer_fast.deploy.bundle.folder import Bundle, write_bundle
from maskformer_fast.deploy.bundle.manifest import BundleError
from maskformer_fast.deploy.runtime.backend import Backend
from maskformer_fast.deploy.runtime.cpu_backend import CpuBackend, default_threads
from tests.support.tiny_bundle import tiny_bundle

TEST = TestConfig(short_edge=None, object_mask_threshold=0.3, overlap_threshold=0.3, top_k=6)
RNG = np.random.default_rng(0)
FRAMES = [RNG.integers(0, 256, (37, 50, 3), dtype=np.uint8) for _ in range(3)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("cpu") / "bundle", TEST)[0]


def labels_of(backend: Backend, frames: list[np.ndarray]) -> list[np.ndarray]:
    return [result.labels for result in backend.collect(backend.submit(frames, "semantic"))[0]]  # type: ignore[union-attr]


class SessionForTwo:
    """Session that runs a batch only when another one waits to run, too."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.barrier = threading.Barrier(2)

    def run(self, *arguments: Any) -> Any:
        self.barrier.wait(timeout=30)
        return self.session.run(*arguments)


def test_batches_overlap_and_each_ticket_gives_its_own_results(bundle: Bundle) -> None:
    backend = CpuBackend(bundle, in_flight=2, threads=1)
    expected = [labels_of(backend, [frame])[0] for frame in FRAMES]
    backend._session = SessionForTwo(backend._session)
    tickets = [backend.submit([FRAMES[n]], "semantic") for n in (0, 1, 2, 0)]
    for ticket, number in reversed(list(zip(tickets, (0, 1, 2, 0), strict=True))):
        results, seconds = backend.collect(ticket)
        np.testing.assert_array_equal(results[0].labels, expected[number])  # type: ignore[union-attr]
        assert min(seconds) >= 0 and sum(seconds[:3]) == pytest.approx(seconds.total)
        with pytest.raises(KeyError):
            backend.collect(ticket)
    backend.close()


def test_an_error_does_not_affect_other_batches(bundle: Bundle) -> None:
    backend = CpuBackend(bundle, in_flight=2)
    bad = backend.submit([FRAMES[0], FRAMES[0][:5]], "semantic")
    empty = backend.submit([], "semantic")
    good = backend.submit(FRAMES, "semantic")
    with pytest.raises(ValueError, match="frames: expected frames of one size"):
        backend.collect(bad)
    with pytest.raises(ValueError, match="frames: expected 1 to"):
        backend.collect(empty)
    assert len(backend.collect(good)[0]) == 3
    assert backend.max_batch(37, 50, "semantic") == 1
    backend.close()


def test_closing_waits_for_batches_that_have_begun(bundle: Bundle) -> None:
    backend = CpuBackend(bundle, in_flight=1)
    begun, go_on = threading.Event(), threading.Event()
    prepare = backend._prepare

    def slowly(frames: Any) -> np.ndarray:
        begun.set()
        assert go_on.wait(30)
        return prepare(frames)

    backend._prepare = slowly  # type: ignore[method-assign]
    backend.submit([FRAMES[0]], "semantic")
    assert begun.wait(30)
    closing = threading.Thread(target=backend.close)
    closing.start()
    assert closing.is_alive()
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    with pytest.raises(RuntimeError):
        backend.submit([FRAMES[0]], "semantic")


def test_a_graph_of_fixed_size_runs_that_size_alone(tmp_path: Path, bundle: Bundle) -> None:
    fixed, free = CpuBackend(tiny_bundle(tmp_path / "fixed", TEST, size=(2, 37, 50))[0], 1), CpuBackend(bundle, 1)
    assert fixed.max_batch(37, 50, "semantic") == 2
    for frames in (FRAMES[:2], FRAMES[2:]):  # a partial batch is filled up
        for got, expected in zip(labels_of(fixed, frames), labels_of(free, frames), strict=True):
            np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="frames: expected 1 to 2 of them, got 3"):
        labels_of(fixed, FRAMES)
    with pytest.raises(ValueError, match=r"becomes \(37, 50\) .*got '\(36, 50\), which becomes \(36, 50\)'"):
        labels_of(fixed, [FRAMES[0][:36]])
    fixed.close()
    free.close()


def test_bundles_without_a_graph_that_runs_are_refused(tmp_path: Path, bundle: Bundle) -> None:
    nothing = write_bundle(tmp_path / "nothing", tiny_bundle(tmp_path / "a", TEST, graphs={})[0].manifest, {})
    with pytest.raises(BundleError, match="graphs: expected one of the flavour raw"):
        CpuBackend(nothing, 1)
    garbage = write_bundle(tmp_path / "garbage", bundle.manifest, {"raw.onnx": b"no graph"})
    with pytest.raises(BundleError, match="graphs.raw: expected a graph that onnxruntime runs"):
        CpuBackend(garbage, 1)
    for arguments in ({"in_flight": 0}, {"in_flight": 1, "threads": 0}):
        with pytest.raises(ValueError, match="> 0, got 0"):
            CpuBackend(bundle, **arguments)


def test_graphs_with_other_inputs_or_outputs_are_refused(tmp_path: Path, bundle: Bundle) -> None:
    content = bundle.read("raw.onnx")
    for old, new in ((b"images", b"frames"), (b"mask_logits", b"mask_scores")):
        other = write_bundle(tmp_path / new.decode(), bundle.manifest, {"raw.onnx": content.replace(old, new)})
        with pytest.raises(BundleError, match=rf"graphs.raw: expected .*{old.decode()}.*, got .*{new.decode()}"):
            CpuBackend(other, 1)


def constant_graph(
    class_logits: np.ndarray, mask_logits: np.ndarray, shape: list[Any] | None = None, pixels: int = TensorProto.UINT8
) -> bytes:
    """A graph that gives these outputs for any images, and declares them as arrays of any rank, or of ``shape``."""
    outputs = {"class_logits": class_logits, "mask_logits": mask_logits}
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"{name}_value"], [name]) for name in outputs],
        "constant",
        [helper.make_tensor_value_info("images", pixels, ["batch", 3, "height", "width"])],
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)
            for name, value in outputs.items()
        ],
        [numpy_helper.from_array(value, f"{name}_value") for name, value in outputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def logits_of(batch: int = 1, queries: int = 9, classes: int = 6, height: int = 16) -> list[np.ndarray]:
    sizes = (batch, queries, classes), (batch, queries, height, 16)
    return [RNG.standard_normal(size).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
@pytest.mark.parametrize("output", [0, 1])
def test_outputs_of_another_type_are_refused_when_loaded(
    tmp_path: Path, bundle: Bundle, output: int, dtype: type[np.generic]
) -> None:
    logits: list[Any] = logits_of()
    logits[output] = logits[output].astype(dtype)
    other = write_bundle(tmp_path / "bundle", bundle.manifest, {"raw.onnx": constant_graph(*logits)})
    with pytest.raises(BundleError, match=r"graphs.raw, (class|mask)_logits: expected tensor\(float\), got"):
        CpuBackend(other, 1)


def test_inputs_of_another_type_are_refused_when_loaded(tmp_path: Path, bundle: Bundle) -> None:
    graph = constant_graph(*logits_of(), pixels=TensorProto.FLOAT)
    other = write_bundle(tmp_path / "bundle", bundle.manifest, {"raw.onnx": graph})
    with pytest.raises(BundleError, match=r"graphs.raw, images: expected tensor\(uint8\), got 'tensor\(float\)'"):
        CpuBackend(other, 1)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 8}, {"classes": 5}, {"height": 0}, {"batch": 2}])
def test_outputs_of_other_sizes_are_refused(tmp_path: Path, bundle: Bundle, sizes: dict[str, int]) -> None:
    graph = constant_graph(*logits_of(**sizes))
    other = write_bundle(tmp_path / "bundle", bundle.manifest, {"raw.onnx": graph})
    with pytest.raises(BundleError, match=r"graphs.raw, (class|mask)_logits: expected "):  # when loaded, or at the run
        labels_of(CpuBackend(other, 1), FRAMES[:1])


def test_outputs_of_unknown_rank_run(tmp_path: Path, bundle: Bundle) -> None:
    logits = logits_of()
    other = write_bundle(tmp_path / "bundle", bundle.manifest, {"raw.onnx": constant_graph(*logits)})
    labels = labels_of(CpuBackend(other, 1), FRAMES[:1])[0]
    assert labels.shape == FRAMES[0].shape[:2] and labels.max() < 5


@pytest.mark.parametrize(("variable", "expected"), [("3", 3), ("2,4", 2), ("0", None), ("many", None), ("", None)])
def test_threads_follow_omp_num_threads(
    monkeypatch: pytest.MonkeyPatch, variable: str, expected: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert default_threads() == expected or (expected is None and default_threads() >= 1)
