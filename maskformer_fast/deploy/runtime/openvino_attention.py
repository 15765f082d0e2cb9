"""Deformable attention of a bundle's graph by the package's C++ operator, inside OpenVINO's graph.

The export writes it by gathers (`deploy.build.deformable_attention`), whose samples need a lot of memory traffic. The
names of these operators tell where they begin and end. What they compute is replaced by one operator for each layer,
which OpenVINO calls as it calls its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.extension import load_extension

_NAME = re.compile(r"(deformable_attention_\d+/)(value_0|height|scaled|free|logits|result)")
BOUNDARY = (("value_0", 0), ("height", 0), ("scaled", 0), ("free", 1), ("logits", 0))
"""Operators of the export that take value, level sizes, reference points, offsets and logits, and which input it is."""


def replace_attention(model: Any, threads: int) -> int:
    """Replace the gathers of an OpenVINO model in place -> the number of layers. Others than the export's stay."""
    layers: dict[str, dict[str, Any]] = {}
    for node in model.get_ordered_ops():
        for output in node.outputs():
            for found in filter(None, map(_NAME.fullmatch, output.get_names())):
                layers.setdefault(found[1], {})[found[2]] = output
    complete = [layer for layer in layers.values() if len(layer) == len(BOUNDARY) + 1]
    for layer in complete:
        inputs = [layer[name].get_node().input_value(number) for name, number in BOUNDARY]
        layer["result"].replace(_operator()(inputs, threads).output(0))
    return len(complete)


@functools.cache
def _operator() -> Any:
    """The operator's class; OpenVINO is imported when a bundle is opened with it."""
    import openvino

    class DeformableAttention(openvino.Op):  # type: ignore[misc]
        """Value, level sizes int64 [levels, 2], reference points, offsets, logits -> [B, Q, heads * D]."""

        def __init__(self, inputs: Sequence[Any] | None = None, threads: int = 1) -> None:
            super().__init__(self)
            self._threads = threads
            if inputs is not None:
                self.set_arguments(inputs)
                self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            value, logits = self.get_input_partial_shape(0), self.get_input_partial_shape(4)
            channels = value[2].get_length() * value[3].get_length()
            shape = openvino.PartialShape([value[0], logits[1], openvino.Dimension(channels)])
            self.set_output_type(0, self.get_input_element_type(0), shape)

        def clone_with_new_inputs(self, inputs: Sequence[Any]) -> Any:
            return DeformableAttention(inputs, self._threads)

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> bool:
            value, sizes, *others = [tensor.data for tensor in inputs]
            batch, cells, heads, dim = value.shape
            queries, _, levels, points = others[2].shape[1:]
            outputs[0].shape = [batch, queries, heads * dim]
            result = outputs[0].data
            addresses = [
                address_of(array, name, "float32", array.shape)
                for array, name in zip(
                    (value, *others, result), ("value", "reference_points", "offsets", "logits", "result"), strict=True
                )
            ]
            load_extension().deformable_attention(
                addresses[0], "float32", (batch, cells, heads, dim, queries, levels, points),
                tuple(int(side) for side in np.ravel(sizes)), *addresses[1:], self._threads,
            )  # fmt: skip
            return True

    return DeformableAttention
