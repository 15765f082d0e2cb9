"""Times an operation beside its peer, and measures the memory of both: one `Case`, one fresh process, one row.

``python -m benchmarks.harness FILE NAME RESULT`` is that process: it runs the case NAME of FILE's ``cases()`` and writes
the row to RESULT. `benchmarks.cpu` runs the cases of every file and writes the table.
"""

from __future__ import annotations

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
SAMPLE_SECONDS = 0.01  # what one sample takes at least, by repeating the operation: a clock and a call cost microseconds
ROUNDS_SECONDS = 2.0  # rounds go on up to this time, where `Case.repeats` ends sooner
MAX_ROUNDS = 25
TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True)
class Case:
    """One operation of one size on one kind of data, beside one peer."""

    name: str  # operator, size, kind of data; unique
    peer: str  # what it is compared with
    goal: float  # peer's time / our time to reach
    setup: Callable[[], tuple[Operation, Operation]]  # -> (ours, theirs); runs in a fresh process
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
    """Measure one case in a process of its own; a failure is a row too, with its reason as ``error``."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.harness", str(path.resolve()), case.name, str(result)]
        try:
            process = subprocess.run(
                command, cwd=ROOT, env=environment(case.threads), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return failure(case, f"not done after {timeout:g} s")
        if process.returncode != 0:
            lines = process.stderr.strip().splitlines()
            return failure(case, lines[-1] if lines else f"ended with status {process.returncode}")
        row: Row = json.loads(result.read_text())
        return row


def environment(threads: int) -> dict[str, str]:
    """This process's environment, with every pool of threads that NumPy, SciPy and PyTorch may start at `threads`."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def failure(case: Case, reason: str) -> Row:
    """The row of a case that could not be measured."""
    measured = ("ours_ms", "peer_ms", "ratio", "ours_peak_mib", "peer_peak_mib")
    return {**_head(case), **dict.fromkeys(measured), "reached": False, "error": reason}


def _head(case: Case) -> Row:
    return {"name": case.name, "peer": case.peer, "goal": case.goal, "threads": case.threads}


def measure(case: Case) -> Row:
    """Measure a case in this process: times interleaved, then the memory of each side.

    Times are medians in ms, ``ratio`` is the peer's over ours. Memory is the most that a call adds, its result
    included, in MiB; None where the system does not tell.
    """
    import torch

    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    ours, peer = case.setup()
    samples = time_interleaved(ours, peer, case.repeats)
    ours_ms, peer_ms = (1e3 * statistics.median(times) for times in samples)
    ratio = peer_ms / ours_ms
    return {
        **_head(case),
        "ours_ms": ours_ms,
        "peer_ms": peer_ms,
        "ratio": ratio,
        "reached": ratio >= case.goal,
        "ours_peak_mib": peak_memory(ours),
        "peer_peak_mib": peak_memory(peer),
        "ours_min_ms": 1e3 * min(samples[0]),
        "peer_min_ms": 1e3 * min(samples[1]),
        "rounds": len(samples[0]),
    }


def time_interleaved(first: Operation, second: Operation, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds per call of each operation, one sample a round; they take turns in going first."""
    operations = (first, second)
    inner = []
    for operation in operations:
        _seconds(operation, 1)  # warm-up: code is loaded, buffers are made
        inner.append(max(1, math.ceil(SAMPLE_SECONDS / max(_seconds(operation, 1), 1e-7))))
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
    Accurate to some 0.3 MiB. None where the system has no such peak.
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
    """Give freed memory back to the system: reused, it would not show in the resident set."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return  # not glibc: most others give it back by themselves


def main(path: str, name: str, result: str) -> None:
    (case,) = (case for case in load_cases(Path(path)) if case.name == name)
    Path(result).write_text(json.dumps(measure(case)))


if __name__ == "__main__":
    main(*sys.argv[1:])
