"""The clocks of the GPU benchmarks: CUDA events, and a stand-in on the CPU with which all else is tested.

A clock says how long a function takes, makes a sequence of calls one that can be replayed without its launches'
overhead, measures memory, and knows whether its device still works.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.harness import peak_memory

SAMPLE_MS = 4.0
"""At least, for one sample: short operations are repeated."""
SAMPLES = (7, 25)
"""At least, and at most."""
SECONDS = 0.6
"""Samples are taken up to this time, between these numbers."""
WARM_UP_CALLS = 3


class Clock(Protocol):
    """What a device can measure."""

    device: torch.device
    fresh_bytes: int  # inputs of so many bytes have left the cache when they are read again

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Time that the device is at work, or waits for the host, between the call's first and last work."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """A function that repeats the device's part of the call."""

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        """The most memory that a call adds, its result included; None where it cannot be told."""

    def is_healthy(self) -> bool:
        """False where nothing works any more in this process, as after an illegal access on a GPU."""

    def release(self) -> None:
        """Give memory back that no tensor uses."""


class CudaClock:
    """CUDA events on the current device and stream."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.fresh_bytes = 4 * torch.cuda.get_device_properties(self.device).L2_cache_size

    def milliseconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # buffers that libraries keep for a stream are made before the capture
            run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def is_healthy(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def release(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class HostClock:
    """The CPU's clock, in the place of CUDA's for the tests; a captured call is the call."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.fresh_bytes = 1 << 16

    def milliseconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        return run

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        return peak_memory(run)

    def is_healthy(self) -> bool:
        return True

    def release(self) -> None:
        return


def open_clock(device: str) -> Clock:
    """The clock of ``cuda`` or ``cpu``."""
    return CudaClock() if device == "cuda" else HostClock()


def sample(clock: Clock, run: Callable[[], object], calls: int = 1) -> dict[str, Any]:
    """Milliseconds of one of the `calls` that `run` makes: the median of samples, the tenth and the ninetieth in 100.

    `run` has been called before.
    """
    first = clock.milliseconds(run)
    if first < 10 * SAMPLE_MS:  # one look may be disturbed
        first = min(first, *(clock.milliseconds(run) for _ in range(3)))
    repeats = max(1, math.ceil(SAMPLE_MS / max(first, 1e-3)))

    def repeated() -> None:
        for _ in range(repeats):
            run()

    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < SAMPLES[0] or (len(samples) < SAMPLES[1] and time.perf_counter() - start < SECONDS):
        samples.append(clock.milliseconds(repeated) / (repeats * calls))
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"ms": statistics.median(samples), "low_ms": tenths[0], "high_ms": tenths[-1], "samples": len(samples)}
