"""Runs units of the GPU benchmarks in processes of many units each, so that neither a crash nor time loses the rest."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu_harness import BROKEN_STATUS, OURS, Case, Unit
from benchmarks.harness import ROOT, Row, environment, load_cases

UNIT_SECONDS = 75.0
"""After so long without a word from a process it is ended: its unit hangs. A case's patience comes on top."""
WORKER = [sys.executable, "-m", "benchmarks.gpu_harness"]
NOT_RUN = "not run: time"

Results = dict[Unit, Row]

logger = logging.getLogger("benchmarks.gpu")


@dataclass(frozen=True)
class Plan:
    """The cases of all files and the order in which their units are measured."""

    cases: dict[str, Case]
    batches: list[tuple[Path, list[Unit]]]  # consecutive units of one file
    failures: dict[str, str]  # files that could not be read: why


def plan(paths: Sequence[Path], only: str = "") -> Plan:
    """Units of rank 0 in the order of files and cases, then of rank 1, and so on; `only` selects cases by name.

    Raises ValueError where two files have cases of one name.
    """
    cases: dict[str, Case] = {}
    failures: dict[str, str] = {}
    ranked: list[tuple[int, Path, Unit]] = []
    for path in paths:
        try:
            found: list[Any] = load_cases(path)
        except Exception as error:  # one broken file must not cost the figures of the others
            logger.exception("%s could not be read", path.name)
            failures[path.name] = f"{type(error).__name__}: {error}"
            continue
        for case in found:
            if only not in case.name:
                continue
            if case.name in cases:
                raise ValueError(f"cases: expected a name each, got {case.name!r} in {path} and before")
            cases[case.name] = case
            ranked.append((case.rank, path, (case.name, OURS)))
            ranked += [(max(case.rank, peer.rank), path, (case.name, peer.name)) for peer in case.peers]
    ranked.sort(key=lambda entry: entry[0])  # stable
    batches = [(path, [unit for *_, unit in batch]) for (_, path), batch in groupby(ranked, key=lambda e: e[:2])]
    return Plan(cases, batches, failures)


def run(plan: Plan, device: str, deadline: float, changed: Callable[[Results], None]) -> Results:
    """Measure all units until `deadline` (of `time.monotonic`) -> the result of each, with why it has none.

    `changed` is called with the results so far after each unit.
    """
    results: Results = {}
    for path, units in plan.batches:
        pending = list(units)
        while pending and time.monotonic() < deadline:
            patience = {name: plan.cases[name].patience for name, _ in pending}
            done = _run_process(path, pending, device, deadline, results, changed, patience)
            pending = pending[done:]
        for unit in pending:
            results[unit] = {"not_run": NOT_RUN}
    changed(results)
    return results


def _run_process(
    path: Path, units: list[Unit], device: str, deadline: float, results: Results, changed: Callable[[Results], None],
    patience: Mapping[str, float],
) -> int:  # fmt: skip
    """One process -> how many units it is done with, for good or bad: at least one. `patience` is that of cases."""
    done, at_work = 0, False
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*WORKER, str(path.resolve()), device], cwd=ROOT, env=environment("time", os.cpu_count() or 1),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        guard = Guard(process, deadline, UNIT_SECONDS + patience[units[0][0]])
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it may end at once; its status tells
            json.dump(units, stdin)
        with process.stdout as lines:
            for line in lines:
                message = json.loads(line)
                unit: Unit = tuple(message["unit"])
                result = results.setdefault(unit, {})
                result |= message["result"]
                at_work = message["stage"] != "done"
                guard.silence = UNIT_SECONDS + patience[unit[0]]
                guard.restart(final=message["stage"] == "done" and unit == units[-1])
                if message["stage"] == "done":
                    done += 1
                    logger.info("%s | %s: %s", *unit, summary(result))
                    changed(results)
        status = process.wait()
        guard.cancel()
        errors.seek(0)
        text = errors.read().strip().splitlines()
    if done == len(units):
        return done
    if guard.ended == "unit" or (guard.ended is None and not (status == BROKEN_STATUS and done)):
        reason = f"not done after {guard.silence:g} s" if guard.ended else f"its process ended with status {status}"
        if text and not guard.ended:
            reason += f": {text[-1][:300]}"
        logger.info("%s | %s: %s", *units[done], reason)
        if not at_work and done == 0:  # it could not even begin; nor would the next
            for unit in units:
                results.setdefault(unit, {})["error"] = reason
            changed(results)
            return len(units)
        results.setdefault(units[done], {})["error"] = reason
        changed(results)
        return done + 1
    if guard.ended == "deadline" and at_work:
        results[units[done]].setdefault("not_run", NOT_RUN)
        return done + 1
    return done


class Guard:
    """Ends a process, and what it started, that says nothing for `silence` s or is still there at the deadline."""

    def __init__(self, process: subprocess.Popen[str], deadline: float, silence: float) -> None:
        self.process, self.deadline, self.silence = process, deadline, silence
        self.ended: str | None = None  # "unit" or "deadline", where it was ended
        self.timer: threading.Timer | None = None
        self.restart()

    def restart(self, final: bool = False) -> None:
        """The process has spoken. After its `final` word it has a few seconds to end."""
        self.cancel()
        seconds, why = min((5.0 if final else self.silence, "unit"), (self.deadline - time.monotonic(), "deadline"))
        self.timer = threading.Timer(max(seconds, 0.0), self._end, [why])
        self.timer.daemon = True
        self.timer.start()

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def _end(self, why: str) -> None:
        self.ended = why
        end_group(self.process)


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill a process of a session of its own and what it started: compilers, for one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def summary(result: Row) -> str:
    """One unit in a few words."""
    for key in ("error", "absent", "not_run"):
        if key in result:
            return str(result[key])
    parts = [f"{key} {1e3 * result[key]['ms']:.4g} us" for key in ("graph", "call") if key in result]
    return ", ".join(parts + [result[key] for key in ("no_graph",) if key in result])
