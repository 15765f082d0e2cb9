"""Weights of INT8 graphs in seven bits, for processors on which sums of two products of bytes saturate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from maskformer_fast.deploy.runtime import openvino_weights
from maskformer_fast.deploy.runtime.openvino_weights import LARGEST, fit_weights, narrow_weights

openvino = pytest.importorskip("openvino")

CHANNELS, OUTPUTS = 96, 40


def quantised_layer(weight: np.ndarray, scale: np.ndarray, levels: int = 256) -> Any:
    """A linear layer of inputs in 0..1, quantised as NNCF writes it."""
    from openvino import opset13 as op

    x = op.parameter([-1, CHANNELS], np.float32, name="x")
    low, high = (op.constant(np.float32(value)) for value in (0, 1))
    quantised = op.fake_quantize(x, low, high, low, high, levels)
    floats = op.multiply(op.convert(op.constant(weight), "f32"), op.constant(scale))
    return openvino.Model([op.matmul(quantised, floats, False, True)], [x])


def constants(model: Any) -> list[np.ndarray]:
    return [node.data for node in model.get_ops()
            if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "i8"]  # fmt: skip


def random_weights(seed: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    weight = generator.integers(-largest, largest + 1, (OUTPUTS, CHANNELS)).astype(np.int8)
    weight[0, 0] = -largest
    return weight, generator.uniform(0.001, 0.1, (OUTPUTS, 1)).astype(np.float32)


def run(model: Any, inputs: np.ndarray) -> np.ndarray:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled(inputs)[0])


def test_weights_fit_and_keep_their_values_within_half_a_step() -> None:
    weight, scale = random_weights(0, 127)
    model = quantised_layer(weight, scale)
    assert narrow_weights(model) == 1
    (narrow,) = constants(model)
    assert np.abs(narrow.astype(int)).max() == LARGEST and 2 * 255 * LARGEST < 2**15
    step = np.float32(127 / LARGEST)
    assert np.abs(narrow * step - weight).max() <= 0.5 * step + 1e-4
    assert narrow_weights(model) == 0  # what fits is left


def test_sums_do_not_saturate_on_any_processor() -> None:
    """All inputs are large, and all weights of an output have one sign: the worst case of a pair."""
    weight, scale = random_weights(1, 127)
    weight = np.abs(weight.astype(np.int16)).clip(90, 127).astype(np.int8)
    model = quantised_layer(weight, scale)
    narrow_weights(model)
    inputs = np.random.default_rng(2).uniform(0.9, 1, (50, CHANNELS)).astype(np.float32)
    wanted = inputs.astype(np.float64) @ (weight * scale.astype(np.float64)).T
    assert np.abs(run(model, inputs) / wanted - 1).max() < 0.01


def test_small_weights_and_other_constants_are_left() -> None:
    weight, scale = random_weights(3, LARGEST)
    model = quantised_layer(weight, scale)
    assert narrow_weights(model) == 0
    assert np.array_equal(constants(model)[0], weight)


@pytest.mark.parametrize("saturates", [False, True])
def test_only_processors_that_saturate_pay_for_it(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_weights, "saturates_bytes", lambda: saturates)
    assert fit_weights(quantised_layer(*random_weights(4, 127))) == saturates
