"""Deformable attention in OpenVINO by the C++ operator, beside the gathers that it replaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskformer_fast.deploy.runtime.openvino_attention import replace_attention
from maskformer_fast.ops.deformable_attention import deformable_attention_eager

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")
from maskformer_fast.deploy.runtime.openvino_session import shared_core  # noqa: E402
from tests.support.attention_graph import CASES, attention_graph, attention_inputs  # noqa: E402


@pytest.mark.parametrize("threads", [1, 2])
def test_the_operator_replaces_the_gathers(threads: int) -> None:
    core = shared_core()
    model = core.read_model(attention_graph().SerializeToString())
    assert replace_attention(model, threads) == 1
    operators = [node.get_type_name() for node in model.get_ordered_ops()]
    assert "Gather" not in operators and "DeformableAttention" in operators
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch, queries, sizes in CASES:
        inputs = attention_inputs(batch, queries, sizes)
        taken = {port.get_any_name() for port in compiled.inputs}
        got = compiled({name: array for name, array in inputs.items() if name in taken})[0]
        value, _, *others = (torch.from_numpy(array) for array in inputs.values())
        expected = 2 * deformable_attention_eager(value, sizes, *others)
        torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-5, rtol=1e-5)


def test_other_graphs_stay() -> None:
    from openvino import opset13

    x = opset13.parameter([1, 3], np.float32, "deformable_attention_0/free")
    model = openvino.Model([opset13.relu(x)], [x])
    assert replace_attention(model, 1) == 0
    assert [node.get_type_name() for node in model.get_ordered_ops()] == ["Parameter", "Relu", "Result"]
