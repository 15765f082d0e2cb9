"""The paper's claim, measured again: what mask classification gains over per-pixel classification by number of classes.

    python -m benchmarks.class_count [--minutes 60] [--classes 19 150 847] [--output FILE]

MaskFormer and the per-pixel baseline+ train on the synthetic scenes with the same small backbone, pixel decoder,
transformer decoder, data, steps and schedule; mIoU of both and the difference go to benchmarks/results/class_count.json
and a table. How many steps fit the time is found by timing the first ones, and is the same for all runs.
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
from typing import Any

from benchmarks.harness import ROOT
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import check
from maskformer_fast.data.shapes import MAX_STUFF
from maskformer_fast.files import atomic_write

RESULTS = Path(__file__).parent / "results" / "class_count.json"
MODELS = ("maskformer", "per_pixel_plus")
TRIAL_STEPS = 20

logger = logging.getLogger("benchmarks.class_count")


@dataclass(frozen=True)
class ClassCountOptions:
    """Train MaskFormer and the per-pixel baseline+ on scenes of more and more classes; compare their mIoU."""

    minutes: float = 60.0
    """Time for all runs."""
    classes: tuple[int, ...] = (19, 150, 847)
    output: Path = RESULTS
    """JSON file."""

    def __post_init__(self) -> None:
        check(self.minutes > 0, "minutes", "> 0", self.minutes)
        check(len(self.classes) > 0 and min(self.classes) >= 3, "classes", "numbers of at least 3", self.classes)


def train(folder: Path, model: str, classes: int, steps: int) -> tuple[float, float]:
    """One run of the demo's recipe at 64x64 with one supervised layer -> mIoU, seconds.

    The baseline scores every class at every pixel, which takes most of the time.
    """
    stuff = min(MAX_STUFF, max(1, classes * 2 // 5))
    command = [
        sys.executable, "-m", "maskformer_fast.train", "--config", "demo", "--output", str(folder),
        "--metrics", "semantic", "--data.task", "semantic", "--model.type", model, "--loss.no-deep-supervision",
        "--data.shapes.num-things", str(classes - stuff), "--data.shapes.num-stuff", str(stuff),
        "--data.shapes.size", "64", "64", "--data.shapes.val-images", "512", "--solver.max-steps", str(steps),
        "--log.pictures", "0", "--log.checkpoint-every", "1000000",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics["semantic"]["miou"], seconds


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(ClassCountOptions, arguments, prog="python -m benchmarks.class_count")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        fixed, slow = 0.0, 0.0  # seconds of all runs beside their steps, seconds of a step of each
        for classes in options.classes:
            for model in MODELS:
                (_, short), (_, longer) = (
                    train(folder / f"trial_{steps}_{model}_{classes}", model, classes, steps)
                    for steps in (1, TRIAL_STEPS)
                )
                slow += max(0.0, longer - short) / (TRIAL_STEPS - 1)
                fixed += short
        left = 60 * options.minutes - (time.perf_counter() - start) - fixed
        steps = int(left / slow)
        check(steps > TRIAL_STEPS, "minutes", f"more than {TRIAL_STEPS} steps take", options.minutes)
        logger.info("%d steps each", steps)
        rows: list[dict[str, Any]] = []
        for classes in options.classes:
            row: dict[str, Any] = {"classes": classes, "steps": steps}
            for model in MODELS:
                row[model], row[f"{model}_seconds"] = train(folder / f"{model}_{classes}", model, classes, steps)
            row["gain"] = row["maskformer"] - row["per_pixel_plus"]
            rows.append(row)
            logger.info("%s", json.dumps(row))
            with atomic_write(options.output) as file:
                file.write((json.dumps({"rows": rows}, indent=2) + "\n").encode())
    print(f"{'classes':>8} {'MaskFormer':>11} {'per-pixel+':>11} {'gain':>7}   mIoU after {steps} steps each")
    for row in rows:
        print(f"{row['classes']:8d} {row['maskformer']:11.4f} {row['per_pixel_plus']:11.4f} {row['gain']:+7.4f}")
    return 0


if __name__ == "__main__":
    run_command(main)
