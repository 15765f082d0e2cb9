"""Weights of an INT8 graph on processors that saturate sums of products.

x86-64 processors multiply bytes in pairs, unsigned activations by signed weights. Those without VNNI write the sum of
two products to 16 bits, where it saturates: 2 * 255 * 127 is twice what fits. OpenVINO's results are wrong there, and
mask logits of trained networks worthless. With weights of seven bits no sum of two is too large.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from maskformer_fast.core.machine import saturates_bytes

LARGEST = 64
"""Absolute value up to which a pair of products fits: 2 * 255 * 64 < 2**15."""


def fit_weights(model: Any) -> int:
    """Round the weights of a quantised OpenVINO model to seven bits if this processor needs that -> how many tensors.

    Weights are constants of int8, converted and multiplied by their scale. Scales grow accordingly, in place.
    """
    return narrow_weights(model) if saturates_bytes() else 0


def narrow_weights(model: Any) -> int:
    """As `fit_weights`, on any processor."""
    from openvino import opset13

    count = 0
    for node in model.get_ops():
        if node.get_type_name() != "Multiply":
            continue
        converted, scale = (port.get_node() for port in node.input_values())
        if converted.get_type_name() != "Convert" or scale.get_type_name() != "Constant":
            continue
        weight = converted.input_value(0).get_node()
        if weight.get_type_name() != "Constant" or weight.get_element_type().get_type_name() != "i8":
            continue
        values = weight.data.astype(np.float32)
        step = np.abs(values).max(initial=0) / np.float32(LARGEST)
        if step <= 1:
            continue
        rounded = np.rint(values / step).astype(np.int8)
        converted.input(0).replace_source_output(opset13.constant(rounded).output(0))
        node.input(1).replace_source_output(opset13.constant(scale.data * step).output(0))
        count += 1
    return count
