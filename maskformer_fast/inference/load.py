"""Predictors from files: a checkpoint, a folder of Hugging Face, a bundle or, untrained, a recipe."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from maskformer_fast.config import Amp, Config, DataConfig, TestConfig
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.files import sha256_of_file
from maskformer_fast.core.machine import keep_freed_memory
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data import dataset_metadata
from maskformer_fast.deploy.bundle.folder import read_manifest
from maskformer_fast.deploy.bundle.manifest import MANIFEST_NAME, Precision
from maskformer_fast.deploy.runtime.selection import Backend
from maskformer_fast.distributed import resolve_device
from maskformer_fast.inference.bundle_predictor import (
    BundlePredictor,
    bundle_data,
    bundle_test,
    is_bundle,
    load_bundle,
)
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.interop.huggingface import is_folder, read_checkpoint
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16, fuse_for_cpu
from maskformer_fast.modeling.weights import (
    Checkpoint,
    CheckpointError,
    check_architecture,
    load_into,
    load_weights,
    weights_file,
)
from maskformer_fast.recipes import load_recipe, recipe_names


def load(
    path_or_recipe: str | Path,
    device: str = "auto",
    test: TestConfig | None = None,
    backend: Backend = "auto",
    amp: Amp | None = None,
    precision: Precision | None = None,
    in_flight: int | None = None,
    graphs: bool = False,
) -> Predictor | BundlePredictor:
    """A predictor from a checkpoint (weights file, checkpoint folder, run folder), a bundle or, untrained, a recipe.

    A folder in which `transformers` saved a MaskFormer, Mask2Former or EoMT is a checkpoint too. It does not tell which
    classes are things: they are those of the published data set with such classes, else none (`convert --things`).

    On a CPU its network is rebuilt for inference (`modeling.fuse_for_cpu`) and cannot be trained, saved, moved to
    another device or exported; `load_network` leaves it as it is. The process keeps freed memory from then on, which
    saves a tenth to a third of the time (`core.machine.keep_freed_memory`, which says how to prevent it).

    Args:
        test: resizing and thresholds in place of those of the checkpoint or recipe; a bundle fixes its own.
        backend: what runs a bundle, see `maskformer_fast.deploy.runtime.load`; without a bundle it must be ``auto``.
        amp: precision of a checkpoint's network, by default that of its training.
        precision: that of a bundle's network, see `maskformer_fast.deploy.runtime.load`.
        in_flight: number of images that are worked on at once on a CPU, where several are given; None: one by one, or
            what `maskformer_fast.deploy.runtime.load` says for a bundle.
        graphs: on a GPU, replay CUDA graphs for batches whose sizes come again, see `Predictor`; a bundle always does.

    Raises:
        FileNotFoundError: neither a path nor a recipe.
        CheckpointError, ConvertError, BundleError: a damaged checkpoint, folder of Hugging Face or bundle.
        ValueError: a backend or ``precision`` without a bundle, an ``amp`` or ``graphs`` with one, or a ``test`` that
            differs from the bundle's.
    """
    if is_bundle(path_or_recipe):
        check(amp is None, "amp", "none with a bundle, for which the option is precision", amp)
        check(not graphs, "graphs", "False, as a bundle decides by itself", graphs)
        return load_bundle(path_or_recipe, device, test, backend, precision, in_flight)
    check(backend == "auto", "backend", f"auto, as {path_or_recipe} is not a bundle and runs in PyTorch", backend)
    check(precision is None, "precision", "none without a bundle; for a checkpoint the option is amp", precision)
    if amp is not None:
        check_choice("amp", amp, get_args(Amp))
    loaded = load_network(path_or_recipe, device, test)
    several = 1 if in_flight is None else in_flight
    predictor = Predictor(loaded.network, loaded.config, loaded.metadata, loaded.device, amp, graphs, several)
    if predictor.device.type == "cpu" and torch.backends.mkldnn.is_available():
        keep_freed_memory()
        half = predictor.amp == "bf16" and convolves_bfloat16()
        fuse_for_cpu(predictor.network, torch.bfloat16 if half else torch.float32)
    return predictor


def load_network(path_or_recipe: str | Path, device: str = "auto", test: TestConfig | None = None) -> Predictor:
    """A predictor from a checkpoint or a recipe, its network as it was trained. Errors are those of `load`."""
    if not Path(path_or_recipe).exists() and str(path_or_recipe) in recipe_names():
        config = load_recipe(str(path_or_recipe))
        metadata = dataset_metadata(config.data)
        config = with_classes(config, metadata)
        network = build_model(config.model)
    else:
        config, metadata, weights, _ = _read(path_or_recipe)
        check_architecture(config.model, weights, path_or_recipe)
        check(metadata.num_classes == config.model.num_classes, f"{path_or_recipe}: metadata.class_names",
              f"the {config.model.num_classes} classes of the network", metadata.num_classes, CheckpointError)
        network = build_model(config.model)
        load_into(network, weights, path_or_recipe)
    on = resolve_device(device)
    return Predictor(network.to(on).eval(), replace(config, test=test or config.test), metadata, on)


def stored_options(path: str | Path) -> tuple[DataConfig, TestConfig]:
    """Data and test options stored in a checkpoint or a bundle. Errors are those of `load`."""
    if is_bundle(path):
        manifest, _ = read_manifest(path)  # `load` verifies the other files
        return bundle_data(manifest), bundle_test(manifest)
    config = _read(path).config
    return config.data, config.test


def fingerprint(path: str | Path) -> str:
    """SHA-256 of the files that determine a network: another one for other weights, whatever folder they lie in.

    For a recipe, whose network is untrained, its name. Raises ``FileNotFoundError`` for what `load` does not find.
    """
    if not Path(path).exists() and str(path) in recipe_names():
        return str(path)
    if is_bundle(path):
        files = [Path(path, MANIFEST_NAME)]  # which has the sums of the others
    elif is_folder(path):
        files = sorted(file for file in Path(path).iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
    else:
        files = [weights_file(path)]
    return hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()


def _read(path: str | Path) -> Checkpoint:
    return read_checkpoint(path) if is_folder(path) else load_weights(path)


def with_classes(config: Config, metadata: Metadata) -> Config:
    """The configuration with ``model.num_classes`` taken from the data set; a different explicit number is an error."""
    got = config.model.num_classes
    check(got in (0, metadata.num_classes), "model.num_classes", f"0 or the data set's {metadata.num_classes}", got)
    return replace(config, model=replace(config.model, num_classes=metadata.num_classes))
