"""Check whether TensorRT can run a bundle on this machine: engine, kernels, GPU and libraries."""

from __future__ import annotations

import importlib.util
from typing import Literal

from maskformer_fast.deploy.bundle.manifest import BundleError, Manifest
from maskformer_fast.deploy.runtime.cuda_driver import Driver, architecture, find_device

BackendName = Literal["onnxruntime", "openvino", "tensorrt"]
BUILD_COMMAND = "python -m maskformer_fast.export BUNDLE --engine-only"


def tensorrt_obstacle(manifest: Manifest, device: int) -> Exception | None:
    """The error to raise if TensorRT cannot run a bundle on CUDA device number ``device``; None if it can.

    Only the manifest, the driver and the list of installed libraries are consulted. Nothing is loaded from the bundle.
    """
    if not manifest.engines:
        return BundleError(f"engines: expected one for this GPU, got a bundle without engines; build it with: "
                           f"{BUILD_COMMAND}")
    try:
        target = gpu_target(device)
    except (ImportError, ValueError) as error:
        return error
    fitting = [engine for engine in manifest.engines if target in engine.targets]
    if not fitting:
        known = sorted({known for engine in manifest.engines for known in engine.targets})
        return BundleError(f"engines: expected one for this GPU ({target}), got those for {', '.join(known)}; build it "
                           f"on this machine with: {BUILD_COMMAND}")
    if target not in manifest.kernels:
        got = ", ".join(manifest.kernels) or "none"
        return BundleError(f"kernels: expected those for this GPU ({target}), got {got}; export the bundle again with: "
                           f"--target {target}")
    apis = sorted({engine.api for engine in fitting})
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
