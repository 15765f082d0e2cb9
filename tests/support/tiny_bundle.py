"""A bundle of a tiny network, written both in PyTorch and in ONNX, so that no test waits for an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from maskformer_fast.config import Config, ModelConfig, TestConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.deploy.bundle.folder import Bundle, write_bundle
from maskformer_fast.deploy.bundle.manifest import Graph, Manifest, Postprocess, Preprocess, TensorSpec
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.structures import Predictions

DIVISOR = 32
CHANNELS = 6


class TinyNetwork(nn.Module):
    """A convolution of stride 4 gives features; their means give the classes, their mixtures the masks.

    Predictions depend on every pixel and are sure enough for segments and instances.
    """

    def __init__(self, queries: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator))

        self.kernel = weight(CHANNELS, 3, 4, 4, scale=0.3)
        self.embeddings = weight(queries, CHANNELS, scale=2.0)
        self.offsets = weight(queries, 1, 1, scale=0.5)
        self.mixture = weight(CHANNELS, queries * (classes + 1), scale=20.0)
        self.bias = weight(queries * (classes + 1), scale=2.0)
        self.mean = (torch.arange(3) * 10.0 + 100)[:, None, None]
        self.scale = (torch.arange(3) * 2.0 + 50)[:, None, None]
        self.queries, self.classes = queries, classes

    def forward(self, images: Tensor, valid_sizes: Tensor) -> Predictions:
        height, width = images.shape[2:]
        rows, columns = torch.arange(height), torch.arange(width)
        inside = (rows < valid_sizes[:, :1])[:, None, :, None] & (columns < valid_sizes[:, 1:])[:, None, None, :]
        normalised = (images - self.mean) / self.scale * inside
        features = torch.tanh(nn.functional.conv2d(normalised, self.kernel, stride=4))
        logits = (features.mean((2, 3)) @ self.mixture + self.bias).unflatten(1, (self.queries, self.classes + 1))
        with_offset = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        embeddings = torch.cat([self.embeddings, self.offsets[:, :, 0]], 1).expand(len(images), -1, -1)
        return Predictions(logits[None], embeddings[None], with_offset, valid_sizes, (height, width))

    def onnx(self, size: tuple[int, int, int] | None = None) -> bytes:
        """The network as a graph of the flavour ``raw``; ``size`` (batch, height, width) fixes its input."""
        nodes: list[Any] = []
        constants: dict[str, np.ndarray] = {}

        def constant(name: str, value: Any) -> str:
            constants[name] = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
            return name

        def node(kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
            out = out or f"{kind}_{len(nodes)}"
            nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
            return out

        pixels = node("Cast", "images", to=TensorProto.FLOAT)
        shifted = node("Sub", pixels, constant("mean", self.mean))
        normalised = node("Div", shifted, constant("scale", self.scale))
        size_of_images = node("Shape", "images", start=2, end=4)
        missing = node("Mod", node("Neg", size_of_images), constant("divisor", np.int64(DIVISOR)))
        pads = node("Concat", constant("begin", np.zeros(6, np.int64)), missing, axis=0)
        padded = node("Pad", normalised, pads)
        features = node("Tanh", node("Conv", padded, constant("kernel", self.kernel), strides=[4, 4]))
        means = node("ReduceMean", features, constant("axes", np.array([2, 3])), keepdims=0)
        classes = node("Add", node("MatMul", means, constant("mixture", self.mixture)), constant("bias", self.bias))
        shape = constant("shape", np.array([-1, self.queries, self.classes + 1]))
        node("Reshape", classes, shape, out="class_logits")
        mixed = node("Conv", features, constant("embeddings", self.embeddings[:, :, None, None]))
        node("Add", mixed, constant("offsets", self.offsets), out="mask_logits")
        batch, height, width = size or ("batch", "height", "width")
        outputs = {"class_logits": [batch, self.queries, self.classes + 1]}
        outputs["mask_logits"] = [batch, self.queries, "h", "w"]
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 3, height, width])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def metadata_of(classes: int) -> Metadata:
    """Metadata of so many classes, of which every other one is a thing."""
    names = tuple(f"class {index}" for index in range(classes))
    colors = tuple((index % 256, 90, 255 - index % 256) for index in range(classes))
    return Metadata("tiny", names, tuple(index % 2 == 0 for index in range(classes)), tuple(range(classes)), colors)


def manifest_of(network: TinyNetwork, metadata: Metadata, test: TestConfig, **changes: Any) -> Manifest:
    """Manifest as an export writes it, with the thresholds of the test configuration."""
    images = TensorSpec("images", "uint8", ("batch", 3, "height", "width"))
    outputs = (
        TensorSpec("class_logits", "float32", ("batch", network.queries, network.classes + 1)),
        TensorSpec("mask_logits", "float32", ("batch", network.queries, "h", "w")),
    )
    fields: dict[str, Any] = {
        "name": "tiny",
        "created_with": {"maskformer_fast": "test"},
        "num_queries": network.queries,
        "num_classes": network.classes,
        "metadata": metadata,
        "preprocess": Preprocess((100.0, 110.0, 120.0), (50.0, 52.0, 54.0), test.edge, test.max_size, DIVISOR),
        "postprocess": Postprocess(
            test.object_mask_threshold, test.overlap_threshold, test.top_k, test.panoptic_rule
        ),
        "graphs": {"raw": Graph("raw.onnx", (images,), outputs, 20, True)},
    }
    return Manifest(**{**fields, **changes})


def tiny_bundle(
    folder: Path,
    test: TestConfig,
    queries: int = 9,
    metadata: Metadata | None = None,
    seed: int = 0,
    size: tuple[int, int, int] | None = None,
    **changes: Any,
) -> tuple[Bundle, Predictor]:
    """A bundle and a predictor of the same weights. The predictor, too, takes images one at a time."""
    metadata = metadata or metadata_of(5)
    network = TinyNetwork(queries, metadata.num_classes, seed)
    manifest = manifest_of(network, metadata, test, **changes)
    if size is not None:
        graph = manifest.graphs["raw"]
        images = TensorSpec("images", "uint8", (size[0], 3, size[1], size[2]))
        changes["graphs"] = {"raw": Graph(graph.file, (images,), graph.outputs, graph.opset, False)}
        manifest = manifest_of(network, metadata, test, **changes)
    bundle = write_bundle(folder, manifest, {"raw.onnx": network.onnx(size)})
    model = ModelConfig(num_classes=metadata.num_classes, size_divisibility=DIVISOR)
    return bundle, Predictor(network, Config(model=model, test=test), metadata, "cpu")
