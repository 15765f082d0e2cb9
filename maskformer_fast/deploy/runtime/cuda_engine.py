"""A bundle's TensorRT engine: choice, checks and execution, by the libraries tensorrt and tensorrt_rtx alike."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import BundleError, Manifest, Precision, Shape, expect
from maskformer_fast.deploy.bundle.manifest import Engine as EngineEntry

INPUT = "images"
OUTPUTS = ("class_logits", "mask_logits")
_INSTALL = {"tensorrt": "pip install maskformer_fast[tensorrt]", "tensorrt_rtx": "pip install maskformer_fast[rtx]"}


def choose_engine(manifest: Manifest, target: str, precision: Precision | None = None) -> tuple[EngineEntry, Any]:
    """Choose the first engine of a bundle for this GPU whose library is installed -> its entry, the library.

    With a precision, only engines of that precision are considered.

    Raises:
        BundleError: the bundle has none for this GPU, or its library has another version.
        ModuleNotFoundError, OSError: its library is not installed, or does not load.
    """
    engines = [
        engine for engine in manifest.engines if target in engine.targets and precision in (None, engine.precision)
    ]
    known = ", ".join(sorted({name for engine in manifest.engines for name in engine.targets})) or "none"
    expect(bool(engines), "engines", f"one for this GPU ({target})", f"those for {known}")
    reason: Exception | None = None
    for engine in engines:
        try:
            library = importlib.import_module(engine.api)
        except ModuleNotFoundError as error:
            reason = reason or ModuleNotFoundError(
                f"{engine.api} is needed to run {engine.file}; install it with: {_INSTALL[engine.api]}", name=error.name
            )
            continue
        except (ImportError, OSError) as error:  # its own shared libraries, or those of CUDA, do not load
            reason = reason or OSError(f"{engine.api}: expected a library that loads, got: {error}")
            continue
        version = str(library.__version__)
        if runs(engine, version):
            return engine, library
        reason = BundleError(
            f"{engine.file}: expected {engine.api} {engine.api_version}, which built the engine, got {version}; build "
            "it again with: python -m maskformer_fast.export BUNDLE --engine-only"
        )
    assert reason is not None  # there is an engine, and it is not usable
    raise reason


def runs(engine: EngineEntry, version: str) -> bool:
    """Whether a library of this version runs the engine.

    The version is that of the build, or, for version-compatible engines, a later one with the same major number.
    """
    if engine.api_version == version:
        return True
    if not engine.options.get("version_compatible", False):
        return False
    built, here = (_numbers(text) for text in (engine.api_version, version))
    return built[:1] == here[:1] and here >= built


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in version.split(".")]


class Network:
    """A deserialised engine. Errors contain the messages of the library."""

    def __init__(self, bundle: Bundle, entry: EngineEntry, library: Any) -> None:
        """Deserialise the engine. Raises BundleError where the library or the manifest disagrees with it."""
        self.entry = entry
        self._library = library
        self._logger = _logger(library)
        if entry.options.get("deformable_attention") == "plugin":
            library.init_libnvinfer_plugins(self._logger, "")
        self._runtime = library.Runtime(self._logger)
        if entry.options.get("version_compatible", False) and hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(bundle.read(entry.file))
        if self._engine is None:
            raise BundleError(f"{entry.file}: {entry.api} refuses the engine{self._explain()}")
        self._check()

    def context(self, images: Shape) -> Context:
        """An execution context for one shape of input. The caller provides its memory."""
        library = self._library
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self._engine, "create_runtime_config"):
            settings = self._engine.create_runtime_config()
            settings.set_execution_context_allocation_strategy(strategy)
            if hasattr(library, "DynamicShapesKernelSpecializationStrategy"):  # RTX: compile now, not under capture
                settings.dynamic_shapes_kernel_specialization_strategy = (
                    library.DynamicShapesKernelSpecializationStrategy.EAGER
                )
            context = self._engine.create_execution_context(settings)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise RuntimeError(f"{self.entry.file}: no execution context{self._explain()}")
        return Context(context, images, self)

    def fail(self, what: str) -> RuntimeError:
        """Make an error with the library's last messages."""
        return RuntimeError(f"{self.entry.file}: {what}{self._explain()}")

    def close(self) -> None:
        """Release the engine. Its contexts must be closed before."""
        self._engine = self._runtime = None

    def _explain(self) -> str:
        text = "; ".join(self._logger.messages[-3:])
        self._logger.messages.clear()
        return f": {text}" if text else ""

    def _check(self) -> None:
        """Raise `BundleError` unless inputs and outputs have the manifest's names and types."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        expect(sorted(names) == sorted((INPUT, *OUTPUTS)), f"{self.entry.file}, tensors", str((INPUT, *OUTPUTS)), names)
        types = {spec.name: spec.dtype for spec in self.entry.outputs} | {INPUT: "uint8"}
        for name in names:
            dtype = {"half": "float16", "float": "float32"}.get(kind := _type_name(self._engine, name), kind)
            expect(dtype == types.get(name), f"{self.entry.file}, {name}", str(types.get(name)), dtype)


class Context:
    """An execution context of one shape, bound once to addresses: a captured CUDA graph must not change."""

    def __init__(self, context: Any, images: Shape, network: Network) -> None:
        self._context = context
        self._network = network
        shape = (images.batch, 3, images.height, images.width)
        if context.active_optimization_profile != 0:  # older versions do not choose the only profile by themselves
            context.set_optimization_profile_async(0, 0)
        if not context.set_input_shape(INPUT, shape):
            raise network.fail(f"does not take images of shape {shape}")
        self.scratch_bytes = int(context.update_device_memory_size_for_shapes())
        """Bytes of device memory that the network needs while it runs."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an output."""
        return tuple(self._context.get_tensor_shape(name))

    def bind(self, scratch: int, scratch_bytes: int, addresses: dict[str, int]) -> None:
        """Set the addresses of scratch memory, input and outputs."""
        if self.scratch_bytes > scratch_bytes:
            raise self._network.fail(f"needs {self.scratch_bytes} bytes of memory, {scratch_bytes} were set aside")
        self._context.set_device_memory(scratch, scratch_bytes)
        for name in (INPUT, *OUTPUTS):
            if not self._context.set_tensor_address(name, addresses[name]):
                raise self._network.fail(f"does not take an address for {name}")

    def capturable(self, stream: Any) -> bool:
        """Whether a run can be captured in a CUDA graph; True where the library (all but RTX's) does not say."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(int(stream)))

    def enqueue(self, stream: Any) -> None:
        """Enqueue one run on a stream."""
        if not self._context.execute_async_v3(int(stream)):
            raise self._network.fail("the network could not be launched")

    def close(self) -> None:
        """Release the context, before its engine and while its device is current."""
        self._context = None


def check_outputs(context: Context, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Raise `BundleError` unless the outputs have the shapes that the launches were recorded with."""
    for name, shape in shapes:
        expect(context.shape(name) == shape, f"shape of {name}", f"{shape}, as recorded", context.shape(name))


def _type_name(engine: Any, name: str) -> str:
    """Type of a tensor as the library's enumeration names it, in small letters: uint8, int32, half, float."""
    return str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1].lower()


@functools.cache
def _logger(library: Any) -> Any:
    """Logger that keeps the library's errors for `Network.fail` and prints nothing.

    It is one for the process: of several loggers TensorRT takes the first, and expects it to stay.
    """

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self.messages.append(message.strip()[:500])
                del self.messages[:-20]

    return Logger()
