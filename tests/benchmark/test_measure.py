"""The measurement of a batch size: turns, percentiles, and that a runner that fails costs no other's row."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskformer_fast.benchmark import measure, report
from maskformer_fast.benchmark.__main__ import BenchmarkOptions

FAILING_WORKER = """
import json, os, sys, time
kind = None
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "open":
        kind = request["setting"]["kind"]
        answer = {"backend": "tensorrt", "ready_s": 1.0, "gpu_mib": 5.0, "device": request["setting"]["device"]}
    elif kind == "eager" and do == "calls":
        answer = {"error": "RuntimeError: out of memory"}
    elif kind == "compile" and do == "stages":
        print("last words", file=sys.stderr)
        os._exit(9)
    elif do == "calls":
        with open(os.environ["TURNS"], "a") as file:
            file.write(kind + " ")
        answer = {"seconds": [0.02, 0.04]}
    elif do == "stages":
        answer = {"stages": {"preprocess": 1.0, "network": 2.0, "postprocess": 1.0, "total": 4.0}}
    elif do == "stream":
        answer = {"frames_per_s": 70.0}
    else:
        time.sleep(1000)
    print(json.dumps(answer), flush=True)
"""
"""A worker whose bundle never finishes, whose eager network fails, and whose compiled one ends the process."""


def test_a_runner_that_fails_costs_its_own_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(FAILING_WORKER)
    monkeypatch.setenv("TURNS", str(tmp_path / "turns"))
    monkeypatch.setattr(measure, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    monkeypatch.setattr(measure.WorkerProcess.ask, "__defaults__", (2.0,))
    options = BenchmarkOptions("bundle", checkpoint="weights", seconds=0.1, device=3)
    start = time.monotonic()
    bundle, eager, compiled = measure.measure_batch(options.settings(1), options.seconds)
    assert time.monotonic() - start < 20
    assert bundle["error"] == "no answer after 2 s" and bundle["frames_per_s"] == 70.0
    assert eager["error"] == "RuntimeError: out of memory" and eager["device"] == "cuda:3"
    assert compiled["error"] == "its process ended with status 9: last words"
    assert (tmp_path / "turns").read_text().split()[:4] == ["bundle", "compile", "compile", "bundle"]
    page = report.markdown({
        "bundle": {"name": "x", "digest": "0"}, "options": {"task": "semantic", "size": "8x8"}, "machine": {},
        "rows": [bundle, eager, compiled],
    })  # fmt: skip
    assert page.count("FAILED") == 3
    table = [line for line in page.splitlines() if line.startswith("| 1 |")]
    assert len({line.count(" | ") for line in table}) == 1
    canvas = report.draw([bundle])
    canvas.print_png(io.BytesIO())


def test_summary_has_the_percentiles_and_the_rate() -> None:
    row = measure.summary([0.001 * k for k in range(1, 102)], batch=4)
    assert (row["p50_ms"], row["p95_ms"], row["p99_ms"]) == pytest.approx((51.0, 96.0, 100.0))
    assert row["images_per_s"] == pytest.approx(4 * 101 / (0.001 * 101 * 51)) and row["calls"] == 101


def test_labels_are_compared_with_the_first_pytorch_runner(tmp_path: Path) -> None:
    maps = np.zeros((2, 4, 5), np.int32)
    np.save(tmp_path / "compile.npy", maps)
    maps[0, 0, :2] = 7
    np.save(tmp_path / "bundle.npy", maps)
    rows: dict[Any, Any] = {"bundle": {}, "eager": {"error": "no"}, "compile": {}}
    measure.compare_labels(rows, tmp_path)
    assert rows == {"bundle": {"labels_equal": 0.95}, "eager": {"error": "no"}, "compile": {"labels_equal": 1.0}}
