"""The benchmarks of the CPU: the cases of every subject within a time limit -> table, cpu.json and cpu.md.

    python -m benchmarks.cpu [--only TEXT] [--minutes 13] [--output FILE]

All files are written anew after every figure, so that whatever ends the command leaves what it had.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from benchmarks.harness import MEMORY, SHARED_VARIABLE, TIME, Case, Row, environment, load_cases
from benchmarks.machine import describe_machine
from benchmarks.processes import NOT_RUN, Results, Unit, run_units
from benchmarks.report import build_row, markdown, text_table
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "cpu.json"
SUBJECTS = ("operators", "network", "train_step", "loader", "deployment", "end_to_end")
"""Each a file; in the order in which they are measured, and shown."""
MEMORY_RANK = 2
"""On top of a case's: memory that has no goal is measured after the times of more cases."""
UNIT_SECONDS = 180.0
"""After so long without a word from a process it is ended: its unit hangs. A case's patience comes on top."""
WORKER = [sys.executable, "-m", "benchmarks.harness"]
MINUTES = 13.0

logger = logging.getLogger("benchmarks.cpu")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time operators, network, training step, loader and deployment on this machine's CPU beside their peers.

    The status is 0 also where a goal is missed (the table says so) or time ran out (the row says so), and 1 where a
    case could not be measured.
    """

    only: str = ""
    """Run the case of this name, or those with this in their subject, name or peer. Writes no file unless --output
    names one."""
    minutes: float = MINUTES
    """Time for all: goals come first, and what finds no time says so."""
    output: Path | None = None
    """JSON file, by default benchmarks/results/cpu.json; the page has the same name and the suffix .md."""

    def __post_init__(self) -> None:
        check(self.minutes > 0, "minutes", "> 0", self.minutes)


@dataclass(frozen=True)
class Batch:
    """Consecutive units of one file that a process can measure."""

    path: Path
    kind: str
    threads: int
    units: list[Unit]


@dataclass(frozen=True)
class Plan:
    """The cases of all subjects and the order in which their units are measured."""

    cases: dict[str, tuple[str, Case]] = field(default_factory=dict)  # by name: subject, case
    batches: list[Batch] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # files that could not be read: why

    def rows(self, results: Results, machine: Row) -> list[Row]:
        """A row for each file that could not be read, and for each case."""
        failed = [
            {"name": f"{subject}.py", "subject": subject, "peer": "", "error": reason}
            for subject, reason in self.failures.items()
        ]
        return failed + [build_row(subject, case, results, machine) for subject, case in self.cases.values()]


def plan(paths: Sequence[Path], only: str = "") -> Plan:
    """Units of rank 0 in the order of the files, then of rank 1, and so on; of memory only those with a goal so soon.

    Raises ValueError where two files have cases of one name.
    """
    found = Plan()
    files: dict[str, list[Case]] = {}
    for path in paths:
        try:
            files[path.stem] = load_cases(path)
        except Exception as error:  # one broken file must not cost the figures of the others
            logger.exception("%s could not be read", path.name)
            found.failures[path.stem] = f"{type(error).__name__}: {error}"
    exact = any(case.name == only for cases in files.values() for case in cases)
    ranked: list[tuple[int, int, str, int, Unit]] = []
    for index, path in enumerate(paths):
        for case in files.get(path.stem, ()):
            if case.name != only if exact else only not in f"{path.stem}: {case.name}, {case.peer}":
                continue
            if case.name in found.cases:
                raise ValueError(f"cases: expected a name each, got {case.name!r} in {path} and before")
            found.cases[case.name] = (path.stem, case)
            ranked.append((case.rank, index, TIME, case.threads, (case.name, TIME)))
            if case.memory:
                rank = case.rank + (MEMORY_RANK if case.memory_goal is None else 0)
                ranked.append((rank, index, MEMORY, case.threads, (case.name, MEMORY)))
    ranked.sort(key=lambda entry: (entry[0], entry[1], entry[2] == MEMORY, entry[3]))  # stable
    for (_, index, kind, threads), batch in groupby(ranked, key=lambda entry: entry[:4]):
        found.batches.append(Batch(paths[index], kind, threads, [entry[4] for entry in batch]))
    return found


def run(todo: Plan, deadline: float, changed: Callable[[Results], None]) -> Results:
    """Measure all units until `deadline` (of `time.monotonic`) -> the result of each, with why it has none.

    `changed` is called with the results so far after each unit.
    """
    results: Results = {}
    silence = {name: UNIT_SECONDS + case.patience for name, (_, case) in todo.cases.items()}
    with tempfile.TemporaryDirectory(prefix="benchmarks") as folder:
        for batch in todo.batches:
            pending = list(batch.units)
            variables = {**environment(batch.kind, batch.threads), SHARED_VARIABLE: folder}
            command = [*WORKER, str(batch.path.resolve())]
            while pending and time.monotonic() < deadline:
                done = run_units(command, variables, pending, deadline, silence, results, changed, summary)
                pending = pending[done:]
            for unit in pending:
                results[unit] = {"not_run": NOT_RUN}
    changed(results)
    return results


def summary(result: Mapping[str, object]) -> str:
    """One unit in a few words."""
    for key in ("error", "absent", "not_run"):
        if key in result:
            return str(result[key])
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))


def measure(subjects: Sequence[str], options: BenchmarkOptions, results: Path) -> int:
    """Run the subjects' cases, write the files, print the table -> exit status.

    `results` is the JSON file that is written where `options` neither name another nor choose cases.
    """
    deadline = time.monotonic() + 60 * options.minutes
    paths = [FOLDER / f"{subject}.py" for subject in subjects]
    todo = plan([path for path in paths if path.exists()], options.only)  # a checkout may lack a subject
    if not todo.cases and not todo.failures:
        raise ValueError(f"only: expected a part of a case's subject, name or peer, got {options.only!r}")
    output = options.output or (None if options.only else results)
    machine = describe_machine()
    rows: list[Row] = []

    def changed(found: Results) -> None:
        rows[:] = todo.rows(found, machine)
        if output is not None:
            write(output, {"machine": machine, "rows": rows})

    run(todo, deadline, changed)
    print(json.dumps(machine, indent=2))
    print(text_table(rows))
    return 1 if any("error" in row for row in rows) else 0


def write(output: Path, content: Row) -> None:
    """The JSON file and the page beside it."""
    for path, text in (
        (output, json.dumps(content, indent=2) + "\n"), (output.with_suffix(".md"), markdown(content))
    ):  # fmt: skip
        with atomic_write(path) as file:
            file.write(text.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(BenchmarkOptions, sys.argv[1:] if argv is None else argv, prog="python -m benchmarks.cpu")
    return measure(SUBJECTS, options, RESULTS)


if __name__ == "__main__":
    run_command(main)
