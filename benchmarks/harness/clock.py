"""The clocks of the CPU and of a GPU, samples of operations that take turns, and the peak memory of a call."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from maskformer_fast.core.machine import peak_resident_bytes, reset_peak_resident_bytes

MIN_ROUNDS, MAX_ROUNDS = 3, 25
ROUNDS_SECONDS = 1.5
"""Rounds go on up to this time, between these numbers of them."""
SLOW_SECONDS = 1.0
"""A first call of more seconds on the CPU is not followed by a second look, which would take too long."""
MIB = 2**20

Call = Callable[[], Any]


class Clock:
    """The CPU's clock; a captured call is the call."""

    device = torch.device("cpu")
    sample_seconds = 0.01  # least time of a sample: short operations are repeated, as reading a clock takes time too
    warm_up_calls = 1
    fresh_bytes = 0  # inputs of so many bytes have left the cache when they are read again; 0: what fits may be there

    def seconds(self, run: Call, times: int = 1) -> float:
        """Time from the first to the last work of so many calls."""
        start = time.perf_counter()
        for _ in range(times):
            run()
        return time.perf_counter() - start

    def capture(self, run: Call) -> Call:
        """A function that repeats the device's part of a call."""
        return run

    def peak_mib(self, run: Call) -> float | None:
        """The most memory in MiB that a call adds, its result included; None where the system does not record it.

        The rise of the peak resident set over the resident set before the call. The operation has run before, so that
        loaded code is not counted; nor is what it keeps from call to call. Accurate to some 0.3 MiB in a process that
        returns freed memory at once (`runner.environment`).
        """
        run()
        gc.collect()
        with contextlib.suppress(AttributeError):  # free memory that glibc holds would be reused and not show
            ctypes.CDLL(None).malloc_trim(0)
        try:
            reset_peak_resident_bytes()
            before = peak_resident_bytes()
            run()
            return max(0.0, (peak_resident_bytes() - before) / MIB)
        except OSError:
            return None

    def works(self) -> bool:
        """False where nothing works any more in this process, as after an illegal access on a GPU."""
        return True

    def release(self) -> None:
        """Give back memory that no tensor uses."""


class ProcessorClock(Clock):
    """The CPU's clock, of this process's processor time: on one thread, what other processes do hardly changes it."""

    def seconds(self, run: Call, times: int = 1) -> float:
        start = time.process_time()
        for _ in range(times):
            run()
        return time.process_time() - start


class CudaClock(Clock):
    """CUDA events on the current device and stream; memory as PyTorch's allocator counts it."""

    sample_seconds = 0.004
    warm_up_calls = 3  # compile, and let torch.compile settle

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.fresh_bytes = 4 * torch.cuda.get_device_properties(self.device).L2_cache_size

    def seconds(self, run: Call, times: int = 1) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def capture(self, run: Call) -> Call:
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # buffers that libraries keep for a stream are made before the capture
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def peak_mib(self, run: Call) -> float | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def works(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def release(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def open_clock(device: str) -> Clock:
    """The clock of ``cuda`` or ``cpu``."""
    return CudaClock() if device == "cuda" else Clock()


def warm_up(clock: Clock, operation: Call) -> tuple[Any, float]:
    """Call first: code is loaded or compiled, buffers are made -> the first result, and the seconds of a later call."""
    start = time.perf_counter()
    result = operation()
    seconds = time.perf_counter() - start
    if clock.warm_up_calls == 1 and seconds >= SLOW_SECONDS:
        return result, seconds
    for _ in range(clock.warm_up_calls - 1):
        operation()
    return result, estimate(clock, operation)


def estimate(clock: Clock, operation: Call) -> float:
    """Seconds of a call; the least of four where it is short, as one may be disturbed."""
    seconds = clock.seconds(operation)
    if seconds < 10 * clock.sample_seconds:
        seconds = min(seconds, *(clock.seconds(operation) for _ in range(3)))
    return seconds


def take_turns(clock: Clock, operations: Sequence[Call], expected: Sequence[float]) -> list[list[float]]:
    """Seconds per call of each operation, one sample a round; the order of a round is the reverse of the one before.

    `expected` are the seconds of a call of each, which decide how often it is repeated for a sample.
    """
    times = [max(1, math.ceil(clock.sample_seconds / max(seconds, 1e-7))) for seconds in expected]
    samples: list[list[float]] = [[] for _ in operations]
    order = list(range(len(operations)))
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() - start > ROUNDS_SECONDS:
                break
            for index in order:
                samples[index].append(clock.seconds(operations[index], times[index]) / times[index])
            order.reverse()
    finally:
        gc.enable()
    return samples
