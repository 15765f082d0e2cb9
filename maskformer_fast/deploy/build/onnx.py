"""Export of a network to ONNX graphs by ``torch.export``.

There are two flavours. Both take uint8 images [B, 3, H, W] of any size and normalise and pad inside the graph; those of
a network of bands take float32 [B, C, H, W], as resized bands are not rounded:

- ``raw`` gives class logits and mask logits, for runtimes with post-processing of their own.
- ``complete`` gives semantic labels at the input's size by plain ONNX operators, in the order ``direct`` of
  `maskformer_fast.inference.postprocess`, for all other runtimes.

The graphs use opset 20, float32, and no control flow. Mask logits are the product of pixel embeddings and mask
embeddings. On the CPU, PyTorch folds the embeddings into the last convolution instead. That needs a kernel for each
image, computed at run time, for which TensorRT has no fast convolution.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_config
from torch.nn import functional as F

from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.deploy.build.deformable_attention import expand, translation
from maskformer_fast.deploy.bundle.manifest import Graph, Shape, TensorSpec
from maskformer_fast.modeling.eomt import EoMT
from maskformer_fast.modeling.mask2former import Mask2Former
from maskformer_fast.modeling.maskformer import MaskFormer
from maskformer_fast.ops.mask_product import layer_mask_logits

logger = logging.getLogger(__name__)

OPSET = 20
"""Opset of the graphs: TensorRT's builder fails on some operators of later ones (Attention, opset 23)."""
Flavour = Literal["raw", "complete"]
FLAVOURS: tuple[Flavour, ...] = ("raw", "complete")

# Sizes while tracing; nothing is computed at them. They are far from 1, from each other, and from multiples of the
# window, so that no comparison of sizes is decided by coincidence.
_TRACED = Shape(3, 1501, 2203)
_NAMES = ("B", "H", "W")


Exportable = MaskFormer | Mask2Former | EoMT


class RawGraph(nn.Module):
    """Network from images to class logits and mask logits of the last decoder layer."""

    def __init__(self, network: Exportable) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] uint8 RGB, or bands [B, C, H, W] float32; without padding
    ) -> tuple[Tensor, Tensor]:
        """-> class logits [B, Q, K+1], mask logits [B, Q, h, w] at stride 4 of the padded input."""
        network = self.network
        height, width = padded_size(images.shape[2], images.shape[3], network.config.size_divisibility)
        padding = (0, width - images.shape[3], 0, height - images.shape[2])
        x = images.to(torch.float32)
        if network.config.padding == "black":
            x = (F.pad(x, padding) - network.pixel_mean) / network.pixel_std
        else:
            x = F.pad((x - network.pixel_mean) / network.pixel_std, padding)
        if isinstance(network, EoMT):
            prediction = network.predict(x, torch.empty(0), all_layers=False)[-1]
            return prediction.class_logits[0], layer_mask_logits(prediction)
        features, memory = network.pixel_decoder.fuse(network.backbone(x))
        projection = network.pixel_decoder.projection
        if isinstance(network, Mask2Former):
            class_logits, embeddings = network.predictor(features, projection, memory, all_layers=False)
        else:
            class_logits, embeddings = network.predictor(memory, all_layers=False)
        if projection.weight.shape[-1] == 1:  # one product of the queries, in place of one of all channels
            folded = torch.matmul(embeddings[-1], projection.weight.flatten(1))
            offsets = torch.matmul(embeddings[-1], projection.bias)
            masks = torch.matmul(folded, features.flatten(2)) + offsets.unsqueeze(2)
            return class_logits[-1], masks.unflatten(2, features.shape[2:])
        pixels = projection.embed(features)
        masks = torch.matmul(embeddings[-1], pixels.flatten(2)).unflatten(2, pixels.shape[2:])
        return class_logits[-1], masks


class LabelGraph(nn.Module):
    """Semantic labels at the images' size from logits: the end of the flavour ``complete``."""

    def __init__(self, divisibility: int) -> None:
        super().__init__()
        self.divisibility = divisibility

    def forward(
        self,
        images: Tensor,  # [B, C, H, W], for their size
        class_logits: Tensor,  # [B, Q, K+1]
        mask_logits: Tensor,  # [B, Q, h, w]
    ) -> Tensor:
        """-> labels [B, H, W] int32."""
        return label_scores(class_logits, mask_logits, images.shape[2:], self.divisibility)[0]


def padded_size(height: int, width: int, divisibility: int) -> tuple[int, int]:
    """Height and width of images rounded up to multiples of ``divisibility`` (0: not rounded)."""
    step = max(divisibility, 1)
    return (height + step - 1) // step * step, (width + step - 1) // step * step


def label_scores(
    class_logits: Tensor,  # [B, Q, K+1]
    mask_logits: Tensor,  # [B, Q, h, w]
    image_size: Sequence[int],
    divisibility: int,
) -> tuple[Tensor, Tensor]:
    """Semantic inference in the order ``direct`` -> labels [B, H, W] int32, class scores [B, K, H, W]."""
    height, width = image_size
    size = padded_size(height, width, divisibility)
    masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)
    # onnxruntime's sigmoid is 0 below -18, where pixels far from every mask still have a best class.
    masks = (1 + masks[:, :, :height, :width].neg().exp()).reciprocal()
    classes = class_logits.softmax(-1)[..., :-1].transpose(1, 2)  # [B, K, Q]
    scores = torch.matmul(classes, masks.flatten(2)).unflatten(2, (height, width))
    return scores.argmax(1).to(torch.int32), scores


def export_graphs(
    network: nn.Module,
    flavours: Sequence[Flavour] = FLAVOURS,
    static: Shape | None = None,
    any_batch: bool = False,
    channels: int = 0,
) -> dict[Flavour, tuple[bytes, Graph]]:
    """Export a network -> for each flavour the ONNX file ``FLAVOUR.onnx`` and its entry in the manifest.

    All flavours take the time of one export: ``complete`` is ``raw`` with a few operators behind it.

    Args:
        network: a `MaskFormer`, `Mask2Former` or `EoMT` on the CPU, in evaluation mode.
        flavours: flavours to export.
        static: the only shape that the graphs will take; ``None`` takes any batch, height and width.
        any_batch: take any batch of the height and width of ``static``.
        channels: as ``data.channels``: number of bands, for a network of bands; 0 for RGB of 8 bits.

    Raises:
        ValueError: the network is a per-pixel baseline, which has no queries, or an EoMT that masks the attention of
            some queries by chance.
    """
    for flavour in flavours:
        check_choice("flavours", flavour, FLAVOURS)
    checked = exportable(network)
    config = checked.config
    traced = static or _TRACED
    if any_batch:
        traced = replace(traced, batch=_TRACED.batch)
    queries, classes = config.decoder.num_queries, config.num_classes
    pixels = mask_size(traced, config.size_divisibility)
    names: tuple[int | str, ...] = _NAMES if static is None else (static.batch, static.height, static.width)
    if any_batch:
        names = (_NAMES[0], *names[1:])
    image = TensorSpec("images", "float32" if channels else "uint8", (names[0], config.channels, *names[1:]))
    logits = (
        TensorSpec("class_logits", "float32", (names[0], queries, classes + 1)),
        TensorSpec("mask_logits", "float32", (names[0], queries, *(("h", "w") if static is None else pixels))),
    )
    labels = TensorSpec("labels", "int32", names)

    blank = torch.zeros(1, dtype=torch.float32 if channels else torch.uint8)
    images = blank.expand(traced.batch, config.channels, traced.height, traced.width)
    raw = _export(RawGraph(checked), (images,), (image,), logits)
    graphs: dict[Flavour, tuple[bytes, Graph]] = {}
    for flavour in flavours:
        outputs: tuple[TensorSpec, ...] = logits
        if flavour == "complete":
            given = (
                images,
                torch.zeros(traced.batch, queries, classes + 1),
                torch.zeros(1).expand(traced.batch, queries, *pixels),
            )
            outputs = (labels,)
            tail = _export(LabelGraph(config.size_divisibility), given, (image, *logits), outputs)
            model = _append(raw, tail)
        else:
            model = raw
        content = model.SerializeToString(deterministic=True)
        graphs[flavour] = content, Graph(f"{flavour}.onnx", (image,), outputs, OPSET, static is None or any_batch)
    return graphs


def exportable(network: nn.Module) -> Exportable:
    """The network, if it can be exported. Raises ``ValueError``."""
    if not isinstance(network, (MaskFormer, Mask2Former, EoMT)):
        raise ValueError("model.type: expected maskformer, mask2former or eomt, which alone can be exported, got "
                         f"{type(network).__name__}")
    check(not network.training, "network", "one in evaluation mode", "training mode")
    if isinstance(network, EoMT):
        certain = all(probability in (0.0, 1.0) for probability in network.probabilities)
        check(certain, "mask_probability", "0 or 1 in each block, as a graph draws nothing", network.probabilities)
    return network


def mask_size(shape: Shape, divisibility: int) -> tuple[int, int]:
    """Height and width of mask logits for images of this shape."""
    height, width = padded_size(shape.height, shape.width, divisibility)
    return -(-height // 4), -(-width // 4)


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], given: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> Any:
    """Export a module -> onnx.ModelProto with the specified inputs and outputs. A size with a name is dynamic."""
    shapes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in given
    )
    # PyTorch compares many sizes with 1 to choose a memory layout, which no ONNX graph has. Size-oblivious tracing
    # answers no without a condition on the size. The other conditions (padding >= 0) are true for all sizes.
    oblivious = symbolic_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # the attribute is added at run time
    with torch.no_grad(), oblivious, _quiet():
        program = torch.export.export(
            module, inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
        exported = torch.onnx.export(
            program, opset_version=OPSET, dynamo=True, verbose=False, input_names=[spec.name for spec in given],
            output_names=[spec.name for spec in outputs],
            custom_translation_table=translation(),
        )  # fmt: skip
    assert exported is not None  # None is returned for exports to a file
    model = exported.model_proto
    expand(model)
    for value, spec in zip([*model.graph.input, *model.graph.output], [*given, *outputs], strict=True):
        assert value.name == spec.name
        for dimension, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(size, str):
                dimension.dim_param = size
            else:
                dimension.dim_value = size
    # Shape inference gives the shapes of inner values again, without the exporter's names for sizes.
    del model.graph.value_info[:]
    return model


def _append(first: Any, second: Any) -> Any:
    """Connect the inputs of the second model to the first model's values of the same names -> a new model."""
    shared = {value.name for value in second.graph.input}
    shared.update(value.name for value in second.graph.output)
    model = type(first)()
    model.CopyFrom(first)
    added = type(first)()
    added.CopyFrom(second)
    for node in added.graph.node:
        node.name = f"labels/{node.name}"
        for slots in (node.input, node.output):
            for index, name in enumerate(slots):
                slots[index] = name if name in shared or not name else f"labels/{name}"
    for initializer in added.graph.initializer:
        initializer.name = f"labels/{initializer.name}"
    model.graph.node.extend(added.graph.node)
    model.graph.initializer.extend(added.graph.initializer)
    del model.graph.output[:]
    model.graph.output.extend(added.graph.output)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress and its notes on optional packages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [noisy.level for noisy in loggers]
    for noisy in loggers:
        noisy.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for noisy, level in zip(loggers, levels, strict=True):
            noisy.setLevel(level)
