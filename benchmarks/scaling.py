"""How cost grows with classes, queries, targets, pixels and images, ours beside its peers, with fitted exponents.

    python -m benchmarks.scaling [--minutes 4] [--only TEXT] [--output FILE]

Both sides run in one process with the same inputs, taking turns, on two threads; times are medians. Peak memory is
measured in a process of its own, as far as the time goes. A peer too slow for the time leaves its largest points out.
Results go to benchmarks/results/scaling.json point by point, so that an interrupted run keeps what it has;
``python -m benchmarks.plots`` draws them.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import ROOT, Row, environment
from benchmarks.machine import describe_machine
from benchmarks.scaling_measure import THREADS
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write

RESULTS = Path(__file__).parent / "results" / "scaling.json"
TIME_SHARE = 0.85  # of the minutes; memory gets the rest
GRACE_SECONDS = 20.0  # what a process may stay beyond its time: one slow call
WORKER = (sys.executable, "-m", "benchmarks.scaling_measure")

Work = list[tuple[str, Any]]

logger = logging.getLogger("benchmarks.scaling")


@dataclass(frozen=True)
class ScalingOptions:
    """Measure how cost grows with classes, queries, targets, pixels and batch on this machine's CPU, beside peers.

    The status is 1 where a curve could not be measured.
    """

    minutes: float = 4.0
    """Time for all curves."""
    only: str = ""
    """Measure the curves with this in their name or peer. Writes no file unless --output names one."""
    output: Path | None = None
    """JSON file; by default benchmarks/results/scaling.json."""

    def __post_init__(self) -> None:
        check(self.minutes > 0, "minutes", "> 0", self.minutes)


class Fit(NamedTuple):
    """A power law through points: time ~ x ** exponent."""

    exponent: float
    error: float  # standard error of the exponent
    low: float  # x of the first point that counts
    high: float  # and of the last


def fit_exponent(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Log-log least squares over the upper half of the points (x, time), at least three of them.

    Small sizes are left out as they measure what a call costs whatever its size. The standard error is that of the
    slope, its residuals' variance with n - 2 degrees of freedom. None for fewer than three points or one x alone.

    Raises:
        ValueError: an x or a time that is not above 0.
    """
    check(all(x > 0 and y > 0 for x, y in points), "points", "numbers above 0", points)
    upper = sorted(points)[-max(3, math.ceil(len(points) / 2)) :]
    if len(upper) < 3 or upper[0][0] == upper[-1][0]:
        return None
    xs, ys = ([math.log(value) for value in column] for column in zip(*upper, strict=True))
    x_mean, y_mean = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    spread = math.fsum((x - x_mean) ** 2 for x in xs)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    residual = math.fsum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Fit(slope, math.sqrt(residual / (len(xs) - 2) / spread), upper[0][0], upper[-1][0])


def add_fit(curve: Row) -> None:
    """Put the exponents of both sides into a curve's row; None where there are too few points."""
    texts = []
    for side in ("ours", "peer"):
        found = fit_exponent([(p["x"], p[f"{side}_ms"]) for p in curve["points"] if p[f"{side}_ms"] is not None])
        curve[f"{side}_exponent"] = None if found is None else found.exponent
        curve[f"{side}_exponent_error"] = None if found is None else found.error
        texts.append("none, too few points" if found is None else f"points {found.low:.0f}..{found.high:.0f}")
    curve["fit"] = f"log-log least squares over {texts[0]}" + ("" if texts[0] == texts[1] else f"; peer: {texts[1]}")


def measure(
    kind: str, work: Work, seconds: float, received: Callable[[Row], None], command: Sequence[str] = WORKER
) -> None:
    """Run `work` in a process, and what is left after one that dies in another; `received` gets each message.

    A process that dies costs the curve at work, which gets an ``error``. One that is there long after its time is
    ended, and what it had not measured is left out.
    """
    end = time.monotonic() + seconds
    while work and time.monotonic() < end:
        process = subprocess.Popen(
            [*command, kind], cwd=ROOT, env=environment(kind, THREADS), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        guard = threading.Timer(end - time.monotonic() + GRACE_SECONDS, process.kill)
        guard.start()
        current = work[0][0]
        try:
            with process.stdin as stdin:
                json.dump({"work": work, "seconds": end - time.monotonic()}, stdin)
            with process.stdout as lines:
                for line in lines:
                    message = json.loads(line)
                    current = message["curve"]
                    received(message)
            status = process.wait()
        finally:
            guard.cancel()
            process.kill()
        if status == 0:
            return
        late = time.monotonic() >= end + GRACE_SECONDS
        reason = "not done in its time" if late else f"its process ended with status {status}"
        received({"curve": current, "error": f"{kind}: {reason}"})
        done = [name for name, _ in work].index(current)
        work = [item for item in work[done:] if item[0] != current]


def memory_work(rows: dict[str, Row], wanted: set[str]) -> Work:
    """The points of the curves in `wanted` that were timed on both sides, the quickest first."""
    points = [(name, point) for name, row in rows.items() if name in wanted for point in row["points"]]
    timed = [(name, (p["x"], 1e-3 * (p["ours_ms"] + p["peer_ms"]))) for name, p in points
             if p["ours_ms"] is not None and p["peer_ms"] is not None]  # fmt: skip
    return sorted(timed, key=lambda item: item[1][1])


def add_message(rows: dict[str, Row], message: Row) -> None:
    """What a process says, in the row of its curve; a point that is there already is added to."""
    row = rows[message["curve"]]
    if "error" in message:
        row["error"] = message["error"]
    if "point" in message:
        known = next((point for point in row["points"] if point["x"] == message["point"]["x"]), None)
        if known is None:
            row["points"].append(message["point"])
            add_fit(row)
        else:
            known |= message["point"]


def format_curves(rows: Sequence[Row]) -> str:
    """A line a point, and one for the exponents, under each curve's name."""
    lines = []
    for row in rows:
        lines.append(f"{row['name']}, beside {row['peer']}" + (f"  FAILED: {row['error']}" if "error" in row else ""))
        for point in row["points"]:
            times = "".join(f"{_number(point[key]):>10}" for key in ("ours_ms", "peer_ms")) + " ms"
            peaks = "".join(f"{_number(point.get(key)):>9}" for key in ("ours_peak_mib", "peer_peak_mib")) + " MiB"
            skipped = point.get("skipped") or point.get("peer_skipped")
            note = f"  ({'' if 'skipped' in point else 'peer '}{skipped})" if skipped else ""
            lines.append(f"  {point['label']:>10}{times}{peaks}{note}")
        exponents = (_exponent(row, side) for side in ("ours", "peer"))
        lines.append("    exponent: ours {}, peer {}; {}".format(*exponents, row["fit"]))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _exponent(row: Row, side: str) -> str:
    value = row[f"{side}_exponent"]
    return "-" if value is None else f"{value:.2f} ± {row[f'{side}_exponent_error']:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(ScalingOptions, sys.argv[1:] if argv is None else argv, prog="python -m benchmarks.scaling")
    start = time.monotonic()
    from benchmarks.scaling_curves import curves  # needs torch, which --help does not

    chosen = [curve for curve in curves() if options.only in f"{curve.name} {curve.peer}"]
    if not chosen:
        raise ValueError(f"only: expected a part of a curve's name or peer, got {options.only!r}")
    keys = ("name", "subject", "axis", "unit", "peer")
    rows: dict[str, Row] = {curve.name: {key: getattr(curve, key) for key in keys} for curve in chosen}
    for row in rows.values():
        row |= {"threads": THREADS, "points": []}
        add_fit(row)
    machine = describe_machine()
    output = options.output or (None if options.only else RESULTS)

    def received(message: Row) -> None:
        add_message(rows, message)
        if "begun" in message:
            return
        logger.info("%s: %s", message["curve"], json.dumps(message.get("point", message.get("error"))))
        if output is not None:
            with atomic_write(output) as file:
                file.write((json.dumps({"machine": machine, "curves": list(rows.values())}, indent=2) + "\n").encode())

    total = 60 * options.minutes
    used = time.monotonic() - start
    ascending = sorted(chosen, key=lambda curve: curve.weight)  # what short curves leave goes to the long ones
    measure("time", [(curve.name, None) for curve in ascending], TIME_SHARE * total - used, received)
    for row in rows.values():
        if not row["points"] and "error" not in row:
            received({"curve": row["name"], "error": f"time: nothing was left of {options.minutes:g} minutes"})
    work = memory_work(rows, {curve.name for curve in chosen if curve.memory})
    measure("memory", work, total - (time.monotonic() - start), received)
    print(json.dumps(machine, indent=2))
    print(format_curves(list(rows.values())))
    return 1 if any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    run_command(main)
