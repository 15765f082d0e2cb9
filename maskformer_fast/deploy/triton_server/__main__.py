"""``python -m maskformer_fast.deploy.triton_server BUNDLE``: a model repository for NVIDIA's Triton Inference Server.

``REPOSITORY/NAME/config.pbtxt`` and ``REPOSITORY/NAME/1/``. The configuration follows the server's documented schema
(``ModelConfig`` of its ``model_config.proto``) and rules: names, types and dims are those of the graph or engine; the
first dimension is left out where the server batches (``max_batch_size`` above 0) and listed where it does not.

This needs neither torch nor the server.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from maskformer_fast.cli import parse, run_command
from maskformer_fast.deploy.bundle.folder import Bundle, check_outside
from maskformer_fast.deploy.bundle.manifest import MANIFEST_NAME, Engine, Graph, Manifest, TensorSpec, manifest_bytes

__all__ = ["ServedModel", "TritonServerOptions", "main", "model_config", "write_repository"]

TYPES = {
    "uint8": "TYPE_UINT8", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float32": "TYPE_FP32",
}  # fmt: skip
"""The server's names of the manifest's types."""
ANY = -1
"""The server's dim of any size."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
PYTHON_MODEL = '''\
"""Served by NVIDIA's Triton Inference Server, in whose Python maskformer_fast must be installed."""

from pathlib import Path

from maskformer_fast.deploy.triton_server.model import ServedBundle


class TritonPythonModel(ServedBundle):
    bundle = Path(__file__).parent / "bundle"
    digest = "{digest}"
'''


@dataclass(frozen=True)
class TritonServerOptions:
    """Write a model repository for NVIDIA's Triton Inference Server from a bundle.

    ``complete`` and ``raw`` serve the bundle's ONNX graphs by the server's ONNX Runtime, ``engine`` a TensorRT engine
    of it: images [3, H, W] in; labels, or class and mask logits, out. ``results`` serves what ``predict`` gives, images
    [H, W, 3] of any size in and this package's results out, by the server's Python backend; the package must be
    installed there. A repository may hold many models; one of this name is left alone unless only its version is new.
    """

    bundle: tyro.conf.Positional[str]
    """Bundle, as ``python -m maskformer_fast.export`` writes it."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "model_repository"
    """The repository; made where there is none."""
    name: str | None = None
    """The model's name in the server; by default the bundle's, with a dash and what is served."""
    model: Literal["complete", "raw", "engine", "results"] = "complete"
    """What is served."""
    engine: str | None = None
    """Which of several engines, by its file's name."""
    task: Literal["semantic", "panoptic", "instance"] = "semantic"
    """With ``results``: the task."""
    backend: Literal["auto", "onnxruntime", "tensorrt"] = "auto"
    """With ``results``: the runtime's backend."""
    version: int = 1
    """Folder of this version; the server serves the highest one unless told otherwise."""
    max_batch: int = 8
    """The largest batch that the server makes of requests of one size; an engine's profile may allow less."""
    queue_delay_us: int = 0
    """How long a request may wait, in microseconds, for others to share its batch."""
    instances: int = 1
    """Copies of the model that run at once, on each GPU or on the CPU."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Where the instances run; an engine runs on GPUs only."""
    response_cache: bool = False
    """Answer repeated requests from the server's cache, which its ``--cache-config`` switches on."""
    digest: str | None = None
    """The bundle's digest, where it is known: any other bundle is refused."""

    def __post_init__(self) -> None:
        for name, low in (("version", 1), ("max_batch", 1), ("queue_delay_us", 0), ("instances", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} at least, got {getattr(self, name)}")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ValueError(f"name: expected letters, digits, '_', '.' and '-', at most 128, got {self.name!r}")
        if self.model == "engine" and self.device == "cpu":
            raise ValueError("device: expected gpu for an engine, got cpu")
        if self.engine is not None and self.model != "engine":
            raise ValueError(f"engine: expected none with --model {self.model}, got {self.engine!r}")


@dataclass(frozen=True)
class ServedTensor:
    """An input or output as the server knows it."""

    name: str
    kind: str  # TYPE_UINT8 ...
    dims: tuple[int, ...]  # without the batch where the server batches


@dataclass(frozen=True)
class ServedModel:
    """What a model of the repository is made of."""

    backend: str  # the server's
    platform: str  # the server's; empty for the Python backend
    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]
    max_batch: int  # 0: the server does not batch, and the shapes are whole
    preferred: tuple[int, ...]  # batch sizes to wait for, where there are such
    files: Mapping[str, bytes]  # below the version's folder


def plan_model(bundle: Bundle, options: TritonServerOptions) -> ServedModel:
    """What to serve of a bundle. Raises ValueError where it holds no such graph or engine."""
    manifest = bundle.manifest
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
    """The TensorRT engine of this file name, or the only one."""
    engines = {engine.file.rpartition("/")[2]: engine for engine in manifest.engines}
    if name is not None and name not in engines:
        raise ValueError(f"engine: expected one of the bundle's {sorted(engines)}, got {name!r}")
    found = [engines[name]] if name is not None else list(engines.values())
    served = [engine for engine in found if engine.api == "tensorrt"]
    if found and not served:
        raise ValueError("engine: expected one of TensorRT; the server cannot run those of TensorRT for RTX")
    if len(served) != 1:
        names = sorted(engine.file.rpartition("/")[2] for engine in served)
        raise ValueError(
            f"engine: expected the name of one of {names}" if names else
            "model: expected a bundle with an engine (python -m maskformer_fast.export BUNDLE --engine-only), got none"
        )  # fmt: skip
    return served[0]


def engine_model(engine: Engine, graph: Graph, content: bytes, max_batch: int) -> ServedModel:
    """Batches as far as the profile allows; sides that the profile fixes are dims."""
    low, best, high = engine.profile.minimum, engine.profile.optimum, engine.profile.maximum
    if low.batch > 1:
        max_batch = 0  # the server sends single images too
    fixed = {axis: low_side for axis, low_side, high_side in ((2, low.height, high.height), (3, low.width, high.width))
             if low_side == high_side}  # fmt: skip
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
    """Tensors without their first dimension where the server may batch along it, else whole and 0."""
    if any(isinstance(spec.shape[0], int) for spec in (*inputs, *outputs)):
        max_batch = 0

    def served(spec: TensorSpec) -> ServedTensor:
        dims = tuple(size if isinstance(size, int) else ANY for size in spec.shape)
        return ServedTensor(spec.name, TYPES[spec.dtype], dims[1:] if max_batch else dims)

    return tuple(map(served, inputs)), tuple(map(served, outputs)), max_batch


def results_model(bundle: Bundle, options: TritonServerOptions) -> ServedModel:
    """The Python backend's model with the whole bundle beside it; see `deploy.triton_server.model` for the outputs."""
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


def model_config(model: ServedModel, name: str, options: TritonServerOptions) -> str:
    """The text of ``config.pbtxt``."""
    fields: list[tuple[str, Any]] = [("name", name), ("backend", model.backend)]
    if model.platform:
        fields.append(("platform", model.platform))
    fields.append(("max_batch_size", model.max_batch))
    for key, tensors in (("input", model.inputs), ("output", model.outputs)):
        fields += [(key, tensor_fields(tensor)) for tensor in tensors]
    fields.append(("instance_group", [("count", options.instances), ("kind", Word(f"KIND_{options.device.upper()}"))]))
    if model.max_batch > 1:
        batching: list[tuple[str, Any]] = [("preferred_batch_size", size) for size in model.preferred]
        if options.queue_delay_us:
            batching.append(("max_queue_delay_microseconds", options.queue_delay_us))
        fields.append(("dynamic_batching", batching))
    if options.response_cache:
        fields.append(("response_cache", [("enable", Word("true"))]))
    if model.backend == "python":
        for key, value in (("task", options.task), ("backend", options.backend)):
            fields.append(("parameters", [("key", key), ("value", [("string_value", value)])]))
    return text_format(fields)


def tensor_fields(tensor: ServedTensor) -> list[tuple[str, Any]]:
    return [("name", tensor.name), ("data_type", Word(tensor.kind)), *(("dims", size) for size in tensor.dims)]


class Word(str):
    """A value that the text format writes without quotes: an enumeration's, or true."""


def text_format(fields: Sequence[tuple[str, Any]], indent: str = "") -> str:
    """Protocol buffers' text format of fields in order; a list is a message, a repeated field comes several times."""
    lines = []
    for key, value in fields:
        if isinstance(value, list):
            lines.append(f"{indent}{key} {{\n{text_format(value, indent + '  ')}{indent}}}\n")
        elif isinstance(value, (int, Word)):
            lines.append(f"{indent}{key}: {value}\n")
        else:
            lines.append(f"{indent}{key}: {quoted(value)}\n")
    return "".join(lines)


def quoted(text: str) -> str:
    """A string of the text format; what is not plain ASCII is written as bytes of its UTF-8, in octal."""
    plain = (chr(b) if 32 <= b < 127 and chr(b) not in '"\\' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(plain)}"'


def default_name(manifest: Manifest, model: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", manifest.name).strip("-._") or "maskformer"
    return f"{stem[:100]}-{model}"


def write_repository(bundle: Bundle, options: TritonServerOptions) -> Path:
    """Write the model -> its folder.

    The folder appears whole or not at all. Into one that is there already only a new version is written, and only
    where its configuration is the same.

    Raises:
        ValueError: the bundle holds no such model, or a TensorRT for RTX engine alone; or the output lies in it.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(TritonServerOptions, arguments, prog="python -m maskformer_fast.deploy.triton_server")
    bundle = Bundle.open(options.bundle, options.digest)
    folder = write_repository(bundle, options)
    print(f"{folder}: serve it with tritonserver --model-repository={folder.parent.resolve()}")
    return 0


if __name__ == "__main__":
    run_command(main)
