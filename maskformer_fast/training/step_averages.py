"""Averages for a line of the log: means over the steps since the last line, speed, and peak memory."""

from __future__ import annotations

import time

import torch

from maskformer_fast.distributed import mean_over_ranks, peak_memory_bytes
from maskformer_fast.training.train_step import StepRecord

GIB = 2**30


class StepAverages:
    """Sums the numbers of steps on their device; only `read` waits for the device."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        """``batch_size`` is the number of images of a step, over all ranks."""
        self._batch_size = batch_size
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._lr = 0.0
        self._names: tuple[str, ...] = ()
        self._sums: torch.Tensor | None = None  # [len(names) + 1] float32; the last is the number of updates

    def add(self, record: StepRecord) -> None:
        """Add a step. A step without an update counts for the speed only."""
        self._steps += 1
        self._waited += record.waited
        self._lr = record.lr
        self._names = tuple(record.scalars)
        values = torch.stack(list(record.scalars.values()))
        values = torch.cat([values, torch.ones_like(values[:1])]).where(record.updated, 0)
        self._sums = values if self._sums is None else self._sums + values

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._started += seconds

    def read(self, remaining_steps: int) -> dict[str, float]:
        """Means over the steps (and ranks) since the last call, and other numbers for the log; then start anew.

        ``lr`` is that of the last step. ``data_share`` is the share of the time spent waiting for data, and
        ``memory_gib`` the peak (`peak_memory_bytes`), both of this process. ``eta_seconds`` excludes validation.
        """
        assert self._sums is not None  # at least one step was added
        *sums, updates = mean_over_ranks(self._sums).tolist()
        seconds = time.perf_counter() - self._started  # after the line above, which waits for the device
        per_step = seconds / self._steps
        means = [value / updates if updates else float("nan") for value in sums]
        numbers = {
            **dict(zip(self._names, means, strict=True)),
            "lr": self._lr,
            "images_per_second": self._batch_size / per_step,
            "step_seconds": per_step,
            "data_share": self._waited / seconds,
            "memory_gib": peak_memory_bytes(self._device) / GIB,
            "eta_seconds": per_step * remaining_steps,
        }
        self._reset()
        return numbers
