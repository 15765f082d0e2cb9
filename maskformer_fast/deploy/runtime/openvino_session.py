"""Runs a bundle's graph on the CPU by OpenVINO.

The graph's last operators, which make mask logits, are taken out where they are those that the export writes, so that
masks are computed for the wanted queries only (`deploy.runtime.mask_factors`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from maskformer_fast.core.checks import check
from maskformer_fast.core.machine import has_bfloat16
from maskformer_fast.deploy.bundle.manifest import Precision, expect
from maskformer_fast.deploy.runtime.cpu_session import FLAVOUR, INPUT, OUTPUTS, Tensor
from maskformer_fast.deploy.runtime.mask_factors import PANEL, FactoredMasks, Projection
from maskformer_fast.deploy.runtime.openvino_attention import replace_attention
from maskformer_fast.deploy.runtime.openvino_weights import fit_weights

TYPES = {"f32": "tensor(float)", "u8": "tensor(uint8)"}
_TABLE_OF_TYPES = threading.Lock()
"""Held by the thread that lets OpenVINO make its table of NumPy's types."""


@functools.cache
def shared_core() -> Any:
    """OpenVINO's core, one for the process, which is never destroyed.

    Its CPU plugin gives the thread that loads it a stack for signals, and frees this with the core, perhaps in another
    thread. The next signal of the first thread would then end the process.

    Raises:
        ModuleNotFoundError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "openvino is needed to run a bundle by the backend openvino; install it with: pip install openvino "
            "(or maskformer_fast[openvino])", name=error.name
        ) from error
    # OpenVINO makes this table when it is first needed. Threads that run their first batches at once would wait for
    # each other forever: one holds the table and wants Python's lock, the other the reverse.
    with _TABLE_OF_TYPES:
        openvino.Type.f32.to_dtype()
    return openvino.Core()


class OpenvinoSession:
    """A `maskformer_fast.deploy.runtime.cpu_session.CpuSession`."""

    def __init__(
        self, graph: bytes, threads: int, weights: bytes | None = None, streams: int = 1, precision: Precision = "fp32"
    ) -> None:
        """See `OpenSession`. What an INT8 graph does not quantise is computed in float32: bfloat16 gained 2 % at most.

        Raises:
            BundleError: OpenVINO refuses the graph.
            ModuleNotFoundError: OpenVINO is not installed.
            ValueError: the processor lacks the precision.
        """
        core = shared_core()
        low = has_bfloat16() and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        check(precision != "bf16" or low, "precision", "fp32 or int8, as this processor has no bfloat16", precision)
        settings = {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT", "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "INFERENCE_NUM_THREADS": threads,
        }  # fmt: skip
        try:
            model = core.read_model(graph, weights or b"")
            self.inputs, self.outputs = ([_tensor(port) for port in part] for part in (model.inputs, model.outputs))
            tail = find_mask_tail(model)
            self._tail = tail
            self._threads = max(1, threads // streams)
            replace_attention(model, self._threads)
            fit_weights(model)
            self._model = core.compile_model(model if tail is None else _without(model, tail), "CPU", settings)
        except RuntimeError as error:
            key = f"graphs.{FLAVOUR}" if weights is None else "engines"
            expect(False, key, "a graph that OpenVINO runs", str(error).strip().splitlines()[-1])
            raise
        self._requests = threading.local()  # a request runs one batch at a time

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """Run the network, see `CpuSession.run`. OpenVINO gives each call a free stream."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._model.create_infer_request()
        found = self._requests.own.infer({INPUT: images}, share_inputs=True, share_outputs=True)
        if self._tail is None:
            return [found[name] for name in OUTPUTS]
        classes, embeddings, features = found.values()
        return [classes, FactoredMasks(embeddings, features, self._tail.projection, self._threads)]


class MaskTail(NamedTuple):
    """Operators that end in mask logits: a convolution of pixel features, times mask embeddings.

    A convolution of 1x1 is folded into the embeddings, by which the graph multiplies the features and adds an offset.
    EoMT has no convolution there.
    """

    embeddings: Any  # output of [B, Q, D]; [B, Q, C] without a projection
    features: Any  # output of [B, C, h, w]
    projection: Projection | None  # None: the features are multiplied as they are
    offsets: Any  # output of [B, Q, 1], where a convolution is folded into the embeddings
    names: tuple[str, ...]  # of all these operators


def find_mask_tail(model: Any) -> MaskTail | None:
    """Find the convolution and the product in an OpenVINO model; None where the mask logits are made in another way."""
    if OUTPUTS[1] not in {name for port in model.outputs for name in port.get_names()}:
        return None
    product = _before(model.output(OUTPUTS[1]).get_node(), "Result", "Reshape")
    total = None
    if product.get_type_name() == "Add":
        total, product = product, product.input_value(0).get_node()
    if product.get_type_name() != "MatMul" or any(product.get_attributes().values()):
        return None
    embeddings = product.input_value(0)
    if total is not None:
        return _product_tail(embeddings, product, total)
    last = _before(product.input_value(1).get_node(), "Reshape")
    bias = None
    if last.get_type_name() == "Add":
        bias, last = _before(last.input_value(1).get_node(), "Reshape"), last.input_value(0).get_node()
    if last.get_type_name() != "Convolution":
        return _product_tail(embeddings, product)
    weight = last.input_value(1).get_node()
    if not all(node is None or node.get_type_name() == "Constant" for node in (weight, bias)):
        return _product_tail(embeddings, product)
    channels, shape = weight.shape[0], list(weight.shape)
    plain = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "auto_pad": "explicit"}
    if shape[2:] != [3, 3] or shape[1] % PANEL or last.get_attributes() != plain:
        return _product_tail(embeddings, product)
    offsets = np.zeros(channels) if bias is None else np.broadcast_to(bias.data.reshape(-1), channels)
    projection = Projection(weight.data.astype(np.float32), np.ascontiguousarray(offsets, dtype=np.float32))
    names = last.get_friendly_name(), product.get_friendly_name()
    return MaskTail(embeddings, last.input_value(0), projection, None, names)


def _product_tail(embeddings: Any, product: Any, total: Any = None) -> MaskTail | None:
    """The tail of a product with pixel features [B, C, h, w], flattened, and of the sum with offsets, if there is one.

    Returns None for other shapes.
    """
    flat = product.input_value(1).get_node()
    if flat.get_type_name() != "Reshape":
        return None
    features = flat.input_value(0)
    shapes = [output.get_partial_shape() for output in (embeddings, features)]
    if [len(shape) for shape in shapes if shape.rank.is_static] != [3, 4]:
        return None
    if not (shapes[0][2].is_static and shapes[0][2] == shapes[1][1]):
        return None
    if total is None:
        return MaskTail(embeddings, features, None, None, (product.get_friendly_name(),))
    offsets = total.input_value(1)
    shape = offsets.get_partial_shape()
    if shape.rank.is_dynamic or len(shape) != 3 or shape[2] != 1:
        return None
    nodes = total, product, embeddings.get_node(), _before(offsets.get_node(), "Unsqueeze", "Reshape")
    return MaskTail(embeddings, features, None, offsets, tuple(node.get_friendly_name() for node in nodes))


def _before(node: Any, *kinds: str) -> Any:
    """The node itself, or the first one before it that is of none of these kinds."""
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node


def _without(model: Any, tail: MaskTail) -> Any:
    """A model that gives class logits, mask embeddings and pixel features [B, h, w, C]."""
    import openvino
    from openvino import opset13

    classes = model.output(OUTPUTS[0]).get_node().input_value(0)
    features = opset13.transpose(tail.features, np.array([0, 2, 3, 1]))
    embeddings = tail.embeddings
    if tail.offsets is not None:
        embeddings = opset13.concat([embeddings, tail.offsets], 2).output(0)
    return openvino.Model([classes, embeddings, features.output(0)], model.get_parameters())


def _tensor(port: Any) -> Tensor:
    kind = port.get_element_type().get_type_name()
    shape = port.get_partial_shape()
    sizes = None if shape.rank.is_dynamic else [None if size.is_dynamic else size.get_length() for size in shape]
    return Tensor(port.get_any_name(), TYPES.get(kind, kind), sizes)
