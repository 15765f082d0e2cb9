"""Weights of a network in one safetensors file, with configuration and classes as JSON in its header."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
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
"""Beginnings of the names of tensors with a row for each class; "no object" may follow as the last row."""
_CLASS_QUERIES = "predictor.query_embed."
"""The same in networks without a classifier, which have a query for each class."""
_MAX_LISTED = 8
"""Number of class names that a message shows."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the network; the message names the file and the reason."""


class Checkpoint(NamedTuple):
    """Content of a weights file."""

    config: Config
    metadata: Metadata
    weights: dict[str, Tensor]
    step: int


class ClassTransfer(NamedTuple):
    """Names of the classes whose weights `load_initial` took from a file or not."""

    kept: tuple[str, ...]  # at the index that they have in the file
    moved: tuple[str, ...]  # at another index
    new: tuple[str, ...]  # not in the file: they keep their initial weights
    dropped: tuple[str, ...]  # in the file alone

    def __str__(self) -> str:
        return "; ".join(f"{what}: {_listing(names)}" for what, names in self._asdict().items() if names)


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


def load_initial(network: nn.Module, path: str | Path, metadata: Metadata) -> ClassTransfer:
    """Load a network's weights to start training from -> what became of the classes, which are compared by name.

    A class of ``metadata`` that is in the file takes its weights from there, wherever it stands; so does "no object" if
    there is such a class. Other classes keep their initial weights. Tensors without a row for each class must fit.

    Raises:
        FileNotFoundError, CheckpointError: see `load_weights` and `load_into`.
    """
    saved = load_weights(path)
    weights, current = _with_counters_of(network, saved.weights), network.state_dict()
    before, after = _numbered(saved.metadata.class_names), _numbered(metadata.class_names)
    shared = [(before[name], row) for name, row in after.items() if name in before]
    has_classifier = any(name.startswith(_CLASSIFIER) for name in current)
    for name, initial in current.items():
        if name in weights and name.startswith(_CLASSIFIER if has_classifier else _CLASS_QUERIES):
            weights[name] = _rows_of_classes(weights[name], initial, len(before), len(after), shared)
    load_into(network, weights, path)
    return ClassTransfer(
        tuple(metadata.class_names[new] for old, new in shared if old == new),
        tuple(metadata.class_names[new] for old, new in shared if old != new),
        tuple(name for key, name in zip(after, metadata.class_names, strict=True) if key not in before),
        tuple(name for key, name in zip(before, saved.metadata.class_names, strict=True) if key not in after),
    )


def _rows_of_classes(
    trained: Tensor,  # [classes of the file (+ 1), ...]
    initial: Tensor,  # [classes of the network (+ 1), ...]
    old_classes: int,
    new_classes: int,
    shared: Sequence[tuple[int, int]],  # index in the file, index in the network
) -> Tensor:
    """Initial values with the rows of shared classes, and of "no object", from trained ones."""
    if trained.shape[1:] != initial.shape[1:] or len(trained) - old_classes != len(initial) - new_classes:
        return trained  # of another architecture, which `load_into` reports
    rows = initial.detach().clone()
    if shared:
        old, new = (list(indices) for indices in zip(*shared, strict=True))
        rows[new] = trained[old].to(rows)
        rows[new_classes:] = trained[old_classes:].to(rows)
    return rows


def _numbered(names: Sequence[str]) -> dict[tuple[str, int], int]:
    """Index by (name, how many times it came before), since a list may have a name twice."""
    seen: Counter[str] = Counter()
    numbered = {}
    for index, name in enumerate(names):
        numbered[name, seen[name]] = index
        seen[name] += 1
    return numbered


def _listing(names: Sequence[str]) -> str:
    """Number and beginning of a list of names, as text."""
    more = ", ..." if len(names) > _MAX_LISTED else ""
    return f"{len(names)} ({', '.join(names[:_MAX_LISTED])}{more})"


def _with_counters_of(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with BatchNorm's counters of a module in place of their own.

    The counters are no pretrained weights: frozen norms have none, and those of trained norms start at 0.
    """
    others = {name: t for name, t in weights.items() if not name.endswith(_COUNTER)}
    return others | {name: t for name, t in module.state_dict().items() if name.endswith(_COUNTER)}
