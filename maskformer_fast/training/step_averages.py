"""How a run is doing: means over the steps since the last line of the log, its speed and its memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from maskformer_fast.distributed import mean_over_ranks
from maskformer_fast.training.train_step import StepRecord

GIB = 2**30


class Meter:
    """Sums up steps on their device; `line` reads the sums, the one synchronisation a line of the log costs."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        """``batch_size`` counts the images of a step, over all ranks."""
        self._batch_size = batch_size
        self._device = device
        self._names: tuple[str, ...] = ()
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._rate = 0.0
        self._sums: torch.Tensor | None = None

    def add(self, record: StepRecord) -> None:
        """Count a step. One that was skipped counts for the speed only."""
        self._steps += 1
        self._waited += record.waited
        self._rate = record.lr
        self._names = record.names
        counted = torch.cat([record.values, torch.ones_like(record.values[:1])])
        counted = counted.where(record.updated, 0)
        self._sums = counted if self._sums is None else self._sums + counted

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._started += seconds

    def line(self, remaining_steps: int) -> dict[str, float]:
        """Means over the steps (and ranks) since the last line, and what else the log says of them; starts anew.

        ``lr`` is the last step's; ``data_share`` the share of the time in which the step waited for data, and
        ``memory_gib`` the peak (see `peak_memory`), both of this process; ``eta_seconds`` is without validation.
        """
        assert self._sums is not None  # a line follows at least one step
        *sums, updates = mean_over_ranks(self._sums).tolist()
        seconds = time.perf_counter() - self._started  # after reading: the device has done these steps
        per_step = seconds / self._steps
        means = [value / updates if updates else float("nan") for value in sums]
        line = {
            **dict(zip(self._names, means, strict=True)),
            "lr": self._rate,
            "images_per_second": self._batch_size / per_step,
            "step_seconds": per_step,
            "data_share": self._waited / seconds,
            "memory_gib": peak_memory(self._device) / GIB,
            "eta_seconds": per_step * remaining_steps,
        }
        self._reset()
        return line


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a CUDA device, elsewhere the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
