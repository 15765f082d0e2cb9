"""Runs a bundle's graph on the CPU by OpenVINO."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskformer_fast.core.checks import check
from maskformer_fast.core.machine import has_bfloat16
from maskformer_fast.deploy.bundle.manifest import Precision, expect
from maskformer_fast.deploy.runtime.cpu_session import FLAVOUR, INPUT, OUTPUTS, Tensor

TYPES = {"f32": "tensor(float)", "u8": "tensor(uint8)"}


class OpenvinoSession:
    """A `maskformer_fast.deploy.runtime.cpu_session.CpuSession`."""

    def __init__(
        self, graph: bytes, threads: int, weights: bytes | None = None, streams: int = 1, precision: Precision = "fp32"
    ) -> None:
        """See `OpenSession`. What an INT8 graph does not quantise is computed in bfloat16 where the processor has it.

        Raises:
            BundleError: OpenVINO refuses the graph.
            ModuleNotFoundError: OpenVINO is not installed.
            ValueError: the processor lacks the precision.
        """
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "openvino is needed to run a bundle by the backend openvino; install it with: pip install openvino "
                "(or maskformer_fast[openvino])", name=error.name
            ) from error
        core = openvino.Core()
        low = has_bfloat16() and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        check(precision != "bf16" or low, "precision", "fp32 or int8, as this processor has no bfloat16", precision)
        settings = {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT", "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "INFERENCE_NUM_THREADS": threads,
        }  # fmt: skip
        try:
            model = core.read_model(graph, weights or b"")
            self._model = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            expect(False, f"graphs.{FLAVOUR}", "a graph that OpenVINO runs", str(error).strip().splitlines()[-1])
            raise
        self.inputs = [_tensor(port) for port in self._model.inputs]
        self.outputs = [_tensor(port) for port in self._model.outputs]
        self._requests = threading.local()  # a request runs one batch at a time

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """Run the network, see `CpuSession.run`. OpenVINO gives each call a free stream."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._model.create_infer_request()
        found = self._requests.own.infer({INPUT: images}, share_inputs=True, share_outputs=True)
        return [found[name] for name in OUTPUTS]


def _tensor(port: Any) -> Tensor:
    kind = port.get_element_type().get_type_name()
    shape = port.get_partial_shape()
    sizes = None if shape.rank.is_dynamic else [None if size.is_dynamic else size.get_length() for size in shape]
    return Tensor(port.get_any_name(), TYPES.get(kind, kind), sizes)
