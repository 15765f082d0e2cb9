"""Our networks as users of other CPU engines run them: OpenVINO, onnxruntime and Inductor, without our operators.

The first two run an exported graph. Inductor, the compiler of `torch.compile`, compiles the same computation with
weights frozen as constants, which lets it fold norms and pack weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases.inputs import Size
from maskformer_fast.deploy.build.onnx import Flavour, LabelGraph, RawGraph, export_graphs
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.deploy.runtime.openvino_session import shared_core

OPENVINO, ONNXRUNTIME, INDUCTOR = "OpenVINO", "onnxruntime", "Inductor"
PACKAGES = {OPENVINO: "openvino", ONNXRUNTIME: "onnxruntime"}
"""What has to be installed beside PyTorch."""
PRECISIONS: dict[str, Literal["f32", "bf16"]] = {"float32": "f32", "bfloat16": "bf16"}
"""dtype -> OpenVINO's name of the precision of inference."""
Run = Callable[[np.ndarray], list[np.ndarray]]
"""uint8 images [B, 3, H, W] -> the graph's outputs."""


class CompleteGraph(nn.Module):
    """The computation of the exported flavour ``complete``."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.raw, self.labels = RawGraph(network), LabelGraph(network.config.size_divisibility)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] uint8 RGB
    ) -> tuple[Tensor]:
        """-> labels [B, H, W] int32, alone in a tuple."""
        return (self.labels(images, *self.raw(images)),)


def is_installed(engine: str) -> bool:
    """Whether the package of an engine is installed; that of others than `PACKAGES` is."""
    return engine not in PACKAGES or importlib.util.find_spec(PACKAGES[engine]) is not None


def export_graph(network: nn.Module, flavour: Flavour, size: Size) -> bytes:
    """An ONNX graph of a network, for one image of this size, which helps these engines."""
    return export_graphs(network, [flavour], Shape(1, *size))[flavour][0]


def open_inductor(network: nn.Module, flavour: Flavour, dtype: str = "float32") -> Run:
    """Compile a network for inference; in bfloat16 by autocast. The first call with images of a size compiles."""
    graph = RawGraph(network) if flavour == "raw" else CompleteGraph(network)  # type: ignore[arg-type]
    compiled = torch.compile(graph.eval(), dynamic=False, options={"freezing": True})

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return [output.float().numpy() if output.is_floating_point() else output.numpy()
                    for output in compiled(torch.from_numpy(images))]  # fmt: skip

    return run


def open_engine(engine: str, graph: bytes, dtype: str = "float32") -> Run:
    """Load a graph in an engine, with PyTorch's number of threads, tuned for one image at a time."""
    threads = torch.get_num_threads()
    if engine == OPENVINO:
        core = shared_core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
            "INFERENCE_NUM_THREADS": threads,
        }  # fmt: skip
        request = core.compile_model(core.read_model(graph), "CPU", settings).create_infer_request()
        return lambda images: [output.copy() for output in request.infer([images]).values()]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda images: list(session.run(None, {"images": images}))
