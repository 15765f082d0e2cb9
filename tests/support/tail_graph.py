"""A graph of the flavour ``raw`` that ends as exported networks do: a 3x3 convolution, times mask embeddings.

Or as Mask2Former's, which has a 1x1 convolution that is folded into the embeddings.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskformer_fast.config import TestConfig
from maskformer_fast.deploy.bundle.folder import Bundle, write_bundle
from tests.support.tiny_bundle import TinyNetwork, manifest_of, metadata_of

QUERIES, CLASSES, CHANNELS, DIM = 9, 5, 16, 24


def tail_graph(bias: bool = True, channels: int = CHANNELS, stride: int = 1, folded: bool = False) -> bytes:
    """Images of any size -> class logits by linear layers on the means, masks of every fourth pixel."""
    rng = np.random.default_rng(0)
    weights = {
        "scale": np.array(0.02), "stem": rng.normal(size=(channels, 3, 4, 4)) / 7, "axes": np.array([2, 3]),
        "conv": rng.normal(size=(DIM, channels, 3, 3)) / 12, "offset": rng.normal(size=DIM),
        "hidden": rng.normal(size=(channels, 32)), "embed": rng.normal(size=(32, QUERIES * DIM)) / 6,
        "classify": rng.normal(size=(32, QUERIES * (CLASSES + 1))), "embeddings": np.array([0, QUERIES, DIM]),
        "classes": np.array([0, QUERIES, CLASSES + 1]), "flat": np.array([0, DIM, -1]), "queries": np.array([QUERIES]),
    }  # fmt: skip
    node = helper.make_node
    projected = [
        node("Conv", ["x", "conv", *["offset"][:bias]], ["p"], pads=[1] * 4, strides=[stride] * 2),
        node("Reshape", ["p", "flat"], ["flat_p"]), node("MatMul", ["mask_embeddings", "flat_p"], ["product"]),
    ]  # fmt: skip
    if folded:
        weights |= {"linear": rng.normal(size=(DIM, channels)) / 4, "flat": np.array([0, channels, -1]),
                    "last": np.array([2])}  # fmt: skip
        projected = [
            node("Identity", ["x"], ["p"]), node("Reshape", ["p", "flat"], ["flat_p"]),
            node("MatMul", ["mask_embeddings", "linear"], ["folded"]),
            node("MatMul", ["mask_embeddings", "offset"], ["o"]), node("Unsqueeze", ["o", "last"], ["offsets"]),
            node("MatMul", ["folded", "flat_p"], ["without"]), node("Add", ["without", "offsets"], ["product"]),
        ]  # fmt: skip
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT), node("Mul", ["pixels", "scale"], ["scaled"]),
        node("Conv", ["scaled", "stem"], ["stemmed"], strides=[4, 4]), node("Tanh", ["stemmed"], ["x"]),
        node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0), node("MatMul", ["mean", "hidden"], ["h"]),
        node("Relu", ["h"], ["state"]), node("MatMul", ["state", "embed"], ["e"]),
        node("Reshape", ["e", "embeddings"], ["mask_embeddings"]), node("MatMul", ["state", "classify"], ["c"]),
        node("Reshape", ["c", "classes"], ["class_logits"]),
        *projected, node("Shape", ["p"], ["batch"], end=1), node("Shape", ["p"], ["size"], start=2),
        node("Concat", ["batch", "queries", "size"], ["shape"], axis=0),
        node("Reshape", ["product", "shape"], ["mask_logits"]),
    ]  # fmt: skip
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "tail", [info("images", TensorProto.UINT8, ["b", 3, "h", "w"])],
        [info("class_logits", TensorProto.FLOAT, ["b", QUERIES, CLASSES + 1]),
         info("mask_logits", TensorProto.FLOAT, ["b", QUERIES, "y", "x"])],
        [numpy_helper.from_array(np.asarray(w, np.float32 if np.asarray(w).dtype == float else np.int64), name)
         for name, w in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def tail_bundle(folder: Path, folded: bool = False) -> Bundle:
    """A bundle of the graph, without resizing and padding."""
    test = TestConfig(short_edge=None, object_mask_threshold=0.1, overlap_threshold=0.1, top_k=6)
    manifest = manifest_of(TinyNetwork(QUERIES, CLASSES), metadata_of(CLASSES), test)
    return write_bundle(folder, manifest, {"raw.onnx": tail_graph(folded=folded)})
