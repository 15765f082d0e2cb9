"""Measures the runners at a batch size, in turn and each in a separate process -> rows of the report."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.benchmark.runners import Kind, Setting

NAMES: dict[Kind, str] = {"bundle": "bundle", "eager": "PyTorch eager", "compile": "torch.compile"}
BLOCK_SECONDS = 0.25
"""Length of a runner's turn in seconds: many short calls, or a single long one."""
MIN_CALLS = 10
"""Smallest number of calls of each runner, however long they take."""
WORKER = [sys.executable, "-m", "maskformer_fast.benchmark.worker"]
OPEN_SECONDS, ANSWER_SECONDS = 1800.0, 300.0
"""Seconds without an answer after which a process is killed: to the command that loads and compiles, and to others."""

Row = dict[str, Any]

logger = logging.getLogger(__name__)


class WorkerProcess:
    """The process of a runner, see `worker`. `ask` raises RuntimeError with the reason if it fails, hangs or dies."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def ask(self, do: str, limit: float = ANSWER_SECONDS, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer, at most ``limit`` seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line:
            raise RuntimeError(f"no answer after {limit:g} s" if late else self.last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def last_words(self) -> str:
        """Exit status of the process and the last line that it wrote to its standard error."""
        status = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return f"its process ended with status {status}" + (f": {lines[-1][:300]}" if lines else "")


def measure_batch(settings: Sequence[Setting], seconds: float) -> list[Row]:
    """A row of the report for each runner, with an ``error`` where it failed.

    Args:
        settings: the bundle's first; PyTorch's devices are set to the kind of device that the bundle runs on.
        seconds: measured time of each runner.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows: dict[Kind, Row] = {}
        processes: dict[Kind, WorkerProcess] = {}
        torch_device = "cpu"
        for setting in settings:
            kind, batch = setting.kind, setting.batch
            if kind != "bundle":
                setting = replace(setting, device=torch_device)
            rows[kind] = {"runner": NAMES[kind], "batch": batch}
            process = stack.enter_context(WorkerProcess())
            try:
                rows[kind] |= process.ask("open", OPEN_SECONDS, setting=asdict(setting))
                processes[kind] = process
            except RuntimeError as error:
                rows[kind]["error"] = str(error)
            if kind == "bundle" and rows[kind].get("backend", setting.device).startswith("tensorrt"):
                torch_device = f"cuda:{setting.device_index}"
            logger.info("batch %d: %s %s", batch, NAMES[kind], rows[kind].get("error", "is ready"))
        samples = take_turns(processes, rows, seconds)
        for kind, process in processes.items():
            row = rows[kind]
            try:
                if "error" not in row:
                    row |= process.ask("stages")
                    row |= process.ask("stream", seconds=seconds / 2) if row["batch"] == 1 else {}
                    row |= process.ask("finish", maps=str(folder / f"{kind}.npy"))
                    row |= summary(samples[kind], row["batch"])
            except RuntimeError as error:
                row["error"] = str(error)
        compare_labels(rows, folder)
        return list(rows.values())


def take_turns(
    processes: dict[Kind, WorkerProcess], rows: dict[Kind, Row], seconds: float
) -> dict[Kind, list[float]]:
    """Seconds of each runner's calls; in every round another runner is first."""
    samples: dict[Kind, list[float]] = {kind: [] for kind in processes}
    left = list(processes)
    first = 0
    while left:
        for kind in left[first % len(left) :] + left[: first % len(left)]:
            try:
                samples[kind] += processes[kind].ask("calls", seconds=min(BLOCK_SECONDS, seconds))["seconds"]
            except RuntimeError as error:
                rows[kind]["error"] = str(error)
        left = [
            kind for kind in left
            if "error" not in rows[kind] and (sum(samples[kind]) < seconds or len(samples[kind]) < MIN_CALLS)
        ]  # fmt: skip
        first += 1
    return samples


def summary(seconds: Sequence[float], batch: int) -> Row:
    """Percentiles 50, 95 and 99 of the calls in milliseconds, images a second and the number of calls."""
    p50, p95, p99 = 1e3 * np.percentile(seconds, (50, 95, 99))
    rate = batch * len(seconds) / sum(seconds)
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "images_per_s": rate, "calls": len(seconds)}


def compare_labels(rows: dict[Kind, Row], folder: Path) -> None:
    """Add to the rows the share of pixels whose label is that of the first PyTorch runner."""
    maps = {kind: np.load(folder / f"{kind}.npy") for kind in rows if (folder / f"{kind}.npy").exists()}
    reference = next((kind for kind in maps if kind != "bundle"), None)
    if reference is not None:
        for kind, labels in maps.items():
            rows[kind]["labels_equal"] = float(np.mean(labels == maps[reference]))
