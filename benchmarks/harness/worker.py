"""The process that measures: ``python -m benchmarks.harness.worker MODULE DEVICE``.

It reads a list of units from its input, pairs of a case of MODULE and of what is measured of it, "time" or "memory".
It reports each as lines ``{"unit", "stage", "result"}`` of JSON. Units of time share the process, and so what the
module caches. Each unit of memory has a process of its own, forked from this one, which has imported modules and run
nothing: that is as fresh as a new process, and starts in no time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

from benchmarks.harness.case import Case, Inputs, Row, Work
from benchmarks.harness.clock import Clock, open_clock
from benchmarks.harness.measure import MEASURES, MEMORY, describe, draw_inputs

BROKEN_STATUS = 77
"""Exit status of a process whose device works no more: another process goes on."""
PRELOADED = ("transformers.models.maskformer.modeling_maskformer", "scipy.optimize")
"""Peers' modules of slow import, imported before forking where they are installed."""

Unit = tuple[str, str]  # name of a case; "time" or "memory"


def load_cases(module: str, device: str) -> list[Case]:
    """The cases that a module has for a device.

    Raises:
        ValueError: two cases of one name.
        Exception: whatever importing the module raises.
    """
    cases: list[Case] = importlib.import_module(module).cases(device)
    names = [case.name for case in cases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"cases: expected a name each, got {sorted(twice)} more than once in {module}")
    return cases


class Worker:
    """Measures units and reports them."""

    def __init__(self, cases: Sequence[Case], clock: Clock, out: TextIO) -> None:
        self.cases = {case.name: case for case in cases}
        self.clock = clock
        self.out = out
        self.prepared: tuple[object, Work, list[Inputs]] | None = None  # a setup and what it made

    def run(self, units: Sequence[Unit]) -> int:
        """Measure the units one after the other -> exit status."""
        if any(kind == MEMORY for _, kind in units):
            for module in PRELOADED:
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)
        for unit in units:
            self.report(unit, "begun", {})
            measure = self.measure_forked if unit[1] == MEMORY else self.measure
            self.report(unit, "done", measure(self.cases[unit[0]], unit[1]))
            if not self.clock.works():
                return BROKEN_STATUS
        return 0

    def report(self, unit: Unit, stage: str, result: Row) -> None:
        """Write a line, with the size of the error stream so far: later errors belong to the next unit."""
        message = {"unit": unit, "stage": stage, "result": result, "error_bytes": os.fstat(2).st_size}
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def measure(self, case: Case, kind: str) -> Row:
        """Measure a unit -> a part of the row; ``error`` or ``absent`` is the reason where there is none."""
        import torch

        torch.set_num_threads(case.threads if self.clock.device.type == "cpu" else os.cpu_count() or 1)
        try:
            work, inputs = self.prepare(case)
            return MEASURES[kind](case, work, inputs, self.clock)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("maskformer_fast", "benchmarks"):
                return {"error": describe(error)}
            return {"absent": f"{error.name} is not installed" if error.name else str(error)}
        except Exception as error:
            traceback.print_exc()
            return {"error": describe(error)}

    def prepare(self, case: Case) -> tuple[Work, list[Inputs]]:
        """The work of a case and its inputs; those of the case before where both have one setup."""
        import torch

        if self.prepared is None or self.prepared[0] is not case.setup:
            self.prepared = None  # frees the inputs before
            self.clock.release()
            torch.manual_seed(0)
            work = case.setup(self.clock.device)
            self.prepared = case.setup, work, draw_inputs(work, self.clock.fresh_bytes)
        return self.prepared[1:]

    def measure_forked(self, case: Case, kind: str) -> Row:
        """Measure a unit in a forked process, as `measure` does."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with os.fdopen(writer, "w") as file:
                    json.dump(self.measure(case, kind), file)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as file:
            text = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            return {"error": f"its process ended with status {status}"}
        row: Row = json.loads(text)
        return row


def main(module: str, device: str) -> int:
    units: list[Any] = [(name, kind) for name, kind in json.load(sys.stdin)]
    # What libraries print goes to the error stream; the real output is the report's.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return Worker(load_cases(module, device), open_clock(device), out).run(units)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
