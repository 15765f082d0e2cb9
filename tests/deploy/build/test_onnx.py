"""Exported graphs equal PyTorch at every size; graphs that do not are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from benchmarks.studies.export_parity import spread_queries
from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.deploy.build.onnx import Flavour, export_graphs, mask_size
from maskformer_fast.deploy.build.parity import ParityError, check_parity
from maskformer_fast.deploy.bundle.manifest import Graph, Shape
from maskformer_fast.inference.postprocess import semantic
from maskformer_fast.modeling import build_model
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Predictions

QUERIES, CLASSES = 7, 5
SHAPES = ["2x64x96", "1x32x32", "1x333x250", "3x200x264", "1x1x1", "1x31x33", "2x5x130", "1x97x224", "5x33x1"]
FORBIDDEN = {"Loop", "If", "Scan", "NonZero", "Attention", "Compress", "Unique"}


# One block of shifted windows is enough: a graph takes seconds a block to export.
SWIN = BackboneConfig("swin_micro", depths=(2, 1, 1, 1))
RESNET = BackboneConfig("resnet_micro")


def build(backbone: BackboneConfig, seed: int = 0, divisibility: int = 32, encoder_layers: int = 0) -> nn.Module:
    """A small network in which every part matters: random norms and biases, classes of high probability."""
    torch.manual_seed(seed)
    network = build_model(
        ModelConfig(
            num_classes=CLASSES, backbone=backbone, size_divisibility=divisibility,
            pixel_decoder=PixelDecoderConfig(
                conv_dim=16, mask_dim=12, norm_groups=4, encoder_layers=encoder_layers, encoder_heads=2,
                encoder_ffn_dim=24,
            ),
            decoder=DecoderConfig(layers=1, hidden_dim=16, num_heads=2, ffn_dim=24, num_queries=QUERIES),
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if "relative_position" in name:
                parameter.normal_()
            if "multihead_attn.in_proj_weight" in name or "query_embed" in name:
                parameter.mul_(4)  # queries attend to different places, so that their predictions differ
    spread_queries(network.eval(), random_images(Shape(1, 160, 192), seed))
    return network


@pytest.fixture(
    scope="module",
    params=[pytest.param(RESNET, id="resnet"), pytest.param(SWIN, id="swin", marks=pytest.mark.slow)],
)
def exported(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[Flavour, tuple[bytes, Graph]]]:
    network = build(request.param, encoder_layers=int(request.param is RESNET))
    return network, export_graphs(network)


def contents(graphs: dict[Flavour, tuple[bytes, Graph]]) -> dict[Flavour, bytes]:
    return {flavour: content for flavour, (content, _) in graphs.items()}


def run(content: bytes, images: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})


def random_images(shape: Shape, seed: int) -> Tensor:
    size, generator = (shape.batch, 3, shape.height, shape.width), torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def predict(network: nn.Module, images: Tensor) -> tuple[Predictions, list[Tensor]]:
    """Predictions and labels as `Predictor` computes them: by padded batches and the fused operator."""
    batch, _, height, width = images.shape
    padded = torch.full((batch, 3, -(-height // 32) * 32, -(-width // 32) * 32), 77, dtype=torch.uint8)
    padded[:, :, :height, :width] = images  # the value of the padding does not matter
    predictions = network(padded, torch.tensor([[height, width]] * batch))
    return predictions, [result.labels for result in semantic(predictions, [(height, width)] * batch)]


@pytest.mark.parametrize("text", SHAPES)
@torch.no_grad()
def test_graphs_equal_the_network_at_any_size(exported: tuple[nn.Module, Any], text: str) -> None:
    network, graphs = exported
    shape = Shape.parse(text)
    images = random_images(shape, seed=shape.height)
    predictions, labels = predict(network, images)
    classes, masks = (torch.from_numpy(output) for output in run(graphs["raw"][0], images))
    for got, expected in ((classes, predictions.class_logits[-1]), (masks, layer_mask_logits(predictions))):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert masks.shape[2:] == mask_size(shape, 32)
    (got,) = run(graphs["complete"][0], images)
    assert got.dtype == np.int32 and got.shape == (shape.batch, shape.height, shape.width)
    equal = torch.from_numpy(got) == torch.stack(labels)
    assert equal.double().mean() > 0.999
    if shape.height > 100:
        assert len(np.unique(got)) > 1, "the test needs labels that differ"


def test_graphs_are_plain_onnx_as_their_entries_say(exported: tuple[nn.Module, Any]) -> None:
    network, graphs = exported
    for flavour, (content, graph) in graphs.items():
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model, full_check=True)
        assert not FORBIDDEN & {node.op_type for node in model.graph.node}
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)] and not model.functions
        assert graph.file == f"{flavour}.onnx" and graph.dynamic and graph.opset == 20
        for value, spec in zip([*model.graph.input, *model.graph.output], [*graph.inputs, *graph.outputs], strict=True):
            dimensions = value.type.tensor_type.shape.dim
            assert value.name == spec.name and tuple(d.dim_param or d.dim_value for d in dimensions) == spec.shape
        weights = sum(p.numel() for p in network.parameters())
        floats = sum(np.prod(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
        assert 0.8 * weights < floats < 1.5 * weights
    assert graphs["complete"][1].outputs[0].shape == ("B", "H", "W")
    assert graphs["raw"][1].outputs[0].shape == ("B", QUERIES, CLASSES + 1)


def test_parity_is_measured(exported: tuple[nn.Module, Any]) -> None:
    network, graphs = exported
    parity = check_parity(network, contents(graphs), [Shape(1, 40, 72), Shape(2, 33, 31)])
    assert [(entry.flavour, str(entry.shape)) for entry in parity] == [
        ("raw", "1x40x72"), ("complete", "1x40x72"), ("raw", "2x33x31"), ("complete", "2x33x31"),
    ]  # fmt: skip
    assert all(0 < entry.logit_error < 1e-4 for entry in parity if entry.flavour == "raw")
    assert all(entry.labels_equal > 0.999 and entry.labels_equal_at_margin == 1.0 for entry in parity)


def scaled(content: bytes, value: str, factor: float) -> bytes:
    """The graph with one of its values multiplied."""
    model = onnx.load_from_string(content)
    (producer,) = (node for node in model.graph.node if value in node.output)
    producer.output[list(producer.output).index(value)] = "before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(factor), "factor"))
    place = list(model.graph.node).index(producer) + 1
    model.graph.node.insert(place, onnx.helper.make_node("Mul", ["before", "factor"], [value]))
    return model.SerializeToString()


def test_a_graph_with_other_results_is_refused(exported: tuple[nn.Module, Any]) -> None:
    network, graphs = exported
    shapes = [Shape(1, 64, 96)]
    raw, complete = graphs["raw"][0], graphs["complete"][0]
    check_parity(network, {"raw": raw}, shapes)
    with pytest.raises(ParityError, match="raw.onnx, 1x64x96: logits differ"):
        check_parity(network, {"raw": scaled(raw, "class_logits", 1.001)}, shapes)
    with pytest.raises(ParityError, match="logits differ"):
        check_parity(network, {"raw": scaled(raw, "mask_logits", float("nan"))}, shapes)
    with pytest.raises(ParityError, match="complete.onnx, 1x64x96: .* of the labels"):
        check_parity(network, {"complete": scaled(complete, "class_logits", -1.0)}, shapes)
    with pytest.raises(ParityError, match="shape"):
        check_parity(network, {"complete": raw}, shapes)


@pytest.mark.slow
@torch.no_grad()
def test_a_static_graph_takes_one_shape() -> None:
    network, shape = build(RESNET, seed=1), Shape(2, 45, 70)
    graphs = export_graphs(network, ("raw",), shape)
    content, graph = graphs["raw"]
    assert not graph.dynamic and graph.inputs[0].shape == (2, 3, 45, 70)
    assert graph.outputs[1].shape == (2, QUERIES, 16, 24) and list(graphs) == ["raw"]
    model = onnx.load_from_string(content)
    assert not {"Shape", "Range", *FORBIDDEN} & {node.op_type for node in model.graph.node}
    check_parity(network, contents(graphs), [shape])
    with pytest.raises(ParityError, match="1x45x70: onnxruntime fails"):
        check_parity(network, contents(graphs), [Shape(1, 45, 70)])


@torch.no_grad()
def test_pixels_far_from_every_mask_have_a_best_class(exported: tuple[nn.Module, Any]) -> None:
    """Mask logits of -30 to -18: labels are those of a sigmoid in double."""
    _, graphs = exported
    model = onnx.load_from_string(graphs["complete"][0])
    del model.graph.output[:]
    nodes = {name: node for node in model.graph.node for name in node.output}
    kept: list[Any] = []
    waiting = ["labels"]
    while waiting:  # the part of the graph behind the logits
        name = waiting.pop()
        if name in nodes and name not in ("class_logits", "mask_logits") and nodes[name] not in kept:
            kept.append(nodes[name])
            waiting.extend(nodes[name].input)
    tail = onnx.helper.make_graph(
        [node for node in model.graph.node if node in kept], "tail",
        [model.graph.input[0], *(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
                                 for name in ("class_logits", "mask_logits"))],
        [onnx.helper.make_tensor_value_info("labels", onnx.TensorProto.INT32, None)],
        list(model.graph.initializer),
    )  # fmt: skip
    made = onnx.helper.make_model(tail, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    classes = torch.randn(1, QUERIES, CLASSES + 1, generator=generator)
    masks = -18 - 12 * torch.rand(1, QUERIES, 16, 24, generator=generator)
    given = {"images": images.numpy(), "class_logits": classes.numpy(), "mask_logits": masks.numpy()}
    labels = torch.from_numpy(session.run(None, given)[0])
    up = nn.functional.interpolate(masks.double(), (64, 96), mode="bilinear").sigmoid()
    expected = torch.einsum("bqc,bqhw->bchw", classes.double().softmax(-1)[..., :-1], up).argmax(1)
    assert (labels == expected).double().mean() > 0.999


@pytest.mark.slow
@torch.no_grad()
def test_a_graph_of_one_size_takes_any_batch() -> None:
    network = build(RESNET, seed=4)
    graphs = export_graphs(network, static=Shape(1, 45, 70), any_batch=True)
    for _, graph in graphs.values():
        assert graph.dynamic and graph.inputs[0].shape == ("B", 3, 45, 70)
    assert graphs["raw"][1].outputs[1].shape == ("B", QUERIES, 16, 24)
    assert graphs["complete"][1].outputs[0].shape == ("B", 45, 70)
    check_parity(network, contents(graphs), [Shape(1, 45, 70), Shape(4, 45, 70)])
    with pytest.raises(ParityError, match="1x46x70: onnxruntime fails"):
        check_parity(network, contents(graphs), [Shape(1, 46, 70)])


@pytest.mark.slow
def test_graphs_without_padding_equal_the_network() -> None:
    network = build(RESNET, seed=2, divisibility=0)
    check_parity(network, contents(export_graphs(network)), [Shape.parse(text) for text in SHAPES])


def test_other_networks_and_flavours_are_refused() -> None:
    with pytest.raises(ValueError, match="flavours"):
        export_graphs(build(RESNET), ("raw", "cooked"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="evaluation mode"):
        export_graphs(build(RESNET).train())
    baseline = build_model(ModelConfig(type="per_pixel", num_classes=3, backbone=BackboneConfig("resnet_micro")))
    with pytest.raises(ValueError, match="model.type: expected maskformer"):
        export_graphs(baseline.eval())
