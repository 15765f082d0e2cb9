"""Choice of what runs a bundle on this machine: TensorRT on a GPU, or a library on the CPU, and its precision."""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple, get_args

from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.deploy.bundle.manifest import OPENVINO, BundleError, Manifest, Precision
from maskformer_fast.deploy.runtime.cuda_driver import Driver, architecture, find_device

BackendName = Literal["onnxruntime", "openvino", "tensorrt"]
Backend = Literal["auto", "onnxruntime", "openvino", "tensorrt"]
CPU_BACKENDS: dict[BackendName, str] = {"openvino": "openvino", "onnxruntime": "deploy"}
"""Libraries that run bundles on a CPU, the fastest first -> the extra of this package that installs it."""
CPU_PRECISIONS: dict[BackendName, tuple[Precision, ...]] = {
    "openvino": ("fp32", "bf16", "int8"), "onnxruntime": ("fp32",),
}  # fmt: skip
BUILD_COMMAND = "python -m maskformer_fast.export BUNDLE --engine-only"
INT8_COMMAND = f"{BUILD_COMMAND} --engine.api openvino --engine.precision int8 --engine.calibration PICTURES"


class Choice(NamedTuple):
    """What runs a bundle, and why."""

    backend: BackendName
    precision: Precision | None  # None: that of the TensorRT engine
    reason: str  # to log


def choose_backend(
    manifest: Manifest, backend: Backend = "auto", device: int | None = 0, precision: Precision | None = None
) -> Choice:
    """Choose what runs a bundle, by the manifest, the driver and the list of installed libraries; nothing is loaded.

    Args:
        backend: ``auto`` takes TensorRT where it can run the bundle, else the first of `CPU_BACKENDS` that is installed
            and has the precision.
        device: number of the CUDA device; None for the CPU.
        precision: of the network. None: on a CPU int8 by OpenVINO where the bundle has such an engine, else fp32; on a
            GPU that of the first engine that fits.

    Raises:
        BundleError: the bundle has no engine for this GPU, or no engine of this precision.
        ModuleNotFoundError: a library that the backend needs is not installed.
        ValueError: a wrong value of an argument, or a device or a precision that the backend does not have.
    """
    check_choice("backend", backend, get_args(Backend))
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
    check(device is None or device >= 0, "device", ">= 0", device)
    obstacle: Exception | None = None
    if backend in ("auto", "tensorrt"):
        check(backend == "auto" or device is not None, "device", "one that tensorrt runs on", "cpu")
        obstacle = None if device is None else tensorrt_obstacle(manifest, device, precision)
        if device is not None and obstacle is None:
            return Choice("tensorrt", precision, "on the GPU by tensorrt")
        if backend == "tensorrt" and obstacle is not None:
            raise obstacle
    name = _cpu_library(precision) if backend == "auto" or backend == "tensorrt" else backend
    known = CPU_PRECISIONS[name]
    check(precision is None or precision in known, "precision", f"{' or '.join(known)} with the backend {name}",
          precision)  # fmt: skip
    engines = [engine for engine in manifest.engines if engine.api == OPENVINO]
    if precision == "int8" and not engines:
        raise BundleError(f"engines: expected one of openvino in int8, got none; build it with: {INT8_COMMAND}")
    why = []
    if name != backend:
        faster = list(CPU_BACKENDS)[: list(CPU_BACKENDS).index(name)]  # they have all precisions
        why.append(f"as {' and '.join(faster)} is not installed" if faster else "the fastest library")
    if precision is None:
        has_int8 = name == "openvino" and bool(engines)
        precision = "int8" if has_int8 else "fp32"
        why += ["for which the bundle has an engine"] if has_int8 else []
    reason = f"on the CPU by {name} in {precision}" + (f" ({', '.join(why)})" if why else "")
    return Choice(name, precision, reason + (f", not by tensorrt: {obstacle}" if obstacle else ""))


def _cpu_library(precision: Precision | None) -> BackendName:
    """The fastest installed library that has the precision."""
    having = [name for name in CPU_BACKENDS if precision is None or precision in CPU_PRECISIONS[name]]
    check(bool(having), "precision", f"one of {', '.join(CPU_PRECISIONS['openvino'])} on a CPU", precision)
    for name in having:
        if importlib.util.find_spec(name) is not None:
            return name
    commands = " or ".join(f"pip install maskformer_fast[{CPU_BACKENDS[name]}]" for name in having)
    wanted = "" if precision is None else f" in {precision}"
    raise ModuleNotFoundError(
        f"{' or '.join(having)} is needed to run a bundle on the CPU{wanted}; install it with: {commands}",
        name=having[0],
    )


def tensorrt_obstacle(manifest: Manifest, device: int, precision: Precision | None = None) -> Exception | None:
    """The error to raise if TensorRT cannot run a bundle on CUDA device number ``device``; None if it can.

    Only the manifest, the driver and the list of installed libraries are consulted. Nothing is loaded from the bundle.
    """
    if manifest.channels:
        return BundleError(f"graphs: expected those of a network of RGB for a GPU, got {manifest.channels} bands, "
                           "which run on a CPU")
    engines = [engine for engine in manifest.engines if engine.api != OPENVINO]
    if not engines:
        return BundleError(f"engines: expected one for this GPU, got a bundle without engines; build it with: "
                           f"{BUILD_COMMAND}")
    try:
        target = gpu_target(device)
    except (ImportError, ValueError) as error:
        return error
    fitting = [engine for engine in engines if target in engine.targets]
    if not fitting:
        known = sorted({known for engine in engines for known in engine.targets})
        return BundleError(f"engines: expected one for this GPU ({target}), got those for {', '.join(known)}; build it "
                           f"on this machine with: {BUILD_COMMAND}")
    if precision not in (None, *(engine.precision for engine in fitting)):
        got = ", ".join(sorted({engine.precision for engine in fitting}))
        return BundleError(f"engines: expected one for this GPU ({target}) in {precision}, got {got}; build it on this "
                           f"machine with: {BUILD_COMMAND} --engine.precision {precision}")
    if target not in manifest.kernels:
        got = ", ".join(manifest.kernels) or "none"
        return BundleError(f"kernels: expected those for this GPU ({target}), got {got}; export the bundle again with: "
                           f"--target {target}")
    apis = sorted({engine.api for engine in fitting if precision in (None, engine.precision)})
    if not any(importlib.util.find_spec(api) for api in apis):
        return ModuleNotFoundError(
            f"{' or '.join(apis)} is needed to run this bundle's engine; install it with: pip install {apis[0]}",
            name=apis[0],
        )
    return None


def gpu_target(device: int) -> str:
    """Architecture of a CUDA device by the name that engines and kernels have: ``sm_87``.

    Raises:
        ModuleNotFoundError: cuda-python is not installed.
        ValueError: there is no driver, or no such device.
    """
    try:
        driver = Driver()
        return architecture(driver, find_device(driver, device))
    except RuntimeError as error:
        raise ValueError(f"device: {error}") from error
