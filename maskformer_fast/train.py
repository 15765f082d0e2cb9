"""``python -m maskformer_fast.train``: train a recipe; with no argument, the demo."""

from __future__ import annotations

import fcntl
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maskformer_fast.cli import run_command
from maskformer_fast.evaluation import format_table
from maskformer_fast.recipes import Recipe, parse_command, save_config
from maskformer_fast.trainer import Trainer, TrainingDiverged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Train a recipe and measure it; with no argument, the demo on synthetic scenes."""

    config: Recipe
    resume: bool = False
    """Continue the run in ``output`` exactly where its last checkpoint stands."""


@contextmanager
def run_folder(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder against a second process; a former run in it is moved aside unless it is resumed.

    Raises:
        ValueError: another process is training there.
    """
    if not resume and (folder / "config.yaml").exists():
        with _lock(folder):
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(aside)
        logger.info("%s held a run already: moved to %s (--resume would have continued it)", folder, aside)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it however the process ends
        except BlockingIOError:
            raise ValueError(f"output: expected a folder no other run is using, got {folder}") from None
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_command(TrainOptions, argv, prog="python -m maskformer_fast.train")
    config = options.config
    backbone = config.model.backbone
    if backbone.norm == "frozen" and not backbone.weights:
        logger.warning("the backbone's BatchNorm is frozen but it has no weights: set --model.backbone.weights, or "
                       "--model.backbone.norm batch to train from nothing")
    folder = Path(config.output)
    with run_folder(folder, options.resume):
        trainer = Trainer(config, options.resume)
        save_config(config, folder / "config.yaml")
        metrics = trainer.run()
    for task in trainer.tasks:
        print(format_table(task, metrics[task]))
    print(f"metrics: {folder / 'metrics.json'}   pictures: {folder / 'predictions.png'}")
    return 0


if __name__ == "__main__":
    run_command(main, TrainingDiverged)
