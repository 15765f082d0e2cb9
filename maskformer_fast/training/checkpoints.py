"""Checkpoints of a run: a file with the weights (`modeling.weights`) and one with the trainer's state.

```
runs/demo/checkpoints/
  step_00002000/model.safetensors     weights; the header carries configuration and classes as JSON
  step_00002000/raw.safetensors       with solver.ema_decay: the trained weights; model.safetensors has the average
  step_00002000/trainer.pt            optimiser and counters, tensors and plain containers only
  step_00002000/checksums.json        SHA-256 of the files
  last -> step_00002000   best -> step_00001500
```

A checkpoint is written under a temporary name and renamed when complete, so a run killed at any moment leaves only
complete checkpoints behind. The two newest and the best are kept: if the newest turns out to be damaged, a run resumes
from the one before it. Checkpoints depend neither on the number of processes nor on ``solver.parallel``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from maskformer_fast.config import Config
from maskformer_fast.core.files import flush, put_aside, remove_temporary_files, sha256_of_file, write_json
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.typed import to_plain
from maskformer_fast.distributed import on_main
from maskformer_fast.modeling.weights import WEIGHTS_NAME, CheckpointError, load_weights, write_weights
from maskformer_fast.training.parallel import gather_full_state

logger = logging.getLogger(__name__)

STATE_NAME = "trainer.pt"
RAW_NAME = "raw.safetensors"
"""File of the weights that are trained, where `WEIGHTS_NAME` has their moving average."""
CHECKSUMS_NAME = "checksums.json"
KEPT_CHECKPOINTS = 2
"""Number of newest checkpoints of a run that are kept, beside the best."""
TEMPORARY_PREFIX = ".writing-"
_FOLDERS = ("checkpoints", "pictures", "tensorboard")
_FILES = ("log.jsonl", "metrics.json", "predictions.png", "checkpoints/best.json")
_LINKS = ("checkpoints/best", "checkpoints/last")


class UnreadableChecksums(CheckpointError):
    """The checksums of a checkpoint cannot be read, so that nothing is known of its other files."""


def save_checkpoint(
    folder: Path,
    network: nn.Module,
    config: Config,
    metadata: Metadata,
    step: int,
    state: Mapping[str, Any],
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``folder/step_N`` atomically, point ``last`` to it, and delete old checkpoints except the best.

    With an ``average`` of the weights, the checkpoint's weights are the average, and `RAW_NAME` has the network's.
    All ranks call it, to gather sharded tensors; rank 0 writes.

    Raises:
        OSError: on every rank: the disk is full or cannot be written. The error names the free space. Earlier
            checkpoints are untouched, and nothing of this one remains.
    """
    final = folder / f"step_{step:08d}"
    files = {WEIGHTS_NAME: gather_full_state(network.state_dict())}
    if average is not None:
        files = {WEIGHTS_NAME: gather_full_state(average), RAW_NAME: files[WEIGHTS_NAME]}
    state = gather_full_state(state)

    def write() -> OSError | None:
        try:
            _write_checkpoint(final, files, config, metadata, step, state)
        except OSError as error:
            return error
        return None

    if failure := on_main(write):
        raise failure
    return final


def _write_checkpoint(
    final: Path,
    files: Mapping[str, Mapping[str, Tensor]],  # weights by the name of their file
    config: Config,
    metadata: Metadata,
    step: int,
    state: Mapping[str, Any],
) -> None:
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY_PREFIX}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, weights in files.items():
            write_weights(temporary / name, weights, config, metadata, step)
        torch.save(dict(state), temporary / STATE_NAME)
        (temporary / CHECKSUMS_NAME).write_text(json.dumps(_checksums(temporary, files)))
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        shutil.rmtree(final, ignore_errors=True)  # incomplete, from an interrupted deletion
        os.rename(temporary, final)
        flush(folder)
        _point(folder / "last", final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # For a full disk, safetensors and torch.save raise SafetensorError and RuntimeError.
        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(f"{final}: the checkpoint could not be written ({free:.1f} MiB free), earlier ones stand: "
                          f"{error}") from error
        raise
    _prune(folder)


def mark_best(folder: Path, checkpoint: Path, score: float) -> None:
    """Point ``best`` to a checkpoint of the folder and write its score for `best_score`."""
    _point(folder / "best", checkpoint)
    write_json(folder / "best.json", {"step": checkpoint.name, "score": score})
    _prune(folder)


def best_score(folder: Path) -> float | None:
    """Score of the best checkpoint so far; ``None`` before the first validation, and if the link to it is lost."""
    if not (folder / "best").exists():
        return None
    return saved_number(folder / "best.json", "score")


def best_step(folder: Path) -> int | None:
    """Step of the best checkpoint so far; ``None`` where `best_score` is."""
    if best_score(folder) is None:
        return None
    name = (folder / "best").resolve().name.removeprefix("step_")
    return int(name) if name.isdecimal() else None


def saved_number(path: Path, key: str) -> float | None:
    """Number in a JSON file of a run; ``None`` if there is no such file or, with a warning, if it is damaged."""
    try:
        number = json.loads(path.read_bytes())[key]
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{key}: expected a finite number, got {number!r:.80}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        logger.warning("%s: not readable, taken for absent until it is written again: %r", path, error)
        return None
    return float(number)


def _prune(folder: Path) -> None:
    keep = {(folder / name).resolve() for name in ("last", "best") if (folder / name).exists()}
    for old in complete_checkpoints(folder)[:-KEPT_CHECKPOINTS]:
        if old.resolve() not in keep:
            leftover = folder / f"{TEMPORARY_PREFIX}{old.name}"  # so that a killed run leaves no incomplete checkpoint
            old.rename(leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run that were written completely, oldest first; the disk may have damaged one since."""
    named = (path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())  # no "step_8.bak"
    return sorted(path for path in named if (path / STATE_NAME).is_file())


def check_undamaged(path: Path) -> None:
    """Raise `CheckpointError` unless the files of a checkpoint are as they were written."""
    sums = path / CHECKSUMS_NAME
    try:
        expected = dict(json.loads(sums.read_bytes()))
    except FileNotFoundError:  # written by an earlier version
        _check_readable(path)
        return
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UnreadableChecksums(f"{sums}: not readable: {error}") from error
    try:
        got = _checksums(path, (WEIGHTS_NAME, RAW_NAME) if RAW_NAME in expected else (WEIGHTS_NAME,))
    except OSError as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    if not expected.keys() >= got.keys():
        raise UnreadableChecksums(f"{sums}: expected the SHA-256 of {', '.join(got)}, got {', '.join(expected)[:80]}")
    if changed := [str(path / name) for name in got if expected.get(name) != got[name]]:
        raise CheckpointError(f"{', '.join(changed)}: damaged, the SHA-256 is not the one noted in {sums}")


def _check_readable(path: Path) -> None:
    """Raise `CheckpointError` unless the files of a checkpoint can be read, whatever their checksums."""
    try:
        load_weights(path / WEIGHTS_NAME)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: it has no {WEIGHTS_NAME}") from error
    load_state(path)


def newest_undamaged(folder: Path) -> tuple[Path | None, list[Path]]:
    """Newest undamaged checkpoint of a run (``None`` if it has no checkpoints), and the damaged ones after it.

    Checkpoints whose checksums cannot be read come last: the newest of them that can be read.

    Raises:
        CheckpointError: all checkpoints are damaged; the error names what is wrong with each.
    """
    problems: dict[Path, CheckpointError] = {}
    for path in reversed(complete_checkpoints(folder)):
        try:
            check_undamaged(path)
        except CheckpointError as error:
            problems[path] = error
            logger.warning("%s; trying the checkpoint before it", error)
        else:
            return path, list(problems)
    for number, (path, problem) in enumerate(problems.items()):
        if isinstance(problem, UnreadableChecksums):
            with contextlib.suppress(CheckpointError):
                _check_readable(path)
                logger.warning("%s is taken without its checksums, as no other checkpoint is undamaged", path)
                return path, list(problems)[:number]
    if problems:
        listing = "\n  ".join(str(error) for error in problems.values())
        raise CheckpointError(f"{folder}: no checkpoint to resume from, all are damaged:\n  {listing}")
    return None, []


def set_aside(damaged: Iterable[Path], newest: Path) -> None:
    """Rename damaged checkpoints, so that their steps can be saved again, and point ``last`` to ``newest``.

    If the best checkpoint is among them, there is no best one until the next validation.
    """
    folder = newest.parent
    for path in damaged:
        put_aside(path, "a damaged checkpoint")
    _point(folder / "last", newest)
    if not (folder / "best").exists():
        for name in ("best", "best.json"):
            (folder / name).unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any]:
    """Read the trainer's state of a checkpoint: tensors and plain containers. Raises `CheckpointError`."""
    try:
        return dict(torch.load(path / STATE_NAME, map_location="cpu", weights_only=True))
    except Exception as error:
        raise CheckpointError(f"{path / STATE_NAME}: not a readable trainer state: {error}") from error


def remove_leftovers(folder: Path) -> None:
    """Delete incomplete checkpoints and links of a killed run."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_symlink():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def clean_run(folder: Path) -> None:
    """Delete what a killed process left in a run's folder, and rename what stands where the run writes other things.

    No process may be writing there.
    """
    for name in _FOLDERS:
        if (path := folder / name).exists() and not path.is_dir():
            put_aside(path, "expected a folder, got a file")
    for name in _FILES:
        if (path := folder / name).exists() and not path.is_file():
            put_aside(path, "expected a file, got a folder or a pipe")
    for name in _LINKS:
        if (path := folder / name).exists() and not path.is_symlink():
            put_aside(path, "expected a symbolic link, got a file or folder")
    remove_leftovers(folder / "checkpoints")
    for part in (folder, folder / "checkpoints", folder / "pictures"):
        remove_temporary_files(part)


def config_differences(old: Config, new: Config, sections: Iterable[str]) -> list[str]:
    """Differing settings of the given sections -> ``["solver.lr: 0.1 -> 0.2", ...]``."""
    differences: list[str] = []

    def compare(prefix: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a:
                compare(f"{prefix}.{key}", a[key], b[key])
        elif a != b:
            differences.append(f"{prefix}: {a} -> {b}")

    before, after = to_plain(old), to_plain(new)
    for section in sections:
        compare(section, before[section], after[section])
    return differences


def check_same_classes(trained: Metadata, now: Metadata, checkpoint: Path) -> None:
    """Raise ``ValueError`` unless a data set has the classes of a run's training, by name and in their order."""
    pairs = list(zip_longest(trained.class_names, now.class_names, fillvalue="(none)"))
    different = [f"{index}: {a} / {b}" for index, (a, b) in enumerate(pairs) if a != b]
    if different:
        raise ValueError(
            f"resume: expected the {trained.num_classes} classes of {checkpoint} in their order, got "
            f"{now.num_classes}; {len(different)} differ (training / data set now: {'; '.join(different[:5])}). "
            "Give the data set its earlier classes, or start a new run from these weights: --output ANOTHER "
            f"--model.weights {checkpoint}, which keeps the classes of the same names"
        )


def _checksums(path: Path, weights: Iterable[str]) -> dict[str, str]:
    """SHA-256 by file name of a checkpoint's files, of which ``weights`` are those with weights."""
    return {name: sha256_of_file(path / name) for name in (*weights, STATE_NAME)}


def _point(link: Path, target: Path) -> None:
    """Make a symbolic link to a checkpoint of the same folder, atomically."""
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)
