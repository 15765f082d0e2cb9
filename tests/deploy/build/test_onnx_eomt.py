"""ONNX graphs of EoMT of any size: parity with PyTorch at odd sizes, with learned and rotary positions."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from maskformer_fast.deploy.build.onnx import export_graphs
from maskformer_fast.deploy.build.parity import _reference, _test_images, check_parity
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession
from maskformer_fast.modeling import EoMT
from tests.modeling.test_eomt import made

SHAPES = [Shape(1, 96, 96), Shape(2, 75, 131), Shape(1, 1, 1), Shape(1, 333, 201)]


def check_openvino(network: EoMT, graph: bytes) -> None:
    """Compare OpenVINO's results with PyTorch's."""
    if importlib.util.find_spec("openvino") is None:
        return
    session = OpenvinoSession(graph, threads=1)
    for number, shape in enumerate(SHAPES):
        images = _test_images(shape, number)
        with torch.no_grad():
            expected = _reference(network, images, network.config.size_divisibility)
        for got, logits in zip(session.run(images.numpy()), expected, strict=True):
            assert (torch.from_numpy(np.array(got)) - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize(("positions", "probability"), [("learned", 0.0), ("learned", 1.0), ("rotary", 0.0)])
def test_graphs_of_any_size_equal_pytorch(positions: str, probability: float) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    network = made(positions)
    network.set_mask_probability([probability] * 3)
    graphs = {flavour: content for flavour, (content, _) in export_graphs(network).items()}
    operators = {node.op_type for node in onnx.load_from_string(graphs["raw"]).graph.node}
    assert not operators & {"If", "Loop", "Scan", "NonZero", "Attention"}
    results = check_parity(network, graphs, SHAPES)
    assert len(results) == 2 * len(SHAPES) and max(result.logit_error for result in results) < 1e-5
    check_openvino(network, graphs["raw"])


@pytest.mark.slow
@pytest.mark.no_cover
def test_a_graph_of_one_size_equals_pytorch() -> None:
    pytest.importorskip("onnxruntime")
    network, shape = made(), Shape(1, 71, 93)
    network.set_mask_probability([0.0] * 3)
    content, graph = export_graphs(network, ["raw"], shape)["raw"]
    assert not graph.dynamic and graph.outputs[1].shape == (1, 7, 24, 24)
    check_parity(network, {"raw": content}, [shape])


def test_a_network_that_draws_which_queries_to_mask_is_refused() -> None:
    network = made()
    network.set_mask_probability([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"mask_probability: expected 0 or 1 in each block.*0\.5"):
        export_graphs(network)
