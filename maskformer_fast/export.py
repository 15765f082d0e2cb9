"""``python -m maskformer_fast.export CHECKPOINT --output BUNDLE``: a checkpoint as a bundle to deploy."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

import maskformer_fast
from maskformer_fast.cli import leading_path, parse, run_command
from maskformer_fast.config import TASKS, Task, TestConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import check_no_windows_path
from maskformer_fast.core.machine import installed_version
from maskformer_fast.deploy.build.tensorrt import EngineConfig
from maskformer_fast.deploy.bundle.folder import Bundle, check_destination, extend_bundle, write_bundle
from maskformer_fast.deploy.bundle.manifest import (
    MANIFEST_NAME,
    OPENVINO,
    Engine,
    FileEntry,
    Manifest,
    Postprocess,
    Preprocess,
    Shape,
)
from maskformer_fast.recipes import load_recipe, recipe_names

if TYPE_CHECKING:
    from maskformer_fast.inference.predictor import Predictor

logger = logging.getLogger(__name__)

PARITY_SHAPES = ("1x512x512", "2x200x264", "1x333x250", "3x31x47")
"""Shapes at which graphs are compared with PyTorch by default: the usual one, sizes that need padding, and one with a
side below the padding's step of 32 pixels."""


@dataclass(frozen=True)
class ExportOptions:
    """Export a checkpoint as a bundle: ONNX graphs, checked against PyTorch; on request, kernels and an engine.

    A bundle in the output folder is replaced. With --engine-only, the first argument is a bundle, to which an engine is
    added: of TensorRT, the one step for an embedded device after all others were done on a workstation, or an INT8
    graph for CPUs by OpenVINO.
    """

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder, weights file or recipe; with --engine-only a bundle."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the bundle."""
    flavours: tuple[str, ...] = ("raw", "complete")
    """Graphs: raw (logits, which the runtime and engines need), complete (semantic labels)."""
    static: str | None = None
    """Shape to export for, as 1x512x512, or any batch of one size, as Bx512x512; default: any batch, height and
    width."""
    sizes: tuple[str, ...] = ()
    """Shapes at which to compare with PyTorch, as 512x512 or 2x333x250; default: the static shape, else four shapes."""
    target: tuple[str, ...] = ()
    """GPUs to compile pre- and post-processing for, as sm_87; this machine need not have them."""
    frames: tuple[str, ...] = ()
    """Batches of camera frames to compile those kernels for, as 1x1080x1920."""
    tasks: tuple[Task, ...] = TASKS
    """Tasks to compile those kernels for."""
    with_engine: bool = False
    """Also build an engine, by the engine options."""
    engine_only: bool = False
    """Add an engine to a bundle."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    test: TestConfig = field(default_factory=TestConfig)


def make_bundle(predictor: Predictor, options: ExportOptions) -> Bundle:
    """Export a predictor's network and write the bundle.

    Raises:
        ValueError: options that do not fit each other or the network, or settings that bundles do not support.
        deploy.build.parity.ParityError: a graph's outputs differ from PyTorch's; no bundle is written.
    """
    from maskformer_fast.deploy.build.onnx import FLAVOURS, export_graphs
    from maskformer_fast.deploy.build.parity import check_parity

    output = options.output
    if output is None:
        raise ValueError("output: expected a folder for the bundle, got none")
    config = predictor.config
    check_test(config.test)
    kind = config.model.type
    check(config.model.classifies_masks, "model.type",
          "maskformer or mask2former: a per-pixel baseline has no queries to export", kind)
    bands = config.data.channels
    check(bands == 0 or not options.target, "target", f"none for a network of {bands} bands, which runs on a CPU",
          options.target)
    check(bands == 0 or not config.model.has_imagenet_mean, "model.pixel_mean", "that of the bands, not ImageNet's",
          config.model.pixel_mean)
    if options.with_engine:
        check_engine(bands, options.engine)
    flavours = [flavour for flavour in FLAVOURS if flavour in options.flavours]
    known = len(flavours) == len(set(options.flavours)) and flavours
    check(bool(known), "flavours", f"some of {', '.join(FLAVOURS)}", options.flavours)
    wants_raw = bool(options.with_engine or options.target)
    check("raw" in flavours or not wants_raw, "flavours", "raw among them, for engines and kernels", options.flavours)
    check(bool(options.target) == bool(options.frames), "target, frames", "both or neither",
          (options.target, options.frames))
    static, any_batch = parse_static(options.static)
    batches = (1, 3) if any_batch else (static.batch if static else 1,)
    default_shapes = [replace(static, batch=batch) for batch in batches] if static else map(Shape.parse, PARITY_SHAPES)
    shapes = [Shape.parse(text) for text in options.sizes] or list(default_shapes)
    fitting = static is None or all(
        (any_batch or shape.batch == static.batch) and (shape.height, shape.width) == (static.height, static.width)
        for shape in shapes
    )
    check(fitting, "sizes", f"{options.static} alone, the one that --static names", options.sizes)
    frames = [Shape.parse(text) for text in options.frames]
    check_destination(output)  # before the work

    logger.info("exporting %s", ", ".join(flavours))
    exported = export_graphs(predictor.network, flavours, static, any_batch, bands)
    contents = {flavour: content for flavour, (content, _) in exported.items()}
    graphs = {str(flavour): graph for flavour, (_, graph) in exported.items()}
    parity = check_parity(predictor.network, contents, shapes, channels=bands)
    files = {graphs[flavour].file: content for flavour, content in contents.items()}
    test, model = config.test, config.model
    manifest = Manifest(
        name=Path(options.checkpoint).resolve().stem,
        created_with=versions(),
        num_queries=model.decoder.num_queries,
        num_classes=model.num_classes,
        metadata=predictor.metadata,
        preprocess=Preprocess(model.pixel_mean, model.pixel_std, test.edge, test.max_size, model.size_divisibility),
        postprocess=Postprocess(test.object_mask_threshold, test.overlap_threshold, test.top_k, test.panoptic_rule),
        graphs=graphs,
        parity=parity,
    )  # fmt: skip
    if options.target:
        files |= compile_kernels(manifest, frames, options)
        manifest = replace(manifest, kernels=tuple(dict.fromkeys(options.target)))
    if options.with_engine:
        manifest = replace(manifest, engines=add_engine(manifest, contents["raw"], options.engine, files))
    return write_bundle(output, manifest, files)


def parse_static(text: str | None) -> tuple[Shape | None, bool]:
    """Parse ``BxHxW``; the letter B stands for any batch -> shape, whether any batch. Raises ``ValueError``."""
    if text is None:
        return None, False
    any_batch = text.lower().startswith("bx")
    return Shape.parse(text[2:] if any_batch else text), any_batch


def check_test(test: TestConfig) -> None:
    """Raise ``ValueError`` for settings that a bundle's runtime does not support."""
    for name in ("semantic_order", "panoptic_order"):
        order = getattr(test, name)
        check(order == "direct", f"test.{name}", "'direct', the only one that a bundle knows", order)
    check(test.multi_scale in ((), (1.0,)), "test.multi_scale", "one scale, as bundles have it", test.multi_scale)
    check(not test.windows, "test.windows", "off, as bundles take an image as a whole", True)
    check(not test.flip, "test.flip", "False: bundles do not average mirrored images", test.flip)


def check_engine(channels: int, config: EngineConfig) -> None:
    """Raise ``ValueError`` for an engine of TensorRT for a network of bands, whose frames no GPU prepares."""
    check(channels == 0 or config.api == OPENVINO, "engine.api", f"{OPENVINO} for a network of {channels} bands",
          config.api)


def compile_kernels(manifest: Manifest, frames: Sequence[Shape], options: ExportOptions) -> dict[str, bytes]:
    """Record launches and compile their kernels -> files for the bundle."""
    from maskformer_fast.deploy.build.record_launches import compile_launches, record_launches

    logger.info("compiling kernels for %s", ", ".join(options.target))
    recorded = record_launches(manifest, frames, options.tasks, options.engine.mask_dtype)
    return compile_launches(recorded, options.target)


def add_engine(
    manifest: Manifest, raw_onnx: bytes, config: EngineConfig, files: dict[str, bytes]
) -> tuple[Engine, ...]:
    """Build an engine and add its files to ``files`` -> the bundle's engines; it replaces one of the same file name."""
    if config.api == OPENVINO:
        from maskformer_fast.deploy.build.openvino_engine import build_openvino_engine

        engine, contents = build_openvino_engine(raw_onnx, config, channels=manifest.channels)
        files.update(contents)
    else:
        from maskformer_fast.deploy.build.tensorrt import build_engine

        content, engine = build_engine(raw_onnx, config)
        files[engine.file] = content
    return (*(other for other in manifest.engines if other.file != engine.file), engine)


def extend_with_engine(folder: str, config: EngineConfig) -> Bundle:
    """Build an engine from a bundle's raw graph and add it.

    Raises:
        ValueError: a bundle without that graph, or of a network of bands for an engine of TensorRT.
    """
    bundle = Bundle.open(folder)
    raw = bundle.manifest.graphs.get("raw")
    if raw is None:
        raise ValueError(f"{folder}: expected a bundle with the flavour raw, got {sorted(bundle.manifest.graphs)}")
    check_engine(bundle.manifest.channels, config)
    files: dict[str, bytes] = {}
    engines = add_engine(bundle.manifest, bundle.read(raw.file), config, files)
    return extend_bundle(bundle, files, engines=engines)


def versions() -> dict[str, str]:
    """Versions of the packages that make a bundle, of those that are installed."""
    packages = ("torch", "onnx", "onnxscript", "onnxruntime", "triton")
    installed = {name: version for name in packages if (version := installed_version(name))}
    return {"maskformer_fast": maskformer_fast.__version__, **installed}


def stored_test(path: str) -> TestConfig | None:
    """Test settings of a checkpoint or a recipe; ``None`` for a bundle, whose settings are fixed."""
    if (Path(path) / MANIFEST_NAME).is_file():
        return None
    if not Path(path).exists() and path in recipe_names():
        return load_recipe(path).test
    from maskformer_fast.inference.load import stored_options

    return stored_options(path)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    path = leading_path(argv)
    check_no_windows_path({"checkpoint": path})
    test = stored_test(path) if path else None
    options = parse(
        ExportOptions,
        argv,
        prog="python -m maskformer_fast.export",
        default=ExportOptions(tyro.MISSING, test=test) if test else None,
    )
    check_no_windows_path({"output": options.output})
    if options.engine_only:
        check(options.output is None, "output", "nothing: --engine-only adds to the bundle itself", options.output)
        bundle = extend_with_engine(options.checkpoint, options.engine)
    else:
        is_bundle = (Path(options.checkpoint) / MANIFEST_NAME).is_file()
        check(not is_bundle, "checkpoint", "a checkpoint, or a bundle with --engine-only", options.checkpoint)
        from maskformer_fast.inference.load import load_network

        bundle = make_bundle(load_network(options.checkpoint, "cpu", test=options.test), options)
    print(f"{bundle.folder}: {listing(bundle.manifest.files)}\ndigest {bundle.digest}")
    return 0


def listing(files: Mapping[str, FileEntry]) -> str:
    """Names and sizes of a bundle's files, and the number of its kernels."""
    parts = [f"{name} ({entry.bytes / 2**20:.1f} MiB)" for name, entry in files.items() if not name.startswith("kern")]
    kernels = sum(name.endswith(".cubin") for name in files)
    return ", ".join([*parts, *([f"{kernels} cubins"] if kernels else [])])



if __name__ == "__main__":
    if "--engine-only" in sys.argv:  # runs without torch, which `onnx` imports
        run_command(main)
    from maskformer_fast.deploy.build.parity import ParityError

    run_command(main, ParityError)
