"""The one runner of all benchmarks: the cases of every subject within a time limit -> a table, JSON and a page.

    python -m benchmarks [--device cpu|cuda] [--only TEXT] [--minutes N] [--output FOLDER] [--list]

The files are ``cpu.json`` or ``GPU-NAME.json``, and the same as ``.md``; with --only, its text is a part of the name.
They are written anew after every figure, so that whatever ends the command leaves what it had. The status is 0 also
where a goal is missed (the table says so) or time ran out (the row says so), and 1 where a case could not be measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.case import Row
from benchmarks.harness.machine import describe
from benchmarks.harness.report import build_rows, markdown, text_table
from benchmarks.harness.runner import Plan, Results, plan, run
from maskformer_fast.core.files import atomic_write, write_json

OUTPUT = Path(__file__).parent / "output"
SUBJECTS = (
    "semantic", "segments", "drop_in", "own_code", "rle", "assignment", "matching_cost", "mask_loss", "points",
    "mask_product", "convolution", "window_attention", "upscaling", "deformable_attention", "criterion", "network",
    "train_step", "mask2former", "eomt", "resize", "loader", "deployment", "end_to_end",
)  # fmt: skip
"""Modules of `benchmarks.cases`, in the order in which they are measured and shown."""
MODULES = tuple(f"benchmarks.cases.{subject}" for subject in SUBJECTS)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    # argparse: tyro, which the commands use, may be missing on a GPU machine without a network
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", metavar="TEXT",
                        help="the case of this name, or those with this in their subject, name or peer")  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="N",
                        help="time for measuring, goals first: 15 on the CPU, 5 on a GPU")  # fmt: skip
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"by default {OUTPUT.name}/")
    parser.add_argument("--list", action="store_true", help="print the cases, with peer and goal, and measure nothing")
    options = parser.parse_args(argv)
    if options.minutes is None:
        options.minutes = 15.0 if options.device == "cpu" else 5.0
    if not options.minutes > 0:
        parser.error(f"--minutes: expected > 0, got {options.minutes:g}")
    return options


def file_name(device: str, machine: Row, only: str) -> str:
    """The stem of the files' names."""
    words = ["cpu" if device == "cpu" else machine["gpu"], *([only] if only else [])]
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", word).strip("-") for word in words)[:100]


def write(path: Path, content: Row) -> None:
    """Write the JSON file and the page beside it."""
    write_json(path, content)
    with atomic_write(path.with_suffix(".md")) as file:
        file.write(markdown(content).encode())


def list_cases(todo: Plan) -> str:
    return "\n".join(
        f"{subject}: {case.name}" + (f"  (beside: {case.peer})" if case.peer else "")
        + ("" if case.goal is None else f"  goal {case.goal:g}x")
        for subject, case in todo.cases.values()
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    todo = plan(MODULES, options.device, options.only)
    if not todo.cases and not todo.failures:
        expected = "a part of a case's subject, name or peer"
        print(f"error: --only: expected {expected}, got {options.only!r}", file=sys.stderr)
        return 2
    if options.list:
        print(list_cases(todo))
        return 1 if todo.failures else 0
    try:
        machine = describe(options.device)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = options.output / f"{file_name(options.device, machine, options.only)}.json"
    content: Row = {"device": options.device, "machine": machine, "rows": []}

    def changed(results: Results) -> None:
        content["rows"] = build_rows(todo.cases, todo.failures, results, machine, options.device)
        write(path, content)

    run(todo, time.monotonic() + 60 * options.minutes, changed)
    print(json.dumps(machine, indent=2))
    print(text_table(content["rows"]))
    print(f"\nwritten: {path}, {path.with_suffix('.md')}")
    return 1 if any("error" in row for row in content["rows"]) else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sys.exit(main())
