"""Growth of cost with classes, queries, targets, pixels and images, ours beside its peers, with fitted exponents.

    python -m benchmarks.studies.scaling [--minutes 4] [--only TEXT] [--output FILE]

Each point of a curve is a case of `benchmarks.harness`; points that find no time say so. Results go to
benchmarks/output/scaling.json after every figure, so that an interrupted run keeps what it has;
``python -m benchmarks.plots`` draws them.

Predictions are like those of trained networks unless a name says random: a fifth of the queries are sure of a class.
That share stays where queries grow; a network that finds no more objects with more queries costs us less. Images fill
their padded input, and outputs have four times the mask logits' sides.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import assignment, matching_cost, network, segments, semantic
from benchmarks.harness.case import Case, Row, Work
from benchmarks.harness.machine import describe
from benchmarks.harness.report import build_row, number
from benchmarks.harness.runner import Plan, Results, plan, run
from benchmarks.studies import OUTPUT
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import write_json

HUGGINGFACE, OFFICIAL, SCIPY = "Hugging Face", "official formula, eager PyTorch", "SciPy"
AXES = ("classes", "queries", "targets", "pixels", "batch")
MODULE = "benchmarks.studies.scaling"
THREADS = 2
FIRST_POINTS = 3
"""Points of each curve that are measured before the larger ones of any: a fit needs so many."""
POINT_KEYS = ("ours_ms", "peer_ms", "ours_quartiles_ms", "peer_quartiles_ms", "rounds", "ours_peak_mib",
              "peer_peak_mib", "error", "not_run")  # fmt: skip


@dataclass(frozen=True)
class ScalingOptions:
    """Measure how cost grows with classes, queries, targets, pixels and batch on this machine's CPU, beside peers.

    The status is 1 where a point could not be measured.
    """

    minutes: float = 4.0
    """Time for all curves."""
    only: str = ""
    """Measure the curves with this in their name, or the points with it in "CURVE: POINT, PEER"."""
    output: Path = OUTPUT / "scaling.json"
    """JSON file."""

    def __post_init__(self) -> None:
        check(self.minutes > 0, "minutes", "> 0", self.minutes)


@dataclass(frozen=True)
class Curve:
    """One operation whose cost is followed while one number grows."""

    name: str  # unique
    axis: str  # one of `AXES`
    unit: str  # of the points on that axis
    peer: str
    implementation: str  # the peer's name in `Work.peers`
    points: dict[int, str]  # ascending, with labels
    setup: Callable[[torch.device, int], Work]  # at one point
    memory: bool = False  # whether peaks are measured too

    def case_name(self, x: int) -> str:
        return f"{self.name}: {self.points[x]}"

    def cases(self) -> list[Case]:
        return [
            Case(self.case_name(x), self.implementation, None, partial(at_point, self.setup, x), threads=THREADS,
                 rank=int(index >= FIRST_POINTS), memory=self.memory)
            for index, x in enumerate(self.points)
        ]  # fmt: skip


def at_point(setup: Callable[[torch.device, int], Work], x: int, device: torch.device) -> Work:
    return setup(device, x)


def curves() -> list[Curve]:
    """All curves, the most telling first."""
    ks, few_ks, qs, batches = (
        labelled(*values)
        for values in ((19, 50, 150, 400, 847), (19, 150, 847), (25, 50, 100, 200, 400), (1, 2, 4, 8))
    )
    sizes = {h * w: f"{h}x{w}" for h, w in ((256, 256), (512, 512), (512, 1024), (1024, 1024), (1024, 2048))}
    squares = {side * side: f"{side}x{side}" for side in (256, 384, 512, 640, 768)}
    pixels, transformers = "pixels of the result", semantic.HUGGINGFACE
    matcher, labels = matching_cost.MATCHER_BY_LAYER, "semantic inference"
    return [
        Curve("whole image, R50, by classes", "classes", "classes", HUGGINGFACE, HUGGINGFACE, few_ks,
              whole_image, True),
        Curve("network R50 by resolution", "pixels", "pixels of the image", HUGGINGFACE, network.HUGGINGFACE, squares,
              lambda device, n: network_at(device, 1, parse_size(squares[n])), True),
        Curve("network R50 by batch, 384x384", "batch", "images", HUGGINGFACE, network.HUGGINGFACE, labelled(1, 2, 4),
              lambda device, b: network_at(device, b, (384, 384))),
        Curve(f"{labels} by classes", "classes", "classes", HUGGINGFACE, transformers, ks,
              lambda device, k: labels_at(device, classes=k), True),
        Curve(f"{labels} by classes, official", "classes", "classes", OFFICIAL, semantic.OFFICIAL, few_ks,
              lambda device, k: labels_at(device, classes=k), True),
        Curve(f"{labels} by classes, random", "classes", "classes", HUGGINGFACE, transformers, few_ks,
              lambda device, k: labels_at(device, kind="random", classes=k)),
        Curve(f"{labels} by resolution", "pixels", pixels, HUGGINGFACE, transformers, sizes,
              lambda device, n: labels_at(device, output=parse_size(sizes[n])), True),
        Curve("panoptic inference by resolution", "pixels", pixels, HUGGINGFACE, segments.HUGGINGFACE, sizes,
              lambda device, n: panoptic_at(device, output=parse_size(sizes[n])), True),
        Curve(f"{labels} by batch", "batch", "images", HUGGINGFACE, transformers, batches,
              lambda device, b: labels_at(device, batch=b)),
        Curve("matching by batch", "batch", "images", HUGGINGFACE, matcher, batches,
              lambda device, b: matching_at(device, batch=b), True),
        Curve(f"{labels} by queries", "queries", "queries", HUGGINGFACE, transformers, qs,
              lambda device, q: labels_at(device, queries=q)),
        Curve("panoptic inference by queries", "queries", "queries", HUGGINGFACE, segments.HUGGINGFACE, qs,
              lambda device, q: panoptic_at(device, queries=q)),
        Curve("matching by queries", "queries", "queries", HUGGINGFACE, matcher, qs,
              lambda device, q: matching_at(device, queries=q)),
        Curve("assignment, queries = targets", "queries", "queries", SCIPY, assignment.SCIPY,
              labelled(50, 100, 200, 400, 800),
              lambda device, q: assignment.setup(device, "matcher-like", (1, q, q))),
        Curve("matching by targets", "targets", "targets an image", HUGGINGFACE, matcher, labelled(5, 10, 20, 40, 80),
              lambda device, t: matching_at(device, count=t)),
    ]  # fmt: skip


def labelled(*points: int) -> dict[int, str]:
    return {x: str(x) for x in points}


def parse_size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def labels_at(
    device: torch.device, kind: str = "peaky", classes: int = 150, output: tuple[int, int] = (512, 512), **options: Any
) -> Work:
    return semantic.setup(device, kind, classes, (output[0] // 4, output[1] // 4), **options)


def panoptic_at(device: torch.device, queries: int = 100, output: tuple[int, int] = (512, 512)) -> Work:
    """A quarter of the queries is kept."""
    return segments.logits_setup(device, max(2, queries // 4), queries, (output[0] // 4, output[1] // 4), output)


def matching_at(device: torch.device, batch: int = 2, **options: Any) -> Work:
    """Cost and assignment of one decoder layer at 512x512, from embeddings; the peer's matcher after the product."""
    return matching_cost.matching_from_embeddings(device, layers=1, batch=batch, cells=16, **options)


def network_at(device: torch.device, batch: int, size: tuple[int, int]) -> Work:
    """Images to class and mask logits."""
    return network.setup(device, network.model_of("resnet50"), "network", "float32", size, batch)


def whole_image(device: torch.device, classes: int) -> Work:
    """Network and labels of a 512x512 image. Weights are random, so that labels are of trained-like stand-ins.

    The networks have 150 classes: the class head is no measurable part of either.
    """
    run, label = network_at(device, 1, (512, 512)), labels_at(device, classes=classes)
    inputs = label.draw(0)
    run_theirs, label_theirs = run.peers[network.HUGGINGFACE], label.peers[semantic.HUGGINGFACE]
    return Work(
        lambda: (run.ours(), label.ours(*inputs)), {HUGGINGFACE: lambda: (run_theirs(), label_theirs(*inputs))}
    )


def cases(device: str) -> list[Case]:
    """The points of all curves; on the CPU only."""
    return [case for curve in curves() for case in curve.cases()] if device == "cpu" else []


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


def fits(points: Sequence[Row]) -> Row:
    """The exponents of both implementations, with their errors and points; None where there are too few."""
    row: Row = {}
    texts = []
    for who in ("ours", "peer"):
        fit = fit_exponent([(p["x"], p[f"{who}_ms"]) for p in points if p[f"{who}_ms"] is not None])
        row[f"{who}_exponent"] = None if fit is None else fit.exponent
        row[f"{who}_exponent_error"] = None if fit is None else fit.error
        texts.append("none, too few points" if fit is None else f"points {fit.low:.0f}..{fit.high:.0f}")
    peers = "" if texts[0] == texts[1] else f"; peer: {texts[1]}"
    return {**row, "fit": f"log-log least squares over {texts[0]}{peers}"}


def curve_row(curve: Curve, todo: Plan, results: Results, machine: Row) -> Row:
    """A curve in the results' file."""
    points = []
    for x, label in curve.points.items():
        if curve.case_name(x) not in todo.cases:
            continue
        row = build_row("scaling", todo.cases[curve.case_name(x)][1], results, machine)
        points.append({"x": x, "label": label} | {key: row[key] for key in POINT_KEYS if key in row})
    about = {key: getattr(curve, key) for key in ("name", "axis", "unit", "peer")}
    return {**about, "threads": THREADS, "points": points, **fits(points)}


def format_curves(rows: Sequence[Row]) -> str:
    """A line a point, and one for the exponents, under each curve's name."""
    lines = []
    for row in rows:
        lines.append(f"{row['name']}, beside {row['peer']}")
        for point in row["points"]:
            times, peaks = (" ".join(f"{number(point[f'{who}_{key}']):>9}" for who in ("ours", "peer"))
                            for key in ("ms", "peak_mib"))  # fmt: skip
            note = "; ".join(point[key] for key in ("error", "not_run") if key in point)
            lines.append(f"  {point['label']:>10} {times} ms {peaks} MiB  {note}".rstrip())
        exponents = (
            "-" if row[f"{who}_exponent"] is None
            else f"{row[f'{who}_exponent']:.2f} ± {row[f'{who}_exponent_error']:.2f}"
            for who in ("ours", "peer")
        )  # fmt: skip
        lines.append("    exponent: ours {}, peer {}; {}".format(*exponents, row["fit"]))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(ScalingOptions, arguments, prog="python -m benchmarks.studies.scaling")
    todo = plan([MODULE], "cpu", options.only)
    if not todo.cases:
        raise ValueError(f"only: expected a part of a curve's name, point or peer, got {options.only!r}")
    chosen = [curve for curve in curves() if any(curve.case_name(x) in todo.cases for x in curve.points)]
    machine = describe("cpu")
    rows: list[Row] = []

    def changed(results: Results) -> None:
        rows[:] = [curve_row(curve, todo, results, machine) for curve in chosen]
        write_json(options.output, {"machine": machine, "curves": rows})

    run(todo, time.monotonic() + 60 * options.minutes, changed)
    print(json.dumps(machine, indent=2))
    print(format_curves(rows))
    return 1 if any("error" in point for row in rows for point in row["points"]) else 0


if __name__ == "__main__":
    run_command(main)
