"""``make gpu``: the tests that need a GPU, then the GPU benchmarks, within nine minutes -> results/GPU-NAME.json, .md.

Both files are written anew after every test file and every figure, so that whatever ends the command leaves what it
had. The status is 1 where a test failed or something could not be measured, and 0 also where a goal is missed (the
table says so) or time ran out (the report says for what).
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
from typing import Any

from benchmarks.gpu_report import build_rows, has_errors, markdown
from benchmarks.gpu_schedule import Results, plan, run
from benchmarks.gpu_tests import run_tests
from benchmarks.harness import ROOT
from maskformer_fast.core.files import atomic_write

FOLDER = Path(__file__).parent
TESTS = ROOT / "tests"
FILES = (
    "gpu_semantic.py", "gpu_matching.py", "gpu_mask_loss.py", "gpu_segments.py", "gpu_train_step.py", "gpu_resize.py",
    "gpu_deploy.py",
)  # fmt: skip
"""In the order in which they are measured."""
TOTAL_SECONDS = 530.0
"""From the start of the build on, which --started tells: nine minutes less a margin for ending."""
TESTS_SECONDS = 200.0
BENCHMARKS_SECONDS = 300.0
"""At most; what building and tests took may leave less."""
MACHINE_SECONDS = 60.0

logger = logging.getLogger("benchmarks.gpu")


class Report:
    """What is known so far, and its two files."""

    def __init__(self, machine: dict[str, Any], folder: Path) -> None:
        self.content: dict[str, Any] = {"machine": machine, "tests": None, "rows": []}
        self.path = folder / (re.sub(r"[^A-Za-z0-9.]+", "-", machine["gpu"]).strip("-") + ".json")

    def update(self, **parts: Any) -> None:
        self.content |= parts
        for path, text in (
            (self.path, json.dumps(self.content, indent=2) + "\n"),
            (self.path.with_suffix(".md"), markdown(self.content)),
        ):
            with atomic_write(path) as file:
                file.write(text.encode())


def parse(argv: Sequence[str]) -> argparse.Namespace:
    # argparse: tyro, which the commands use, may be missing on a GPU machine without a network
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="benchmarks of such a name, no tests; needs --output")
    parser.add_argument("--output", type=Path, help="folder of the two files, by default benchmarks/results")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test the harness itself")
    parser.add_argument("--started", type=float, help="Unix time at which the nine minutes began, by default now")
    options = parser.parse_args(argv)
    if options.only and options.output is None:
        parser.error("--only: a part of the figures must not replace all; name a folder with --output")
    return options


def describe_machine(device: str) -> dict[str, Any]:
    """In a process of its own: this one never opens the GPU. RuntimeError says why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu_machine", device]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=MACHINE_SECONDS)
    if process.returncode != 0:
        raise RuntimeError((process.stderr.strip().splitlines() or ["no reason given"])[-1])
    machine: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return machine


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    spent = max(0.0, time.time() - options.started) if options.started else 0.0
    end = time.monotonic() + TOTAL_SECONDS - spent
    todo = plan([FOLDER / name for name in FILES], options.only)
    if not todo.cases and not todo.failures:
        print(f"error: --only: expected a part of a case's name, got {options.only!r}", file=sys.stderr)
        return 2
    try:
        machine = describe_machine(options.device)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = Report(machine, options.output or FOLDER / "results")
    report.update()
    if not (options.no_tests or options.only):
        limit = min(time.monotonic() + TESTS_SECONDS, end)
        report.update(tests=run_tests(TESTS, limit, lambda tests: report.update(tests=tests)))

    def changed(results: Results) -> None:
        report.update(rows=build_rows(todo, results, machine))

    run(todo, options.device, min(time.monotonic() + BENCHMARKS_SECONDS, end), changed)
    print(report.path.with_suffix(".md").read_text().partition("## Figures")[0])
    print(f"All figures: {report.path.with_suffix('.md')}")
    return status(report.content)


def status(content: dict[str, Any]) -> int:
    failed = content["tests"] is not None and content["tests"]["failed"] > 0
    return 1 if failed or has_errors(content["rows"]) else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sys.exit(main(sys.argv[1:]))
