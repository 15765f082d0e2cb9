"""Runs a bundle's graph on the CPU by OpenVINO."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskformer_fast.core.checks import check
from maskformer_fast.deploy.bundle.manifest import expect
from maskformer_fast.deploy.runtime.cpu_session import FLAVOUR, INPUT, OUTPUTS, CpuPrecision, Tensor

TYPES = {"f32": "tensor(float)", "u8": "tensor(uint8)"}
HINTS: dict[CpuPrecision, str] = {"fp32": "f32", "bf16": "bf16"}


class OpenvinoSession:
    """A `maskformer_fast.deploy.runtime.cpu_session.CpuSession`. All threads share one stream of the processor."""

    def __init__(self, graph: bytes, threads: int, precision: CpuPrecision = "fp32") -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "openvino is needed to run a bundle by the backend openvino; install it with: pip install openvino "
                "(or maskformer_fast[openvino])", name=error.name
            ) from error
        core = openvino.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        check(precision.upper() in capabilities, "precision", "one that this processor has (fp32)", precision)
        settings = {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
        }  # fmt: skip
        try:
            self._model = core.compile_model(core.read_model(graph), "CPU", settings)
        except RuntimeError as error:
            expect(False, f"graphs.{FLAVOUR}", "a graph that OpenVINO runs", str(error).strip().splitlines()[-1])
            raise
        self.inputs = [_tensor(port) for port in self._model.inputs]
        self.outputs = [_tensor(port) for port in self._model.outputs]
        self._requests = threading.local()  # a request runs one batch at a time

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """Run the network, see `CpuSession.run`."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._model.create_infer_request()
        found = self._requests.own.infer({INPUT: images})
        return [found[name] for name in OUTPUTS]


def _tensor(port: Any) -> Tensor:
    kind = port.get_element_type().get_type_name()
    shape = port.get_partial_shape()
    sizes = None if shape.rank.is_dynamic else [None if size.is_dynamic else size.get_length() for size in shape]
    return Tensor(port.get_any_name(), TYPES.get(kind, kind), sizes)
