"""A GPU on the host, in the place of `cuda.bindings.driver`, so that all of the backend runs without a GPU.

Memory is the host's, addresses are real, streams run work at once, and a captured graph is a list of functions. A cubin
is the text ``fake NAME SYMBOL``. The test gives the function that runs a kernel.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from enum import IntEnum
from typing import Any

POISON = 0xAB
"""Byte that fills new memory."""


class Result(IntEnum):
    CUDA_SUCCESS = 0


class DeviceAttribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class FunctionAttribute(IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class StreamFlags(IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class EventFlags(IntEnum):
    CU_EVENT_DEFAULT = 0
    CU_EVENT_DISABLE_TIMING = 2


class RecordFlags(IntEnum):
    CU_EVENT_RECORD_DEFAULT = 0
    CU_EVENT_RECORD_EXTERNAL = 1


class CaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


Kernel = Callable[[str, tuple[int, int, int], int, int], None]  # name, grid, threads, address of parameters


class FakeDriver(types.ModuleType):
    """The driver's functions, as far as the backend calls them.

    Attributes:
        calls: calls so far.
        failures: function -> error code that it returns.
        alive: objects that were made and not released.
    """

    CUresult = Result
    CUdevice_attribute = DeviceAttribute
    CUfunction_attribute = FunctionAttribute
    CUstream_flags = StreamFlags
    CUevent_flags = EventFlags
    CUevent_record_flags = RecordFlags
    CUstreamCaptureMode = CaptureMode

    def __init__(self, kernel: Kernel, capability: tuple[int, int] = (8, 7)) -> None:
        super().__init__("cuda.bindings.driver")
        self.kernel = kernel
        self.capability = capability
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failures: dict[str, int] = {}
        self.alive: dict[int, tuple[str, Any]] = {}
        self.depth = 0
        self.retained = 0
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.clock = 0
        self.eager = True  # False: kernels run in graphs only, which saves the first run of slow ones
        self._next = 1 << 20

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if not name.startswith("cu") or name.startswith("cuGetError"):
            return attribute

        def call(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            if name in self.failures:
                if name == "cuStreamEndCapture":  # the capture ends in spite of the error
                    self.capturing.pop(int(arguments[0]))
                return self.failures[name], None
            status, *values = attribute(*arguments)
            return (Result.CUDA_SUCCESS if status == 0 else status), *values

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def do(self, stream: Any, work: Callable[[], None]) -> None:
        """Run work now, or add it to the graph that is being captured."""
        captured = self.capturing.get(int(stream))
        if captured is None:
            work()
        else:
            captured.append(work)

    def _make(self, kind: str, content: Any = None) -> int:
        assert self.depth > 0, f"{kind} made without a current device"
        self._next += 1 << 12
        self.alive[self._next] = (kind, content)
        return self._next

    def _drop(self, kind: str, handle: int) -> tuple[int]:
        assert self.depth > 0, f"{kind} released without a current device"
        resource = self.alive.pop(int(handle), None)
        assert resource is not None and resource[0] == kind, f"{handle} is no {kind}"
        return (0,)

    def cuGetErrorName(self, status: int) -> tuple[int, bytes]:
        return 0, f"CUDA_ERROR_{int(status)}".encode()

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"as the test wants it"

    def cuInit(self, flags: int) -> tuple[int]:
        return (0,)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, 1

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDeviceGetName(self, length: int, device: int) -> tuple[int, bytes]:
        return 0, b"Fake GPU" + bytes(length - 8)

    def cuDeviceGetAttribute(self, attribute: DeviceAttribute, device: int) -> tuple[int, int]:
        return 0, self.capability[attribute - 75]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, str]:
        self.retained += 1
        return 0, "context"

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[int]:
        self.retained -= 1
        return (0,)

    def cuCtxPushCurrent(self, context: str) -> tuple[int]:
        self.depth += 1
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, str]:
        self.depth -= 1
        return 0, "context"

    def cuCtxSynchronize(self) -> tuple[int]:
        return (0,)

    def _memory(self, kind: str, size: int) -> tuple[int, int]:
        assert self.depth > 0 and size > 0
        memory = ctypes.create_string_buffer(size + 256)
        address = -(-ctypes.addressof(memory) // 256) * 256
        ctypes.memset(address, POISON, size)
        self.alive[address] = (kind, memory)
        return 0, address

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        return self._memory("memory", size)

    def cuMemFree(self, address: int) -> tuple[int]:
        return self._drop("memory", address)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        return self._memory("pinned", size)

    def cuMemFreeHost(self, address: int) -> tuple[int]:
        return self._drop("pinned", address)

    def cuMemcpyHtoD(self, device: int, host: bytes, size: int) -> tuple[int]:
        ctypes.memmove(device, host, size)
        return (0,)

    def cuMemcpyHtoDAsync(self, device: int, host: int, size: int, stream: int) -> tuple[int]:
        self.do(stream, lambda: ctypes.memmove(device, host, size) and None)
        return (0,)

    def cuMemcpyDtoHAsync(self, host: int, device: int, size: int, stream: int) -> tuple[int]:
        self.do(stream, lambda: ctypes.memmove(host, device, size) and None)
        return (0,)

    def cuMemsetD8Async(self, device: int, value: int, size: int, stream: int) -> tuple[int]:
        self.do(stream, lambda: ctypes.memset(device, value, size) and None)
        return (0,)

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        return 0, self._make("stream")

    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        return self._drop("stream", stream)

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.capturing[stream] = []
        return (0,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, int]:
        return 0, self._make("graph", self.capturing.pop(stream))

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        return 0, self._make("exec", self.alive[graph][1])

    def cuGraphDestroy(self, graph: int) -> tuple[int]:
        return self._drop("graph", graph)

    def cuGraphExecDestroy(self, graph: int) -> tuple[int]:
        return self._drop("exec", graph)

    def cuGraphUpload(self, graph: int, stream: int) -> tuple[int]:
        return (0,)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        for work in self.alive[graph][1]:
            work()
        return (0,)

    def cuEventCreate(self, flags: int) -> tuple[int, int]:
        return 0, self._make("event", [0])

    def cuEventDestroy(self, event: int) -> tuple[int]:
        return self._drop("event", event)

    def _tick(self, event: int) -> None:
        self.clock += 1
        self.alive[event][1][0] = self.clock

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:
        self.do(stream, lambda: self._tick(event))
        return (0,)

    def cuEventRecordWithFlags(self, event: int, stream: int, flags: int) -> tuple[int]:
        assert (int(stream) in self.capturing) == (flags == RecordFlags.CU_EVENT_RECORD_EXTERNAL)
        self.do(stream, lambda: self._tick(event))
        return (0,)

    def cuEventSynchronize(self, event: int) -> tuple[int]:
        return (0,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return 0, 1000.0 * (self.alive[end][1][0] - self.alive[start][1][0])

    def cuModuleLoadData(self, image: bytes) -> tuple[int, int]:
        word, name, symbol = image.decode().split()
        return (0, self._make("module", (name, symbol))) if word == "fake" else (200, 0)

    def cuModuleUnload(self, module: int) -> tuple[int]:
        return self._drop("module", module)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, str | None]:
        kernel, symbol = self.alive[module][1]
        return (0, kernel) if name.decode() == symbol else (500, None)

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> tuple[int]:
        return (0,)

    def cuLaunchKernel(self, function: Any, *arguments: Any) -> tuple[int]:
        x, y, z, threads, _, _, _, stream, parameters, _ = arguments
        if int(stream) in self.capturing or self.eager:
            self.do(stream, lambda: self.kernel(function, (x, y, z), threads, parameters))
        return (0,)
