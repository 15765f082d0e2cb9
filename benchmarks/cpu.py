"""Benchmarks of the CPU: runs the cases of every ``benchmarks/cpu_*.py``, prints the table, writes cpu.json."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Row, load_cases, run_fresh
from benchmarks.machine import describe_machine
from maskformer_fast.cli import parse, run_command
from maskformer_fast.files import atomic_write

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "cpu.json"

logger = logging.getLogger("benchmarks.cpu")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time the operators on this machine's CPU beside their peers.

    The status is 0 also where a goal is missed (the table says so), and 1 where a case could not be measured.
    """

    only: str = ""
    """Run the cases with this in their name or peer. Writes no file unless --output names one."""
    output: Path | None = None
    """JSON file; by default benchmarks/results/cpu.json."""


def run_all(folder: Path, only: str = "") -> list[Row]:
    """A row for each case of the ``cpu_*.py`` in `folder`; a file or a case that fails gets one with its ``error``."""
    rows: list[Row] = []
    for path in sorted(folder.glob("cpu_*.py")):
        try:
            cases = load_cases(path)
        except Exception as error:  # one broken file must not cost the figures of the others
            logger.exception("%s could not be read", path.name)
            rows.append({"name": path.name, "peer": "", "error": f"{type(error).__name__}: {error}"})
            continue
        for case in cases:
            if only in f"{case.name} {case.peer}":
                rows.append(run_fresh(path, case))
                logger.info("%s", format_table(rows[-1:]).splitlines()[-1])
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """One aligned line a row, headings first."""
    lines = [("operation", "peer", "ours ms", "peer ms", "ratio", "goal", "", "ours MiB", "peer MiB")]
    for row in rows:
        if row.get("error"):
            lines.append((row["name"], row["peer"], *[""] * 4, f"FAILED: {row['error']}", "", ""))
            continue
        lines.append((
            row["name"],
            row["peer"],
            f"{row['ours_ms']:.4g}",
            f"{row['peer_ms']:.4g}",
            f"{row['ratio']:.2f}",
            f"{row['goal']:g}",
            "reached" if row["reached"] else "MISSED",
            *("-" if row[key] is None else f"{row[key]:.1f}" for key in ("ours_peak_mib", "peer_peak_mib")),
        ))
    # an error may be long: it does not widen its column
    widths = [max(len(line[k]) for line in lines if not line[6].startswith("FAILED") or k < 2) for k in range(9)]
    return "\n".join(
        "  ".join(cell.ljust(w) if k in (0, 1, 6) else cell.rjust(w)
                  for k, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(BenchmarkOptions, arguments, prog="python -m benchmarks.cpu")
    machine = describe_machine()
    rows = run_all(FOLDER, options.only)
    if not rows:
        raise ValueError(f"only: expected a part of a case's name or peer, got {options.only!r}")
    output = options.output or (None if options.only else RESULTS)
    if output is not None:
        with atomic_write(output) as file:
            file.write((json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n").encode())
    print(json.dumps(machine, indent=2))
    print(format_table(rows))
    return 1 if any(row.get("error") for row in rows) else 0


if __name__ == "__main__":
    run_command(main)
