"""Gain of mask classification over per-pixel classification by number of classes: the paper's claim, measured again.

    python -m benchmarks.studies.class_count [--minutes 60] [--classes 19 150 847] [--output FILE]

MaskFormer and the per-pixel baseline+ train on the synthetic scenes with the same small backbone, pixel decoder,
transformer decoder, data, steps and schedule; mIoU of both and the difference go to benchmarks/output/class_count.json
and a table. Each number of classes gets the same time; how many steps fit in is found by timing the first ones, and is
the same for both models.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.runner import ROOT
from benchmarks.studies import OUTPUT
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import write_json
from maskformer_fast.data.datasets.shapes import MAX_STUFF

MODELS = ("maskformer", "per_pixel_plus")
TRIAL_STEPS = 40
"""Steps of the runs that tell how long a step takes."""
LOG_EVERY = 20
"""Steps between two lines of the log."""

logger = logging.getLogger("benchmarks.studies.class_count")


@dataclass(frozen=True)
class ClassCountOptions:
    """Train MaskFormer and the per-pixel baseline+ on scenes of more and more classes; compare their mIoU."""

    minutes: float = 60.0
    """Time for all runs."""
    classes: tuple[int, ...] = (19, 150, 847)
    output: Path = OUTPUT / "class_count.json"
    """JSON file."""

    def __post_init__(self) -> None:
        check(self.minutes > 0, "minutes", "> 0", self.minutes)
        check(len(self.classes) > 0 and min(self.classes) >= 3, "classes", "numbers of at least 3", self.classes)


class Run(NamedTuple):
    """Result of a training run."""

    miou: float
    seconds: float  # of the complete run
    step_seconds: float  # of the last steps


def train(folder: Path, model: str, classes: int, steps: int, images: int = 512) -> Run:
    """One run of the demo's recipe with other classes.

    The baseline scores every class at every pixel, which takes most of the time: hence the small images.

    Raises:
        RuntimeError: training failed; with the end of its error output.
    """
    stuff = min(MAX_STUFF, max(1, classes * 2 // 5))
    command = [
        sys.executable, "-m", "maskformer_fast.train", "--config", "demo", "--output", str(folder),
        "--metrics", "semantic", "--data.task", "semantic", "--model.type", model,
        "--data.shapes.num-things", str(classes - stuff), "--data.shapes.num-stuff", str(stuff),
        "--data.shapes.val-images", str(images), "--solver.max-steps", str(steps),
        "--log.every", str(LOG_EVERY), "--log.pictures", "0", "--log.checkpoint-every", "1000000",
    ]  # fmt: skip
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{model}, {classes} classes: training failed: {run.stderr.strip()[-500:]}")
    seconds = time.perf_counter() - start
    miou = json.loads((folder / "metrics.json").read_text())["semantic"]["miou"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return Run(miou, seconds, [line["step_seconds"] for line in lines if "step_seconds" in line][-1])


def affordable_steps(folder: Path, classes: int, seconds: float) -> int:
    """Steps that both models can do in so many seconds together, their start and their evaluation included."""
    start = time.perf_counter()
    trials = [train(folder / f"trial_{model}_{classes}", model, classes, TRIAL_STEPS) for model in MODELS]
    step = sum(trial.step_seconds for trial in trials)
    fixed = sum(trial.seconds - TRIAL_STEPS * trial.step_seconds for trial in trials)
    steps = int((seconds - (time.perf_counter() - start) - fixed) / step)
    check(steps > TRIAL_STEPS, "minutes", f"more, for {TRIAL_STEPS} steps of {classes} classes", seconds / 60)
    return steps


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(ClassCountOptions, arguments, prog="python -m benchmarks.studies.class_count")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for classes in options.classes:
            steps = affordable_steps(Path(name), classes, 60 * options.minutes / len(options.classes))
            row: dict[str, Any] = {"classes": classes, "steps": steps}
            for model in MODELS:
                run = train(Path(name) / f"{model}_{classes}", model, classes, steps)
                row[model], row[f"{model}_seconds"] = run.miou, run.seconds
            row["gain"] = row["maskformer"] - row["per_pixel_plus"]
            rows.append(row)
            logger.info("%s", json.dumps(row))
            write_json(options.output, {"rows": rows})
    print(f"{'classes':>8} {'steps':>6} {'MaskFormer':>11} {'per-pixel+':>11} {'gain':>7}   (mIoU)")
    for row in rows:
        numbers = f"{row['maskformer']:11.4f} {row['per_pixel_plus']:11.4f} {row['gain']:+7.4f}"
        print(f"{row['classes']:8d} {row['steps']:6d} {numbers}")
    return 0


if __name__ == "__main__":
    run_command(main)
