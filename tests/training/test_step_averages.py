"""Averages for a line of the log."""

from __future__ import annotations

import math
import time

import pytest
import torch

from maskformer_fast.core.machine import peak_resident_bytes
from maskformer_fast.distributed import peak_memory_bytes
from maskformer_fast.training.step_averages import StepAverages
from maskformer_fast.training.train_step import StepRecord

CPU = torch.device("cpu")


def record(
    loss: float, norm: float, updated: bool = True, lr: float = 0.1, waited: float = 0.0
) -> StepRecord:
    scalars = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}
    return StepRecord(scalars, torch.tensor(updated), lr, waited)


def test_means_are_those_of_the_updates_since_the_last_call() -> None:
    averages = StepAverages(4, CPU)
    averages.add(record(1.0, 10.0, lr=0.3))
    averages.add(record(float("nan"), float("inf"), updated=False, lr=0.2))
    averages.add(record(2.0, 30.0, lr=0.1))
    numbers = averages.read(10)
    assert numbers["loss"] == 1.5 and numbers["grad_norm"] == 20.0 and numbers["lr"] == 0.1
    averages.add(record(7.0, 8.0))
    assert averages.read(9)["loss"] == 7.0
    averages.add(record(float("nan"), 1.0, updated=False))
    assert math.isnan(averages.read(8)["loss"])


def test_speed_leaves_out_excluded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    averages = StepAverages(6, CPU)
    for _ in range(4):
        averages.add(record(1.0, 1.0, waited=0.5))
    now[0] += 8.0 + 30.0
    averages.exclude(30.0)
    numbers = averages.read(100)
    assert numbers["step_seconds"] == 2.0 and numbers["images_per_second"] == 3.0
    assert numbers["data_share"] == 0.25 and numbers["eta_seconds"] == 200.0
    now[0] += 3.0
    averages.add(record(1.0, 1.0))
    assert averages.read(1)["step_seconds"] == 3.0


def test_memory_on_the_cpu_is_the_peak_of_the_process_in_gib() -> None:
    averages = StepAverages(1, CPU)
    averages.add(record(1.0, 1.0))
    assert averages.read(1)["memory_gib"] == pytest.approx(peak_resident_bytes() / 2**30, rel=0.05)
    assert peak_memory_bytes(CPU) == pytest.approx(peak_resident_bytes(), rel=0.05)
