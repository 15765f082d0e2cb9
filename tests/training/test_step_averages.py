"""What a line of the log says."""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from maskformer_fast.training.step_averages import Meter, peak_memory
from maskformer_fast.training.train_step import StepRecord

CPU = torch.device("cpu")


def record(loss, norm, updated=True, lr=0.1, waited=0.0):
    return StepRecord(("loss", "grad_norm"), torch.tensor([loss, norm]), torch.tensor(updated), lr, waited)


def test_a_line_has_the_means_of_the_steps_that_were_taken():
    meter = Meter(4, CPU)
    meter.add(record(1.0, 10.0, lr=0.3))
    meter.add(record(float("nan"), float("inf"), updated=False, lr=0.2))
    meter.add(record(2.0, 30.0, lr=0.1))
    line = meter.line(10)
    assert line["loss"] == 1.5 and line["grad_norm"] == 20.0 and line["lr"] == 0.1
    meter.add(record(7.0, 8.0))
    assert meter.line(9)["loss"] == 7.0  # a line starts anew
    meter.add(record(float("nan"), 1.0, updated=False))
    assert math.isnan(meter.line(8)["loss"])


def test_speed_leaves_out_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(6, CPU)
    for _ in range(4):
        meter.add(record(1.0, 1.0, waited=0.5))
    now[0] += 8.0 + 30.0
    meter.pause(30.0)
    line = meter.line(100)
    assert line["step_seconds"] == 2.0 and line["images_per_second"] == 3.0
    assert line["data_share"] == 0.25 and line["eta_seconds"] == 200.0
    now[0] += 3.0
    meter.add(record(1.0, 1.0))
    assert meter.line(1)["step_seconds"] == 3.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_in_bytes():
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    assert peak_memory(CPU) == pytest.approx(peak, rel=0.05)
