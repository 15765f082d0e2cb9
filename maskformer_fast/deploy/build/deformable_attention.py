"""Deformable attention in ONNX graphs: by gathers for any runtime, or by TensorRT's plugin.

The export makes a node of this package for each call of the operator. `expand` replaces it by standard operators whose
names begin with ``deformable_attention_0/``, ``deformable_attention_1/`` and so on, by which
`maskformer_fast.deploy.runtime.openvino_attention` and `use_plugin` find them again.

Locations are sums of a whole number of pixels and a small fraction, so that half precision keeps their accuracy. Maps
get a border of zeros, which replaces masks for what is outside. There is no GridSample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskformer_fast.core.checks import check
from maskformer_fast.deploy.runtime.openvino_attention import BOUNDARY

DOMAIN = "maskformer_fast"
OPERATOR = "DeformableAttention"
PREFIX = "deformable_attention_"
PLUGIN = "MultiscaleDeformableAttnPlugin_TRT"
PLUGIN_VERSIONS = ("1", "2")
"""Version 1 of the plugin is that of TensorRT before 10.11, version 2 that of later ones. Both take the same inputs."""


class Nodes:
    """Nodes that are added to a graph, with names below a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.list: list[Any] = []

    def add(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Append a node -> its output's name, which is ``name`` below the prefix."""
        return self.add_many(kind, [name], *inputs, **attributes)[0]

    def add_many(self, kind: str, names: Sequence[str], *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with several outputs -> their names."""
        from onnx import helper

        outputs = [self.prefix + name for name in names]
        self.list.append(helper.make_node(kind, inputs, outputs, outputs[0], **attributes))
        return outputs

    def constant(self, name: str, values: Any, dtype: str) -> str:
        """Append a constant array -> its name."""
        import numpy as np
        from onnx import numpy_helper

        return self.add("Constant", name, value=numpy_helper.from_array(np.array(values, dtype)))


def translation() -> dict[Any, Any]:
    """Table for `torch.onnx.export` that makes a node of this package for each call of `deformable_attention`."""
    import onnxscript
    import torch
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    opset20: Any = onnxscript.opset20
    inputs = [OpSchema.FormalParameter(name, "tensor(float)") for name in ("value", "references", "offsets", "logits")]
    inputs.insert(1, OpSchema.FormalParameter("sizes", "tensor(int64)"))
    attributes = [OpSchema.Attribute(name, OpSchema.AttrType.INT) for name in ("heads", "dim", "levels", "points")]
    result = OpSchema.FormalParameter("result", "tensor(float)")
    schema = OpSchema(OPERATOR, DOMAIN, 1, inputs=inputs, outputs=[result], attributes=attributes)
    operator = Op(Opset(DOMAIN, 1), OPERATOR, schema)

    def translate(value: Any, level_sizes: Any, references: Any, offsets: Any, logits: Any) -> Any:
        parts = [
            opset20.Constant(value_ints=[side]) if isinstance(side, int) else opset20.Reshape(side, [1])
            for side in level_sizes
        ]  # fmt: skip
        sizes = opset20.Reshape(opset20.Concat(*parts, axis=0), [-1, 2])
        return operator(
            value, sizes, references, offsets, logits,
            heads=int(value.shape[2]), dim=int(value.shape[3]),
            levels=int(logits.shape[3]), points=int(logits.shape[4]),
        )  # fmt: skip

    return {torch.ops.maskformer_fast.deformable_attention.default: translate}


def expand(model: Any) -> None:
    """Replace this package's nodes by gathers, in place."""
    from onnx import helper

    nodes: list[Any] = []
    renamed: dict[str, str] = {}
    count = 0
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        if node.domain == DOMAIN and node.op_type == OPERATOR:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            added = by_gathers(f"{PREFIX}{count}/", list(node.input), **attributes)
            renamed[node.output[0]] = added[-1].output[0]
            nodes += added
            count += 1
        else:
            nodes.append(node)
    for value in model.graph.output:
        if value.name in renamed:
            nodes.append(helper.make_node("Identity", [renamed[value.name]], [value.name], f"{value.name}/output"))
    if count:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)


def by_gathers(prefix: str, inputs: Sequence[str], heads: int, dim: int, levels: int, points: int) -> list[Any]:
    """Nodes from value, level sizes int64 [levels, 2], references, offsets and logits; the last one gives the result.

    Shapes are those of `maskformer_fast.ops.deformable_attention.deformable_attention`.
    """
    value, sizes, references, offsets, logits = inputs
    nodes = Nodes(prefix)
    add, constant = nodes.add, nodes.constant
    zero, one, minus = (constant(name, [n], "int64") for name, n in (("zero", 0), ("one", 1), ("minus", -1)))
    two = constant("two", [2], "int64")
    count = constant("heads", heads, "int32")

    # Maps with a border of zeros, as one table [B * cells * heads, D].
    height, width = nodes.add_many("Split", ["height", "width"], sizes, axis=1, num_outputs=2)  # [levels, 1]
    areas = add("Reshape", "areas", add("Mul", "areas_2d", height, width), minus)
    maps = nodes.add_many("Split", [f"value_{level}" for level in range(levels)], value, areas, axis=1)
    channels, border = constant("channels", [heads * dim], "int64"), constant("border", [0, 1, 1, 0] * 2, "int64")
    flat = add("Concat", "flat", zero, minus, channels, axis=0)
    padded = []
    for level, cells in enumerate(maps):
        size = add("Slice", f"size_{level}", sizes, *(constant(f"{name}_{level}", [n], "int64")
                                                     for name, n in (("from", level), ("to", level + 1))), zero)
        shape = add("Concat", f"shape_{level}", zero, add("Reshape", f"sides_{level}", size, minus), channels, axis=0)
        image = add("Pad", f"padded_{level}", add("Reshape", f"map_{level}", cells, shape), border)
        padded.append(add("Reshape", f"cells_{level}", image, flat))
    cells = add("Concat", "cells", *padded, axis=1)
    table = add("Reshape", "table", cells, constant("row", [-1, dim], "int64"))

    # Locations: whole numbers of the reference points, and parts of pixels with the offsets.
    sides = add("Cast", "sides", add("Concat", "sides_int64", width, height, axis=1), to=1)  # [levels, 2] of x, y
    centers = add("Sub", "centers", add("Mul", "scaled", references, sides), constant("half", 0.5, "float32"))
    whole = add("Floor", "whole", centers)  # [B, Q, levels, 2]
    axes = constant("axes", [2, 4], "int64")
    first = add("Unsqueeze", "first", add("Sub", "least", constant("before", -1.0, "float32"), whole), axes)
    last = add("Unsqueeze", "last", add("Sub", "most", sides, whole), axes)
    parts = add("Unsqueeze", "parts", add("Sub", "part", centers, whole), axes)
    free = add("Add", "free", parts, offsets)  # [B, Q, heads, levels, points, 2]
    location = add("Min", "location", add("Max", "raised", free, first), last)
    corner = add("Floor", "corner", location)
    share = add("Sub", "share", location, corner)

    # Rows of the table of the upper left corners.
    strides = add("Add", "strides", add("Cast", "width_int32", add("Reshape", "widths", width, minus), to=6),
                  constant("both_borders", 2, "int32"))  # [levels]
    rows = add("Add", "rows", add("Cast", "height_int32", add("Reshape", "heights", height, minus), to=6),
               constant("both_ends", 2, "int32"))
    sums = add("CumSum", "starts", add("Mul", "padded_areas", rows, strides), constant("axis", 0, "int64"), exclusive=1)
    whole_x, whole_y = _coordinates(nodes, "whole", whole)  # [B, Q, levels]
    origin = add("Add", "origin", sums, add("Add", "border_cells", strides, constant("left_border", 1, "int32")))
    base = add("Add", "base", add("Add", "base_row", add("Mul", "base_y", whole_y, strides), whole_x), origin)
    by_head = add("Add", "by_head", add("Mul", "base_heads", add("Unsqueeze", "base_4d", base, two), count),
                  constant("head", [[[h] for h in range(heads)]], "int32"))  # [B, Q, heads, levels]
    total = add("Mul", "total", add("Cast", "cells_int32", add("Shape", "cells_shape", cells, start=1, end=2), to=6),
                count)
    batch = add("Shape", "batch", value, start=0, end=1)
    numbers = add("Range", "numbers", constant("range_start", 0, "int64"), add("Squeeze", "batch_0d", batch),
                  constant("range_step", 1, "int64"))
    images = add("Cast", "images", numbers, to=6)
    image = add("Reshape", "image", add("Mul", "image_rows", images, total),
                constant("batch_axes", [-1, 1, 1, 1], "int64"))
    corner_x, corner_y = _coordinates(nodes, "corner", corner)  # [B, Q, heads, levels, points]
    column = add("Unsqueeze", "stride_column", strides, one)
    cell = add("Add", "cell", add("Mul", "cell_y", corner_y, column), corner_x)
    places = add("Add", "places", add("Mul", "cell_heads", cell, count),
                     add("Unsqueeze", "by_image", add("Add", "by_image_4d", by_head, image), minus))

    # Weights of the corners, and their samples.
    logits_flat = add("Reshape", "logits", logits, constant("all_points", [0, 0, 0, -1], "int64"))
    softmax = add("Softmax", "softmax", logits_flat, axis=-1)
    weights = add("Reshape", "weights", softmax, constant("by_level", [0, 0, 0, levels, points], "int64"))
    share_x, share_y = (add("Squeeze", f"share_{name}", half, minus) for name, half in zip(
        "xy", nodes.add_many("Split", ["share_x_1", "share_y_1"], share, axis=-1, num_outputs=2), strict=True))
    lower = add("Mul", "lower", weights, share_y)
    upper = add("Sub", "upper", weights, lower)
    limit = add("Sub", "limit", add("Mul", "all_rows", total, add("Cast", "batch_int32", batch, to=6)),
                constant("one_row", 1, "int32"))
    bags, columns = (constant(name, [-1, *shape, levels * points], "int64") for name, shape in
                     (("bags", []), ("columns", [1])))
    below = add("Mul", "below", column, count)
    result = ""
    for name, share_of_row, step in (("upper", upper, None), ("lower", lower, below)):
        row = places if step is None else add("Add", f"{name}_row", places, step)
        right = add("Mul", f"{name}_right", share_of_row, share_x)
        left = add("Sub", f"{name}_left", share_of_row, right)
        for side, weight, cells_of in (
            ("left", left, row), ("right", right, add("Add", f"{name}_right_row", row, count)),
        ):  # fmt: skip
            corner_name = f"{name}_{side}"
            # A weight of 0 can belong to a row after the last one, and NaN to any.
            index = add("Min", f"{corner_name}_low", add("Max", f"{corner_name}_high", cells_of,
                        constant(f"{corner_name}_zero", 0, "int32")), limit)
            index = add("Reshape", f"{corner_name}_index", index, bags)
            samples = add("Gather", f"{corner_name}_samples", table, index)
            weight = add("Reshape", f"{corner_name}_weight", weight, columns)
            summed = add("MatMul", f"{corner_name}_sum", weight, samples)
            result = summed if not result else add("Add", f"{corner_name}_total", result, summed)
    shape = add("Concat", "result_shape", add("Shape", "queries_shape", logits, start=0, end=2), channels, axis=0)
    add("Reshape", "result", result, shape)
    return nodes.list


def _coordinates(nodes: Nodes, name: str, pairs: str) -> list[str]:
    """Whole x and y [..., 2] as int32, each [...]."""
    halves = nodes.add_many("Split", [f"{name}_x_1", f"{name}_y_1"], nodes.add("Cast", f"{name}_int32", pairs, to=6),
                            axis=-1, num_outputs=2)
    return [
        nodes.add("Squeeze", f"{name}_{axis}", half, nodes.constant(f"{name}_{axis}_axis", [-1], "int64"))
        for axis, half in zip("xy", halves, strict=True)
    ]



def use_plugin(model: Any, version: str) -> int:
    """Replace the gathers of an exported graph by TensorRT's plugin, in place -> the number of layers.

    The plugin takes float32 or float16, with all inputs of one type: in float16 its sampling locations, 0..1, have
    steps of 1/2048 of a map's side.

    Args:
        model: a graph of `expand`, not yet in another precision.
        version: one of `PLUGIN_VERSIONS`.
    """
    from onnx import TensorProto, helper

    check(version in PLUGIN_VERSIONS, "version", f"one of {', '.join(PLUGIN_VERSIONS)}", version)
    layers: dict[str, dict[str, Any]] = {}
    nodes = []
    for node in model.graph.node:
        prefix, slash, name = node.output[0].partition("/")
        if not (slash and prefix.startswith(PREFIX)):
            nodes.append(node)
            continue
        layer = layers.setdefault(prefix + slash, {})
        layer[name] = node
        if name == "result":
            inputs = [layer[first].input[number] for first, number in BOUNDARY]
            nodes += by_plugin(prefix + slash, inputs, version)
    if layers:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    # the type of the plugin's result, which no schema tells: conversions to half precision need it
    model.graph.value_info.extend(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        for node in nodes if node.op_type == PLUGIN
    )  # fmt: skip
    return len(layers)


def by_plugin(prefix: str, inputs: Sequence[str], version: str) -> list[Any]:
    """Nodes from the inputs of `by_gathers` to its result, by TensorRT's plugin."""
    value, sizes, references, offsets, logits = inputs
    nodes = Nodes(prefix)
    add, constant = nodes.add, nodes.constant
    minus, one = constant("minus", [-1], "int64"), constant("one", [1], "int64")
    sizes_int32 = add("Cast", "sizes_int32", sizes, to=6)
    areas = add("ReduceProd", "areas", sizes_int32, one, keepdims=0)
    starts = add("CumSum", "starts", areas, constant("axis", 0, "int64"), exclusive=1)
    height, width = nodes.add_many("Split", ["height", "width"], add("Cast", "sides_float32", sizes, to=1), axis=1,
                                   num_outputs=2)  # fmt: skip
    sides = add("Unsqueeze", "sides", add("Concat", "sides_2d", width, height, axis=1), one)  # [levels, 1, 2]
    points = add("Unsqueeze", "points", references, constant("axes", [2, 4], "int64"))
    locations = add("Add", "locations", points, add("Div", "scaled_offsets", offsets, sides))
    flat = add("Reshape", "logits_flat", logits, constant("all_points", [0, 0, 0, -1], "int64"))
    softmax = add("Softmax", "softmax", flat, axis=-1)
    weights = add("Reshape", "weights", softmax, add("Shape", "logits_shape", logits))
    attended = add(PLUGIN, "attended", value, sizes_int32, starts, locations, weights, plugin_version=version,
                   plugin_namespace="")  # fmt: skip
    shape = add("Concat", "result_shape", add("Shape", "queries_shape", logits, start=0, end=2), minus, axis=0)
    add("Reshape", "result", attended, shape)
    return nodes.list
