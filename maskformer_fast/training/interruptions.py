"""Early ends of a run: stop signals, out of memory, dead loader processes."""

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
from maskformer_fast.distributed import peak_memory_bytes
from maskformer_fast.modeling.backbone import is_swin, is_vit, resolve_backbone
from maskformer_fast.training.step_averages import GIB

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 5.0
"""Time in seconds within which another SIGTERM is ignored: schedulers send it to all processes, and torchrun forwards
it to them again."""
_OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator",  # "can't allocate memory", "not enough memory"
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class OutOfMemory(MemoryError):
    """Memory ran out. The message names the peak use and the options that reduce it."""


class WorkerLost(RuntimeError):
    """A data loader process died."""


class Stopped(BaseException):
    """A stop signal during work that can be dropped; no ``Exception``, so that no handler of errors catches it."""


class StopSignals:
    """Handles SIGTERM and SIGINT (Ctrl-C): a run stops after the current step, with its state saved.

    A second signal of the same kind has its previous effect, except a SIGTERM within `REPEAT_SECONDS`. Does nothing
    outside the main thread, where Python handles no signals. Loader processes ignore both signals, which are often sent
    to a process group.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False
        self._previous_handlers: dict[int, Any] = {}
        self._received_at: dict[int, float] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in self._received_at:
            if number != signal.SIGTERM or now - self._received_at[number] > REPEAT_SECONDS:
                signal.signal(number, self._previous_handlers[number])
                signal.raise_signal(number)
            return
        self._received_at[number] = now
        self.received = signal.Signals(number)
        action = "stopping" if self._at_once else "finishing the step, saving it, and stopping"
        # Not by logging: the interrupted code may hold a log handler's lock.
        os.write(2, f"\n{self.received.name}: {action}\n".encode())
        if self._at_once:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Stopped` at once on a signal during the block, or on entry if one was received before."""
        self._at_once = True
        try:
            if self.received is not None:
                raise Stopped
            yield
        finally:
            self._at_once = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_MESSAGES)


def training_advice(config: Config, device: torch.device, input_size: tuple[int, int] | None) -> str:
    """Peak memory of a training step, and the options that reduce it, as text."""
    solver, micro = config.solver, config.solver.images // config.solver.accumulate
    size = "" if input_size is None else f" of {input_size[0]}x{input_size[1]} pixels"
    options = []
    if micro > 1:
        options.append(f"--solver.accumulate {_next_divisor(solver.images, solver.accumulate)} (fewer images at a "
                    "time, the same numbers)")
    if config.data.augment.crop_size is None:
        options.append("--data.augment.crop-size, so that no image is larger")
    else:
        options.append("a smaller --data.augment.crop-size")
    backbone = resolve_backbone(config.model.backbone)
    if (is_swin(backbone) or is_vit(backbone)) and not backbone.checkpointing:
        options.append("--model.backbone.checkpointing True (more time, the same numbers)")
    if solver.amp == "off" and device.type == "cuda":
        options.append("--solver.amp bf16")
    if device.type == "cpu" and config.data.workers > 0:
        options.append("fewer --data.workers")
    return (f"a step of {solver.images} images in {solver.accumulate} micro-batches of {micro}{size}: "
            f"{memory_report(device)}. What takes less: {', '.join(options)}")


def validation_advice(config: Config, device: torch.device) -> str:
    """Peak memory of validation, and the options that reduce it, as text."""
    test = config.test
    return (f"validation with {test.batch_size} images at a time: {memory_report(device)}. What takes less: "
            f"{'--test.batch-size 1, ' if test.batch_size > 1 else ''}a smaller --test.short-edge or --test.max-size")


def memory_report(device: torch.device) -> str:
    """Peak use and total memory in GiB, as text."""
    peak = peak_memory_bytes(device) / GIB
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        return f"tensors took up to {peak:.2f} of the GPU's {total:.1f} GiB"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"this process held up to {peak:.2f} of the machine's {total:.1f} GiB"


def out_of_memory(error: BaseException, advice: str, saved: str) -> OutOfMemory:
    """Error for running out of memory. ``saved`` is a sentence on where ``--resume`` continues."""
    lines = str(error).splitlines() or ["MemoryError"]
    return OutOfMemory(f"out of memory in {advice}. {saved}. PyTorch said: {lines[0]}")


def _next_divisor(number: int, after: int) -> int:
    """Smallest divisor of a number that is larger than ``after``."""
    return next(d for d in range(after + 1, number + 1) if number % d == 0)
