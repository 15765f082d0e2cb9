"""The process that builds one TensorRT engine: ``python -m maskformer_fast.deploy.build.tensorrt_worker FOLDER``.

It reads ``job.json``, ``model.onnx`` and, if present, ``timing.cache`` from the folder, and writes ``model.engine`` and
``timing.cache``. It prints progress and outcome on standard output, one JSON object a line.
`maskformer_fast.deploy.build.tensorrt` starts it, and reports the cause if it dies.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLDEST_VERSION = 10
DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8",
}
_KEPT_MESSAGES = 8


class BuildError(Exception):
    """An error whose message is shown to the user."""


def send(event: str, **content: object) -> None:
    """Print one line for the process that started this one."""
    print(json.dumps({"event": event, **content}), flush=True)


def make_logger(trt: Any, messages: list[str]) -> Any:
    """Make a logger of the library that keeps the last errors in ``messages`` and prints warnings to stderr."""
    severities = trt.ILogger.Severity
    errors = (severities.INTERNAL_ERROR, severities.ERROR)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                messages.append(message)
                del messages[:-_KEPT_MESSAGES]
            if severity in errors or severity == severities.WARNING:
                print(message, file=sys.stderr, flush=True)

    return Logger()


class Progress:
    """Share of the work that is done, from nested phases: inner phases count as a part of the outer phase's step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}  # phase -> steps done, steps
        self.parents: dict[str, str | None] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Begin a phase, inside ``parent`` or as an outermost one."""
        self.steps[phase] = [0, max(steps, 1)]
        self.parents[phase] = parent

    def step(self, phase: str, step: int) -> None:
        """Finish step number ``step``, counted from 0."""
        if phase in self.steps:
            self.steps[phase][0] = step + 1

    def finish(self, phase: str) -> None:
        """End a phase. The library finishes the step of its parent in a call of its own."""
        self.steps.pop(phase, None)
        self.parents.pop(phase, None)

    def done(self) -> float:
        """Share from 0 to 1: that of the outermost phase which is furthest."""
        roots = [phase for phase, parent in self.parents.items() if parent not in self.steps]
        return max((self._share(phase) for phase in roots), default=0.0)

    def _share(self, phase: str) -> float:
        finished, steps = self.steps[phase]
        inner = max((self._share(p) for p, parent in self.parents.items() if parent == phase), default=0.0)
        return min((finished + inner) / steps, 1.0)


def make_monitor(trt: Any) -> Any:
    """Make a progress monitor of the library that sends an event for each per cent."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.progress = Progress()
            self.sent = -1  # last per cent
            self.lock = threading.Lock()  # any thread of the library may call

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                self.progress.step(phase_name, step)
                done = self.progress.done()
                if int(100 * done) > self.sent:
                    self.sent = int(100 * done)
                    send("progress", phase=phase_name, done=done)
            return True  # continue the build

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.progress.finish(phase_name)

    return Monitor()


def own_target() -> str | None:
    """Architecture of the first GPU, as ``sm_89``; None without a GPU or a driver."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BuildError(f"cuda-python: not installed (pip install maskformer_fast[deploy]): {error}") from None
    attribute = driver.CUdevice_attribute
    try:
        if int(driver.cuInit(0)[0]) != 0:
            return None
        major, minor = (
            driver.cuDeviceGetAttribute(which, 0)[1]
            for which in (attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                          attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        )
    except RuntimeError:  # no driver library to call
        return None
    return f"sm_{major}{minor}"


def set_flag(trt: Any, config: Any, name: str, option: str) -> None:
    """Set a builder flag. Raises `BuildError` where this version does not have it."""
    if not hasattr(trt.BuilderFlag, name):
        raise BuildError(f"{option}: {trt.__name__} {trt.__version__} does not have it (no BuilderFlag.{name})")
    config.set_flag(getattr(trt.BuilderFlag, name))


def parse(trt: Any, builder: Any, logger: Any, model: bytes) -> tuple[Any, Any]:
    """Parse ONNX -> a strongly typed network, and the parser, which owns its weights."""
    flags = trt.NetworkDefinitionCreationFlag
    # In later versions all networks are strongly typed, and the flag may be gone.
    typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if parser.parse(model):
        return network, parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = dict.fromkeys(f"{e.node_operator() or 'graph'} {e.node_name()!r}: {e.desc()}" for e in errors)
    raise BuildError(f"{trt.__name__} {trt.__version__} cannot translate the graph:\n  " + "\n  ".join(lines))


def configure(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    """Configuration of the builder, with every option set. Raises `BuildError` for one that the library lacks."""
    config = builder.create_builder_config()
    config.builder_optimization_level = job["builder_level"]
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # engines that allocate cannot be captured as CUDA graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if job["workspace_mib"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_mib"] << 20)
    if job["version_compatible"]:
        set_flag(trt, config, "VERSION_COMPATIBLE", "version_compatible")
    if job["refittable"]:
        set_flag(trt, config, "REFIT", "refittable")
    if job["targets"]:
        set_targets(trt, config, job["targets"])
    shapes = [tuple(shape) for shape in job["profile"]]
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"min_shape, opt_shape, max_shape: not accepted: {shapes}")
    return config


def set_targets(trt: Any, config: Any, targets: list[str]) -> None:
    """Set the compute capabilities to build for."""
    known = {f"sm_{name[2:]}": value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if target not in known or not config.set_compute_capability(known[target], index):
            raise BuildError(f"targets: expected some of {', '.join(known)} ({trt.__name__} {trt.__version__} "
                             f"builds for no others), got {target}")


def use_timing_cache(config: Any, path: Path) -> Any:
    """Start from cached timings, except those of another GPU or version."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):  # None for a file that is no cache
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def tensors(count: int, get: Callable[[int], Any]) -> list[tuple[str, str, int]]:
    """Name, dtype and number of dimensions of each input or output of a network."""
    return [(tensor.name, DTYPES[tensor.dtype.name], len(tensor.shape)) for tensor in map(get, range(count))]


def check_engine(
    trt: Any, logger: Any, content: bytes, version_compatible: bool, expected: list[tuple[str, str, int]],
    messages: list[str],
) -> None:  # fmt: skip
    """Load the engine and compare its inputs and outputs with the network's."""
    runtime = trt.Runtime(logger)
    if version_compatible:  # such an engine contains code for the host, which must be allowed
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BuildError("the engine was built but cannot be loaded here:\n  " + "\n  ".join(messages))
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    actual = [
        (name, DTYPES[engine.get_tensor_dtype(name).name], len(engine.get_tensor_shape(name))) for name in names
    ]
    if sorted(actual) != sorted(expected):
        raise BuildError(f"the engine's inputs and outputs are {actual}, the graph's {expected}")


def build(folder: Path) -> dict[str, Any]:
    """Build the engine in ``folder`` -> version, targets, outputs, and whether the engine was loaded for a check."""
    job = json.loads((folder / "job.json").read_text())
    trt = importlib.import_module(job["api"])
    if int(trt.__version__.split(".")[0]) < OLDEST_VERSION and job["api"] == "tensorrt":
        raise BuildError(f"tensorrt: expected version {OLDEST_VERSION} or later, got {trt.__version__}")
    here = own_target()
    if here is None and not job["targets"]:
        raise BuildError(
            "targets: expected the GPUs to build for, as there is none here" if job["api"] == "tensorrt_rtx" else
            "there is no GPU here, and tensorrt builds on the GPU the engine is for"
        )
    targets = job["targets"] or [here]
    from maskformer_fast.deploy.build.tensorrt import check_capability

    check_capability(job["precision"], tuple(targets))
    messages: list[str] = []
    logger = make_logger(trt, messages)
    if job["deformable_attention"] == "plugin":
        trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network, parser = parse(trt, builder, logger, (folder / "model.onnx").read_bytes())
    config = configure(trt, builder, job)
    config.progress_monitor = monitor = make_monitor(trt)  # the library does not keep it alive
    cache = None
    if job["timing_cache"] is not None:
        cache = use_timing_cache(config, folder / "timing.cache")
    serialized = builder.build_serialized_network(network, config)
    del monitor
    if serialized is None:
        reasons = "\n  ".join(messages) or "no reason was given"
        raise BuildError(f"{job['api']} {trt.__version__} could not build the engine:\n  {reasons}")
    content = bytes(serialized)
    inputs = tensors(network.num_inputs, network.get_input)
    outputs = tensors(network.num_outputs, network.get_output)
    loadable = here in targets
    if loadable:
        check_engine(trt, logger, content, job["version_compatible"], inputs + outputs, messages)
    (folder / "model.engine").write_bytes(content)
    if cache is not None:
        (folder / "timing.cache").write_bytes(bytes(cache.serialize()))
    del parser
    return {"version": trt.__version__, "targets": targets, "outputs": outputs, "loaded": loadable}


def main() -> int:
    """Entry point; returns the exit status, 1 after an error that was sent."""
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        send("built", **build(Path(sys.argv[1])))
    except (BuildError, ValueError, ImportError) as error:
        send("failed", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    # Libraries' own prints go to stderr, so that standard output has JSON lines alone.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.exit(main())
