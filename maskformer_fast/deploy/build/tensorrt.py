"""Building TensorRT engines from a bundle's ``raw`` graph, by TensorRT 10 and 11 and by TensorRT for RTX.

Only calls that both products share are used. The precision is written into the graph (`deploy.build.precision`), the
network is strongly typed, and TF32 is off, so that "fp32" is float32. The library runs in a process of its own
(`deploy.build.tensorrt_worker`), because a crash in the library would end this process.

TensorRT times kernels, so it builds on the GPU that the engine is for. TensorRT for RTX completes engines where they
are loaded. So it builds for other GPUs too, even on machines without a GPU (``EngineConfig.targets``).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write
from maskformer_fast.core.machine import installed_version
from maskformer_fast.deploy.build.deformable_attention import use_plugin
from maskformer_fast.deploy.bundle.manifest import OPENVINO, Engine, Precision, Profile, Shape, TensorSpec

__all__ = ["EngineConfig", "EngineError", "build_engine"]

Api = Literal["auto", "tensorrt", "tensorrt_rtx", "openvino"]
CalibrationMethod = Literal["entropy", "percentile", "max"]

APIS = ("tensorrt", "tensorrt_rtx")
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}  # library -> extra of this package that installs it
QUANTIZED = ("int8", "fp8")
OLDEST = {"fp8": 89, "bf16": 80}  # precision -> least compute capability that has its type
DEFAULTS = ((1, 256, 256), (1, 512, 512), (1, 1024, 1024))  # minimum, optimum, maximum of a dynamic graph
OPENVINO_OPTIONS = ("precision", "api", "opt_shape", "calibration", "calibration_images")
BAR = "{desc} {bar} {n:.0f}% {elapsed} {postfix}"
_MAX_OUTPUT = 2000  # characters of the library's output in an error


logger = logging.getLogger(__name__)


class EngineError(ValueError):
    """An engine that cannot be built as requested. The message names the node, option or limit that prevents it."""


_check = functools.partial(check, error=EngineError)


@dataclass(frozen=True)
class EngineConfig:
    """Options of the build of an engine: by TensorRT for a GPU, or an INT8 graph by OpenVINO for CPUs."""

    precision: Precision = "fp16"
    """Precision of most of the network; norms and softmax stay float32. int8 and fp8 need ``calibration``."""
    api: Api = "auto"
    """The library. ``auto`` takes tensorrt_rtx for given ``targets``, else tensorrt where it is installed. openvino
    serves int8, and takes its ``opt_shape`` and ``calibration`` alone: it runs other precisions without an engine."""
    min_shape: tuple[int, int, int] | None = None
    """Smallest batch, height, width. Unset: the graph's fixed sizes, and 1 256 256 for dynamic ones."""
    opt_shape: tuple[int, int, int] | None = None
    """Batch, height, width at which the engine is fastest. Unset: as for ``min_shape``, with 1 512 512."""
    max_shape: tuple[int, int, int] | None = None
    """Largest batch, height, width; memory grows with it. Unset: as for ``min_shape``, with 1 1024 1024."""
    builder_level: int = 3
    """Effort of the search for fast kernels, 0 to 5."""
    workspace_mib: int | None = None
    """Limit in MiB of the kernels' scratch memory. Unset: all of the GPU's memory."""
    timing_cache: str | None = None
    """File of kernel timings. It is read and extended, and makes later builds faster (tensorrt only)."""
    version_compatible: bool = False
    """Build an engine that also loads in later versions of the library, at some cost in speed (tensorrt only)."""
    refittable: bool = False
    """Build an engine whose weights can be exchanged later (not with ``targets``)."""
    targets: tuple[str, ...] = ()
    """GPUs to build for, as sm_89, present or not (tensorrt_rtx only). Unset: the GPU of this machine."""
    mask_dtype: Literal["float32", "float16"] = "float32"
    """Type of the mask logits; float16 halves what post-processing reads (with fp16, int8, fp8)."""
    deformable_attention: Literal["gathers", "plugin"] = "gathers"
    """Deformable attention of Mask2Former: by gathers, or by TensorRT's own plugin (tensorrt only, with fp32, fp16)."""
    calibration: str | None = None
    """Folder of typical images, searched recursively, by which ranges for int8 and fp8 are measured."""
    calibration_method: CalibrationMethod = "entropy"
    """Choice of ranges by the measured activations."""
    calibration_images: int = 256
    """Largest number of images, which are spread over the folder."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("precision", ("fp32", "fp16", "bf16", *QUANTIZED)), ("api", ("auto", *APIS, OPENVINO)),
            ("mask_dtype", ("float32", "float16")), ("calibration_method", ("entropy", "percentile", "max")),
            ("deformable_attention", ("gathers", "plugin")),
        ):
            _check(getattr(self, name) in choices, name, f"one of {', '.join(choices)}", getattr(self, name))
        for name in ("min_shape", "opt_shape", "max_shape"):
            shape = getattr(self, name)
            is_shape = shape is None or (len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape))
            _check(is_shape, name, "batch, height and width, each at least 1", shape)
        _check(0 <= self.builder_level <= 5, "builder_level", "0 to 5", self.builder_level)
        _check(self.workspace_mib is None or self.workspace_mib > 0, "workspace_mib", "at least 1", self.workspace_mib)
        _check(self.calibration_images > 0, "calibration_images", "at least 1", self.calibration_images)
        for target in self.targets:
            _check(re.fullmatch(r"sm_[1-9]\d{1,2}", target) is not None, "targets", "names such as sm_89", target)
        _check(len(set(self.targets)) == len(self.targets), "targets", "different GPUs", self.targets)
        quantized = self.precision in QUANTIZED
        _check(bool(self.calibration) == quantized, "calibration",
               "a folder of images" if quantized else f"none for {self.precision}", self.calibration)
        _check(self.mask_dtype == "float32" or self.precision not in ("fp32", "bf16"), "mask_dtype",
               f"float32 for {self.precision}", self.mask_dtype)
        _check(not self.targets or self.api != "tensorrt", "targets",
               "none: tensorrt builds for the GPU that is here (tensorrt_rtx for others)", self.targets)
        check_capability(self.precision, self.targets)
        has_plugin = self.precision in ("fp32", "fp16") and self.api in ("auto", "tensorrt") and not self.targets
        _check(self.deformable_attention == "gathers" or has_plugin, "deformable_attention",
               "gathers: the plugin is TensorRT's, for fp32 and fp16", self.deformable_attention)
        if self.api == OPENVINO:
            _check(self.precision == "int8", "precision", "int8 with openvino, which runs others without an engine",
                   self.precision)
            for field in fields(self):
                got = getattr(self, field.name)
                _check(field.name in OPENVINO_OPTIONS or got == field.default, field.name,
                       "nothing: openvino does not have this option", got)


def build_engine(raw_onnx: bytes, config: EngineConfig, progress: bool = True) -> tuple[bytes, Engine]:
    """Build an engine of the ``raw`` flavour.

    Args:
        raw_onnx: float32 graph, ``images`` uint8 [B, 3, H, W] -> ``class_logits``, ``mask_logits``.
        config: options.
        progress: show a bar on stderr; a build takes half a minute to many minutes.

    Returns:
        The engine file and its entry in the manifest. Where a GPU is present that can load the engine, its inputs and
        outputs have been compared with the graph's.

    Raises:
        EngineError: an option that the library does not have, a node that it cannot translate, shapes that the graph
            does not take, or a build that failed, crashed, or was killed.
        ModuleNotFoundError: the library, or a package that quantisation needs, is not installed.
    """
    import onnx
    from google.protobuf.message import DecodeError

    api = select_api(config)
    try:
        model = onnx.load_from_string(raw_onnx)
    except DecodeError as error:
        raise EngineError(f"raw_onnx: expected an ONNX graph, got {len(raw_onnx)} other bytes: {error}") from None
    sizes = {output.name: output.type.tensor_type.shape.dim for output in model.graph.output}
    profile = make_profile(model, config)
    if config.deformable_attention == "plugin":
        _check(api == "tensorrt", "deformable_attention", f"gathers: {api} has no plugins", "plugin")
        _check(use_plugin(model, plugin_version()) > 0, "deformable_attention", "gathers: this network has none",
               "plugin")
    model = _in_precision(model, config, profile, progress)
    with tempfile.TemporaryDirectory(prefix="maskformer_fast_engine_") as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        del model
        job = {**asdict(config), "api": api, "profile": [_dimensions(s) for s in
                                                         (profile.minimum, profile.optimum, profile.maximum)]}
        (folder / "job.json").write_text(json.dumps(job))
        if config.timing_cache is not None and Path(config.timing_cache).exists():
            (folder / "timing.cache").write_bytes(Path(config.timing_cache).read_bytes())
        answer = _run_worker(folder, progress)
        content = (folder / "model.engine").read_bytes()
        if config.timing_cache is not None:
            try:
                with atomic_write(config.timing_cache) as file:
                    file.write((folder / "timing.cache").read_bytes())
            except OSError as error:  # the engine took minutes and is complete without the cache
                logger.warning("timing_cache: not written, so the next build is not faster: %s", error)
    targets = tuple(answer["targets"])
    names = "-".join(targets)
    options: dict[str, str | int | bool] = {
        "builder_level": config.builder_level, "version_compatible": config.version_compatible,
        "refittable": config.refittable, "loaded": answer["loaded"],
    }
    if config.deformable_attention != "gathers":
        options["deformable_attention"] = config.deformable_attention
    if config.workspace_mib is not None:
        options["workspace_mib"] = config.workspace_mib
    if config.precision in QUANTIZED:
        options["calibration_method"] = config.calibration_method
    engine = Engine(
        file=f"engines/{config.precision}_{profile.maximum}_{names}.engine", api=api,
        api_version=answer["version"], precision=config.precision, targets=targets, profile=profile, options=options,
        outputs=tuple(
            TensorSpec(name, dtype, tuple(
                size.dim_value or size.dim_param or f"{name}_{axis}" for axis, size in enumerate(sizes[name])
            ))
            for name, dtype, _ in answer["outputs"]
        ),
    )
    return content, engine


def select_api(config: EngineConfig) -> Literal["tensorrt", "tensorrt_rtx"]:
    """Choose the library, which must be installed and have the requested options.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra that installs it.
        EngineError: it lacks an option.
    """
    order: tuple[Any, ...] = (config.api,) if config.api != "auto" else APIS[::-1] if config.targets else APIS
    if config.targets:
        order = ("tensorrt_rtx",)
    for api in order:
        if importlib.util.find_spec(api) is not None:
            break
    else:
        extras = " or ".join(f"maskformer_fast[{EXTRAS[api]}]" for api in order)
        raise ModuleNotFoundError(f"{' or '.join(order)}: not installed (pip install {extras})")
    if api == "tensorrt_rtx":
        _check(config.timing_cache is None, "timing_cache", "none: TensorRT for RTX times nothing when it builds",
               config.timing_cache)
        _check(not config.version_compatible, "version_compatible",
               "False: engines of TensorRT for RTX belong to its version", config.version_compatible)
        # Version 1.7 fails inside its compiler (CHECK(sm_vers_.size() == 1)), for one target as for several.
        _check(not (config.refittable and config.targets), "refittable",
               "False with targets: TensorRT for RTX refits engines of the GPU it builds on alone", config.refittable)
    return api


def plugin_version() -> str:
    """Version of the plugin of deformable attention that the installed TensorRT recommends."""
    numbers = [int(part) for part in (installed_version("tensorrt") or "10.0").split(".")[:2]]
    return "2" if numbers >= [10, 11] else "1"


def check_capability(precision: str, targets: tuple[str, ...]) -> None:
    """Raise `EngineError` where a target lacks the type of the precision."""
    for target in targets:
        _check(int(target[3:]) >= OLDEST.get(precision, 0), "precision",
               f"one that {target} has ({precision} starts at sm_{OLDEST.get(precision)})", precision)


def make_profile(model: Any, config: EngineConfig) -> Profile:
    """Shapes of the engine: those of the config; where unset, the graph's fixed sizes or defaults.

    Raises:
        EngineError: shapes that the graph does not take, or a graph with other inputs than ``images`` uint8
            [B, 3, H, W] or other outputs than those of the flavour ``raw``.
    """
    from onnx import TensorProto

    names, outputs = [i.name for i in model.graph.input], [output.name for output in model.graph.output]
    _check(names == ["images"], "raw_onnx", "one input, images uint8 [B, 3, H, W]", names)
    tensor = model.graph.input[0].type.tensor_type
    is_batch = tensor.elem_type == TensorProto.UINT8 and len(tensor.shape.dim) == 4
    _check(is_batch, "raw_onnx", "images uint8 [B, 3, H, W]", str(tensor).replace("\n", " "))
    _check(outputs == ["class_logits", "mask_logits"], "raw_onnx", "the outputs class_logits, mask_logits", outputs)
    fixed: tuple[int | None, ...] = tuple(tensor.shape.dim[axis].dim_value or None for axis in (0, 2, 3))

    def filled(default: tuple[int, ...], best: tuple[int, ...], choose: Callable[[int, int], int]) -> tuple[int, ...]:
        return tuple(n or choose(d, b) for n, d, b in zip(fixed, default, best, strict=True))

    best = config.opt_shape or filled(DEFAULTS[1], DEFAULTS[1], max)
    chosen = {
        "min_shape": config.min_shape or filled(DEFAULTS[0], best, min), "opt_shape": best,
        "max_shape": config.max_shape or filled(DEFAULTS[2], best, max),
    }
    for name, shape in chosen.items():
        fits = all(size in (None, n) for size, n in zip(fixed, shape, strict=True))
        _check(fits, name, f"the graph's fixed sizes {fixed}", shape)
    shapes = [Shape(*shape) for shape in chosen.values()]
    try:
        return Profile(*shapes)
    except ValueError as error:
        raise EngineError(f"min_shape, opt_shape, max_shape: {error}") from None


def _in_precision(model: Any, config: EngineConfig, profile: Profile, progress: bool) -> Any:
    """Convert the graph to the precision of the config."""
    from maskformer_fast.deploy.build.precision import to_half

    if config.precision == "fp32":
        return model
    if config.precision in QUANTIZED:
        from maskformer_fast.deploy.build.quantize import quantize

        assert config.calibration is not None  # checked by EngineConfig
        best = profile.optimum
        model = quantize(model, "int8" if config.precision == "int8" else "fp8", Path(config.calibration),
                         (best.height, best.width), method=config.calibration_method,
                         limit=config.calibration_images, progress=progress)
    half_outputs = ("mask_logits",) if config.mask_dtype == "float16" else ()
    return to_half(model, "bf16" if config.precision == "bf16" else "fp16", half_outputs=half_outputs)


def _run_worker(folder: Path, progress: bool) -> dict[str, Any]:
    """Run the worker process on a folder and show its progress -> its answer. Raises `EngineError`."""
    command = [sys.executable, "-m", "maskformer_fast.deploy.build.tensorrt_worker", str(folder)]
    # The package may be importable only because of the working folder.
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    answer: dict[str, Any] = {}
    phase = "start"
    with (
        open(folder / "stderr", "w+b") as errors,
        tqdm(total=100, desc="engine", disable=not progress, bar_format=BAR) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace",
                         env={**os.environ, "PYTHONPATH": path}) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith('{"event"'):
                    continue  # libraries print too
                event = json.loads(line)
                if event["event"] == "progress":
                    phase = event["phase"]
                    bar.set_postfix_str(phase, refresh=False)
                    bar.update(max(0.0, 100 * event["done"] - bar.n))
                else:
                    answer = event
            status = process.wait()
            bar.update(100 - bar.n if answer.get("event") == "built" else 0)
        finally:
            if process.poll() is None:
                process.kill()
        errors.seek(0)
        output = errors.read()[-_MAX_OUTPUT:].decode(errors="replace").strip()
    if answer.get("event") == "built" and status == 0:
        return answer
    if answer.get("event") == "failed":
        raise EngineError(answer["message"])
    if status < 0:
        cause = signal.Signals(-status).name
        hint = ("memory has run out, most likely" if cause == "SIGKILL"
                else "the library crashed; other shapes, another builder_level or another version may do")
        raise EngineError(f"build ended by {cause} in phase {phase!r}: {hint}\n{output}".strip())
    raise EngineError(f"build ended with status {status} in phase {phase!r}\n{output}".strip())


def _dimensions(shape: Shape) -> tuple[int, int, int, int]:
    return (shape.batch, 3, shape.height, shape.width)
