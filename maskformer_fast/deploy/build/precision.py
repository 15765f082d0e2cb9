"""Conversion of an ONNX graph to half precision, for engines that compute in the types that the graph states.

TensorRT 11 and TensorRT for RTX take precision from the tensors' types alone ("strongly typed" networks), and
TensorRT 10 can do the same. The types are set in the graph, where they can be read, tested and run by onnxruntime.

Operators that depend on the image become half precision from the first convolution or matrix product on. Operators
before it (normalisation of the pixels), operators that do not depend on the image (positions, window masks) and those
of ``PINNED`` stay float32. Weights, activations and scales of Q/DQ nodes follow their operators.

There are libraries for this: ``onnxruntime.transformers.float16`` knows float16 only, and ``modelopt.onnx.autocast``
needs more packages than a Jetson should have to install (CuPy among them). This module needs onnx alone.

Measured by ``python -m benchmarks.studies.half_labels RUN --images 128`` on a trained network of the demo recipe: with
float16, 99.998 % of the labels are equal, pinned or not, as onnxruntime accumulates in float32. Engines may accumulate
in the type that the graph states, so operators that sum over many values are pinned. The gain has to be measured on a
GPU.
Opset 20 does not allow bfloat16 convolutions, but TensorRT for RTX takes them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx

HalfPrecision = Literal["fp16", "bf16"]

PINNED = frozenset({"InstanceNormalization", "LayerNormalization", "Softmax"})
"""Operators that stay float32: they sum over many values or take exponentials."""

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
_QUANTIZERS = frozenset({"DequantizeLinear", "QuantizeLinear"})
_SIZES_ONLY = frozenset({"Shape", "Size"})  # their results do not depend on the values of pixels
_FLOAT32_INPUTS = {"Resize": (1, 2)}  # inputs that are float32 by definition of the operator
_SMALLEST_NORMAL = {"fp16": 2.0**-14, "bf16": 2.0**-126}
_LARGEST = {"fp16": 65504.0, "bf16": 3.38e38}


def to_half(
    model: onnx.ModelProto,
    precision: HalfPrecision,
    *,
    pinned: Collection[str] = PINNED,
    half_outputs: Collection[str] = (),
) -> onnx.ModelProto:
    """Convert a copy of a float32 graph to half precision, with explicit ``Cast`` nodes where types change.

    Args:
        model: graph with uint8 ``images``; opset 19 or later where it has Q/DQ nodes.
        precision: "fp16" or "bf16".
        pinned: operator types, or names of nodes, that stay float32.
        half_outputs: names of outputs that become half precision; the others keep their type.

    Returns:
        The graph, with the same inputs and outputs. Weights that only half-precision nodes read are stored in half
        precision.

    Raises:
        ValueError: an unknown precision or output, a graph with control flow, a tensor of unknown type, or weights that
            half precision cannot hold.
    """
    if precision not in _LARGEST:
        raise ValueError(f"precision: expected fp16 or bf16, got {precision!r}")
    unknown = set(half_outputs) - {output.name for output in model.graph.output}
    if unknown:
        raise ValueError(f"half_outputs: expected names of the graph's outputs, got {sorted(unknown)}")
    return _Rewriter(model, precision, frozenset(pinned)).run(half_outputs)


class _Rewriter:
    """One conversion. It tracks the type of every tensor, and makes one cast for each pair of tensor and type."""

    def __init__(self, model: onnx.ModelProto, precision: HalfPrecision, pinned: frozenset[str]) -> None:
        from onnx import TensorProto, shape_inference

        self.precision = precision
        self.pinned = pinned
        self.float = TensorProto.FLOAT
        self.half = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
        try:
            self.model = shape_inference.infer_shapes(model)
        except shape_inference.InferenceError as error:
            raise ValueError(f"model: expected operators of known types: {error}") from None
        self.graph = self.model.graph
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        values = (*self.graph.input, *self.graph.value_info, *self.graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.types |= {name: tensor.data_type for name, tensor in self.initializers.items()}
        for node in self.graph.node:  # without its type, a tensor might lack a cast
            for name in filter(None, node.output):
                if not self.types.get(name):
                    where = f"{name!r} of {node.op_type} {node.name!r}"
                    raise ValueError(f"model: expected known types, got none for {where}")
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def run(self, half_outputs: Collection[str]) -> onnx.ModelProto:
        """Convert the graph. The object cannot be used again."""
        half_nodes = self._half_nodes()
        outputs = {output.name: output.type.tensor_type.elem_type for output in self.graph.output}
        output_types = {name: self.half if name in half_outputs else kind for name, kind in outputs.items()}
        renamed: dict[str, str] = {}
        for index, node in enumerate(self.graph.node):
            is_half = index in half_nodes
            takes_any = node.op_type in _SIZES_ONLY
            skipped = _FLOAT32_INPUTS.get(node.op_type, ())
            for place, name in enumerate(node.input):
                name = renamed.get(name, name)
                node.input[place] = name
                if self.types.get(name) in (self.float, self.half) and not takes_any:
                    kind = self.half if is_half and place not in skipped else self.float
                    node.input[place] = self._as(name, kind)
            for attribute in node.attribute:
                if is_half and node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.float:
                    attribute.i = self.half
            self.nodes.append(node)
            for place, name in enumerate(node.output):
                if self.types.get(name) != self.float:
                    continue
                self.types[name] = self.half if is_half else self.float
                if name in output_types and output_types[name] != self.types[name]:  # the output keeps its name
                    inner = renamed[name] = node.output[place] = f"{name}_{self.precision if is_half else 'fp32'}"
                    self.types[inner] = self.types.pop(name)
                    self.nodes.append(self._cast(inner, name, output_types[name]))
                    self.types[name] = output_types[name]
                    self.casts[inner, output_types[name]] = name
        self._write(output_types)
        return self.model

    def _half_nodes(self) -> set[int]:
        """Indices of the nodes to convert: they depend on the image and on a weighted operator, and are not pinned."""
        from_image = {value.name for value in self.graph.input}
        weighted: set[str] = set()
        half_nodes: set[int] = set()
        for index, node in enumerate(self.graph.node):
            for attribute in node.attribute:
                if attribute.HasField("g") or attribute.graphs:
                    raise ValueError(f"model: expected no control flow, got {node.op_type} {node.name!r}")
            if node.op_type in _SIZES_ONLY or not from_image.intersection(node.input):
                continue
            from_image.update(node.output)
            if node.op_type not in _WEIGHTED and not weighted.intersection(node.input):
                continue
            weighted.update(node.output)
            if not self.pinned.intersection((node.op_type, node.name)) and self._scales_fit(node):
                half_nodes.add(index)
        return half_nodes | self._weight_dequantizers(half_nodes)

    def _weight_dequantizers(self, half_nodes: set[int]) -> set[int]:
        """Indices of the nodes that dequantise weights of half-precision nodes: they must give that type."""
        read = {name for index in half_nodes for name in self.graph.node[index].input}
        return {
            index for index, node in enumerate(self.graph.node)
            if node.op_type == "DequantizeLinear" and read.intersection(node.output) and self._scales_fit(node)
        }

    def _scales_fit(self, node: onnx.NodeProto) -> bool:
        """Whether Q/DQ scales are normal numbers in half precision: subnormal ones would lose digits of every value."""
        from onnx import numpy_helper

        if node.op_type not in _QUANTIZERS or node.input[1] not in self.initializers:
            return True
        scales = numpy_helper.to_array(self.initializers[node.input[1]])
        return bool((scales >= _SMALLEST_NORMAL[self.precision]).all())

    def _as(self, name: str, kind: int) -> str:
        """Name of a tensor of type ``kind`` with the values of ``name``: itself, a converted weight, or a cast."""
        if self.types[name] == kind:
            return name
        if (name, kind) not in self.casts:
            target = self.casts[name, kind] = f"{name}_{self.precision if kind == self.half else 'fp32'}"
            self.types[target] = kind
            if name in self.initializers:
                self.initializers[target] = self._converted(self.initializers[name], target)
            else:
                self.nodes.append(self._cast(name, target, kind))
        return self.casts[name, kind]

    def _cast(self, source: str, target: str, kind: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node("Cast", [source], [target], name=f"cast/{target}", to=kind)

    def _converted(self, tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
        """A weight in half precision, rounded to nearest even."""
        from onnx import helper, numpy_helper

        values = numpy_helper.to_array(tensor)
        largest = float(np.abs(values).max(initial=0.0))
        limit = _LARGEST[self.precision]
        if not largest <= limit:
            raise ValueError(f"model: expected weights up to {limit}, got {largest} in {tensor.name!r}")
        return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(self.half)), name)

    def _write(self, output_types: dict[str, int]) -> None:
        """Write nodes, weights that are read and types of outputs into the graph, and drop old intermediate types."""
        read = {name for node in self.nodes for name in node.input}
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in read)
        for output in self.graph.output:
            output.type.tensor_type.elem_type = output_types[output.name]
