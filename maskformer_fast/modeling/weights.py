"""Weights of a network in one safetensors file, with configuration and classes as JSON in its header."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskformer_fast.config import Config
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.typed import to_plain
from maskformer_fast.distributed import shard_like
from maskformer_fast.recipes import from_dict

FORMAT = "maskformer_fast/1"
"""Value of the header's key ``format``."""
WEIGHTS_NAME = "model.safetensors"
_COUNTER = "num_batches_tracked"
"""Last part of the names of BatchNorm's counters of batches."""
_CLASSIFIER = ("predictor.class_embed.", "predictor.weight", "predictor.bias")
"""Beginnings of the names of tensors with a row for each class."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the network; the message names the file and the reason."""


class Checkpoint(NamedTuple):
    """Content of a weights file."""

    config: Config
    metadata: Metadata
    weights: dict[str, Tensor]
    step: int


def weights_file(path: str | Path) -> Path:
    """Path of the weights file, given it, a checkpoint folder, or a run's folder (its best checkpoint, else its last).

    Raises:
        FileNotFoundError: there is no such file; the message names all paths that were tried.
    """
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
    """Write a network's weights with its configuration and classes; see `write_weights`."""
    write_weights(path, network.state_dict(), config, metadata, step)


def write_weights(
    path: str | Path, weights: Mapping[str, Tensor], config: Config, metadata: Metadata, step: int
) -> None:
    """Write weights with their configuration and classes. Not atomic: `save_checkpoint` writes to a temporary folder.

    Raises:
        SafetensorError, OSError: the file cannot be written.
    """
    header = {
        "format": FORMAT,
        "config": json.dumps(to_plain(config)),
        "metadata": json.dumps(dataclasses.asdict(metadata)),
        "step": str(step),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, str(path), metadata=header)


def load_weights(path: str | Path) -> Checkpoint:
    """Read a weights file; ``path`` as for `weights_file`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or of another format.
    """
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
    """Load weights by name into a module, sharded or not; every tensor must fit.

    Raises:
        CheckpointError: the weights do not fit; the message lists every tensor that is missing, unknown or of another
            shape, after ``source``.
    """
    current = module.state_dict()
    problems = [f"missing: {name}" for name in current if name not in weights]
    problems += [f"unknown: {name}" for name in weights if name not in current]
    problems += [
        f"shape: {name}: expected {tuple(current[name].shape)}, got {tuple(weights[name].shape)}"
        for name in current
        if name in weights and current[name].shape != weights[name].shape
    ]
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit the network:\n  " + "\n  ".join(problems))
    module.load_state_dict({name: shard_like(tensor, current[name]) for name, tensor in weights.items()})


def load_backbone(network: nn.Module, path: str | Path) -> None:
    """Load pretrained backbone weights, from a file of a backbone alone or from the backbone of a network's file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, or the weights do not fit the backbone.
    """
    file = weights_file(path)
    try:
        with safe_open(str(file), framework="pt") as reader:
            weights = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    of_network = {name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")}
    backbone = network.get_submodule("backbone")
    load_into(backbone, _with_counters_of(backbone, of_network or weights), file)


def load_initial(network: nn.Module, path: str | Path) -> list[str]:
    """Load a network's weights to start training from -> names of the tensors that keep their initial values.

    Tensors with a row for each class keep them if the file has another number of classes. All others must fit.

    Raises:
        FileNotFoundError, CheckpointError: see `load_weights` and `load_into`.
    """
    weights = _with_counters_of(network, load_weights(path).weights)
    current = network.state_dict()
    untrained = [
        name
        for name in current
        if name.startswith(_CLASSIFIER) and name in weights and weights[name].shape != current[name].shape
    ]
    load_into(network, weights | {name: current[name] for name in untrained}, path)
    return untrained


def _with_counters_of(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with BatchNorm's counters of a module in place of their own.

    The counters are no pretrained weights: frozen norms have none, and those of trained norms start at 0.
    """
    others = {name: t for name, t in weights.items() if not name.endswith(_COUNTER)}
    return others | {name: t for name, t in module.state_dict().items() if name.endswith(_COUNTER)}
