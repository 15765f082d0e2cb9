"""Half precision in the graph: types, pinned operators, casts, and labels that do not change."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from maskformer_fast.deploy.build.precision import PINNED, to_half
from tests.support.graphs import images, labels, raw_graph, run

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def input_types(model: onnx.ModelProto) -> dict[str, set[int]]:
    """Operator -> float types of its inputs, weights included."""
    inferred = shape_inference.infer_shapes(model)
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
    types |= {t.name: t.data_type for t in inferred.graph.initializer}
    kinds_of: dict[str, set[int]] = {}
    for node in inferred.graph.node:
        kinds = {types.get(name) for name in node.input} & {TensorProto.FLOAT, *HALF.values()}
        kinds_of.setdefault(node.op_type, set()).update(kinds)
    return kinds_of


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A bfloat16 graph in float32 with rounding to bfloat16 at every such value, as an oracle that onnxruntime runs."""
    half = TensorProto.BFLOAT16
    inferred = shape_inference.infer_shapes(model)
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:]
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        result.graph.initializer.append(
            numpy_helper.from_array(values.astype(np.float32), tensor.name) if tensor.data_type == half else tensor
        )
    for node in model.graph.node:
        copy = result.graph.node.add()
        copy.CopyFrom(node)
        if node.op_type == "Cast" and node.attribute[0].i == half:
            copy.attribute[0].i = TensorProto.FLOAT
        for place, name in enumerate(node.output):
            if types.get(name) == half:
                copy.output[place] = f"{name}:exact"
                result.graph.node.append(helper.make_node("Cast", [f"{name}:exact"], [f"{name}:bf16"], to=half))
                result.graph.node.append(helper.make_node("Cast", [f"{name}:bf16"], [name], to=TensorProto.FLOAT))
    return result


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_operators_have_the_types_of_their_kind(precision: str) -> None:
    """Weighted operators compute in half precision, pinned ones and the normalisation of pixels in float32."""
    model = raw_graph()
    before = model.SerializeToString()
    types = input_types(to_half(model, precision))
    half = {HALF[precision]}
    for operator in ("Conv", "MatMul", "Einsum", "Relu", "Add"):
        assert types[operator] == half, operator
    for operator in (*PINNED, "Sub", "Div"):
        assert types[operator] == {TensorProto.FLOAT}, operator
    assert model.SerializeToString() == before  # only a copy was changed


def test_sizes_are_read_without_a_cast() -> None:
    """`Shape` takes any type, so a float32 copy of a map for its sizes would be wasted work."""
    converted = to_half(raw_graph(), "fp16", pinned=())
    makers = {name: node.op_type for node in converted.graph.node for name in node.output}
    read = [name for node in converted.graph.node if node.op_type == "Shape" for name in node.input]
    assert [makers[name] for name in read] == ["InstanceNormalization"]


@pytest.mark.parametrize("pinned", [(), *((name,) for name in sorted(PINNED)), sorted(PINNED), [*PINNED, "MatMul"]])
def test_float16_keeps_labels(pinned: list[str]) -> None:
    """99.5 % of labels are equal and logits differ by float16's rounding alone, with any operators pinned."""
    model, inputs = raw_graph(seed=3), images(4, 128, 192)
    exact, got = run(model, inputs), run(to_half(model, "fp16", pinned=pinned), inputs)
    for a, b in zip(exact, got, strict=True):
        assert b.dtype == np.float32
        assert 0 < np.abs(a - b).max() < 1e-2 * np.abs(a).max()  # something was rounded
    assert (labels(exact) == labels(got)).mean() >= 0.995


def test_bfloat16_keeps_most_labels() -> None:
    model, inputs = raw_graph(seed=3), images(4, 128, 192)
    exact, got = run(model, inputs), run(rounded(to_half(model, "bf16")), inputs)
    for a, b in zip(exact, got, strict=True):
        assert 1e-4 * np.abs(a).max() < np.abs(a - b).max() < 5e-2 * np.abs(a).max()
    assert (labels(exact) == labels(got)).mean() >= 0.97


@pytest.mark.parametrize(("name", "other"), [("mask_logits", "class_logits"), ("class_logits", "mask_logits")])
def test_half_outputs_leave_in_half_precision(name: str, other: str) -> None:
    """The named outputs keep their names and become half precision; the others stay float32."""
    model, inputs = raw_graph(), images()
    converted = to_half(model, "fp16", half_outputs=[name])
    onnx.checker.check_model(converted, full_check=True)
    kinds = {o.name: o.type.tensor_type.elem_type for o in converted.graph.output}
    assert kinds == {name: TensorProto.FLOAT16, other: TensorProto.FLOAT}
    for a, b in zip(run(to_half(model, "fp16"), inputs), run(converted, inputs), strict=True):
        assert np.array_equal(a.astype(np.float16), b.astype(np.float16))


def test_an_output_that_is_read_again_is_cast_once() -> None:
    """Another node that reads an output reads it in the right type."""
    model = raw_graph()
    model.graph.node.append(helper.make_node("Relu", ["class_logits"], ["again"]))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, ["b", 16, 11]))
    converted = to_half(model, "fp16")
    onnx.checker.check_model(converted, full_check=True)
    classes, _ = run(converted, images())
    assert classes.dtype == np.float32


def test_nodes_pinned_by_name_stay_and_weights_are_stored_once() -> None:
    """Weights that no float32 node reads are stored in half precision."""
    model = raw_graph()
    converted = to_half(model, "fp16", pinned=[*PINNED, "conv2"])
    stored = {t.name.removesuffix("_fp16"): t.data_type for t in converted.graph.initializer}
    assert stored["conv1"] == TensorProto.FLOAT16
    assert stored["conv2"] == TensorProto.FLOAT
    assert len(stored) == len(converted.graph.initializer)
    assert stored["mean"] == TensorProto.FLOAT  # before the first convolution


@pytest.mark.parametrize("scale", [0.01, 1e-6])
def test_quantised_weights_stay_next_to_their_operator(scale: float) -> None:
    """Scales of weights become float16 where they are normal numbers of float16."""
    model = raw_graph()
    weight = next(t for t in model.graph.initializer if t.name == "conv2")
    levels = np.clip(np.round(numpy_helper.to_array(weight) / scale), -127, 127).astype(np.int8)
    model.graph.initializer.remove(weight)
    model.graph.initializer.extend([
        numpy_helper.from_array(levels, "levels"), numpy_helper.from_array(np.full(32, scale, np.float32), "scale_w"),
        numpy_helper.from_array(np.zeros(32, np.int8), "zero"),
    ])  # fmt: skip
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["levels", "scale_w", "zero"], ["conv2"], axis=0))
    converted = to_half(model, "fp16")
    is_half = scale > 1e-5
    assert input_types(converted)["DequantizeLinear"] == {TensorProto.FLOAT16 if is_half else TensorProto.FLOAT}
    assert input_types(converted)["Conv"] == {TensorProto.FLOAT16}
    for a, b in zip(run(model, images()), run(converted, images()), strict=True):
        assert np.abs(a - b).max() < 1e-2 * np.abs(a).max()


def test_graphs_and_options_that_cannot_be_converted_are_refused() -> None:
    with pytest.raises(ValueError, match="precision: expected fp16 or bf16, got 'fp8'"):
        to_half(raw_graph(), "fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="half_outputs: .*masks"):
        to_half(raw_graph(), "fp16", half_outputs=["masks"])
    large = raw_graph()
    weight = next(t for t in large.graph.initializer if t.name == "conv1")
    weight.CopyFrom(numpy_helper.from_array(np.full((32, 3, 3, 3), 1e5, np.float32), "conv1"))
    with pytest.raises(ValueError, match="weights up to 65504.0, got 100000.0 in 'conv1'"):
        to_half(large, "fp16")
    to_half(large, "bf16")
    untyped = raw_graph()
    untyped.graph.node[4].op_type, untyped.graph.node[4].domain = "Mystery", "elsewhere"
    with pytest.raises(ValueError, match="expected operators of known types: .*Mystery"):
        to_half(untyped, "fp16")
    untyped.opset_import.append(helper.make_opsetid("elsewhere", 1))
    with pytest.raises(ValueError, match="expected known types, got none for 'x2' of Mystery"):
        to_half(untyped, "fp16")
