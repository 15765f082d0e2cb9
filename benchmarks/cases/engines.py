"""Our exported graphs as users of other CPU engines run them: OpenVINO and onnxruntime, without our operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from benchmarks.cases.inputs import Size
from maskformer_fast.deploy.build.onnx import Flavour, export_graphs
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.deploy.runtime.openvino_session import shared_core

OPENVINO, ONNXRUNTIME = "OpenVINO", "onnxruntime"
PRECISIONS: dict[str, Literal["f32", "bf16"]] = {"float32": "f32", "bfloat16": "bf16"}
"""dtype -> OpenVINO's name of the precision of inference."""
Run = Callable[[np.ndarray], list[np.ndarray]]
"""uint8 images [B, 3, H, W] -> the graph's outputs."""


def export_graph(network: nn.Module, flavour: Flavour, size: Size) -> bytes:
    """An ONNX graph of a network, for one image of this size, which helps these engines."""
    return export_graphs(network, [flavour], Shape(1, *size))[flavour][0]


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
