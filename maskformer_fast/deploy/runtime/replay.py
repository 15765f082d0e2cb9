"""Replays recorded launches: places of buffers in device memory, and launches by the CUDA driver, without Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskformer_fast.deploy.bundle.launches import Cubin, Kernel, Launch, LaunchSequence

ALIGNMENT = 256
"""Alignment of buffers in bytes; TensorRT asks for as much."""
WARP = 32
"""Threads of a warp."""
LARGE_SHARED_BYTES = 48 << 10
"""Bytes of dynamic shared memory above which the driver must be asked for each function."""
_SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


@dataclass(frozen=True)
class Arena:
    """Offsets of a sequence's buffers in one piece of memory. Buffers that are never used at one time may overlap."""

    offsets: dict[str, int]
    bytes: int


def plan_arena(sequence: LaunchSequence) -> Arena:
    """Choose offsets for all buffers but the constant ones, each a multiple of `ALIGNMENT`.

    A buffer lives from its first to its last step: upload, each launch before the network, the network, each launch
    after it, download. The largest buffers are placed first, each at the lowest offset that is free while it lives.
    """
    lives = _lives(sequence)
    sizes = {buffer.name: aligned(buffer.bytes) for buffer in sequence.buffers if buffer.name in lives}
    offsets: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        first, last = lives[name]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lives[other][0] <= last and first <= lives[other][1]
        )
        place = 0
        for begin, end in taken:
            if begin - place >= sizes[name]:
                break
            place = max(place, end)
        offsets[name] = place
    return Arena(offsets, max(offsets[name] + sizes[name] for name in offsets))


def _lives(sequence: LaunchSequence) -> dict[str, tuple[int, int]]:
    """Buffer -> steps of its first and last use; constants, which lie elsewhere, are left out."""
    steps: list[Iterable[str]] = [("frames",), *(launch.buffers() for launch in sequence.before)]
    steps += [("images", "class_logits", "mask_logits"), *(launch.buffers() for launch in sequence.after)]
    steps += [sequence.results]
    constant = {buffer.name for buffer in sequence.buffers if buffer.constant}
    lives: dict[str, tuple[int, int]] = {}
    for step, names in enumerate(steps):
        for name in names:
            if name not in constant:
                lives[name] = (lives.get(name, (step, step))[0], step)
    return lives


def aligned(size: int) -> int:
    """Round a size up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Function:
    """A kernel loaded on a device."""

    kernel: Kernel
    cubin: Cubin
    handle: Any


class PreparedLaunch:
    """A launch with addresses, as the driver takes it. This object owns the memory of the parameters."""

    def __init__(self, launch: Launch, function: Function, addresses: Mapping[str, int]) -> None:
        """``addresses`` has those of all buffers that the launch reads or writes."""
        self._function = function
        self._grid = launch.grid
        self._fills = [(addresses[fill.buffer] + fill.offset, fill.value, fill.bytes) for fill in launch.fills]
        values: list[Any] = []
        for argument, parameter in zip(launch.arguments, function.kernel.parameters, strict=True):
            if argument.buffer is None:
                kind: Any = _SCALARS[parameter.type]
                values.append(kind(argument.value))
            else:
                values.append(ctypes.c_void_p(addresses[argument.buffer] + int(argument.value)))
        values += [ctypes.c_void_p(None) for _ in range(function.cubin.null_pointers)]
        self._values = values  # the driver reads them at each launch
        self._parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

    def enqueue(self, driver: Any, stream: Any) -> None:
        """Enqueue the fills and the launch. ``driver`` is a `maskformer_fast.deploy.runtime.cuda_driver.Driver`."""
        for address, value, size in self._fills:
            driver.call("cuMemsetD8Async", address, value, size, stream)
        threads = WARP * self._function.kernel.num_warps
        driver.call(
            "cuLaunchKernel", self._function.handle, *self._grid, threads, 1, 1, self._function.cubin.shared_bytes,
            stream, ctypes.addressof(self._parameters), 0,
        )  # fmt: skip


def prepare(
    launches: Sequence[Launch], functions: Mapping[str, Function], addresses: Mapping[str, int]
) -> list[PreparedLaunch]:
    """Bind launches to the functions of their kernels and the addresses of their buffers."""
    return [PreparedLaunch(launch, functions[launch.kernel], addresses) for launch in launches]
