"""Comparison of a network's ONNX graphs, as onnxruntime and OpenVINO run them, with PyTorch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import ModelConfig
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.deploy.build.onnx import Flavour, exportable, label_scores, padded_size
from maskformer_fast.deploy.bundle.manifest import Parity, Shape
from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession
from maskformer_fast.modeling.eomt import EoMT
from maskformer_fast.modeling.mask2former import Mask2Former
from maskformer_fast.ops.mask_product import layer_mask_logits

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit."""
MARGIN = 1e-3
"""Lead of the best class's score over the second best's above which labels must be equal."""
SETTLED = 0.5
"""Share of the queries of a network with masked attention whose logits must be within `TOLERANCE`. Others may attend to
other cells, and a little of that reaches all queries in self-attention."""
UNSETTLED = 1e-2
"""Largest difference of the other queries' logits, and `MARGIN` of such a network."""

Library = Literal["onnxruntime", "openvino"]


class ParityError(RuntimeError):
    """A graph whose outputs differ from PyTorch's."""


@torch.no_grad()
def check_parity(
    network: nn.Module, graphs: Mapping[Flavour, bytes], shapes: Sequence[Shape], library: Library = "onnxruntime",
    channels: int = 0,
) -> tuple[Parity, ...]:  # fmt: skip
    """Compare each graph, run by a library, with PyTorch on random images of each shape.

    OpenVINO runs graphs of the flavour ``raw`` only, as the runtime does. ``channels`` is that of `export_graphs`.

    The reference of ``raw`` is the network as `Predictor` runs it. That of ``complete`` is semantic inference on the
    network's logits.

    In masked attention a query attends where its mask logit is not negative. Where one is zero up to rounding, one
    library attends and another does not, and this query's logits differ by more. See `SETTLED` and `UNSETTLED`.

    Raises:
        ParityError: logits differ by more than `TOLERANCE` of the largest one, labels differ where the best class leads
            by more than `MARGIN`, or a graph fails. The message has the flavour and the shape.
        ModuleNotFoundError: the library is not installed.
    """
    check_choice("library", library, ("onnxruntime", "openvino"))
    check(library == "onnxruntime" or set(graphs) == {"raw"}, "graphs", "raw alone with openvino", sorted(graphs))
    checked = exportable(network)
    masked = isinstance(checked, Mask2Former) or (isinstance(checked, EoMT) and 1.0 in checked.probabilities)
    divisibility = checked.config.size_divisibility
    sessions = {flavour: _runner(content, library) for flavour, content in graphs.items()}
    results = []
    for number, shape in enumerate(shapes):
        images = _test_images(shape, number, checked.config.channels)
        if channels:
            images = _as_bands(images, checked.config)
        reference = _reference(checked, images, divisibility)
        for flavour, run in sessions.items():
            try:
                outputs = run(images.numpy())
            except Exception as error:  # onnxruntime's errors share no base class
                raise ParityError(f"{flavour}.onnx, {shape}: {library} fails: {error}") from error
            tensors = [torch.from_numpy(np.array(output)) for output in outputs]
            results.append(_compare(flavour, shape, reference, tensors, divisibility, masked))
    return tuple(results)


def _runner(content: bytes, library: Library) -> Callable[[np.ndarray], Sequence[Any]]:
    """Function from images to a graph's outputs."""
    if library == "openvino":
        return OpenvinoSession(content, torch.get_num_threads()).run
    session = _session(content)
    return lambda images: session.run(None, {"images": images})


def _session(content: bytes) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "onnxruntime is not installed: pip install maskformer_fast[deploy]", name="onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _test_images(shape: Shape, seed: int, channels: int = 3) -> Tensor:
    """Random blocks of 16 pixels with noise, so that every layer has structure to work on."""
    generator = np.random.default_rng(seed)
    rows, columns = math.ceil(shape.height / 16), math.ceil(shape.width / 16)
    blocks = generator.integers(0, 224, (shape.batch, channels, rows, columns)).repeat(16, 2).repeat(16, 3)
    blocks = blocks[:, :, : shape.height, : shape.width]
    return torch.from_numpy((blocks + generator.integers(0, 32, blocks.shape)).astype(np.uint8))


def _as_bands(images: Tensor, config: ModelConfig) -> Tensor:
    """Images of 0..255 as float32 on the scale of each band: twice its deviation below and above its mean."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.pixel_mean, config.pixel_std))
    return mean + (images.float() - 127.5) / 64 * std


def _reference(network: nn.Module, images: Tensor, divisibility: int) -> tuple[Tensor, Tensor]:
    """Logits of the PyTorch network, whose input is padded as `Predictor` does."""
    batch, _, height, width = images.shape
    size = padded_size(height, width, divisibility)
    padded = F.pad(images, (0, size[1] - width, 0, size[0] - height))
    predictions = network(padded, torch.tensor([[height, width]]).expand(batch, -1))
    return predictions.class_logits[-1], layer_mask_logits(predictions)


def _difference(got: Tensor, logits: Tensor, masked: bool) -> float:
    """Largest difference of the queries that must agree, relative to the largest logit."""
    by_query = ((got - logits).abs().flatten(2).amax(2) / logits.abs().max()).flatten()
    if masked and float(by_query.max()) <= UNSETTLED:
        return float(by_query.kthvalue(max(1, int(SETTLED * len(by_query)))).values)
    return float(by_query.max())


def _compare(
    flavour: Flavour, shape: Shape, reference: tuple[Tensor, Tensor], outputs: list[Tensor], divisibility: int,
    masked: bool,
) -> Parity:  # fmt: skip
    """Errors of one graph of a network with or without masked attention on one batch. Raises `ParityError`."""
    where = f"{flavour}.onnx, {shape}"
    size = (shape.height, shape.width)
    expected, scores = label_scores(*reference, size, divisibility)
    top = scores.topk(min(2, scores.shape[1]), dim=1).values
    margin = UNSETTLED if masked else MARGIN
    clear = top[:, 0] - top[:, -1] > margin if scores.shape[1] > 1 else torch.ones_like(expected, dtype=torch.bool)
    del scores, top
    error = 0.0
    if flavour == "raw":
        for got, logits in zip(outputs, reference, strict=True):
            if got.shape != logits.shape:
                raise ParityError(f"{where}: expected logits of shape {list(logits.shape)}, got {list(got.shape)}")
            difference = _difference(got, logits, masked)
            error = difference if math.isnan(difference) else max(error, difference)
        labels = label_scores(outputs[0], outputs[1], size, divisibility)[0]
    else:
        labels = outputs[0]
        if labels.shape != expected.shape:
            raise ParityError(f"{where}: expected labels of shape {list(expected.shape)}, got {list(labels.shape)}")
    equal = labels == expected
    result = Parity(
        flavour, shape, error, float(equal.double().mean()),
        float(equal[clear].double().mean()) if bool(clear.any()) else 1.0,
    )  # fmt: skip
    if not error <= TOLERANCE:  # true for NaN too
        raise ParityError(f"{where}: logits differ from PyTorch's by {error:.3g} of the largest, over {TOLERANCE}")
    if result.labels_equal_at_margin < 1.0:
        share = 1.0 - result.labels_equal_at_margin
        raise ParityError(f"{where}: {share:.3g} of the labels that lead by {margin:g} differ from PyTorch's")
    logger.info("%s: logits within %.1e of the largest, %.4f of labels equal", where, error, result.labels_equal)
    return result
