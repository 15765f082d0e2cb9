"""Runs a bundle's graph on the CPU by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskformer_fast.deploy.bundle.manifest import expect
from maskformer_fast.deploy.runtime.cpu_session import FLAVOUR, INPUT, OUTPUTS, Tensor


class OnnxruntimeSession:
    """A `maskformer_fast.deploy.runtime.cpu_session.CpuSession`."""

    def __init__(self, graph: bytes, threads: int, weights: bytes | None = None, streams: int = 1) -> None:
        """See `OpenSession`. Batches that run at once share the threads, whatever ``streams`` is."""
        assert weights is None  # a graph of OpenVINO
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "onnxruntime is needed to run a bundle on the CPU; install it with: pip install onnxruntime "
                "(or maskformer_fast[deploy])", name=error.name
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only: the warnings are about onnxruntime's own optimisations
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            expect(False, f"graphs.{FLAVOUR}", "a graph that onnxruntime runs", f"{type(error).__name__}: {error}")
            raise
        self.inputs = [Tensor(each.name, each.type, each.shape) for each in self._session.get_inputs()]
        self.outputs = [Tensor(each.name, each.type, each.shape) for each in self._session.get_outputs()]

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """Run the network, see `CpuSession.run`."""
        return self._session.run(OUTPUTS, {INPUT: images})
