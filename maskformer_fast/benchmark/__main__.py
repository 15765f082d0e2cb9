"""``python -m maskformer_fast.benchmark BUNDLE``: how fast a bundle is here, beside PyTorch eager and compiled."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from maskformer_fast.benchmark.report import require_matplotlib, write_report
from maskformer_fast.benchmark.runners import Kind, Setting
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import Amp, Task
from maskformer_fast.core.checks import check
from maskformer_fast.deploy.bundle.folder import Bundle, check_outside
from maskformer_fast.deploy.bundle.manifest import Shape

NAMES: dict[Kind, str] = {"bundle": "bundle", "eager": "PyTorch eager", "compile": "torch.compile"}
BLOCK_SECONDS = 0.25
"""A contestant's turn: many short calls, or a long one."""
MIN_CALLS = 10
"""Of each contestant, however long they take."""
WORKER = [sys.executable, "-m", "maskformer_fast.benchmark.runners"]
OPEN_SECONDS, ANSWER_SECONDS = 1800.0, 300.0
"""After so long without an answer a process is ended; the first loads and compiles."""
PACKAGES = ("numpy", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda-python", "torch", "triton")

Row = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time a bundle: latency, throughput, memory and the stages' shares, for several batch sizes.

    Writes ``benchmark.json``, ``benchmark.md`` and ``benchmark.png``. With a checkpoint, the one that the bundle was
    exported from, PyTorch runs beside it on the same frames and the same kind of device: the GPU where the bundle runs
    by TensorRT, else the CPU. Each contestant has a process of its own; they take turns. Exit status 1 if one failed.
    """

    bundle: tyro.conf.Positional[str]
    """Bundle, as ``python -m maskformer_fast.export`` writes it."""
    checkpoint: str | None = None
    """Checkpoint to compare with; without one the bundle runs alone, and torch is not needed."""
    against: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    """How PyTorch runs the checkpoint."""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    """Frames in one call."""
    size: str = "512x512"
    """HEIGHTxWIDTH of the frames."""
    task: Task = "semantic"
    """What is asked of them."""
    backend: Literal["auto", "onnxruntime", "tensorrt"] = "auto"
    """The bundle's backend."""
    amp: Amp = "off"
    """Precision of PyTorch; an engine has that of its build."""
    pictures: str | None = None
    """Folder with pictures to run on, as post-processing depends on what is seen; by default drawn by chance."""
    seconds: float = 5.0
    """Measured time of each contestant at each batch size."""
    in_flight: int = 2
    """Frames that a stream of the bundle works on at once."""
    device: int = 0
    """Number of the GPU."""
    digest: str | None = None
    """The bundle's digest, where it is known: any other bundle is refused."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "benchmark"
    """Folder for the report."""

    def __post_init__(self) -> None:
        check(len(self.batches) > 0 and min(self.batches) > 0, "batches", "positive numbers", self.batches)
        check(self.seconds > 0, "seconds", "> 0", self.seconds)
        check(self.in_flight > 0, "in_flight", "> 0", self.in_flight)
        check(Shape.parse(self.size).batch == 1, "size", "HEIGHTxWIDTH", self.size)

    def kinds(self) -> tuple[Kind, ...]:
        return ("bundle", *self.against) if self.checkpoint else ("bundle",)

    def setting(self, kind: Kind, batch: int, device: str) -> Setting:
        shape = Shape.parse(self.size)
        return Setting(
            kind, self.bundle if kind == "bundle" else str(self.checkpoint), batch, (shape.height, shape.width),
            self.task, device, self.device, self.in_flight, self.amp, self.digest, self.pictures,
        )  # fmt: skip


class Process:
    """A contestant's process. `ask` raises RuntimeError with its reason where it fails, hangs or dies."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def ask(self, do: str, limit: float = ANSWER_SECONDS, **arguments: Any) -> dict[str, Any]:
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
        status = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return f"its process ended with status {status}" + (f": {lines[-1][:300]}" if lines else "")


def measure_batch(options: BenchmarkOptions, batch: int) -> list[Row]:
    """A row for each contestant, those that failed with an ``error``."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows: dict[Kind, Row] = {}
        processes: dict[Kind, Process] = {}
        device: str = options.backend
        for kind in options.kinds():
            rows[kind] = {"contestant": NAMES[kind], "batch": batch}
            process = stack.enter_context(Process())
            try:
                opened = process.ask("open", OPEN_SECONDS, setting=asdict(options.setting(kind, batch, device)))
            except RuntimeError as error:
                rows[kind]["error"] = str(error)
            else:
                processes[kind] = process
                rows[kind] |= opened
            if kind == "bundle":
                on_gpu = rows[kind].get("backend", options.backend) == "tensorrt"
                device = f"cuda:{options.device}" if on_gpu else "cpu"
            logger.info("batch %d: %s %s", batch, NAMES[kind], rows[kind].get("error", "is ready"))
        samples = take_turns(processes, rows, options.seconds)
        for kind, process in processes.items():
            row = rows[kind]
            try:
                if "error" not in row:
                    row |= process.ask("stages")
                    row |= process.ask("stream", seconds=options.seconds / 2) if batch == 1 else {}
                    row |= process.ask("finish", maps=str(folder / f"{kind}.npy"))
                    row |= summary(samples[kind], batch)
            except RuntimeError as error:
                row["error"] = str(error)
        compare_labels(rows, folder)
        return list(rows.values())


def take_turns(processes: dict[Kind, Process], rows: dict[Kind, Row], seconds: float) -> dict[Kind, list[float]]:
    """Seconds of each contestant's calls; every round another one goes first."""
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
    """Milliseconds of a call: median, and what 95 and 99 of 100 calls stay below; frames a second."""
    p50, p95, p99 = 1e3 * np.percentile(seconds, (50, 95, 99))
    rate = batch * len(seconds) / sum(seconds)
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "images_per_s": rate, "calls": len(seconds)}


def compare_labels(rows: dict[Kind, Row], folder: Path) -> None:
    """Share of the pixels whose label is the first PyTorch contestant's."""
    maps = {kind: np.load(folder / f"{kind}.npy") for kind in rows if (folder / f"{kind}.npy").exists()}
    reference = next((kind for kind in maps if kind != "bundle"), None)
    if reference is not None:
        for kind, found in maps.items():
            rows[kind]["labels_equal"] = float(np.mean(found == maps[reference]))


def describe_machine() -> dict[str, Any]:
    """Processor, cores, GPUs as the driver's tool names them, and versions of what is installed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
        "gpus": gpu_names(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := installed_version(name))},
    }


def gpu_names() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return process.stdout.strip().splitlines() if process.returncode == 0 else []


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(BenchmarkOptions, arguments, prog="python -m maskformer_fast.benchmark")
    require_matplotlib()  # before minutes of measuring
    bundle = Bundle.open(options.bundle, options.digest)
    check_outside(bundle, options.output)
    start = monotonic()
    content: dict[str, Any] = {
        "bundle": {"name": bundle.manifest.name, "digest": bundle.digest}, "options": asdict(options),
        "machine": describe_machine(), "rows": [],
    }  # fmt: skip
    for batch in options.batches:
        content["rows"] += measure_batch(options, batch)
        content["seconds"] = round(monotonic() - start, 1)
        text = write_report(content, Path(options.output))  # so that what ends the command leaves what it had
    print(text)
    return 1 if any("error" in row for row in content["rows"]) else 0


if __name__ == "__main__":
    run_command(main)
