"""The CUDA driver's API, by cuda-python, with errors as exceptions and memory, streams and modules that are given back.

What is made here is kept in a list and released in the opposite order by `Device.close`, whatever failed in between.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

CAPTURE_LOCK = threading.RLock()
"""Held while a stream is captured, and by what waits for all of a device, as loading and releasing an engine may do:
the driver refuses that to every thread while any stream is being captured, and spoils the capture."""


class DriverError(RuntimeError):
    """A call of the CUDA driver that failed."""


class Driver:
    """Calls of ``cuda.bindings.driver``, checked."""

    def __init__(self) -> None:
        """Raises ModuleNotFoundError where cuda-python is not installed, RuntimeError where no driver is."""
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
        """Call a function -> what it returns beside the status. Raises `DriverError` with the error's name."""
        status, *values = getattr(self.api, name)(*arguments)
        if int(status) != 0:
            raise DriverError(f"{name}: {self._error(status)}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def abandon_capture(self, stream: Any) -> None:
        """End a capture in which something failed: the stream is usable again, the graph is dropped."""
        status, graph = self.api.cuStreamEndCapture(stream)  # reports the failure that is being handled already
        if int(status) == 0 and graph:
            self.call("cuGraphDestroy", graph)

    def _error(self, status: Any) -> str:
        found = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            failed, text = getattr(self.api, name)(status)
            if int(failed) == 0 and text:
                found.append(text.decode() if isinstance(text, bytes) else str(text))
        return ": ".join(found) or f"error {int(status)}"


def find_device(driver: Driver, index: int) -> Any:
    """The GPU of a number. Raises ValueError where there is no such one."""
    count = driver.call("cuDeviceGetCount")
    if not 0 <= index < count:
        raise ValueError(f"device: expected 0..{count - 1}, one of this machine's GPUs, got {index}")
    return driver.call("cuDeviceGet", index)


def architecture(driver: Driver, device: Any) -> str:
    """A GPU's architecture, as engines and kernels name it: ``sm_87``."""
    attributes = driver.api.CUdevice_attribute
    major = driver.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = driver.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return f"sm_{major}{minor}"


class Device:
    """One GPU by its primary context, the one that PyTorch and the CUDA runtime use too."""

    def __init__(self, driver: Driver, index: int) -> None:
        """Raises ValueError where there is no such device."""
        self.driver = driver
        self._device = find_device(driver, index)
        self.target = architecture(driver, self._device)
        name = driver.call("cuDeviceGetName", 256, self._device)
        self.name = name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name)
        self._made: list[tuple[str, Any]] = []
        self._context = driver.call("cuDevicePrimaryCtxRetain", self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it this thread's device; what was so before is so again after. Of a closed one nothing happens."""
        if self._context is None:
            yield
            return
        self.driver.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.driver.call("cuCtxPopCurrent")

    def allocate(self, size: int) -> int:
        """Device memory -> address, a multiple of 256."""
        return int(self._keep("cuMemFree", self.driver.call("cuMemAlloc", size)))

    def pinned(self, size: int) -> np.ndarray:
        """Host memory that the device copies from and to by itself -> uint8 [size]."""
        address = int(self._keep("cuMemFreeHost", self.driver.call("cuMemHostAlloc", size, 0)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        flags = self.driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._keep("cuStreamDestroy", self.driver.call("cuStreamCreate", int(flags)))

    def event(self, timing: bool) -> Any:
        kinds = self.driver.api.CUevent_flags
        flags = kinds.CU_EVENT_DEFAULT if timing else kinds.CU_EVENT_DISABLE_TIMING
        return self._keep("cuEventDestroy", self.driver.call("cuEventCreate", int(flags)))

    def function(self, cubin: bytes, symbol: str) -> Any:
        """A kernel of a module of its own. Raises `DriverError` for machine code of another architecture."""
        module = self._keep("cuModuleUnload", self.driver.call("cuModuleLoadData", cubin))
        return self.driver.call("cuModuleGetFunction", module, symbol.encode())

    def keep_graph(self, graph: Any) -> Any:
        """Instantiate a captured graph, and destroy its description."""
        try:
            return self._keep("cuGraphExecDestroy", self.driver.call("cuGraphInstantiate", graph, 0))
        finally:
            self.driver.call("cuGraphDestroy", graph)

    def _keep(self, release: str, made: Any) -> Any:
        self._made.append((release, made))
        return made

    def synchronize(self) -> None:
        """Wait for all work of this context."""
        if self._context is not None:
            with CAPTURE_LOCK:
                self.driver.call("cuCtxSynchronize")

    def close(self) -> None:
        """Wait for the device and release what was made. Raises the first error after all was tried."""
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
