"""CUDA graphs that cannot be captured, and threads that capture, collect and close at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="recording launches needs Triton")

from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.runtime.cuda_backend import TensorRTBackend
from tests.support.fake_cuda import FakeDriver
from tests.support.launch_cases import SHAPES, fake_gpu, make_bundle, make_frames, make_manifest

ONE = SHAPES[1]
TIMEOUT = 20.0
"""Seconds to wait for another thread."""


@pytest.fixture
def launches() -> list[str]:
    """Names of the kernels that ran."""
    return []


@pytest.fixture
def driver(launches: list[str]) -> Iterator[FakeDriver]:
    driver = FakeDriver(lambda name, grid, threads, parameters: launches.append(name))
    yield driver
    driver.failures.clear()
    assert not driver.alive and driver.retained == 0 and driver.depth == 0, "not everything was released"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("graphs") / "bundle", make_manifest(), [ONE])


@pytest.fixture(scope="module")
def uncapturable(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("graphs") / "uncapturable"
    return make_bundle(folder, make_manifest(), [ONE], uncapturable=True)


def runs_without_graphs(bundle: Bundle, launches: list[str], caplog: pytest.LogCaptureFixture) -> str:
    """Run four batches in two slots without graphs -> the reason, which is logged once."""
    backend = TensorRTBackend(bundle, 0, 2)
    try:
        assert backend.graph_obstacle is None
        for batch in range(4):
            launches.clear()
            (result,), seconds = backend.collect(backend.submit(make_frames(ONE, 0), "semantic"))
            assert result.labels.shape == (ONE.height, ONE.width) and seconds.network == 1
            # A slot's first batch runs twice: to load what is lazy, and for its results.
            assert len(launches) == 4 * (2 if batch < 2 else 1)
        assert sum("piece by piece" in record.message for record in caplog.records) == 1
        assert backend.graph_obstacle is not None
        return backend.graph_obstacle
    finally:
        backend.close()


def test_an_engine_that_cannot_be_captured_still_runs(
    uncapturable: Bundle, driver: FakeDriver, launches: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with fake_gpu(driver) as tensorrt:
        assert "not permitted when stream is capturing" in runs_without_graphs(uncapturable, launches, caplog)
        assert "cuGraphInstantiate" not in driver.names() and not driver.capturing
        assert tensorrt.contexts == 0


def test_rtx_is_asked_before_a_capture(
    uncapturable: Bundle, driver: FakeDriver, launches: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with fake_gpu(driver, rtx=True):
        assert "library says that it cannot be captured" in runs_without_graphs(uncapturable, launches, caplog)
        assert "cuStreamBeginCapture" not in driver.names()


@pytest.mark.parametrize("name", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphUpload"])
def test_a_driver_that_refuses_graphs_still_runs(
    bundle: Bundle, driver: FakeDriver, launches: list[str], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    driver.failures[name] = 900
    with fake_gpu(driver):
        assert f"{name}: CUDA_ERROR_900" in runs_without_graphs(bundle, launches, caplog)


def test_graphs_are_used_where_possible(bundle: Bundle, driver: FakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    with fake_gpu(driver, rtx=True):
        backend = TensorRTBackend(bundle, 0, 1)
        backend.collect(backend.submit(make_frames(ONE, 0), "semantic"))
        assert backend.graph_obstacle is None and not caplog.records
        backend.close()


def test_nobody_waits_for_the_context_during_a_capture(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver forbids it to all threads, so a backend that closes waits for another's capture to end."""
    driver = FakeDriver(lambda *arguments: None)
    monkeypatch.setattr(driver, "_drop", lambda kind, handle: (driver.alive.pop(int(handle)), (0,))[1])  # any thread
    threads: list[threading.Thread] = []
    with fake_gpu(driver) as tensorrt:
        other = TensorRTBackend(bundle, 0, 1)
        backend = TensorRTBackend(bundle, 0, 1)
        begin = driver.cuStreamBeginCapture
        synchronised_early = []

        def begin_capture(*arguments: Any) -> Any:
            status = begin(*arguments)
            driver.calls.clear()
            threads.append(threading.Thread(target=other.close))
            threads[0].start()
            threads[0].join(0.3)
            synchronised_early.append("cuCtxSynchronize" in driver.names())
            return status

        monkeypatch.setattr(driver, "cuStreamBeginCapture", begin_capture, raising=False)
        ticket = backend.submit(make_frames(ONE, 0), "semantic")
        threads[0].join(TIMEOUT)
        assert synchronised_early == [False] and "cuCtxSynchronize" in driver.names()
        backend.collect(ticket)
        backend.close()
        assert tensorrt.contexts == 0


def test_closing_waits_for_threads_that_collect(
    bundle: Bundle, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is not released while another thread reads results from it."""
    waiting, go_on = threading.Event(), threading.Event()
    results: list[Any] = []

    def synchronize(event: int) -> tuple[int]:
        waiting.set()
        assert go_on.wait(TIMEOUT)
        return (0,)

    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 1)
        ticket = backend.submit(make_frames(ONE, 0), "semantic")
        monkeypatch.setattr(driver, "cuEventSynchronize", synchronize, raising=False)
        collector = threading.Thread(target=lambda: results.extend(backend.collect(ticket)[0]))
        collector.start()
        assert waiting.wait(TIMEOUT)
        closer = threading.Thread(target=backend.close)
        closer.start()
        closer.join(0.3)
        assert closer.is_alive() and any(kind == "pinned" for kind, _ in driver.alive.values())
        go_on.set()
        for thread in (collector, closer):
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        assert len(results) == 1
