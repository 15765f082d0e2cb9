"""``python -m maskformer_fast.train``: train a recipe; with no argument, the demo."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from maskformer_fast.cli import INTERRUPTED_STATUS, Recipe, parse_command, run_command
from maskformer_fast.config import Config
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import check_no_windows_path
from maskformer_fast.distributed import RankError, is_main, on_main, process_group, restarted
from maskformer_fast.evaluation import format_table
from maskformer_fast.modeling.weights import CheckpointError, load_weights
from maskformer_fast.recipes import load_recipe, save_config
from maskformer_fast.training.batch_size import with_batch_size
from maskformer_fast.training.checkpoints import clean_run, complete_checkpoints
from maskformer_fast.training.interruptions import OutOfMemory, WorkerLost
from maskformer_fast.training.skipped_steps import TrainingDiverged
from maskformer_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Train a recipe and measure it; with no argument, the demo on synthetic scenes."""

    config: Recipe
    resume: bool = False
    """Continue the run in ``output`` exactly from its last checkpoint, by default with its own recipe."""
    profile: bool = False
    """Write a trace of a few steps by PyTorch's profiler to ``profile/`` in the run's folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[str]:
    """Lock a run's folder against other processes -> `launch_id` of the process that locked it before, else ``""``.

    The lock is on a file beside the folder itself, whatever links ``folder`` names it by. It belongs to this process
    alone, since loader processes do not inherit locks of `lockf` as they would those of `flock`. The kernel releases it
    however the process ends.

    Raises:
        ValueError: another process is training there.
    """
    real = Path(os.path.realpath(folder))
    real.parent.mkdir(parents=True, exist_ok=True)
    name = f".{real.name}.lock"
    if len(os.fsencode(name)) > 255:  # more than file systems take
        name = f".{hashlib.sha256(os.fsencode(name)).hexdigest()}.lock"
    with real.with_name(name).open("a+", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(f"output: expected a folder no other run is using, got {folder}") from None
        file.seek(0)
        previous = file.read()
        file.truncate(0)
        file.write(launch_id())
        file.flush()
        yield previous


def launch_id() -> str:
    """Value of torchrun's ``--rdzv-id`` for this launch; empty without one.

    It stays the same when torchrun restarts the processes, even if a node joined, which does not count as a restart.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def check_paths(config: Config) -> None:
    """Check the forms of the paths that a run reads and writes.

    Raises:
        ValueError: ``output`` is a file, below a file, or the root of the file system, or begins with ``~``; or a path
            is one of Windows.
    """
    model = config.model
    check_no_windows_path({"output": config.output, "data.root": config.data.root, "model.weights": model.weights,
                           "model.backbone.weights": model.backbone.weights})
    folder = Path(os.path.realpath(config.output))
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    check(bool(folder.name) and nearest.is_dir(), "output", "a folder below /, which may be new, and below no file",
          config.output)
    check(not config.output.startswith("~") or folder.is_dir(), "output",
          f"a path without ~, which the shell alone knows: {os.path.expanduser(config.output)}", config.output)


def move_aside(folder: Path, inputs: Iterable[Path] = ()) -> None:
    """Rename the folder of an earlier run, so that a new run in the folder overwrites nothing.

    A link to the folder leads to the new run's, which is made in the place of the old one.

    Args:
        inputs: files and folders that the new run reads; none may be in the folder.

    Raises:
        ValueError: the folder cannot be renamed: it has inputs or the current folder in it, or the system refuses.
    """
    named = folder
    folder = Path(os.path.realpath(folder))
    written_by_runs = ("log.jsonl", "checkpoints")
    if not (folder / "config.yaml").exists() or not any((folder / name).exists() for name in written_by_runs):
        return  # not a run: perhaps a folder with the user's own recipe
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    way_out = "continue the run there with --resume, or name another --output for a new one"
    for path in (Path.cwd(), *inputs):
        real = Path(os.path.realpath(path))
        if folder in (real, *real.parents):
            raise ValueError(f"output: expected a folder that can be renamed, as it holds a run already, got {named} "
                             f"with {path} in it; {way_out}")
    clean_run(folder)
    try:
        folder.rename(aside)
    except OSError as error:  # as for the root of a mounted disk
        raise ValueError(f"output: {named} holds a run already and cannot be renamed to {aside} ({error.strerror}); "
                         f"{way_out}") from error
    folder.mkdir()
    logger.info("%s held a run already: moved to %s (--resume would have continued it)", named, aside)


def with_own_recipe(argv: list[str]) -> list[str]:
    """Add the run's own ``config.yaml`` as ``--config`` to arguments with ``--resume`` but without ``--config``."""
    if "--resume" not in argv or any(argument.split("=")[0] == "--config" for argument in argv):
        return argv
    outputs = [b for a, b in pairwise([*argv, ""]) if a == "--output"]
    outputs += [argument.partition("=")[2] for argument in argv if argument.startswith("--output=")]
    folder = Path(outputs[-1] if outputs else load_recipe("demo").output)
    own = folder / "config.yaml"
    _restore_lost_recipe(own)
    return ["--config", str(own), *argv] if own.exists() else argv


def _restore_lost_recipe(own: Path) -> None:
    """Write a run's ``config.yaml`` anew from its newest checkpoint if it is lost, or empty or zeros after a power cut.

    Other errors in it may be those of an editor, and are reported.
    """
    if own.exists() and own.read_bytes().strip(b"\0 \n"):
        return
    for checkpoint in reversed(complete_checkpoints(own.parent / "checkpoints")):
        with suppress(CheckpointError, FileNotFoundError):
            config = load_weights(checkpoint).config
            save_config(replace(config, output=str(own.parent)), own)
            logger.warning("%s: lost or empty, and written anew from %s", own, checkpoint)
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = with_own_recipe(list(sys.argv[1:] if argv is None else argv))
    options = parse_command(TrainOptions, argv, prog="python -m maskformer_fast.train")
    with process_group(options.config.device):
        return train(options.config, options.resume, options.profile)


def train(config: Config, resume: bool, profile: bool) -> int:
    """Train and measure; every rank of a process group calls it. Returns the exit status."""
    backbone = config.model.backbone
    if backbone.norm == "frozen" and not (backbone.weights or config.model.weights):
        logger.warning("the backbone's BatchNorm is frozen but it has no weights: set --model.backbone.weights, or "
                       "--model.backbone.norm batch to train from nothing")
    check_paths(config)
    folder = Path(config.output)
    with ExitStack() as locks:
        previous = on_main(lambda: locks.enter_context(run_lock(folder)))
        resume = resume or restarted() or previous == launch_id() != ""
        config = on_main(lambda: with_batch_size(config, resume))
        trainer = Trainer(config, resume, profile)  # writes no files, so bad input leaves an earlier run in its place
        if is_main():
            if not resume:
                move_aside(folder, [Path(config.data.root)] if config.data.root else [])
            save_config(config, folder / "config.yaml")
        metrics = trainer.run()
    if trainer.stopped:  # status 0 after SIGTERM: for a scheduler, the job has not failed
        return INTERRUPTED_STATUS if trainer.signals.received == signal.SIGINT else 0
    if is_main():
        for task in trainer.tasks:
            print(format_table(task, metrics[task]))
        print(f"metrics: {folder / 'metrics.json'}   pictures: {folder / 'predictions.png'}")
    return 0


if __name__ == "__main__":
    run_command(main, TrainingDiverged, OutOfMemory, WorkerLost, RankError)
