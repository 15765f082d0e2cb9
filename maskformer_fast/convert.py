"""``python -m maskformer_fast.convert SOURCE DEST`` converts weights of other implementations to ours and back."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import BackboneConfig, Config
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write, check_no_windows_path
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.typed import to_plain
from maskformer_fast.inference.load import load_network
from maskformer_fast.interop.architecture import check_fit, meta_backbone, meta_model
from maskformer_fast.interop.eomt import is_official as is_eomt
from maskformer_fast.interop.eomt import official_to_ours
from maskformer_fast.interop.files import read_weights
from maskformer_fast.interop.huggingface import is_folder, read_folder, write_folder
from maskformer_fast.interop.names import Renamed
from maskformer_fast.interop.official import backbone_to_ours, is_model, model_to_ours, no_object_weight
from maskformer_fast.interop.published import published_config, with_published_classes, with_things
from maskformer_fast.interop.verification.eomt import read_eomt_recording, recorded_heads, verify_eomt
from maskformer_fast.interop.verification.mask2former import read_mask2former, verify_mask2former
from maskformer_fast.interop.verification.recording import read_recordings
from maskformer_fast.interop.verification.verify import verify
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import (
    BACKBONE_FORMAT,
    FORMAT,
    WEIGHTS_NAME,
    check_depth,
    load_into,
    load_weights,
    save_weights,
)

logger = logging.getLogger(__name__)

_OTHER_SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".json")


@dataclass(frozen=True)
class ConvertOptions:
    """Convert weights of other implementations to ours, or ours to Hugging Face's. Nothing in a file is ever run.

    SOURCE is an official checkpoint (.pkl, .pth), a Hugging Face folder (config.json beside its weights), a checkpoint
    of ours, or a backbone: detectron2's or torchvision's ResNet, a Swin Transformer of its authors, a DINOv2 with
    registers or a DINOv3 of timm or Hugging Face. Its
    contents decide its kind and its architecture. Any tensor that is missing, unknown or misshapen is an error.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """File or folder to convert."""
    dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")]
    """A .safetensors file, or a folder for model.safetensors. The file must not exist yet."""
    to: Literal["ours", "huggingface"] = "ours"
    """``huggingface`` writes a folder that transformers loads."""
    num_heads: int | None = None
    """Attention heads of the transformer decoder and encoder, or of an EoMT's ViT, which official weights do not show;
    default: 8; of a ViT what ``--verify``'s recording tells, or one for every 64 channels."""
    things: tuple[str, ...] | None = None
    """Classes that are things, as ``0-79`` or ``0 1 5``; default: those of the published data set with as many classes
    (ADE20K 150, COCO panoptic 133, ...), otherwise none."""
    base: str | None = None
    """Weights of a backbone (a file that convert takes) to which the source, an official EoMT, is a difference."""
    verify: str | None = None
    """Recorded outputs (case.pt, synth.pt or their folder) to compare with the written model. One JSON object with the
    largest difference of each quantity is printed; the exit status is 1 if one is beyond its tolerance."""


class Converted(NamedTuple):
    """A model under our names."""

    kind: str
    weights: Mapping[str, Tensor]
    config: Config
    metadata: Metadata


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(
        ConvertOptions, list(sys.argv[1:] if argv is None else argv), prog="python -m maskformer_fast.convert"
    )
    check_no_windows_path({"source": options.source, "dest": options.dest, "verify": options.verify})
    report = logger.info if options.verify else print
    target = destination(options)
    if options.verify and not Path(options.verify).exists():
        raise FileNotFoundError(f"verify: expected recorded outputs, found nothing at {options.verify}")
    source = read_source(options)
    if isinstance(source, Converted):
        if options.verify:  # recordings of another model are refused before anything is written
            check_recordings(source, options.verify)
        write_model(source, target, options.to)
        summarize(source, report)
    else:
        write_backbone(*source, target)
        report(f"backbone:     {describe_backbone(source[1])}")
        report(f"parameters:   {parameters(source[0])}")
    report(f"written:      {target}")
    if not options.verify or not isinstance(source, Converted):
        return 0
    compare = {"mask2former": verify_mask2former, "eomt": verify_eomt}.get(source.config.model.type, verify)
    result = compare(read_back(target, options.to), source.metadata, options.verify, source.config.loss)
    print(json.dumps(result.to_dict(), indent=2))
    return 0 if result.ok else 1


def destination(options: ConvertOptions) -> Path:
    """The file (or, for Hugging Face, folder) to write.

    Raises:
        FileExistsError: it exists.
        ValueError: a suffix that our weights do not have.
    """
    target = Path(options.dest)
    if options.to == "ours":
        check(target.suffix not in _OTHER_SUFFIXES, "dest", "a .safetensors file or a folder", options.dest)
        if target.suffix != ".safetensors":
            target = target / WEIGHTS_NAME
        exists = target.exists()
    else:
        exists = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if exists:
        raise FileExistsError(f"dest: expected a path where nothing is yet, got {target}")
    return target


def read_source(options: ConvertOptions) -> Converted | tuple[dict[str, Tensor], BackboneConfig]:
    """Determine the kind of the source and read it: a model, or a backbone's weights with its preset.

    Raises:
        FileNotFoundError: the source does not exist, or is a folder without weights.
        ConvertError: unknown, damaged or refused contents (a ``ValueError``).
        CheckpointError: a damaged checkpoint of ours.
        ValueError: options that do not apply to the source.
    """
    path = Path(options.source)
    if not path.exists():
        raise FileNotFoundError(f"source: expected a file or a folder, found nothing at {path}")
    heads = options.num_heads
    if is_folder(path):
        _refuse("num_heads", heads, "a Hugging Face folder, whose config.json has it")
        model = read_folder(path)
        return _with_classes(options, "Hugging Face", model.weights, model.config, model.class_names)
    if path.is_dir() and not any((path / part).exists() for part in (WEIGHTS_NAME, "checkpoints", "best", "last")):
        raise FileNotFoundError(f"source: expected the config.json of a Hugging Face folder or a checkpoint of ours in "
                                f"{path}")
    if path.is_dir() or _is_ours(path):
        _refuse("num_heads", heads, "a checkpoint of ours, whose configuration has it")
        checkpoint = load_weights(path)
        check_depth(checkpoint.config.model, len(checkpoint.weights), path)
        check_fit(meta_model(checkpoint.config.model, path), Renamed(checkpoint.weights, {}, []), (), path)
        metadata = checkpoint.metadata
        if options.things is not None:
            metadata = with_things(metadata, options.things)
        return Converted("maskformer_fast", checkpoint.weights, checkpoint.config, metadata)
    theirs = read_weights(path)
    if is_eomt(theirs):
        base = None if options.base is None else _base_weights(Path(options.base))
        if heads is None and options.verify:
            heads = recorded_heads(options.verify)
        weights, model_config = official_to_ours(theirs, path, heads, base)
        return _with_classes(options, "official", weights, published_config(model_config), None)
    _refuse("base", options.base, "another source than an official EoMT")
    if is_model(theirs):
        weights, model_config = model_to_ours(theirs, path, heads)
        config = published_config(model_config)
        if (weight := no_object_weight(theirs)) is not None:
            config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, no_object_weight=weight))
        return _with_classes(options, "official", weights, config, None)
    backbone = backbone_to_ours(theirs, path)
    _refuse("num_heads", heads, "a backbone alone")
    _refuse("things", options.things, "a backbone alone")
    _refuse("verify", options.verify, "a backbone alone")
    check(options.to == "ours", "to", "'ours' for a backbone alone", options.to)
    return backbone


def check_recordings(source: Converted, path: str) -> None:
    """Check that recorded outputs can be read and belong to such a model.

    Raises:
        ValueError: a model without queries, or recordings that are damaged or of another number of classes.
        FileNotFoundError: a folder without recordings.
    """
    model = source.config.model
    check(model.classifies_masks, "verify", "a MaskFormer, Mask2Former or EoMT, as recordings are of", model.type)
    if model.type == "eomt":
        read_eomt_recording(path, model)
    else:
        (read_mask2former if model.type == "mask2former" else read_recordings)(path, model.num_classes)


def write_model(source: Converted, target: Path, to: str) -> None:
    """Write a checkpoint of ours, or a Hugging Face folder, completely or not at all.

    Raises:
        OSError: the disk is full or cannot be written.
        ConvertError: Hugging Face's MaskFormer cannot express the model.
    """
    if to == "huggingface":
        write_folder(target, source.weights, source.config, source.metadata)
        return
    network = _filled(meta_model(source.config.model, target), source.weights)
    _write(target, lambda path: save_weights(path, network, source.config, source.metadata, step=0))


def write_backbone(weights: Mapping[str, Tensor], config: BackboneConfig, target: Path) -> None:
    """Write a backbone's own file, for ``model.backbone.weights`` of a recipe.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    tensors = _filled(meta_backbone(config, target), weights).state_dict()
    header = {"format": BACKBONE_FORMAT, "backbone": json.dumps(to_plain(config))}
    _write(target, lambda path: save_file(tensors, path, metadata=header))


def read_back(target: Path, to: str) -> nn.Module:
    """Load the written model as a network on the CPU."""
    if to == "ours":
        return load_network(target, "cpu").network
    model = read_folder(target)
    network = build_model(model.config.model)
    load_into(network, model.weights, target)
    return network.eval()


def summarize(source: Converted, report: Callable[[str], object]) -> None:
    """Report kind, architecture, classes and size of the source in a few lines."""
    model, metadata = source.config.model, source.metadata
    decoder, encoder = model.decoder, model.pixel_decoder.encoder_layers
    names = ", ".join(metadata.class_names[:3])
    report(f"source:       {source.kind}")
    report(f"architecture: {model.type}, {describe_backbone(model.backbone)}")
    if model.type == "eomt":
        report(f"transformer:  {decoder.num_queries} queries in the last {decoder.layers} blocks")
    elif model.type != "per_pixel":
        queries = f", {decoder.num_queries} queries" if model.classifies_masks else ""
        report(f"transformer:  {encoder} encoder and {decoder.layers} decoder layers of {decoder.hidden_dim} channels, "
               f"{decoder.num_heads} heads{queries}")
    report(f"classes:      {metadata.num_classes} of {metadata.name} ({names}, ...), {sum(metadata.is_thing)} things")
    test = source.config.test
    fixed = f"all of {test.size[0]} x {test.size[1]} (height x width)" if test.size else ""
    report(f"images:       {fixed or f'short edge {test.short_edge}, at most {test.max_size}'}")
    report(f"parameters:   {parameters(source.weights)}")


def describe_backbone(config: BackboneConfig) -> str:
    """Name of the preset, and the fields that differ from it."""
    different = [f"{name} {value}" for name, value in dataclasses.asdict(config).items() if value and name != "name"]
    return config.name + (f" ({', '.join(different)})" if different else "")


def parameters(weights: Mapping[str, Tensor]) -> str:
    """Number of parameters and tensors."""
    return f"{sum(tensor.numel() for tensor in weights.values()) / 1e6:.2f} million in {len(weights)} tensors"


def _base_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a backbone under our names in a network, from a file that `convert` takes or wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"base: expected a file of a backbone's weights, found nothing at {path}")
    weights, _ = backbone_to_ours(read_weights(path), path)
    return {f"backbone.{name}": tensor for name, tensor in weights.items()}


def _with_classes(
    options: ConvertOptions, kind: str, weights: Mapping[str, Tensor], config: Config, names: Sequence[str] | None
) -> Converted:
    config, metadata = with_published_classes(config, names)
    if options.things is not None:
        metadata = with_things(metadata, options.things)
    return Converted(kind, weights, config, metadata)


def _is_ours(path: Path) -> bool:
    """Whether a file has the header of our checkpoints; False for damaged files, whose reading raises the error."""
    try:
        with safe_open(str(path), framework="pt") as reader:
            return (reader.metadata() or {}).get("format") == FORMAT
    except SafetensorError:
        return False


def _refuse(name: str, value: object, source: str) -> None:
    check(value is None, name.replace("_", "-"), f"nothing for {source}", value)


def _filled(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Fill a module from the meta device with checked weights, in the module's order and types."""
    state = network.state_dict()
    network.load_state_dict({name: weights[name].to(tensor.dtype) for name, tensor in state.items()}, assign=True)
    return network


def _write(target: Path, write: Callable[[str], None]) -> None:
    """Let a function write a safetensors file under a temporary name, and rename it when it is complete."""
    try:
        with atomic_write(target) as file:
            write(file.name)
    except SafetensorError as error:
        raise OSError(f"{target}: could not be written: {error}") from error


if __name__ == "__main__":
    run_command(main)
