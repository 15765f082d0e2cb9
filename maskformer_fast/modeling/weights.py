"""Weights of a network as one safetensors file, whose header carries configuration and classes as JSON."""

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
from maskformer_fast.distributed import shared_out
from maskformer_fast.recipes import from_dict

FORMAT = "maskformer_fast/1"
WEIGHTS_NAME = "model.safetensors"
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
    write_weights(path, network.state_dict(), config, metadata, step)


def write_weights(
    path: str | Path, weights: Mapping[str, Tensor], config: Config, metadata: Metadata, step: int
) -> None:
    header = {
        "format": FORMAT,
        "config": json.dumps(to_plain(config)),
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
