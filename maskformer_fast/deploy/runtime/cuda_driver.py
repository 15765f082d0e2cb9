"""The CUDA driver's API through cuda-python: errors are exceptions, and memory, streams and modules are released.

`Device` keeps a list of everything it makes; `Device.close` releases it in the opposite order, whatever failed before.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

CAPTURE_LOCK = threading.RLock()
"""Lock around every capture of a stream and every call that may wait for a device, as loading and releasing an engine
does. While any stream is being captured, the driver refuses such a wait to every thread and spoils the capture."""


class DriverError(RuntimeError):
    """A call of the CUDA driver that failed."""


class Driver:
    """Calls of ``cuda.bindings.driver`` with checked status."""

    def __init__(self) -> None:
        """Start the driver. Raises ModuleNotFoundError without cuda-python, RuntimeError without a driver."""
        try:
            from cuda.bindings import driver
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "cuda-python is needed to run a bundle on a GPU; install it with: pip install cuda-python "
                "(or maskformer_fast[deploy])",
                name=error.name,
            ) from error
        self.api: Any = driver
        try:
            self.call("cuInit", 0)
        except Exception as error:  # cuda-python has a class of its own for a driver that is not installed
            raise RuntimeError(f"expected a machine with an NVIDIA GPU and its driver: {error}") from error

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function -> its return values without the status. Raises `DriverError` with the error's name."""
        status, *values = getattr(self.api, name)(*arguments)
        if int(status) != 0:
            raise DriverError(f"{name}: {self._error(status)}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def abandon_capture(self, stream: Any) -> None:
        """End a failed capture: the stream becomes usable again, the graph is dropped."""
        status, graph = self.api.cuStreamEndCapture(stream)  # reports the failure that is being handled already
        if int(status) == 0 and graph:
            self.call("cuGraphDestroy", graph)

    def _error(self, status: Any) -> str:
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            failed, text = getattr(self.api, name)(status)
            if int(failed) == 0 and text:
                texts.append(text.decode() if isinstance(text, bytes) else str(text))
        return ": ".join(texts) or f"error {int(status)}"


def find_device(driver: Driver, index: int) -> Any:
    """Handle of GPU number ``index``. Raises ValueError where there is none."""
    count = driver.call("cuDeviceGetCount")
    if not 0 <= index < count:
        raise ValueError(f"device: expected 0..{count - 1}, one of this machine's GPUs, got {index}")
    return driver.call("cuDeviceGet", index)


def architecture(driver: Driver, device: Any) -> str:
    """Architecture of a GPU by the name that engines and kernels have: ``sm_87``."""
    attributes = driver.api.CUdevice_attribute
    major = driver.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = driver.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return f"sm_{major}{minor}"


class Device:
    """One GPU through its primary context, which PyTorch and the CUDA runtime use too."""

    def __init__(self, driver: Driver, index: int) -> None:
        """Retain the primary context of GPU number ``index``. Raises ValueError where there is none."""
        self.driver = driver
        self._device = find_device(driver, index)
        self.target = architecture(driver, self._device)
        name = driver.call("cuDeviceGetName", 256, self._device)
        self.name = name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name)
        self._made: list[tuple[str, Any]] = []
        self._context = driver.call("cuDevicePrimaryCtxRetain", self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the thread's device during the block. On a closed device nothing happens."""
        if self._context is None:
            yield
            return
        self.driver.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.driver.call("cuCtxPopCurrent")

    def allocate(self, size: int) -> int:
        """Allocate device memory -> address, a multiple of 256."""
        return int(self._keep("cuMemFree", self.driver.call("cuMemAlloc", size)))

    def pinned(self, size: int) -> np.ndarray:
        """Allocate pinned host memory, for asynchronous copies -> uint8 [size]."""
        address = int(self._keep("cuMemFreeHost", self.driver.call("cuMemHostAlloc", size, 0)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def stream(self) -> Any:
        """Make a stream that does not wait for the default stream."""
        flags = self.driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._keep("cuStreamDestroy", self.driver.call("cuStreamCreate", int(flags)))

    def event(self, timing: bool) -> Any:
        kinds = self.driver.api.CUevent_flags
        flags = kinds.CU_EVENT_DEFAULT if timing else kinds.CU_EVENT_DISABLE_TIMING
        return self._keep("cuEventDestroy", self.driver.call("cuEventCreate", int(flags)))

    def function(self, cubin: bytes, symbol: str) -> Any:
        """Load machine code -> its kernel. Raises `DriverError` for another architecture."""
        module = self._keep("cuModuleUnload", self.driver.call("cuModuleLoadData", cubin))
        return self.driver.call("cuModuleGetFunction", module, symbol.encode())

    def keep_graph(self, graph: Any) -> Any:
        """Make a captured graph executable, and destroy its description."""
        try:
            return self._keep("cuGraphExecDestroy", self.driver.call("cuGraphInstantiate", graph, 0))
        finally:
            self.driver.call("cuGraphDestroy", graph)

    def _keep(self, release: str, made: Any) -> Any:
        self._made.append((release, made))
        return made

    def synchronize(self) -> None:
        """Wait for all work of the device's context."""
        if self._context is not None:
            with CAPTURE_LOCK:
                self.driver.call("cuCtxSynchronize")

    def close(self) -> None:
        """Wait for the device and release everything. The first error is raised after all has been tried."""
        errors: list[Exception] = []

        def attempt(name: str, *arguments: Any) -> None:
            try:
                self.driver.call(name, *arguments)
            except DriverError as error:
                errors.append(error)

        if self._context is None:
            return
        with self.current():
            with CAPTURE_LOCK:
                attempt("cuCtxSynchronize")
            while self._made:
                attempt(*self._made.pop())
        attempt("cuDevicePrimaryCtxRelease", self._device)
        self._context = None
        if errors:
            raise errors[0]
