"""Checkpoints: one self-describing safetensors file for the weights, one file for the trainer's state.

```
runs/demo/checkpoints/
  step_00002000/model.safetensors     weights; the header carries configuration and classes as JSON
  step_00002000/trainer.pt            optimiser and counters, tensors and plain containers only
  step_00002000/checksums.json        SHA-256 of both
  last -> step_00002000   best -> step_00001500
```

A checkpoint is written under a temporary name and renamed when complete, so a run killed at any moment leaves
only whole checkpoints behind. The two newest and the best are kept: where the newest turns out to be damaged, a run
resumes from the one before. Checkpoints are the same however many processes wrote them, and by `solver.parallel`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskformer_fast.config import Config, to_dict
from maskformer_fast.distributed import on_main, shared_out, whole
from maskformer_fast.formats import write_json
from maskformer_fast.recipes import from_dict
from maskformer_fast.structures import Metadata

logger = logging.getLogger(__name__)

FORMAT = "maskformer_fast/1"
WEIGHTS_NAME = "model.safetensors"
STATE_NAME = "trainer.pt"
CHECKSUMS_NAME = "checksums.json"
KEPT = 2
"""Newest checkpoints of a run that are kept, beside the best."""
TEMPORARY_PREFIX = ".writing-"
_COUNTER = "num_batches_tracked"
_CLASS_ROWS = ("predictor.class_embed.", "predictor.weight", "predictor.bias")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, with its path and the reason."""


class Checkpoint(NamedTuple):
    """What a weights file says."""

    config: Config
    metadata: Metadata
    weights: dict[str, Tensor]
    step: int


def weights_file(path: str | Path) -> Path:
    """The weights file of a checkpoint folder, of a run's folder (its best, else last one), or the file itself."""
    path = Path(path)
    candidates = (
        [path]
        if path.is_file()
        else [path / part / WEIGHTS_NAME for part in (".", "checkpoints/best", "checkpoints/last", "best", "last")]
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"checkpoint: expected a weights file, a checkpoint folder or a run folder, got {path} "
                            f"(looked for {tried})")


def save_weights(path: str | Path, network: nn.Module, config: Config, metadata: Metadata, step: int) -> None:
    """Write the weights with what is needed to use them. Not atomic by itself: see `save_checkpoint`."""
    _write_weights(path, network.state_dict(), config, metadata, step)


def _write_weights(
    path: str | Path, weights: Mapping[str, Tensor], config: Config, metadata: Metadata, step: int
) -> None:
    header = {
        "format": FORMAT,
        "config": json.dumps(to_dict(config)),
        "metadata": json.dumps(dataclasses.asdict(metadata)),
        "step": str(step),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, str(path), metadata=header)


def load_weights(path: str | Path) -> Checkpoint:
    """Read a weights file. Raises `CheckpointError` for a file that is damaged or of another format."""
    file = weights_file(path)
    try:
        with safe_open(str(file), framework="pt") as reader:
            header = reader.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{file}: expected a checkpoint of format {FORMAT}, got {header.get('format')}")
            weights = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
        fields = json.loads(header["metadata"])
        metadata = Metadata(
            name=fields["name"],
            class_names=tuple(fields["class_names"]),
            is_thing=tuple(fields["is_thing"]),
            category_ids=tuple(fields["category_ids"]),
            colors=tuple((r, g, b) for r, g, b in fields["colors"]),
        )
        return Checkpoint(from_dict(json.loads(header["config"])), metadata, weights, int(header["step"]))
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a readable checkpoint: {error}") from error


def load_into(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights strictly; the error lists every missing, unknown and misshapen tensor."""
    own = module.state_dict()
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"unknown: {name}" for name in weights if name not in own]
    problems += [
        f"shape: {name}: expected {tuple(own[name].shape)}, got {tuple(weights[name].shape)}"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit the network:\n  " + "\n  ".join(problems))
    module.load_state_dict({name: shared_out(tensor, own[name]) for name, tensor in weights.items()})


def load_backbone(network: nn.Module, path: str | Path) -> None:
    """Load pretrained backbone weights: a backbone's own file, or the ``backbone.`` part of a whole checkpoint."""
    file = weights_file(path)
    try:
        with safe_open(str(file), framework="pt") as reader:
            weights = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    inner = {name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")}
    backbone = network.get_submodule("backbone")
    load_into(backbone, _with_own_counters(backbone, inner or weights), file)


def load_initial(network: nn.Module, path: str | Path) -> list[str]:
    """Load a whole checkpoint to start training from -> names of the tensors that keep their random values.

    Those are the ones with a row for each class, where the checkpoint has another number of classes. Everything else
    must fit, as in `load_into`. Raises `CheckpointError` and ``FileNotFoundError``.
    """
    weights = _with_own_counters(network, load_weights(path).weights)
    own = network.state_dict()
    fresh = [
        name
        for name in own
        if name.startswith(_CLASS_ROWS) and name in weights and weights[name].shape != own[name].shape
    ]
    load_into(network, weights | {name: own[name] for name in fresh}, path)
    return fresh


def _with_own_counters(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Counters of batches are no pretrained weights: a frozen norm has none, a trained one starts anew."""
    kept = {name: t for name, t in weights.items() if not name.endswith(_COUNTER)}
    return kept | {name: t for name, t in module.state_dict().items() if name.endswith(_COUNTER)}


def save_checkpoint(
    folder: Path,
    network: nn.Module,
    config: Config,
    metadata: Metadata,
    step: int,
    state: Mapping[str, Any],
) -> Path:
    """Write ``folder/step_N`` atomically, point ``last`` to it, and drop what is neither new nor the best.

    All ranks call it, since they put sharded tensors together; rank 0 writes.

    Raises:
        OSError: on every rank: the disk is full or cannot be written. The error names the room that is left; the
            checkpoints that stand there are untouched and nothing is left of this one.
    """
    final = folder / f"step_{step:08d}"
    weights, state = whole(network.state_dict()), whole(state)

    def write() -> OSError | None:
        try:
            _write_checkpoint(final, weights, config, metadata, step, state)
        except OSError as error:
            return error
        return None

    if failure := on_main(write):
        raise failure
    return final


def _write_checkpoint(
    final: Path, weights: Mapping[str, Tensor], config: Config, metadata: Metadata, step: int, state: Mapping[str, Any]
) -> None:
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY_PREFIX}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_weights(temporary / WEIGHTS_NAME, weights, config, metadata, step)
        torch.save(dict(state), temporary / STATE_NAME)
        (temporary / CHECKSUMS_NAME).write_text(json.dumps(_checksums(temporary)))
        for file in (*temporary.iterdir(), temporary):
            _flush(file)
        shutil.rmtree(final, ignore_errors=True)  # what an interrupted removal left of one
        os.rename(temporary, final)
        _flush(folder)
        _point(folder / "last", final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors and torch.save have exceptions of their own for a full disk.
        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(f"{final}: the checkpoint could not be written ({free:.1f} MiB free), earlier ones stand: "
                          f"{error}") from error
        raise
    _prune(folder)


def mark_best(folder: Path, checkpoint: Path, score: float) -> None:
    """Point ``best`` to a checkpoint of the folder and note its score for `best_score`."""
    _point(folder / "best", checkpoint)
    write_json(folder / "best.json", {"step": checkpoint.name, "score": score})
    _prune(folder)


def best_score(folder: Path) -> float | None:
    """Score of the best checkpoint so far; ``None`` before the first validation."""
    path = folder / "best.json"
    return float(json.loads(path.read_text())["score"]) if path.exists() else None


def _prune(folder: Path) -> None:
    keep = {(folder / name).resolve() for name in ("last", "best") if (folder / name).exists()}
    for old in complete_checkpoints(folder)[:-KEPT]:
        if old.resolve() not in keep:
            leftover = folder / f"{TEMPORARY_PREFIX}{old.name}"  # so that a kill leaves no half of a checkpoint
            old.rename(leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first: all were written to their end, but a disk may have damaged one since."""
    return sorted(path for path in folder.glob("step_*") if (path / STATE_NAME).is_file())


def check_whole(path: Path) -> None:
    """Raise `CheckpointError` unless a checkpoint folder is as it was written."""
    sums = path / CHECKSUMS_NAME
    if not sums.exists():  # of an earlier version: what can be read is taken for whole
        load_weights(path / WEIGHTS_NAME)
        load_state(path)
        return
    try:
        expected, got = dict(json.loads(sums.read_text())), _checksums(path)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    if changed := [str(path / name) for name in got if expected.get(name) != got[name]]:
        raise CheckpointError(f"{', '.join(changed)}: damaged, the SHA-256 is not the one noted in {sums}")


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is undamaged, ``None`` where a run has none at all, and the damaged ones after it.

    Raises:
        CheckpointError: there are checkpoints and each is damaged, said of each.
    """
    problems: dict[Path, CheckpointError] = {}
    for path in reversed(complete_checkpoints(folder)):
        try:
            check_whole(path)
        except CheckpointError as error:
            problems[path] = error
            logger.warning("%s; trying the checkpoint before it", error)
        else:
            return path, list(problems)
    if problems:
        listing = "\n  ".join(str(error) for error in problems.values())
        raise CheckpointError(f"{folder}: no checkpoint to resume from, all are damaged:\n  {listing}")
    return None, []


def set_aside(damaged: Iterable[Path], newest: Path) -> None:
    """Rename damaged checkpoints, so that the steps they stood for can be saved anew, and point ``last`` to ``newest``.

    Where the best one is among them, there is no best one until the next validation.
    """
    folder = newest.parent
    for path in damaged:
        number, aside = 0, folder / f"damaged_{path.name}"
        while aside.exists():
            number += 1
            aside = folder / f"damaged_{path.name}.{number}"
        path.rename(aside)
        logger.warning("%s is damaged: moved to %s", path, aside)
    _point(folder / "last", newest)
    if not (folder / "best").exists():
        for name in ("best", "best.json"):
            (folder / name).unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any]:
    """Read the trainer's state of a checkpoint folder (no pickled code: tensors and plain containers only)."""
    try:
        return dict(torch.load(path / STATE_NAME, map_location="cpu", weights_only=True))
    except Exception as error:
        raise CheckpointError(f"{path / STATE_NAME}: not a readable trainer state: {error}") from error


def remove_leftovers(folder: Path) -> None:
    """Delete half-written checkpoints of a killed run."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def config_differences(old: Config, new: Config, sections: Iterable[str]) -> list[str]:
    """Dotted keys below the given sections that differ -> ``["solver.lr: 0.1 -> 0.2", ...]``."""
    found: list[str] = []

    def compare(prefix: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a:
                compare(f"{prefix}.{key}", a[key], b[key])
        elif a != b:
            found.append(f"{prefix}: {a} -> {b}")

    before, after = to_dict(old), to_dict(new)
    for section in sections:
        compare(section, before[section], after[section])
    return found


def _checksums(path: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files of a checkpoint folder."""
    sums = {}
    for name in (WEIGHTS_NAME, STATE_NAME):
        with (path / name).open("rb") as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
