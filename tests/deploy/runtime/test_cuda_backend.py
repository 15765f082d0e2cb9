"""The GPU backend on a fake driver and a fake TensorRT: order of calls, refusals, and release of everything.

The correctness of results is tested in `tests/deploy/build/test_record_launches.py`, where the fake GPU computes.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="recording launches needs Triton")

from maskformer_fast.config import TASKS
from maskformer_fast.deploy.build.record_launches import record_launches
from maskformer_fast.deploy.bundle.folder import Bundle, write_bundle
from maskformer_fast.deploy.bundle.manifest import BundleError, Manifest, Shape
from maskformer_fast.deploy.runtime.cuda_backend import TensorRTBackend
from maskformer_fast.deploy.runtime.cuda_driver import DriverError
from maskformer_fast.deploy.runtime.cuda_engine import runs
from maskformer_fast.deploy.runtime.session import load
from tests.support.fake_cuda import FakeDriver
from tests.support.launch_cases import SHAPES, TARGET, fake_files, fake_gpu, make_bundle, make_frames, make_manifest

TWO, ONE = SHAPES
MEMORY = {"cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuModuleLoadData", "cuMemFree"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("cuda") / "bundle", make_manifest(), [TWO, ONE, replace(TWO, batch=4)])


def idle(name: str, grid: tuple[int, int, int], threads: int, parameters: int) -> None:
    """A kernel that does nothing."""


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    driver = FakeDriver(idle)
    yield driver
    driver.failures.clear()
    assert not driver.alive and driver.retained == 0 and driver.depth == 0, "not everything was released"


def rebuilt(bundle: Bundle, folder: Path, manifest: Manifest, **files: bytes) -> Bundle:
    """The bundle with another manifest, or other files (``/`` in their names written as ``__``)."""
    contents = {name: bundle.read(name) for name in bundle.manifest.files}
    return write_bundle(folder, manifest, contents | {name.replace("__", "/"): text for name, text in files.items()})


def test_a_graph_is_captured_once_and_replayed(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver) as tensorrt:
        backend = TensorRTBackend(bundle, 0, 2)
        for _ in range(2):  # both slots
            backend.collect(backend.submit(make_frames(ONE, 0), "instance"))
        names = driver.names()
        assert names.count("cuStreamBeginCapture") == names.count("cuGraphInstantiate") == 2
        assert names.count("cuGraphDestroy") == 2 and names.count("cuGraphLaunch") == 2
        assert tensorrt.enqueued == 4  # each slot once for itself and once into the graph
        launched = names.count("cuLaunchKernel")
        driver.calls.clear()
        for _ in range(5):
            backend.collect(backend.submit(make_frames(ONE, 0), "instance"))
        each = ["cuCtxPushCurrent", "cuGraphLaunch", "cuEventRecord", "cuCtxPopCurrent",
                "cuCtxPushCurrent", "cuEventSynchronize", *["cuEventElapsedTime"] * 3, "cuCtxPopCurrent"]  # fmt: skip
        assert driver.names() == each * 5  # nothing allocated, nothing launched one by one
        assert launched == 2 * 2 * (1 + 2) and tensorrt.enqueued == 4
        backend.close()
        assert tensorrt.contexts == 0


def test_no_memory_is_allocated_after_the_start(
    bundle: Bundle, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kernels do nothing here, so there are no results to read.
    monkeypatch.setattr("maskformer_fast.deploy.runtime.cuda_backend.read_results", lambda *arguments: [])
    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 3)
        names = driver.names()
        assert names.count("cuMemHostAlloc") == 3 and names.count("cuMemAlloc") == 3 + 5  # slots, and constants
        driver.calls.clear()
        for task, shape, _ in itertools.product(TASKS, SHAPES, range(3)):
            backend.collect(backend.submit(make_frames(shape, 0), task))
        assert not MEMORY & set(driver.names()) and driver.names().count("cuStreamBeginCapture") == 18
        backend.close()


def test_batches_in_flight_run_in_different_slots(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 2)
        first = backend.submit(make_frames(ONE, 0), "semantic")
        second = backend.submit(make_frames(ONE, 1), "semantic")
        with pytest.raises(RuntimeError, match="expected a batch to be collected"):
            backend.submit(make_frames(ONE, 2), "semantic")
        for ticket in (second, first):  # in any order
            (result,), seconds = backend.collect(ticket)
            assert result.labels.shape == (ONE.height, ONE.width)
            # The fake clock advances one second at each event.
            assert seconds.preprocess == seconds.network == 1 and 1 <= seconds.postprocess < 2
            assert seconds.total == pytest.approx(sum(seconds[:3]))
        with pytest.raises(KeyError):
            backend.collect(first)
        streams = [arguments[1] for name, arguments in driver.calls if name == "cuGraphLaunch"]
        assert len(set(streams)) == 2
        backend.close()
        backend.close()
        with pytest.raises(RuntimeError, match="it was closed"):
            backend.submit(make_frames(ONE, 0), "semantic")


def test_frames_reach_the_device_and_results_are_copies(bundle: Bundle) -> None:
    seen = []

    def kernel(name: str, grid: tuple[int, int, int], threads: int, parameters: int) -> None:
        seen.append(name.rsplit("_", 1)[0])

    driver = FakeDriver(kernel)
    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 1)
        frames = make_frames(TWO, 0)
        (first, _), _ = backend.collect(backend.submit(frames, "semantic"))
        # the run before the capture, and the graph
        assert seen == ["resize", "probabilities", "semantic_logits", "semantic_general"] * 2
        pinned = next(memory for kind, memory in driver.alive.values() if kind == "pinned")
        assert frames[0].tobytes() + frames[1].tobytes() in bytes(pinned)
        before = first.labels.copy()
        backend.collect(backend.submit(make_frames(TWO, 5), "semantic"))
        backend.close()
        assert np.array_equal(first.labels, before)
    assert not driver.alive


def test_smaller_batches_run_by_the_next_larger_sequence(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 1)
        assert backend.max_batch(TWO.height, TWO.width, "instance") == 4
        assert backend.max_batch(ONE.height, ONE.width, "instance") == 1
        for count in (1, 2, 3, 4):
            results, _ = backend.collect(backend.submit(make_frames(replace(TWO, batch=count), 0), "instance"))
            assert len(results) == count
        assert driver.names().count("cuStreamBeginCapture") == 2  # batches of two and of four
        with pytest.raises(ValueError, match="at most 4"):
            backend.submit(make_frames(replace(TWO, batch=5), 0), "instance")
        backend.close()


def test_frames_of_another_size_are_refused_with_the_known_sizes(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 1)
        with pytest.raises(ValueError, match=r"semantic: 11x19, 17x10\); .* got '10x10'"):
            backend.submit(make_frames(Shape(1, 10, 10), 0), "semantic")
        with pytest.raises(ValueError, match="at least one"):
            backend.submit([], "semantic")
        with pytest.raises(ValueError, match="as the first"):
            backend.submit([*make_frames(ONE, 0), *make_frames(TWO, 0)], "semantic")
        backend.collect(backend.submit(make_frames(ONE, 0), "semantic"))  # the slot is free
        backend.close()


def test_rtx_compiles_before_it_is_captured(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver, rtx=True):
        backend = TensorRTBackend(bundle, 0, 1)
        backend.collect(backend.submit(make_frames(ONE, 0), "semantic"))
        backend.close()


def test_several_backends_share_a_process(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver) as tensorrt:
        backends = [TensorRTBackend(bundle, 0, 1) for _ in range(3)]
        tickets = [backend.submit(make_frames(ONE, 0), "instance") for backend in backends]
        for backend, ticket in zip(backends, tickets, strict=True):
            assert len(backend.collect(ticket)[0]) == 1
            backend.close()
        assert driver.retained == 0 and tensorrt.contexts == 0


def test_the_runtime_streams_through_the_backend(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver), load(bundle, "tensorrt", in_flight=2) as runtime:
        frames = [make_frames(ONE, seed)[0] for seed in range(5)]
        assert len(list(runtime.stream(frames, "instance"))) == 5
        assert len(runtime.predict([*frames, *make_frames(TWO, 0)])) == 7


FAILING = [
    "cuInit", "cuDeviceGetCount", "cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuFuncSetAttribute", "cuMemAlloc",
    "cuMemHostAlloc", "cuMemcpyHtoD", "cuStreamCreate", "cuEventCreate",
]  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_errors_at_the_start_name_the_call(bundle: Bundle, driver: FakeDriver, name: str) -> None:
    driver.failures[name] = 2
    with fake_gpu(driver) as tensorrt:
        with pytest.raises(RuntimeError, match=f"{name}: CUDA_ERROR_2: as the test wants it"):
            TensorRTBackend(bundle, 0, 2)
        assert tensorrt.contexts == 0


@pytest.mark.parametrize(
    "name",
    ["cuMemcpyHtoDAsync", "cuLaunchKernel", "cuMemsetD8Async", "cuStreamSynchronize", "cuGraphLaunch", "cuEventRecord",
     "cuEventRecordWithFlags"],
)  # fmt: skip
def test_errors_of_a_batch_leave_the_backend_usable(bundle: Bundle, driver: FakeDriver, name: str) -> None:
    with fake_gpu(driver) as tensorrt:
        backend = TensorRTBackend(bundle, 0, 1)
        driver.failures[name] = 700
        with pytest.raises(DriverError, match=f"{name}: CUDA_ERROR_700"):
            backend.submit(make_frames(ONE, 0), "instance")
        driver.failures.clear()
        driver.capturing.clear()
        assert len(backend.collect(backend.submit(make_frames(ONE, 0), "instance"))[0]) == 1
        backend.close()
        assert tensorrt.contexts == 0


def test_device_errors_are_raised_when_a_batch_is_collected(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 1)
        ticket = backend.submit(make_frames(ONE, 0), "semantic")
        driver.failures["cuEventSynchronize"] = 719
        with pytest.raises(DriverError, match="cuEventSynchronize: CUDA_ERROR_719"):
            backend.collect(ticket)
        driver.failures.clear()
        backend.collect(backend.submit(make_frames(ONE, 0), "semantic"))
        backend.close()


def test_closing_releases_everything_after_an_error(bundle: Bundle) -> None:
    driver = FakeDriver(idle)
    with fake_gpu(driver) as tensorrt:
        backend = TensorRTBackend(bundle, 0, 1)
        backend.submit(make_frames(ONE, 0), "semantic")  # never collected
        driver.failures["cuCtxSynchronize"] = 700
        with pytest.raises(DriverError, match="cuCtxSynchronize"):
            backend.close()
        assert not driver.alive and driver.retained == 0 and tensorrt.contexts == 0


def test_errors_of_the_network_have_the_librarys_message(bundle: Bundle, driver: FakeDriver, tmp_path: Path) -> None:
    facts = json.loads(bundle.read("engines/fake.engine"))
    broken = {"engines__fake.engine": json.dumps(facts | {"broken": True}).encode()}
    with fake_gpu(driver):
        backend = TensorRTBackend(rebuilt(bundle, tmp_path / "broken", bundle.manifest, **broken), 0, 1)
        with pytest.raises(RuntimeError, match="could not be launched: the fake network is broken"):
            backend.submit(make_frames(ONE, 0), "semantic")
        backend.close()


@pytest.mark.parametrize(
    ("engine", "message"),
    [(b"no JSON", "refuses the engine: no engine of mine"), ({"dtype": "float16"}, "mask_logits: expected float32"),
     ({"queries": 9}, "shape of class_logits"), ({"divisor": 64}, "shape of mask_logits"),
     ({"most": 4}, "does not take images of shape")],
)  # fmt: skip
def test_engines_of_other_inputs_or_outputs_are_refused(
    bundle: Bundle, driver: FakeDriver, tmp_path: Path, engine: Any, message: str
) -> None:
    facts = json.loads(bundle.read("engines/fake.engine"))
    content = engine if isinstance(engine, bytes) else json.dumps(facts | engine).encode()
    changed = rebuilt(bundle, tmp_path / "changed", bundle.manifest, **{"engines__fake.engine": content})
    with fake_gpu(driver), pytest.raises((BundleError, RuntimeError), match=message):
        TensorRTBackend(changed, 0, 1)


def test_another_gpu_is_refused_before_anything_is_read(bundle: Bundle, driver: FakeDriver, tmp_path: Path) -> None:
    engine = bundle.manifest.engines[0]
    foreign = replace(bundle.manifest, engines=(replace(engine, targets=("sm_90",)),))
    cases = [
        (bundle, (9, 0), "10.9.0.34", r"one for this GPU \(sm_90\), got 'those for sm_87'"),
        (rebuilt(bundle, tmp_path / "foreign", foreign), (8, 7), "10.9.0.34", r"\(sm_87\), got 'those for sm_90'"),
        (bundle, (8, 7), "10.10.0.1", r"expected tensorrt 10.9.0.34, which built the engine, got 10.10.0.1"),
        (rebuilt(bundle, tmp_path / "both", replace(foreign, engines=(replace(engine, targets=(TARGET, "sm_90")),))),
         (9, 0), "10.9.0.34", r"kernels: expected those for this GPU \(sm_90\)"),
    ]  # fmt: skip
    for refused, capability, version, message in cases:
        driver.capability = capability
        with fake_gpu(driver, version=version) as tensorrt:
            with pytest.raises(BundleError, match=message):
                TensorRTBackend(refused, 0, 1)
            assert tensorrt.deserialised == 0 and "cuModuleLoadData" not in driver.names()


def test_a_missing_library_is_named(bundle: Bundle, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(driver):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(ModuleNotFoundError, match=r"tensorrt is needed .* pip install maskformer_fast\[tensorrt\]"):
            TensorRTBackend(bundle, 0, 1)


def test_a_library_that_does_not_load_is_named(
    bundle: Bundle, driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    with fake_gpu(driver):
        monkeypatch.delitem(sys.modules, "tensorrt")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(OSError, match="tensorrt: expected a library that loads, got: libnvinfer.so.10"):
            TensorRTBackend(bundle, 0, 1)


def test_a_device_number_that_does_not_exist_is_refused(bundle: Bundle, driver: FakeDriver) -> None:
    with fake_gpu(driver), pytest.raises(ValueError, match=r"device: expected 0..0, one of this machine's GPUs, got 1"):
        TensorRTBackend(bundle, 1, 1)


def test_launches_for_another_type_of_masks_are_refused(driver: FakeDriver, tmp_path: Path) -> None:
    manifest = make_manifest("float16")
    files = fake_files(manifest, record_launches(make_manifest(), [ONE], ["semantic"], "float32"))
    with fake_gpu(driver), pytest.raises(BundleError, match=r"'mask_logits': 'float16'"):
        TensorRTBackend(write_bundle(tmp_path / "bundle", manifest, files), 0, 1)


@pytest.mark.parametrize(
    ("built", "here", "compatible", "expected"),
    [("10.9.0.34", "10.9.0.34", False, True), ("10.9.0.34", "10.9.1.1", False, False),
     ("10.9.0.34", "10.13.2.6", True, True), ("10.9.0.34", "10.8.9.9", True, False),
     ("10.9.0.34", "11.0.0.1", True, False)],
)  # fmt: skip
def test_which_versions_run_an_engine(built: str, here: str, compatible: bool, expected: bool) -> None:
    engine = replace(make_manifest().engines[0], api_version=built, options={"version_compatible": compatible})
    assert runs(engine, here) == expected


def test_cuda_python_takes_our_arguments(bundle: Bundle, driver: FakeDriver) -> None:
    """cuda-python accepts the arguments of every call: it converts them before it looks for a driver."""
    api = pytest.importorskip("cuda.bindings.driver")
    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 1)
        backend.collect(backend.submit(make_frames(ONE, 0), "instance"))
        backend.close()
    try:
        api.cuInit(0)
    except RuntimeError as error:
        missing = type(error)
    else:
        pytest.skip("a machine with a driver: the calls would be made")
    for name, arguments in {name: arguments for name, arguments in driver.calls}.items():
        kinds = {"CUdevice_attribute": "cuDeviceGetAttribute", "CUfunction_attribute": "cuFuncSetAttribute",
                 "CUstreamCaptureMode": "cuStreamBeginCapture"}  # fmt: skip
        real = [
            next((getattr(getattr(api, kind), argument.name) for kind, owner in kinds.items()
                  if owner == name and hasattr(argument, "name")), argument)
            for argument in arguments
        ]  # fmt: skip
        if name in ("cuFuncSetAttribute", "cuLaunchKernel"):
            real[0] = api.CUfunction(4096)
        if name == "cuCtxPushCurrent":
            real = [api.CUcontext(4096)]
        with pytest.raises(missing):
            getattr(api, name)(*real)


BLOCKED = """
import sys
for name in ("torch", "triton", "PIL", "onnxruntime", "tensorrt", "cuda", "torchvision"):
    sys.modules[name] = None
import maskformer_fast.deploy.runtime.cuda_backend
from maskformer_fast.deploy.runtime.cuda_driver import Driver
try:
    Driver()
except ModuleNotFoundError as error:
    assert "maskformer_fast[deploy]" in str(error), error
else:
    raise AssertionError
"""


def test_the_backend_is_imported_without_torch_and_the_libraries() -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_machine_without_a_driver_is_named() -> None:
    pytest.importorskip("cuda.bindings.driver")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    from maskformer_fast.deploy.runtime.cuda_driver import Driver

    with pytest.raises(RuntimeError, match="expected a machine with an NVIDIA GPU and its driver"):
        Driver()
