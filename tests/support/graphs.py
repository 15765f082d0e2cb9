"""A small ONNX graph of the flavour ``raw`` with every kind of node that conversions treat differently."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, QUERIES, CLASSES = 32, 16, 10


def raw_graph(sizes: tuple[int | str, int | str, int | str] = ("b", "h", "w"), seed: int = 0) -> onnx.ModelProto:
    """Graph of normalised pixels, two convolutions with a norm, attention of queries to pixels, classes and masks."""
    rng = np.random.default_rng(seed)
    c, q = CHANNELS, QUERIES
    weights = {
        "mean": np.full((3, 1, 1), 120.0), "std": np.full((3, 1, 1), 60.0),
        "conv1": rng.normal(size=(c, 3, 3, 3)) / 5, "conv1_bias": rng.normal(size=c),
        "conv2": rng.normal(size=(c, c, 3, 3)) / 17, "conv2_bias": rng.normal(size=c),
        "gamma": 1 + rng.normal(size=c) / 5, "beta": rng.normal(size=c) / 5,
        "query": rng.normal(size=(1, q, c)), "key": rng.normal(size=(c, c)) / 6, "scale": np.array(c**-0.5),
        "ln_gamma": 1 + rng.normal(size=c) / 5, "ln_beta": rng.normal(size=c) / 5,
        "classify": rng.normal(size=(c, CLASSES + 1)), "classify_bias": rng.normal(size=CLASSES + 1),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Sub", ["pixels", "mean"], ["centred"]), node("Div", ["centred", "std"], ["x"]),
        node("Conv", ["x", "conv1", "conv1_bias"], ["x1"], "conv1", pads=[1] * 4, strides=[2, 2]),
        node("Relu", ["x1"], ["x2"]),
        node("Conv", ["x2", "conv2", "conv2_bias"], ["x3"], "conv2", pads=[1] * 4, strides=[2, 2]),
        node("InstanceNormalization", ["x3", "gamma", "beta"], ["f"]),  # [B, C, h, w]
        node("Shape", ["f"], ["head"], end=2), node("Concat", ["head", "rest"], ["flat"], axis=0),
        node("Reshape", ["f", "flat"], ["memory"]),  # [B, C, N]
        node("Transpose", ["memory"], ["tokens"], perm=[0, 2, 1]), node("MatMul", ["tokens", "key"], ["keys"], "key"),
        node("Transpose", ["keys"], ["keys_t"], perm=[0, 2, 1]),
        node("MatMul", ["query", "keys_t"], ["scores"], "scores"), node("Mul", ["scores", "scale"], ["scaled"]),
        node("Softmax", ["scaled"], ["weights"], axis=-1), node("MatMul", ["weights", "tokens"], ["seen"], "seen"),
        node("Add", ["seen", "query"], ["sum"]),
        node("LayerNormalization", ["sum", "ln_gamma", "ln_beta"], ["state"], axis=-1),
        node("MatMul", ["state", "classify"], ["classes"], "classify"),
        node("Add", ["classes", "classify_bias"], ["class_logits"]),
        node("Einsum", ["state", "f"], ["mask_logits"], equation="bqc,bchw->bqhw"),
    ]
    tensors = [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([-1]), "rest"))
    info = helper.make_tensor_value_info
    b, h, w = sizes
    low = [f"{s}/4" if isinstance(s, str) else s // 4 for s in (h, w)]
    graph = helper.make_graph(
        nodes, "raw", [info("images", TensorProto.UINT8, [b, 3, h, w])],
        [info("class_logits", TensorProto.FLOAT, [b, q, CLASSES + 1]),
         info("mask_logits", TensorProto.FLOAT, [b, q, *low])],
        tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def images(batch: int = 2, height: int = 64, width: int = 96, seed: int = 1) -> np.ndarray:
    """Random uint8 [B, 3, H, W], smooth enough that neighbours agree."""
    coarse = np.random.default_rng(seed).integers(0, 256, (batch, 3, -(-height // 8), -(-width // 8)), np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 2).repeat(8, 3)[:, :, :height, :width])


def run(model: onnx.ModelProto, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class logits and mask logits by onnxruntime without optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    classes, masks = session.run(["class_logits", "mask_logits"], {"images": inputs})
    return np.asarray(classes), np.asarray(masks)


def labels(outputs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Semantic labels at the size of the masks: argmax over classes of sum_q softmax x sigmoid."""
    classes, masks = (np.asarray(o, np.float64) for o in outputs)
    exponentials = np.exp(classes - classes.max(-1, keepdims=True))
    shares = (exponentials / exponentials.sum(-1, keepdims=True))[..., :-1]
    return np.einsum("bqk,bqhw->bkhw", shares, 1 / (1 + np.exp(-masks))).argmax(1)
