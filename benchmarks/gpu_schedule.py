"""Runs units of the GPU benchmarks in processes of many units each, so that neither a crash nor time loses the rest."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu_harness import OURS, Case, Unit
from benchmarks.harness import Row, environment, load_cases
from benchmarks.processes import NOT_RUN, Results, run_units

UNIT_SECONDS = 75.0
"""After so long without a word from a process it is ended: its unit hangs. A case's patience comes on top."""
WORKER = [sys.executable, "-m", "benchmarks.gpu_harness"]

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
            silence = {name: UNIT_SECONDS + plan.cases[name].patience for name, _ in pending}
            command = [*WORKER, str(path.resolve()), device]
            threads = environment("time", os.cpu_count() or 1)
            done = run_units(command, threads, pending, deadline, silence, results, changed, summary)
            pending = pending[done:]
        for unit in pending:
            results[unit] = {"not_run": NOT_RUN}
    changed(results)
    return results


def summary(result: Row) -> str:
    """One unit in a few words."""
    for key in ("error", "absent", "not_run"):
        if key in result:
            return str(result[key])
    parts = [f"{key} {1e3 * result[key]['ms']:.4g} us" for key in ("graph", "call") if key in result]
    return ", ".join(parts + [result[key] for key in ("no_graph",) if key in result])
