"""ONNX graphs of Mask2Former: parity with PyTorch at odd sizes, by gathers and without GridSample."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.deploy.build.onnx import export_graphs
from maskformer_fast.deploy.build.parity import (
    ParityError,
    _difference,
    _session,
    _test_images,
    check_parity,
)
from maskformer_fast.deploy.build.precision import to_half
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.deploy.runtime.mask_factors import FactoredMasks
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


def test_half_of_the_queries_may_attend_to_other_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 15, 4, 6, generator=generator).clamp_(-2.0, 2.0)
    logits[0, 0, 0, 0] = 2.0
    got = logits + 1e-4
    got[:, :8] += 4e-3  # 16 of 30 queries
    assert _difference(got, logits, masked=True) == pytest.approx(2.05e-3, rel=1e-2)
    got[:, 7] = logits[:, 7]  # 14 of them
    assert _difference(got, logits, masked=True) == pytest.approx(5e-5, rel=1e-2)
    assert _difference(got, logits, masked=False) == pytest.approx(2.05e-3, rel=1e-2)
    got[1, 0, 2, 2] += 0.1
    assert _difference(got, logits, masked=True) == pytest.approx(0.052, rel=1e-2)
    got[1, 9, 0, 0] = torch.nan
    assert not _difference(got, logits, masked=True) <= 1.0


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
    if importlib.util.find_spec("openvino") is not None:  # which calls the C++ operator and makes masks apart
        assert isinstance(OpenvinoSession(graphs["raw"], 1).run(_test_images(SHAPES[0], 0).numpy())[1], FactoredMasks)
        check_parity(network, {"raw": graphs["raw"]}, SHAPES, "openvino")
        with pytest.raises(ValueError, match="graphs: expected raw alone with openvino"):
            check_parity(network, graphs, SHAPES, "openvino")
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
