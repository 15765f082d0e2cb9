"""A graph that is deformable attention alone, as the export writes it, with inputs for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from maskformer_fast.deploy.build.deformable_attention import DOMAIN, OPERATOR, expand
from tests.support.graphs import raw_graph

HEADS, DIM, LEVELS, POINTS = 4, 8, 3, 2
INPUTS = ("value", "sizes", "references", "offsets", "logits")
CASES = [
    (2, 7, [(1, 1), (2, 3), (5, 4)]),
    (1, 9, [(4, 4), (8, 8), (16, 16)]),
    (3, 5, [(3, 1), (1, 9), (7, 7)]),
]  # fmt: skip
"""Images, queries, sizes of the levels."""


def attention_node(output: str) -> Any:
    """Node of deformable attention, which `expand` replaces."""
    sizes = {"heads": HEADS, "dim": DIM, "levels": LEVELS, "points": POINTS}
    return helper.make_node(OPERATOR, INPUTS, [output], domain=DOMAIN, **sizes)


def attention_graph() -> Any:
    """Graph of any batch, number of queries and sizes -> onnx.ModelProto."""
    floats = (["B", "S", HEADS, DIM], None, ["B", "Q", LEVELS, 2], ["B", "Q", HEADS, LEVELS, POINTS, 2],
              ["B", "Q", HEADS, LEVELS, POINTS])  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(name, *((TensorProto.INT64, [LEVELS, 2]) if shape is None else
                                              (TensorProto.FLOAT, shape)))
        for name, shape in zip(INPUTS, floats, strict=True)
    ]  # fmt: skip
    output = helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ["B", "Q", HEADS * DIM])
    nodes = [attention_node("attended"), helper.make_node("Add", ["attended", "attended"], ["doubled"])]
    model = helper.make_model(
        helper.make_graph(nodes, "attention", inputs, [output]), ir_version=10,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)],
    )  # fmt: skip
    expand(model)
    return model


def graph_with_attention() -> bytes:
    """The graph of `raw_graph` with deformable attention of constants, whose mean is added to the class logits."""
    model, attention = raw_graph(), attention_graph()
    constants = [numpy_helper.from_array(array, name) for name, array in attention_inputs(1, 7, CASES[0][2]).items()]
    model.graph.initializer.extend([*constants, *attention.graph.initializer])
    last = next(node for node in model.graph.node if node.output[0] == "class_logits")
    last.output[0] = "plain"
    model.graph.node.extend(attention.graph.node)
    model.graph.node.append(helper.make_node("ReduceMean", ["doubled"], ["average"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["plain", "average"], ["class_logits"]))
    return model.SerializeToString()


def attention_inputs(batch: int, queries: int, sizes: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Random inputs, with points inside, at the border and far outside of the levels."""
    generator = torch.Generator().manual_seed(queries)
    cells = sum(height * width for height, width in sizes)
    shape = (batch, queries, HEADS, LEVELS, POINTS)
    offsets = torch.randn(*shape, 2, generator=generator) * 4
    offsets[:, 0] *= 100
    return {
        "value": torch.randn(batch, cells, HEADS, DIM, generator=generator).numpy(),
        "sizes": np.array(sizes),
        "references": (torch.rand(batch, queries, LEVELS, 2, generator=generator) * 1.2 - 0.1).numpy(),
        "offsets": offsets.numpy(),
        "logits": (torch.randn(shape, generator=generator) * 2).numpy(),
    }
