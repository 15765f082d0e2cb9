"""Plans which cases are measured when, and measures them in processes that neither a crash nor a hang outlives.

A *unit* is a case and what is measured of it, "time" or "memory". A process (`benchmarks.harness.worker`) measures many
units of one module one after the other. One that dies or hangs costs the unit at work; another process goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.harness.case import Case, Row
from benchmarks.harness.measure import MEMORY, TIME
from benchmarks.harness.worker import BROKEN_STATUS, Unit, load_cases

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "benchmarks.harness.worker"]
UNIT_SECONDS = {"cpu": 180.0, "cuda": 75.0}
"""Seconds without a word from a process after which its unit hangs; a case's `extra_seconds` come on top."""
END_SECONDS = 5.0
"""Seconds that a process may take to end after its last unit."""
MEMORY_RANK = 2
"""Added to a case's rank: memory without a goal is measured after the times of more cases."""
NOT_RUN = "not run: time"
SHARED_VARIABLE = "BENCHMARKS_SHARED"
"""Environment variable: folder for what is costly to make and serves several processes of a run."""

Results = dict[Unit, Row]

logger = logging.getLogger("benchmarks")


def environment(kind: str, threads: int) -> dict[str, str]:
    """Return a copy of the environment that sets every thread pool of NumPy, SciPy and PyTorch to `threads`."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    changed = dict.fromkeys(names, str(threads))
    if kind == MEMORY:  # freed memory goes back to the system at once, so that reused memory is not missed
        changed |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return {**os.environ, **changed}


@dataclass(frozen=True)
class Batch:
    """Consecutive units of one module that a process can measure."""

    module: str
    kind: str
    threads: int
    units: list[Unit]


@dataclass(frozen=True)
class Plan:
    """Cases, and the order in which their units are measured."""

    device: str
    cases: dict[str, tuple[str, Case]] = field(default_factory=dict)  # by name: subject, case
    batches: list[Batch] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # modules that could not be imported: why


def plan(modules: Sequence[str], device: str, only: str = "") -> Plan:
    """Units of rank 0 in the order of the modules, then of rank 1, and so on; of memory only those with a goal so soon.

    `only` selects the case of this name, or those with this text in "SUBJECT: NAME, PEER".

    Raises:
        ValueError: two modules have cases of one name.
    """
    todo = Plan(device)
    by_module: dict[str, list[Case]] = {}
    for module in modules:
        try:
            by_module[module] = load_cases(module, device)
        except Exception as error:  # one broken file must not cost the figures of the others
            logger.exception("%s could not be imported", module)
            todo.failures[module] = f"{type(error).__name__}: {error}"
    exact = any(case.name == only for cases in by_module.values() for case in cases)
    ranked: list[tuple[int, int, str, int, Unit]] = []
    for index, (module, cases) in enumerate(by_module.items()):
        subject = module.rpartition(".")[2]
        for case in cases:
            if case.name != only if exact else only not in f"{subject}: {case.name}, {case.peer}":
                continue
            if case.name in todo.cases:
                raise ValueError(f"cases: expected a name each, got {case.name!r} in {module} and before")
            todo.cases[case.name] = (subject, case)
            ranked.append((case.rank, index, TIME, case.threads, (case.name, TIME)))
            if case.memory and device == "cpu":
                rank = case.rank + (MEMORY_RANK if case.memory_goal is None else 0)
                ranked.append((rank, index, MEMORY, case.threads, (case.name, MEMORY)))
    ranked.sort(key=lambda entry: (entry[0], entry[1], entry[2] == MEMORY, entry[3]))  # stable
    names = list(by_module)
    for (_, index, kind, threads), batch in groupby(ranked, key=lambda entry: entry[:4]):
        todo.batches.append(Batch(names[index], kind, threads, [entry[4] for entry in batch]))
    return todo


def run(todo: Plan, deadline: float, changed: Callable[[Results], None]) -> Results:
    """Measure all units until `deadline` (of `time.monotonic`) -> the result of each, with why it has none.

    `changed` is called with the results so far after each unit.
    """
    results: Results = {}
    limits = {name: UNIT_SECONDS[todo.device] + case.extra_seconds for name, (_, case) in todo.cases.items()}
    with tempfile.TemporaryDirectory(prefix="benchmarks") as folder:
        for batch in todo.batches:
            pending = list(batch.units)
            threads = batch.threads if todo.device == "cpu" else os.cpu_count() or 1
            variables = {**environment(batch.kind, threads), SHARED_VARIABLE: folder}
            command = [*WORKER, batch.module, todo.device]
            while pending and time.monotonic() < deadline:
                done = run_process(command, variables, pending, deadline, limits, results, changed)
                pending = pending[done:]
            for unit in pending:
                results[unit] = {"not_run": NOT_RUN}
    changed(results)
    return results


def run_process(
    command: Sequence[str], variables: Mapping[str, str], units: Sequence[Unit], deadline: float,
    limits: Mapping[str, float], results: Results, changed: Callable[[Results], None],
) -> int:  # fmt: skip
    """Run one process, which adds to `results` -> how many units it is done with, for good or bad: at least one."""
    done, begun, ended, error_bytes = 0, False, "", 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(process, json.dumps(units), lines), daemon=True).start()
        while True:
            silence = limits[units[done][0]] if done < len(units) else END_SECONDS
            left = deadline - time.monotonic()
            try:
                line = lines.get(timeout=max(0.0, min(silence, left)))
            except queue.Empty:
                ended = "deadline" if left <= silence else f"not done after {silence:g} s"
                _end_session(process)
                break
            if line is None:
                break
            message = json.loads(line)
            unit: Unit = tuple(message["unit"])
            result = results.setdefault(unit, {})
            result |= message["result"]
            begun, error_bytes = message["stage"] == "begun", message["error_bytes"]
            if not begun:
                done += 1
                logger.info("%s | %s: %s", *unit, summary(result))
                changed(results)
        status = process.wait()
        errors.seek(error_bytes)
        text = errors.read().strip().splitlines()
    if done == len(units):
        return done
    if ended == "deadline":
        if begun:
            results[units[done]]["not_run"] = NOT_RUN
        return done + begun
    if status == BROKEN_STATUS and done:
        return done
    reason = ended or f"its process ended with status {status}" + (f": {text[-1][:300]}" if text else "")
    logger.info("%s | %s: %s", *units[done], reason)
    if done or begun:
        failed = units[done : done + 1]
    else:  # it could not even begin; nor would the next
        failed = units
    for unit in failed:
        results.setdefault(unit, {})["error"] = reason
    changed(results)
    return done + len(failed)


def _forward(process: subprocess.Popen[str], request: str, lines: queue.Queue[str | None]) -> None:
    """Write a process's input, then put its lines into a queue, and None at their end."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it may end at once; its status says more
        stdin.write(request)
    with process.stdout as stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)


def _end_session(process: subprocess.Popen[Any]) -> None:
    """Kill a process and what it started, compilers for one; it was started in a new session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def summary(result: Row) -> str:
    """The result of one unit in a few words."""
    for key in ("error", "absent", "not_run"):
        if key in result:
            return str(result[key])
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="benchmarks")  # removed when the process ends


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder `name`, made once in a run by whichever process first asks for it.

    `make` gets the path where it is to be; one that was interrupted is made anew.
    """
    folder = Path(os.environ.get(SHARED_VARIABLE) or _own_folder().name)
    path, part = folder / name, folder / f"{name}.part"
    if not path.exists():
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(path)
    return path
