"""Interface of a library that runs a bundle's graph on the CPU, for `deploy.runtime.cpu_backend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

FLAVOUR = "raw"
INPUT, OUTPUTS = "images", ["class_logits", "mask_logits"]


class Tensor(NamedTuple):
    """An input or output of a graph."""

    name: str
    type: str
    """As ONNX Runtime writes it: ``tensor(float)``."""
    shape: Sequence[int | str | None] | None
    """Sizes; those that are no numbers are free. None or empty: of any rank."""


class CpuSession(Protocol):
    """A graph that is ready to run. Any thread may call, several at a time."""

    inputs: list[Tensor]
    outputs: list[Tensor]

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """Run the network on uint8 [B, 3, H, W], or bands float32 [B, C, H, W] -> class logits, mask logits.

        These are valid until this thread's next call.
        """
        ...


class OpenSession(Protocol):
    """Opens a graph."""

    def __call__(self, graph: bytes, threads: int, weights: bytes | None = None, streams: int = 1) -> CpuSession:
        """Load a graph, to run ``streams`` batches at a time by ``threads`` threads together.

        Args:
            graph: an ONNX file, or the XML file of OpenVINO's format with its ``weights``.

        Raises:
            BundleError: the library refuses the graph.
            ModuleNotFoundError: the library is not installed.
        """
        ...
