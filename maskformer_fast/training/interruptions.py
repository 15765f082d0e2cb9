"""What ends a run early: signals, memory that runs out, a loader process that dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch

from maskformer_fast.config import Config
from maskformer_fast.modeling.backbone import is_swin, resolve_backbone
from maskformer_fast.training.step_averages import GIB, peak_memory

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 5.0
"""Seconds in which another SIGTERM is the same one: schedulers send it to all processes, and torchrun passes it on."""
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",  # "can't allocate memory", "not enough memory"
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_WORKER = "DataLoader worker (pid"


class OutOfMemory(MemoryError):
    """Memory ran out: how much was in use, for what, and what takes less."""


class WorkerLost(RuntimeError):
    """A data loader process died."""


class Stopped(BaseException):
    """Raised by `StopSignals` where work may be dropped at once. No ``Exception``, so that nothing swallows it."""


class StopSignals:
    """SIGTERM and SIGINT (Ctrl-C) ask a run to stop: after the current step, with its state saved.

    A second signal of the same kind acts as it did before, but for a SIGTERM within `ECHO`. Does nothing outside the
    main thread, where Python handles no signals. Loader processes ignore both signals, whole process groups being sent
    them.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False
        self._former: dict[int, Any] = {}
        self._since: dict[int, float] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in self._since:
            if number != signal.SIGTERM or now - self._since[number] > ECHO:
                signal.signal(number, self._former[number])
                signal.raise_signal(number)
            return
        self._since[number] = now
        self.received = signal.Signals(number)
        what = "stopping" if self._at_once else "finishing the step, saving it, and stopping"
        os.write(2, f"\n{self.received.name}: {what}\n".encode())  # a log handler may hold its lock just now
        if self._at_once:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that is not waited for: a signal, or one received before, raises `Stopped`."""
        self._at_once = True
        try:
            if self.received is not None:
                raise Stopped
            yield
        finally:
            self._at_once = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def is_lost_worker(error: BaseException) -> bool:
    """Whether PyTorch's loader says that one of its processes died."""
    return isinstance(error, RuntimeError) and _WORKER in str(error)


def training_advice(config: Config, device: torch.device, input_size: tuple[int, int] | None) -> str:
    """What a training step took, and the options that make it take less."""
    solver, micro = config.solver, config.solver.batch_size // config.solver.accumulate
    size = "" if input_size is None else f" of {input_size[0]}x{input_size[1]} pixels"
    ways = []
    if micro > 1:
        ways.append(f"--solver.accumulate {_next_divisor(solver.batch_size, solver.accumulate)} (fewer images at a "
                    "time, the same numbers)")
    if config.data.augment.crop_size is None:
        ways.append("--data.augment.crop-size, so that no image is larger")
    else:
        ways.append("a smaller --data.augment.crop-size")
    backbone = resolve_backbone(config.model.backbone)
    if is_swin(backbone) and not backbone.checkpointing:
        ways.append("--model.backbone.checkpointing True (more time, the same numbers)")
    if solver.amp == "off" and device.type == "cuda":
        ways.append("--solver.amp bf16")
    if device.type == "cpu" and config.data.workers > 0:
        ways.append("fewer --data.workers")
    return (f"a step of {solver.batch_size} images in {solver.accumulate} micro-batches of {micro}{size}: "
            f"{memory_report(device)}. What takes less: {', '.join(ways)}")


def validation_advice(config: Config, device: torch.device) -> str:
    """What validation took, and the options that make it take less."""
    test = config.test
    return (f"validation with {test.batch_size} images at a time: {memory_report(device)}. What takes less: "
            f"{'--test.batch-size 1, ' if test.batch_size > 1 else ''}a smaller --test.short-edge or --test.max-size")


def memory_report(device: torch.device) -> str:
    """Peak use beside what there is, in GiB."""
    peak = peak_memory(device) / GIB
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        return f"tensors took up to {peak:.2f} of the GPU's {total:.1f} GiB"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"this process held up to {peak:.2f} of the machine's {total:.1f} GiB"


def out_of_memory(error: BaseException, advice: str, saved: str) -> OutOfMemory:
    """The error that tells what to do; ``saved`` says where the run continues."""
    said = str(error).splitlines() or ["MemoryError"]
    return OutOfMemory(f"out of memory in {advice}. {saved}. PyTorch said: {said[0]}")


def worker_lost(error: BaseException, saved: str) -> WorkerLost:
    """The same for a loader process."""
    text = str(error)
    if "Bus error" in text:
        why = "It ran out of shared memory: give the container more (docker: --shm-size 8g or --ipc host)"
    else:
        why = ("Most likely the system ran out of memory and its OOM killer chose that process (dmesg would say so): "
               "use fewer --data.workers, or free memory")
    said = text.splitlines()[0].rstrip(". ")
    return WorkerLost(f"a data loader process died: {said}. {why}. {saved}")


def _next_divisor(number: int, after: int) -> int:
    return next(d for d in range(after + 1, number + 1) if number % d == 0)
