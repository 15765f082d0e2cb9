"""Times an operation beside its peer, and measures the memory of both: a `Case`, two fresh processes, a row.

``python -m benchmarks.harness FILE NAME time|memory RESULT`` is such a process: it measures the case NAME of FILE's
``cases()`` and writes its part of the row to RESULT. `benchmarks.cpu` runs the cases of all files.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

Operation = Callable[[], object]
Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 0.01  # at least, for one sample: short operations are repeated, as reading a clock takes time too
ROUNDS_SECONDS = 2.0  # rounds go on up to this time, where `Case.repeats` ends sooner
MAX_ROUNDS = 25
TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True)
class Case:
    """One operation of one size on one kind of data, beside one peer."""

    name: str  # operator, size, kind of data; unique
    peer: str  # what it is compared with
    goal: float  # peer's time / our time to reach
    setup: Callable[[], tuple[Operation, Operation]]  # -> (ours, theirs); each time in a fresh process
    threads: int = 2
    repeats: int = 5  # rounds, at least

    def __post_init__(self) -> None:
        for name, low in (("goal", 0), ("threads", 1), ("repeats", 5)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}: expected >= {low}, got {getattr(self, name)!r} in the case {self.name!r}")


def load_cases(path: Path) -> list[Case]:
    """The cases of one file, imported by its path.

    Raises:
        ValueError: two cases of one name.
        Exception: whatever the file itself raises.
    """
    cases: list[Case] = _load_module(path).cases()
    names = [case.name for case in cases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"cases: expected a name each, got {sorted(twice)} more than once in {path}")
    return cases


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"path: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses of the file look their module up
    spec.loader.exec_module(module)
    return module


def run_fresh(path: Path, case: Case, timeout: float = TIMEOUT_SECONDS) -> Row:
    """Measure one case in processes of its own; a failure is a row too, with its reason as ``error``.

    Times are medians in ms, ``ratio`` is the peer's over ours. Memory is what `peak_memory` says of each side.
    """
    row = {"name": case.name, "peer": case.peer, "goal": case.goal, "threads": case.threads, "reached": False}
    row |= dict.fromkeys(("ours_ms", "peer_ms", "ratio", "ours_peak_mib", "peer_peak_mib"))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "part.json"
        for kind in MEASURES:
            command = [sys.executable, "-m", "benchmarks.harness", str(path.resolve()), case.name, kind, str(result)]
            try:
                process = subprocess.run(
                    command, cwd=ROOT, env=environment(kind, case.threads), capture_output=True, text=True,
                    timeout=timeout,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return {**row, "error": f"{kind}: not done after {timeout:g} s"}
            if process.returncode != 0:
                lines = process.stderr.strip().splitlines() or [f"ended with status {process.returncode}"]
                return {**row, "error": f"{kind}: {lines[-1]}"}
            row |= json.loads(result.read_text())
    return row


def environment(kind: str, threads: int) -> dict[str, str]:
    """This process's environment, with every pool of threads that NumPy, SciPy and PyTorch may start at `threads`."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    changed = dict.fromkeys(names, str(threads))
    if kind == "memory":  # freed memory goes back to the system at once, so that reused memory is not missed
        changed |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return {**os.environ, **changed}


def measure_time(case: Case) -> Row:
    """The part of the row about time, measured in this process."""
    ours, peer = case.setup()
    ours_seconds, peer_seconds = time_interleaved(ours, peer, case.repeats)
    ours_ms, peer_ms = (1e3 * statistics.median(seconds) for seconds in (ours_seconds, peer_seconds))
    return {
        "ours_ms": ours_ms,
        "peer_ms": peer_ms,
        "ratio": peer_ms / ours_ms,
        "reached": peer_ms / ours_ms >= case.goal,
        "ours_min_ms": 1e3 * min(ours_seconds),
        "peer_min_ms": 1e3 * min(peer_seconds),
        "rounds": len(ours_seconds),
    }


def measure_memory(case: Case) -> Row:
    """The part of the row about memory, measured in this process."""
    ours, peer = case.setup()
    return {"ours_peak_mib": peak_memory(ours), "peer_peak_mib": peak_memory(peer)}


MEASURES: dict[str, Callable[[Case], Row]] = {"time": measure_time, "memory": measure_memory}


def time_interleaved(first: Operation, second: Operation, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds per call of each operation, one sample a round; they take turns in going first."""
    operations = (first, second)
    inner = []
    for operation in operations:
        _seconds(operation, 1)  # warm-up: code is loaded, buffers are made
        seconds = _seconds(operation, 1)
        if seconds < 10 * SAMPLE_SECONDS:  # one look may be disturbed
            seconds = min(seconds, *(_seconds(operation, 1) for _ in range(3)))
        inner.append(max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7))))
    samples: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= repeats and time.perf_counter() - start > ROUNDS_SECONDS:
                break
            for side in (0, 1) if done % 2 == 0 else (1, 0):
                samples[side].append(_seconds(operations[side], inner[side]) / inner[side])
    finally:
        gc.enable()
    return samples


def _seconds(operation: Operation, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        operation()
    return time.perf_counter() - start


def peak_memory(operation: Operation) -> float | None:
    """The most memory in MiB that a call of `operation` adds to the process, its result included.

    The rise of the peak resident set (Linux resets it by ``/proc/self/clear_refs``) over the resident set before the
    call. The operation has run before, so that loaded code is not counted; nor is what it keeps from call to call.
    Accurate to some 0.3 MiB in a process with `environment`'s settings for it. None where the system has no such peak.
    """
    operation()
    gc.collect()
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = _status_kib("VmHWM")
        operation()
        return max(0.0, (_status_kib("VmHWM") - before) / 1024)
    except (OSError, KeyError):
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int({key: value for key, _, value in (line.partition(":") for line in lines)}[field].split()[0])


def _return_free_memory() -> None:
    """Free memory that the allocator holds would be reused and not show; most but glibc hold little."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def main(path: str, name: str, kind: str, result: str) -> None:
    import torch

    (case,) = (case for case in load_cases(Path(path)) if case.name == name)
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    Path(result).write_text(json.dumps(MEASURES[kind](case)))


if __name__ == "__main__":
    main(*sys.argv[1:])
