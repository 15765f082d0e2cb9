"""ONNX graphs of Mask2Former: parity with PyTorch at odd sizes, by gathers and without GridSample."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.deploy.build.onnx import (
    ParityError,
    _reference,
    _session,
    _test_images,
    check_parity,
    export_graphs,
)
from maskformer_fast.deploy.build.precision import to_half
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession
from maskformer_fast.modeling import Mask2Former, build_model

SHAPES = [Shape(1, 64, 96), Shape(2, 75, 131), Shape(1, 1, 1), Shape(1, 333, 201)]


def small_network(backbone: str) -> Mask2Former:
    """A network with random weights whose masks have edges, so that queries attend to parts of the image."""
    torch.manual_seed(0)
    network = build_model(
        ModelConfig(
            type="mask2former",
            num_classes=5,
            backbone=BackboneConfig(backbone),
            pixel_decoder=PixelDecoderConfig(
                conv_dim=64, mask_dim=32, encoder_layers=1, encoder_heads=4, encoder_ffn_dim=48, encoder_dropout=0.0
            ),
            decoder=DecoderConfig(layers=3, hidden_dim=32, num_heads=4, ffn_dim=48, dropout=0.0, num_queries=7),
        )
    ).eval()
    assert isinstance(network, Mask2Former)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return network


def check_openvino(network: Mask2Former, graph: bytes) -> None:
    """Compare OpenVINO's results, whose deformable attention is the C++ operator, with PyTorch's."""
    if importlib.util.find_spec("openvino") is None:
        return
    session = OpenvinoSession(graph, threads=1)
    for number, shape in enumerate(SHAPES):
        images = _test_images(shape, number)
        with torch.no_grad():
            expected = _reference(network, images, 32)
        for got, logits in zip(session.run(images.numpy()), expected, strict=True):
            assert (torch.from_numpy(np.array(got)) - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("backbone", ["resnet_micro", "swin_micro"])
def test_graphs_of_any_size_equal_pytorch_without_grid_samples(backbone: str) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    network = small_network(backbone)
    graphs = {flavour: content for flavour, (content, _) in export_graphs(network).items()}
    operators = {node.op_type for node in onnx.load_from_string(graphs["raw"]).graph.node}
    assert "GridSample" not in operators and {"Gather", "Resize", "Softmax"} <= operators
    assert not operators & {"If", "Loop", "Scan", "NonZero"}
    results = check_parity(network, graphs, SHAPES)
    assert len(results) == 2 * len(SHAPES) and max(result.logit_error for result in results) < 1e-4
    check_openvino(network, graphs["raw"])
    with torch.no_grad():
        network.predictor.query_feat.weight.mul_(1.1)
    with pytest.raises(ParityError, match="logits differ"):
        check_parity(network, graphs, SHAPES[:1])


@pytest.mark.slow
@pytest.mark.no_cover
def test_a_graph_of_one_size_equals_pytorch() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    network, shape = small_network("resnet_micro"), Shape(1, 71, 93)
    content, graph = export_graphs(network, ["raw"], shape)["raw"]
    assert not graph.dynamic and graph.outputs[1].shape == (1, 7, 24, 24)
    check_parity(network, {"raw": content}, [shape])
    half = to_half(onnx.load_from_string(content), "fp16")  # half precision holds every constant of the graph
    images = _test_images(shape, 0).numpy()
    expected, got = (_session(c).run(None, {"images": images}) for c in (content, half.SerializeToString()))
    for a, b in zip(expected, got, strict=True):
        assert abs(a - b).mean() < 0.02 * abs(a).mean()
