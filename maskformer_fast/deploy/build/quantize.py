"""INT8 and FP8 by explicit Q/DQ nodes: nvidia-modelopt places them, the user's images give their ranges.

Convolutions and linear layers are quantised, with one range for each output channel of a weight. The first convolution
is not, as its few channels gain nothing. Neither are products of two activations: attention, and the mask product, by
whose values queries are compared. Percentile ranges are computed here, as modelopt offers only entropy and max.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from maskformer_fast.core.checks import check
from maskformer_fast.core.image_files import IMAGE_SUFFIXES, list_files, picture_suffixes
from maskformer_fast.core.image_resize import is_rgb, resize_bands
from maskformer_fast.data import BrokenExampleError
from maskformer_fast.data.bands import read_picture
from maskformer_fast.data.images import read_image

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

LEAST_IMAGES = 8
"""Fewest pictures by which ranges are measured."""
PERCENTILE = 99.99
"""Per cent of the activations that lie within a range of the method "percentile"."""
QUANTIZED_OPERATORS = ("Conv", "Gemm", "MatMul")
"""Operators that are quantised where one input is a weight."""
_BINS = 2048
"""Bins of a histogram of activations."""


def quantize(
    model: onnx.ModelProto,
    precision: Literal["int8", "fp8"],
    images: Path,
    size: tuple[int, int],
    *,
    method: Literal["entropy", "percentile", "max"] = "entropy",
    limit: int = 256,
    progress: bool = True,
) -> onnx.ModelProto:
    """Copy a float32 graph and put Q/DQ nodes around the operators that run in eight bits.

    Args:
        model: float32 graph with one input, ``images`` uint8 [B, 3, H, W].
        precision: "int8", or "fp8" (E4M3).
        images: folder of typical images, searched recursively.
        size: height and width of the images in the graph; they are scaled to cover it, then cut at the centre.
        method: choice of a range by the activations: least loss of information, a percentile, or their maximum.
        limit: largest number of images, which are spread evenly over the folder.
        progress: show a bar on stderr.

    Raises:
        ModuleNotFoundError: modelopt or a package that it needs is not installed.
        FileNotFoundError: the folder has no images.
        ValueError: fewer than `LEAST_IMAGES` images that can be read, a method that "fp8" does not have, or a graph
            that modelopt refuses or that has nothing to quantise.
    """
    if precision == "fp8" and method == "percentile":
        raise ValueError("calibration_method: expected entropy or max for fp8 (its range is not cut), got 'percentile'")
    files = image_files(images, limit)
    modelopt = _modelopt()
    files = readable_images(files, progress)
    import onnx

    # The libraries print on both streams; only this module's own progress bar is shown.
    with (
        tempfile.TemporaryDirectory(prefix="maskformer_fast_quantize_") as folder,
        open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere),
        quantizer_errors("modelopt"),
    ):
        source, target = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
        onnx.save(model, source)
        modelopt.quantize(
            str(source),
            quantize_mode=precision,
            calibration_method="max" if method == "percentile" else method,
            calibration_data_reader=_Reader(files, size, progress),
            calibration_eps=["cpu"],
            op_types_to_quantize=list(QUANTIZED_OPERATORS),
            nodes_to_exclude=kept_nodes(model),
            disable_mha_qdq=True,
            high_precision_dtype="fp32",  # `maskformer_fast.deploy.build.precision` does the rest
            output_path=str(target),
            log_level="ERROR",
        )
        if not target.exists():
            raise LookupError("nothing to quantise")
        quantized = onnx.load(str(target))
    if not any(node.op_type == "QuantizeLinear" for node in quantized.graph.node):
        raise ValueError("model: expected a graph with convolutions or linear layers to quantise, got none")
    if method == "percentile":
        _cut_ranges(model, quantized, files, size, progress)
    return quantized


def image_files(folder: Path, limit: int, channels: int = 0) -> list[Path]:
    """At most ``limit`` images below a folder, spread evenly. Raises ``FileNotFoundError`` where there are none.

    With ``channels``, as ``data.channels``, they are pictures of bands.
    """
    suffixes = picture_suffixes(channels) if channels else IMAGE_SUFFIXES
    if not folder.is_dir():
        raise FileNotFoundError(f"calibration: expected a folder of images, got {str(folder)!r}")
    files = [folder / name for name in list_files(folder, suffixes)]
    if not files:
        raise FileNotFoundError(f"calibration: no image in {str(folder)!r} (looked for {', '.join(suffixes)})")
    return [files[index * len(files) // min(limit, len(files))] for index in range(min(limit, len(files)))]


def readable_images(files: Sequence[Path], progress: bool, channels: int = 0) -> list[Path]:
    """Those of the pictures that can be read; each of the others is logged. Raises ``ValueError`` for too few.

    Each must have ``channels`` bands, as ``data.channels``.
    """
    readable = []
    for path in tqdm(files, desc="read", unit="img", disable=not progress, leave=False):
        try:
            read_picture(path, channels=channels)
        except BrokenExampleError as error:  # one bad file among hundreds hardly changes a range
            logger.warning("calibration: left out: %s", error)
        else:
            readable.append(path)
    check(len(readable) >= LEAST_IMAGES, "calibration", f"at least {LEAST_IMAGES} pictures that can be read",
          len(readable))
    return readable


@contextmanager
def quantizer_errors(library: str) -> Iterator[None]:
    """Turn what a quantiser raises about a graph into a ``ValueError`` of one line.

    The libraries' exceptions have no class in common. Those about files, memory, packages and pictures pass.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError, BrokenExampleError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        check(False, "graphs.raw", f"a graph that {library} quantises", reason)


def covering_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut the largest centred part of a picture [H, W, C] with the aspect ratio of ``size``, and scale it to ``size``.

    Returns [1, C, *size], resized as in inference: uint8 for RGB of 8 bits, float32 for bands. Very long images take no
    more memory than others.
    """
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    part = (min(size[1] / scale, width), min(size[0] / scale, height))
    left, top = (width - part[0]) / 2, (height - part[1]) / 2
    box = (left, top, left + part[0], top + part[1])
    if is_rgb(image):
        array = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box))
    else:
        array = resize_bands(image, size, (top, left, top + part[1], left + part[0]))
    return np.ascontiguousarray(array.transpose(2, 0, 1)[None])


def kept_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that are not quantised: the first convolution, and products of two activations."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:  # a weight may be transposed before its operator
        if node.input and all(name in weights for name in node.input):
            weights.update(node.output)
    first = next((node.name for node in model.graph.node if node.op_type == "Conv"), None)
    products = [
        node.name for node in model.graph.node if node.op_type == "MatMul" and not weights.intersection(node.input)
    ]
    return [name for name in (first, *products) if name]


class _Reader:
    """Reader of calibration images in modelopt's interface: one image at a time."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int], progress: bool) -> None:
        self.files, self.size, self.progress = files, size, progress
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image, None after the last."""
        return next(self.arrays, None)

    def get_first(self) -> dict[str, np.ndarray]:
        """The first image, without counting it as read; modelopt takes shapes from it."""
        return next(_arrays(self.files, self.size, progress=False))

    def rewind(self) -> None:
        """Start again at the first image."""
        self.arrays = _arrays(self.files, self.size, self.progress)


def _arrays(files: Sequence[Path], size: tuple[int, int], progress: bool) -> Iterator[dict[str, np.ndarray]]:
    """Every image as the network's input."""
    for path in tqdm(files, desc="calibrate", unit="img", file=sys.__stderr__, disable=not progress, leave=False):
        yield {"images": covering_crop(read_image(path), size)}


def _cut_ranges(
    model: onnx.ModelProto, quantized: onnx.ModelProto, files: Sequence[Path], size: tuple[int, int], progress: bool
) -> None:
    """Narrow activation ranges in place from the maximum to `PERCENTILE`, by histograms over all images."""
    import onnxruntime
    from onnx import helper, numpy_helper

    scales = {tensor.name: tensor for tensor in quantized.graph.initializer}
    produced = {name for node in model.graph.node for name in node.output}
    tensors = {  # activation -> the scale of its Q/DQ pair
        node.input[0]: node.input[1] for node in quantized.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in produced and node.input[1] in scales
    }
    largest = {name: float(numpy_helper.to_array(scales[scale])) * 127 for name, scale in tensors.items()}
    probe = type(model)()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    counts = {name: np.zeros(_BINS) for name in tensors}
    for inputs in _arrays(files, size, progress):
        for name, value in zip(tensors, session.run(list(tensors), inputs), strict=True):
            counts[name] += np.histogram(np.abs(value), bins=_BINS, range=(0.0, largest[name]))[0]
    for name, scale in tensors.items():
        share = np.cumsum(counts[name]) / counts[name].sum()
        end = (int(np.searchsorted(share, PERCENTILE / 100)) + 1) / _BINS
        tensor = scales[scale]
        tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * np.float32(end)), tensor.name))


def _modelopt() -> Any:
    try:
        return importlib.import_module("modelopt.onnx.quantization")
    except ImportError as error:
        missing = str(error).splitlines()[0]
        raise ModuleNotFoundError(
            f"int8 and fp8 need nvidia-modelopt and its ONNX tools (pip install maskformer_fast[quantize]): {missing}"
        ) from error
