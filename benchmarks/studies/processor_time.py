"""Rows of one subject of the CPU's benchmarks in processor time, for machines whose cores are shared.

    python -m benchmarks.studies.processor_time SUBJECT [--only TEXT] [--output FOLDER]

The subject is a file of benchmarks/cases/, such as drop_in, train_step or mask2former. Sides, turns and checks that
results are equal are those of `python -m benchmarks --only SUBJECT`, but time is the processor's of one thread, and
freed memory stays with the process, as `load` and the trainer have it on a CPU. Rows of 12 megapixels have a process
each, and are skipped where memory is short. Rows are written to SUBJECT.json and .md after each; those of other cases
that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.__main__ import OUTPUT, write
from benchmarks.harness.case import Case, Row
from benchmarks.harness.clock import ProcessorClock
from benchmarks.harness.machine import measure_peaks
from benchmarks.harness.measure import MEMORY, TIME
from benchmarks.harness.report import build_rows
from benchmarks.harness.runner import ROOT, environment, plan
from benchmarks.harness.worker import Unit, Worker, load_cases
from maskformer_fast.core.machine import describe_machine, keep_freed_memory

PEAK_GB = 7.0
"""Memory that a row of 12 megapixels may need."""


def free_gb() -> float:
    """Memory that the system can give."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 2**20


def on_one_thread(case: Case) -> Case:
    """The same case with one thread: others would wait for one another, which counts as time of the processor."""
    return replace(case, threads=1)


def measure(subject: str, kind: str, names: list[str]) -> Iterator[tuple[Unit, Row]]:
    """Measure time or memory of cases in one process; yields each with its result when it is there."""
    command = [sys.executable, "-m", "benchmarks.studies.processor_time", subject, "--worker"]
    left = list(names)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(kind, 1), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        json.dump([(name, kind) for name in names], process.stdin)
        process.stdin.close()
        for line in process.stdout:
            message = json.loads(line)
            if message["stage"] == "done":
                left.remove(message["unit"][0])
                yield (message["unit"][0], kind), message["result"]
    for name in left:
        yield (name, kind), {"error": f"its process ended with status {process.returncode}"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", help="a file of benchmarks/cases/ without its suffix")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"by default {OUTPUT.name}/")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    module = f"benchmarks.cases.{options.subject}"
    if options.worker:
        units = [(name, kind) for name, kind in json.load(sys.stdin)]
        if all(kind == TIME for _, kind in units):  # kept memory would be part of a peak
            keep_freed_memory()
        one_thread = [on_one_thread(case) for case in load_cases(module, "cpu")]
        return Worker(one_thread, ProcessorClock(), sys.stdout).run(units)
    todo = plan([module], "cpu")
    cases = {
        name: (subject, on_one_thread(case)) for name, (subject, case) in todo.cases.items() if options.only in name
    }
    path = options.output / f"{options.subject}.json"
    kept = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    torch.set_num_threads(1)
    peaks = measure_peaks(ProcessorClock(), 2048, 256, ("fp32", "bf16"))
    machine = {**describe_machine(), "peaks": [{"threads": 1, **peaks}]}
    large = [name for name in cases if "12 MP" in name]
    results: dict[Unit, Row] = {}
    for group in filter(None, [[name for name in cases if name not in large], *([name] for name in large)]):
        with_memory = [name for name in group if cases[name][1].memory]
        for kind, names in ((TIME, group), (MEMORY, with_memory)):
            if group[0] in large and free_gb() < PEAK_GB:
                reason = f"{free_gb():.1f} GB of memory free, {PEAK_GB:g} may be needed"
                results[group[0], kind] = {"not_run": reason}
                continue
            for unit, result in measure(options.subject, kind, names):
                results[unit] = result
                done = {name: pair for name, pair in cases.items() if (name, TIME) in results}
                kept |= {row["name"]: row for row in build_rows(done, {}, results, machine, "cpu")}
                rows = [kept[name] for name in todo.cases if name in kept]
                write(path, {"device": "cpu", "machine": machine, "rows": rows})
    print(f"written: {path}, {path.with_suffix('.md')}")
    return 1 if any("error" in kept.get(name, {}) for name in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
