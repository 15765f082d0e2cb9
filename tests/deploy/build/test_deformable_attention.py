"""Deformable attention in ONNX graphs: gathers and TensorRT's plugin beside the eager operator and grid_sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from maskformer_fast.deploy.build.deformable_attention import PLUGIN, use_plugin
from maskformer_fast.deploy.build.tensorrt import EngineConfig, EngineError
from maskformer_fast.ops.deformable_attention import deformable_attention_eager

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from tests.support.attention_graph import CASES, HEADS, LEVELS, attention_graph, attention_inputs  # noqa: E402

PROVIDERS = ["CPUExecutionProvider"]


def expected(inputs: dict[str, np.ndarray], sizes: list[tuple[int, int]]) -> torch.Tensor:
    value, _, *others = (torch.from_numpy(array) for array in inputs.values())
    return deformable_attention_eager(value, sizes, *others)


@pytest.mark.parametrize(("batch", "queries", "sizes"), CASES)
def test_gathers_equal_the_eager_operator(batch: int, queries: int, sizes: list[tuple[int, int]]) -> None:
    model, inputs = attention_graph(), attention_inputs(batch, queries, sizes)
    onnx.checker.check_model(model, full_check=True)
    assert "GridSample" not in {node.op_type for node in model.graph.node}
    got = onnxruntime.InferenceSession(model.SerializeToString(), providers=PROVIDERS).run(None, inputs)[0]
    torch.testing.assert_close(torch.from_numpy(got), 2 * expected(inputs, sizes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("batch", "queries", "sizes"), CASES)
@pytest.mark.parametrize("version", ["1", "2"])
def test_the_plugin_gets_what_it_documents(
    batch: int, queries: int, sizes: list[tuple[int, int]], version: str
) -> None:
    """The plugin's inputs, run by onnxruntime, give the result by the formula of its documentation."""
    model, inputs = attention_graph(), attention_inputs(batch, queries, sizes)
    assert use_plugin(model, version) == 1
    operators = [node.op_type for node in model.graph.node]
    assert operators.count(PLUGIN) == 1 and "Gather" not in operators
    at = operators.index(PLUGIN)
    node = model.graph.node[at]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
        "plugin_version": version.encode(), "plugin_namespace": b""
    }  # fmt: skip
    prefix, names = node.output[0].partition("/")[0], list(node.input)
    assert model.graph.node[-1].input[0] == f"{prefix}/result"  # what follows reads the plugin's result
    assert names[0] == "value"
    del model.graph.node[at:], model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names[1:])
    shapes, starts, locations, weights = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=PROVIDERS
    ).run(None, {i.name: inputs[i.name] for i in model.graph.input})
    assert shapes.dtype == starts.dtype == np.int32 and locations.dtype == weights.dtype == np.float32
    assert shapes.tolist() == [list(size) for size in sizes]
    value = torch.from_numpy(inputs["value"])
    total = 0
    for level, (height, width) in enumerate(sizes):
        first = int(starts[level])
        maps = value[:, first : first + height * width].permute(0, 2, 3, 1).reshape(batch * HEADS, -1, height, width)
        grid = torch.from_numpy(locations[:, :, :, level]).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(maps, 2 * grid - 1, align_corners=False)  # [B * heads, D, Q, points]
        weight = torch.from_numpy(weights[:, :, :, level]).transpose(1, 2).flatten(0, 1)[:, None]
        total = total + (samples * weight).sum(-1)
    got = total.unflatten(0, (batch, HEADS)).permute(0, 3, 1, 2).flatten(2)
    torch.testing.assert_close(got, expected(inputs, sizes), atol=1e-4, rtol=1e-4)


def test_a_graph_without_deformable_attention_stays() -> None:
    model = attention_graph()
    del model.graph.node[:]
    assert use_plugin(model, "1") == 0
    with pytest.raises(ValueError, match="version: expected one of 1, 2, got '3'"):
        use_plugin(model, "3")


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"precision": "fp16", "targets": ("sm_89",)}, {"api": "tensorrt_rtx"}]
)
def test_the_plugin_is_refused_where_tensorrt_has_none(options: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="deformable_attention: expected gathers"):
        EngineConfig(deformable_attention="plugin", **options)  # type: ignore[arg-type]


def test_each_level_has_its_points() -> None:
    """A point in the middle of a cell reads that cell of its level alone."""
    sizes = [(2, 2), (1, 3), (3, 1)]
    inputs = attention_inputs(1, 1, sizes)
    inputs["offsets"][:] = 0
    inputs["logits"][:] = -np.inf
    for level, (start, (height, width)) in enumerate(zip((0, 4, 7), sizes, strict=True)):
        inputs["logits"][..., :, :] = -np.inf
        inputs["logits"][:, :, :, level] = 0
        inputs["references"][:] = [(width - 0.5) / width, (height - 0.5) / height]  # the last cell
        session = onnxruntime.InferenceSession(attention_graph().SerializeToString(), providers=PROVIDERS)
        got = session.run(None, inputs)[0]
        last = inputs["value"][0, start + height * width - 1].reshape(-1)
        np.testing.assert_allclose(got[0, 0], 2 * last, atol=1e-5)
    assert LEVELS == 3
