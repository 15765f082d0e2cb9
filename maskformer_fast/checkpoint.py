"""Checkpoints: one self-describing safetensors file for the weights, one file for the trainer's state.

```
runs/demo/checkpoints/
  step_00002000/model.safetensors     weights; the header carries configuration and classes as JSON
  step_00002000/trainer.pt            optimiser and counters, tensors and plain containers only
  last -> step_00002000   best -> step_00001500
```

A checkpoint is written under a temporary name and renamed when complete, so a run killed at any moment leaves
only whole checkpoints behind.
"""

from __future__ import annotations

import dataclasses
import json
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
from maskformer_fast.formats import write_json
from maskformer_fast.recipes import from_dict
from maskformer_fast.structures import Metadata

FORMAT = "maskformer_fast/1"
WEIGHTS_NAME = "model.safetensors"
STATE_NAME = "trainer.pt"
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
    header = {
        "format": FORMAT,
        "config": json.dumps(to_dict(config)),
        "metadata": json.dumps(dataclasses.asdict(metadata)),
        "step": str(step),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
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
    module.load_state_dict(dict(weights))


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
    """Write ``folder/step_N`` atomically, point ``last`` to it, and drop what neither ``last`` nor ``best`` points to.

    Raises:
        OSError: the disk is full or cannot be written; the checkpoints that stand there are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    if not final.exists():
        temporary = folder / f"{TEMPORARY_PREFIX}{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            save_weights(temporary / WEIGHTS_NAME, network, config, metadata, step)
            torch.save(dict(state), temporary / STATE_NAME)
            for file in (temporary / WEIGHTS_NAME, temporary / STATE_NAME, temporary):
                _flush(file)
            os.rename(temporary, final)
            _flush(folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # safetensors and torch.save have exceptions of their own for a full disk.
            if isinstance(error, (SafetensorError, RuntimeError)):
                raise OSError(f"{final}: the checkpoint could not be written, earlier ones stand: {error}") from error
            raise
    _point(folder / "last", final)
    _prune(folder)
    return final


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
    for old in complete_checkpoints(folder):
        if old.resolve() not in keep:
            shutil.rmtree(old, ignore_errors=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / STATE_NAME).is_file())


def load_state(path: Path) -> dict[str, Any]:
    """Read the trainer's state of a checkpoint folder (no pickled code: tensors and plain containers only)."""
    try:
        return torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
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
