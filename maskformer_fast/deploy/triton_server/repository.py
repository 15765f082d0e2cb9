"""A model repository for the server: ``REPOSITORY/NAME/config.pbtxt`` and ``REPOSITORY/NAME/VERSION/``.

Names, types and dims of a model are those of the graph or engine. The first dimension is left out where the server
batches (``max_batch_size`` above 0) and listed where it does not. This needs neither torch nor the server.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from maskformer_fast.core.checks import check
from maskformer_fast.deploy.bundle.folder import Bundle, check_outside
from maskformer_fast.deploy.bundle.manifest import MANIFEST_NAME, Engine, Graph, Manifest, TensorSpec, manifest_bytes
from maskformer_fast.deploy.triton_server.config import ServedModel, ServedTensor, model_config
from maskformer_fast.deploy.triton_server.options import TritonServerOptions

TYPES = {
    "uint8": "TYPE_UINT8", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float32": "TYPE_FP32",
}  # fmt: skip
"""Type in the manifest -> name of the server's type."""
ANY = -1
"""Value of a dim that may have any size."""
PYTHON_MODEL = '''\
"""Served by NVIDIA's Triton Inference Server, in whose Python maskformer_fast must be installed."""

from pathlib import Path

from maskformer_fast.deploy.triton_server.model import ServedBundle


class TritonPythonModel(ServedBundle):
    bundle = Path(__file__).parent / "bundle"
    digest = "{digest}"
'''


def plan_model(bundle: Bundle, options: TritonServerOptions) -> ServedModel:
    """The model to serve. Raises ValueError where the bundle has no such graph or engine.

    Of a network of bands its graphs alone are served: the Python backend takes RGB.
    """
    manifest = bundle.manifest
    check(manifest.channels == 0 or options.model in manifest.graphs, "model",
          f"{' or '.join(sorted(manifest.graphs))} of a network of {manifest.channels} bands", options.model)
    if options.model == "results":
        return results_model(bundle, options)
    if options.model == "engine":
        engine = choose_engine(manifest, options.engine)
        return engine_model(engine, find_graph(manifest, "raw"), bundle.read(engine.file), options.max_batch)
    graph = find_graph(manifest, options.model)
    inputs, outputs, max_batch = batched(graph.inputs, graph.outputs, options.max_batch)
    files = {"model.onnx": bundle.read(graph.file)}
    return ServedModel("onnxruntime", "onnxruntime_onnx", inputs, outputs, max_batch, (), files)


def find_graph(manifest: Manifest, flavour: str) -> Graph:
    if flavour not in manifest.graphs:
        raise ValueError(f"model: expected a graph of the bundle {sorted(manifest.graphs)}, got {flavour!r}")
    return manifest.graphs[flavour]


def choose_engine(manifest: Manifest, name: str | None) -> Engine:
    """The TensorRT engine of this file name, or the only one. Raises ValueError where there is no such engine."""
    engines = {engine.file.rpartition("/")[2]: engine for engine in manifest.engines}
    if name is not None and name not in engines:
        raise ValueError(f"engine: expected one of the bundle's {sorted(engines)}, got {name!r}")
    candidates = [engines[name]] if name is not None else list(engines.values())
    served = [engine for engine in candidates if engine.api == "tensorrt"]
    if candidates and not served:
        apis = ", ".join(sorted({engine.api for engine in candidates}))
        raise ValueError(f"engine: expected one of tensorrt, which alone the server runs, got those of {apis}")
    if len(served) != 1:
        names = sorted(engine.file.rpartition("/")[2] for engine in served)
        raise ValueError(
            f"engine: expected the name of one of {names}" if names else
            "model: expected a bundle with an engine (python -m maskformer_fast.export BUNDLE --engine-only), got none"
        )  # fmt: skip
    return served[0]


def engine_model(engine: Engine, graph: Graph, content: bytes, max_batch: int) -> ServedModel:
    """Model of an engine: batches within its profile, and fixed dims where the profile fixes height or width."""
    low, best, high = engine.profile.minimum, engine.profile.optimum, engine.profile.maximum
    if low.batch > 1:
        max_batch = 0  # the server sends single images too
    ranges = {2: (low.height, high.height), 3: (low.width, high.width)}
    fixed = {axis: smallest for axis, (smallest, largest) in ranges.items() if smallest == largest}
    images = [
        TensorSpec(spec.name, spec.dtype, tuple(fixed.get(axis, size) for axis, size in enumerate(spec.shape)))
        for spec in graph.inputs
    ]
    inputs, outputs, max_batch = batched(images, engine.outputs, min(max_batch, high.batch))
    preferred = (min(best.batch, max_batch),) if best.batch > 1 and max_batch > 1 else ()
    return ServedModel("tensorrt", "tensorrt_plan", inputs, outputs, max_batch, preferred, {"model.plan": content})


def batched(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_batch: int
) -> tuple[tuple[ServedTensor, ...], tuple[ServedTensor, ...], int]:
    """Inputs, outputs and largest batch: without the first dimension where the server may batch, else with it and 0."""
    if any(isinstance(spec.shape[0], int) for spec in (*inputs, *outputs)):
        max_batch = 0

    def served(spec: TensorSpec) -> ServedTensor:
        dims = tuple(size if isinstance(size, int) else ANY for size in spec.shape)
        return ServedTensor(spec.name, TYPES[spec.dtype], dims[1:] if max_batch else dims)

    return tuple(map(served, inputs)), tuple(map(served, outputs)), max_batch


def results_model(bundle: Bundle, options: TritonServerOptions) -> ServedModel:
    """Model of the Python backend, with the bundle beside it. `deploy.triton_server.model` describes the outputs."""
    labels = "TYPE_UINT8" if bundle.manifest.num_classes <= 255 else "TYPE_INT16"
    outputs = {
        "semantic": (ServedTensor("labels", labels, (ANY, ANY)),),
        "panoptic": (ServedTensor("id_map", "TYPE_INT32", (ANY, ANY)), ServedTensor("segments", "TYPE_STRING", (1,))),
        "instance": (
            ServedTensor("count", "TYPE_INT32", (1,)), ServedTensor("labels", "TYPE_INT64", (ANY,)),
            ServedTensor("scores", "TYPE_FP32", (ANY,)), ServedTensor("boxes", "TYPE_FP32", (ANY, 4)),
            ServedTensor("masks", "TYPE_UINT8", (ANY, ANY, ANY)),
        ),
    }[options.task]  # fmt: skip
    images = (ServedTensor("images", "TYPE_UINT8", (ANY, ANY, 3)),)
    manifest, _ = manifest_bytes(bundle.manifest)
    files = {"model.py": PYTHON_MODEL.format(digest=bundle.digest).encode(), f"bundle/{MANIFEST_NAME}": manifest}
    files |= {f"bundle/{name}": bundle.read(name) for name in bundle.manifest.files}
    return ServedModel("python", "", images, outputs, options.max_batch, (), files)


def default_name(manifest: Manifest, model: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", manifest.name).strip("-._") or "maskformer"
    return f"{stem[:100]}-{model}"


def write_repository(bundle: Bundle, options: TritonServerOptions) -> Path:
    """Write the model -> its folder.

    The folder appears complete or not at all. In an existing folder only a new version is added, and only where the
    configuration is the same.

    Raises:
        ValueError: the bundle has no such model, or only an engine of TensorRT for RTX; or the output lies in it.
        FileExistsError: the repository has a different model of this name, or this version of it.
        BundleError: a file of the bundle was changed since it was opened.
    """
    check_outside(bundle, options.output)
    name = options.name or default_name(bundle.manifest, options.model)
    model = plan_model(bundle, options)
    config = model_config(model, name, options)
    repository = Path(options.output)
    target, version = repository / name, str(options.version)
    known = target / "config.pbtxt"
    if target.exists() and (not known.is_file() or known.read_text() != config):
        raise FileExistsError(f"{target}: expected no model there, or one of the same configuration")
    if (target / version).exists():
        raise FileExistsError(f"{target / version}: expected a new version, got one that is there")
    repository.mkdir(parents=True, exist_ok=True)
    temporary = repository / f".{secrets.token_hex(8)}.tmp"
    try:
        for file, content in model.files.items():
            write_file(temporary / version / file, content)
        write_file(temporary / "config.pbtxt", config.encode())
        if target.exists():
            os.rename(temporary / version, target / version)
        else:
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
