"""Options of ``python -m maskformer_fast.deploy.triton_server``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from maskformer_fast.deploy.bundle.manifest import Precision
from maskformer_fast.deploy.runtime.selection import Backend

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class TritonServerOptions:
    """Write a model repository for NVIDIA's Triton Inference Server from a bundle.

    ``complete`` and ``raw`` serve the bundle's ONNX graphs by the server's ONNX Runtime, ``engine`` serves one of its
    TensorRT engines: images [3, H, W] in; labels, or class and mask logits, out. ``results`` serves the results of
    ``predict`` by the server's Python backend: images [H, W, 3] of any size in; labels, segments or instances out. This
    package must be installed there. A repository may hold many models. A model of the same name is not changed, except
    that a new version is added.
    """

    bundle: tyro.conf.Positional[str]
    """Bundle, as ``python -m maskformer_fast.export`` writes it."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "model_repository"
    """The repository, which is made if missing."""
    name: str | None = None
    """The model's name in the server; by default the bundle's name, a dash and the option ``model``."""
    model: Literal["complete", "raw", "engine", "results"] = "complete"
    """The part of the bundle that is served."""
    engine: str | None = None
    """File name of one of several engines."""
    task: Literal["semantic", "panoptic", "instance"] = "semantic"
    """With ``results``: the task."""
    backend: Backend = "auto"
    """With ``results``: the runtime's backend. ``auto`` takes TensorRT where the bundle has an engine for the GPU, else
    the CPU by openvino where it is installed, else onnxruntime; on the device cpu one of the latter two."""
    precision: Precision | None = None
    """With ``results``: precision of the network. On a CPU: fp32, bf16 (openvino, where the processor has it) or int8
    (an engine of openvino in the bundle); by default int8 where the bundle has it, else fp32."""
    version: int = 1
    """Number of this version; by default the server serves the highest one."""
    max_batch: int = 8
    """Largest batch that the server makes of requests of one size; an engine's profile may allow less."""
    queue_delay_us: int = 0
    """Microseconds that a request may wait for others to share its batch."""
    instances: int = 1
    """Number of copies of the model that run at once, on each GPU or on the CPU."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Device of the instances; an engine runs on GPUs only."""
    response_cache: bool = False
    """Answer repeated requests from the server's cache, which its ``--cache-config`` switches on."""
    digest: str | None = None
    """Expected digest of the bundle; any other bundle is refused."""

    def __post_init__(self) -> None:
        for name, low in (("version", 1), ("max_batch", 1), ("queue_delay_us", 0), ("instances", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} at least, got {getattr(self, name)}")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ValueError(f"name: expected letters, digits, '_', '.' and '-', at most 128, got {self.name!r}")
        if self.model == "engine" and self.device == "cpu":
            raise ValueError("device: expected gpu for an engine, got cpu")
        if self.engine is not None and self.model != "engine":
            raise ValueError(f"engine: expected none with --model {self.model}, got {self.engine!r}")
        if self.backend == "tensorrt" and self.device == "cpu":
            raise ValueError("device: expected gpu for the backend tensorrt, got cpu")
