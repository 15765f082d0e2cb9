"""``python -m maskformer_fast.evaluate CHECKPOINT``: measure a checkpoint on a data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from maskformer_fast.checkpoint import load_weights
from maskformer_fast.cli import leading_path, parse, run_command
from maskformer_fast.config import DataConfig, Task, TestConfig
from maskformer_fast.data import build_dataset
from maskformer_fast.evaluation import format_table
from maskformer_fast.files import atomic_write
from maskformer_fast.formats import write_json
from maskformer_fast.predictor import load
from maskformer_fast.validation import measure


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a checkpoint: mIoU, PQ or AP. Data and test settings default to those the checkpoint was trained with."""

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder or weights file."""
    task: tuple[Task, ...] = ()
    """What to measure; default: the data set's own task."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """JSON file for the metrics; default: metrics on the screen only."""
    picture: str | None = None
    """PNG file for a grid of the first images: image, truth, results."""
    limit: int | None = None
    """Measure only the first so many images."""
    device: str = "auto"
    """``auto`` takes the GPU where there is one."""
    data: DataConfig = field(default_factory=DataConfig)
    test: TestConfig = field(default_factory=TestConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    path = leading_path(argv)
    config = load_weights(path).config if path else None
    options = parse(
        EvaluateOptions,
        argv,
        prog="python -m maskformer_fast.evaluate",
        default=EvaluateOptions(tyro.MISSING, data=config.data, test=config.test) if config else None,
    )
    predictor = load(options.checkpoint, options.device, test=options.test)
    dataset = build_dataset(options.data, "val")
    expected, got = predictor.metadata.class_names, dataset.metadata.class_names
    if len(expected) != len(got):
        raise ValueError(f"data: expected the checkpoint's {len(expected)} classes, got {len(got)} in the data set")
    tasks = options.task or (dataset.task,)
    for task in tasks:
        predictor.check_task(task)
    metrics, grid = measure(
        predictor,
        dataset,
        tasks,
        workers=options.data.workers,
        skip_broken=options.data.skip_broken,
        pictures=4 if options.picture else 0,
        limit=options.limit,
    )
    for task in tasks:
        print(format_table(task, metrics[task]))
    if options.output:
        write_json(Path(options.output), metrics)
    if options.picture and grid is not None:
        with atomic_write(options.picture) as file:
            Image.fromarray(grid).save(file, format="PNG")
    return 0


if __name__ == "__main__":
    run_command(main)
