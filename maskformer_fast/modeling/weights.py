"""Weights of a network in one safetensors file, with configuration and classes as JSON in its header."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskformer_fast.config import Config, ModelConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.typed import TypedReader, to_plain
from maskformer_fast.distributed import is_sharded, shard_like
from maskformer_fast.modeling import build_model, resolve_backbone
from maskformer_fast.modeling.first_convolution import fitted_to_channels
from maskformer_fast.modeling.vit import ViT
from maskformer_fast.recipes import from_dict

FORMAT = "maskformer_fast/1"
"""Value of the header's key ``format``."""
WEIGHTS_NAME = "model.safetensors"
BACKBONE_FORMAT = "maskformer_fast/backbone/1"
"""Value of ``format`` in a file of a backbone alone."""
_OTHER_SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".ckpt", ".json")
"""Endings of files of weights that ``convert`` reads and that are never ours."""
_COUNTER = "num_batches_tracked"
"""Last part of the names of BatchNorm's counters of batches."""
_CLASSIFIER = ("predictor.class_embed.", "predictor.weight", "predictor.bias")
"""Beginnings of the names of tensors with a row for each class; "no object" may follow as the last row."""
_CLASS_QUERIES = "predictor.query_embed."
"""Beginning of the names of queries, which networks without a classifier have for each class."""
_MAX_LISTED = 8
"""Number of class names that a message shows."""


_DTYPES = frozenset(("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"))
"""Types of safetensors that are read: those of 4 and 8 bits are quantised weights, of which PyTorch knows no sums."""
_TENSORS_OF_A_LAYER = 4
"""Least number of tensors that a layer of a backbone or a transformer has; each has more."""
_MAX_WINDOW = 32
"""Largest side of a Swin Transformer's windows: each block has a table of its fourth power."""
_METADATA = TypedReader(locate_checks=True)


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
    hint = convert_hint(path) if (path / "config.json").is_file() else ""
    raise FileNotFoundError(f"checkpoint: expected a weights file, a checkpoint folder or a run folder, got {path} "
                            f"(looked for {tried}){hint}")


def convert_hint(source: Path) -> str:
    """End of an error about weights of another implementation: the command that converts them."""
    target = source.with_name(f"{source.stem or 'model'}-converted.safetensors")
    return (f"; convert weights of other implementations first: python -m maskformer_fast.convert "
            f"{shlex.quote(str(source))} {shlex.quote(str(target))}")


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
            if (kind := header.get("format")) == BACKBONE_FORMAT:
                raise CheckpointError(f"{file}: expected a checkpoint of format {FORMAT}, got a backbone alone"
                                      "; train a network from them with --model.backbone.weights")
            if kind != FORMAT:
                ours = "; it is of another version of maskformer_fast, which reads it"
                hint = ours if (kind or "").startswith(FORMAT.partition("/")[0]) else _hint(file)
                raise CheckpointError(f"{file}: expected a checkpoint of format {FORMAT}, got {kind}{hint}")
            if absent := [key for key in ("metadata", "config", "step") if key not in header]:
                raise CheckpointError(f"{file}: expected {', '.join(absent)} in the header, got none")
            weights = read_tensors(reader)
        metadata: Metadata = _METADATA.read(Metadata, json.loads(header["metadata"]), "metadata")
        return Checkpoint(from_dict(json.loads(header["config"])), metadata, weights, int(header["step"]))
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        hint = _hint(file) if file.suffix in _OTHER_SUFFIXES else ""
        raise CheckpointError(f"{file}: not a readable checkpoint: {error}{hint}") from error


def _hint(file: Path) -> str:
    """`convert_hint` of a file, or of its folder where that is one of Hugging Face."""
    return convert_hint(file.parent if (file.parent / "config.json").is_file() else file)


def read_tensors(reader: Any) -> dict[str, Tensor]:
    """Tensors of an open safetensors file, by name. Raises ``ValueError`` for one of another type than numbers."""
    weights = {}
    for name in reader.keys():  # noqa: SIM118 (not a dict)
        kind = reader.get_slice(name).get_dtype()
        if kind not in _DTYPES:
            raise ValueError(f"{name}: expected one of the types {', '.join(sorted(_DTYPES))}, got {kind}")
        weights[name] = reader.get_tensor(name)
    return weights


def check_depth(model: ModelConfig, tensors: int, source: object) -> None:
    """Raise `CheckpointError` for a network of more layers than so many tensors can fill, before it is built."""
    backbone = resolve_backbone(model.backbone)
    decoder_layers = 0 if model.type == "per_pixel" else model.decoder.layers
    decoder_layers = 0 if model.type == "eomt" else decoder_layers  # its layers are blocks of the backbone
    layers = sum(backbone.depths or ()) + (backbone.blocks or 0) + decoder_layers + model.pixel_decoder.encoder_layers
    if layers * _TENSORS_OF_A_LAYER > tensors:
        raise CheckpointError(f"{source}: expected no more layers than tensors fill, got {layers} layers for {tensors} "
                              "tensors")
    if (backbone.window_size or 0) > _MAX_WINDOW:
        raise CheckpointError(f"{source}: expected windows of at most {_MAX_WINDOW} cells, got {backbone.window_size}")


@contextmanager
def on_meta() -> Iterator[None]:
    """Build networks on the meta device: names and shapes without memory and without initial weights."""
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Leaves initial weights out: on the meta device PyTorch would import its compiler to draw them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_):
            return args[0]
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):  # which call those past the mode
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def check_architecture(model: ModelConfig, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise `CheckpointError` unless names and shapes are those of the network that a configuration describes.

    No memory is taken for that network's own weights.
    """
    try:
        check_depth(model, len(weights), source)
        with on_meta():
            expected = build_model(model).state_dict()
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source}: its configuration describes no network: {error}") from error
    _raise_problems(_differences(expected, weights), source)


def not_finite(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors with NaN or infinite numbers: name -> how many there are. Tensors without numbers are left out."""
    problems = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.is_meta and not (finite := tensor.isfinite()).all():
            problems[name] = f"{tensor.numel() - int(finite.sum())} of {tensor.numel()} numbers are NaN or infinite"
    return problems


def load_into(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights by name into a module, sharded or not; every tensor must fit.

    Raises:
        CheckpointError: the weights do not fit; the message lists every tensor that is missing, unknown, of another
            shape or not finite, after ``source``.
    """
    current = module.state_dict()
    problems = _differences(current, weights)
    read = {name: tensor for name, tensor in weights.items() if not is_sharded(tensor)}
    problems += [f"not finite: {name}: {count}" for name, count in not_finite(read).items()]
    _raise_problems(problems, source)
    module.load_state_dict({name: shard_like(tensor, current[name]) for name, tensor in weights.items()})


def _differences(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are missing, unknown, of another shape, or integers for floating point or the reverse."""
    problems = [f"missing: {name}" for name in expected if name not in weights]
    problems += [f"unknown: {name}" for name in weights if name not in expected]
    for name in (name for name in expected if name in weights):
        want, got = expected[name], weights[name]
        if want.shape != got.shape:
            problems.append(f"shape: {name}: expected {tuple(want.shape)}, got {tuple(got.shape)}")
        elif want.is_floating_point() != got.is_floating_point():
            problems.append(f"type: {name}: expected {want.dtype}, got {got.dtype}")
    return problems


def _raise_problems(problems: list[str], source: str | Path) -> None:
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit the network:\n  " + "\n  ".join(problems))


def load_backbone(network: nn.Module, path: str | Path) -> None:
    """Load pretrained backbone weights, from a file of a backbone alone or from the backbone of a network's file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, or the weights do not fit the backbone.
    """
    file = weights_file(path)
    try:
        with safe_open(str(file), framework="pt") as reader:
            weights = read_tensors(reader)
    except (SafetensorError, OSError, ValueError) as error:
        hint = _hint(file) if file.suffix in _OTHER_SUFFIXES else ""
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}{hint}") from error
    of_network = {name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")}
    backbone = network.get_submodule("backbone")
    weights = _with_counters_of(backbone, of_network or weights)
    if isinstance(backbone, ViT):
        weights = backbone.fitted(weights)
    load_into(backbone, fitted_to_channels(weights, backbone.state_dict()), file)


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
    load_into(network, fitted_to_channels(weights, current), path)
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
