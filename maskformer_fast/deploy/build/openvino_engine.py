"""INT8 graphs for OpenVINO, which NNCF makes from a bundle's ``raw`` graph and a few hundred typical pictures.

Convolutions and linear layers are quantised, weights with one range for each output channel. NNCF's preset for
transformers, which is used where the backbone is one of attention, keeps residual sums, what norms read and the softmax
of attention in floating point, and evens out the ranges of activations before linear layers. The convolution and the
product that make mask logits stay in floating point: the runtime computes them by its own operator, for the wanted
queries only, and queries are compared by their values.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskformer_fast.core.checks import check
from maskformer_fast.data.bands import read_picture
from maskformer_fast.deploy.build.quantize import covering_crop, image_files, quantizer_errors, readable_images
from maskformer_fast.deploy.build.tensorrt import EngineConfig
from maskformer_fast.deploy.bundle.manifest import OPENVINO, Engine, Profile, Shape, TensorSpec, expect
from maskformer_fast.deploy.runtime.openvino_session import MaskTail, find_mask_tail, shared_core

logger = logging.getLogger(__name__)

FILE = f"engines/{OPENVINO}_int8.xml"
KEPT_OPERATORS = ("GroupConvolution",)
"""Operators that are not quantised: EoMT's depthwise convolutions. Their input is transposed, and NNCF gives ranges to
another axis than that of its channels."""
LARGEST = Shape(65536, 65536, 65536)
"""End of the profile of a graph that takes any size."""


def build_openvino_engine(
    raw_onnx: bytes, config: EngineConfig, progress: bool = True, channels: int = 0
) -> tuple[Engine, dict[str, bytes]]:
    """Quantise the ``raw`` graph -> its entry in the manifest, its files.

    Args:
        raw_onnx: float32 graph, ``images`` uint8 [B, 3, H, W], or bands float32 [B, C, H, W] -> ``class_logits``,
            ``mask_logits``.
        config: its calibration options, and the height and width of ``opt_shape``, to which pictures are brought.
        progress: show a bar on stderr.
        channels: as ``data.channels``: number of bands of the pictures; 0 for RGB of 8 bits.

    Raises:
        FileNotFoundError: the folder has no pictures.
        ModuleNotFoundError: nncf or openvino is not installed.
        ValueError: fewer than `deploy.build.quantize.LEAST_IMAGES` pictures that can be read, or a graph that NNCF
            refuses.
        BundleError: OpenVINO refuses the graph.
    """
    assert config.calibration is not None  # checked by EngineConfig
    files = image_files(Path(config.calibration), config.calibration_images, channels)
    openvino, nncf = _libraries()
    readable = readable_images(files, progress, channels)
    try:
        model = shared_core().read_model(raw_onnx)
    except RuntimeError as error:
        expect(False, "graphs.raw", "a graph that OpenVINO reads", str(error).strip().splitlines()[-1])
        raise
    batch, _, height, width = (0 if size.is_dynamic else size.get_length() for size in model.inputs[0].partial_shape)
    best = config.opt_shape or (batch or 1, height or 512, width or 512)
    fits = all(fixed in (0, size) for fixed, size in zip((batch, height, width), best, strict=True))
    check(fits, "opt_shape", f"the graph's fixed sizes {(batch, height, width)} (0: any)", best)
    tail = find_mask_tail(model)
    if tail is None:
        logger.warning("the mask logits are made in an unknown way, and are quantised as well")

    quantised = quantise_model(
        model, readable, batch or 1, best[1:], is_transformer(model, tail), tail.names if tail else (), progress,
        channels,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="maskformer_fast_engine_") as folder:
        path = Path(folder) / Path(FILE).name
        openvino.save_model(quantised, path, compress_to_fp16=False)
        contents = {FILE: path.read_bytes(), FILE.removesuffix(".xml") + ".bin": path.with_suffix(".bin").read_bytes()}
    low = Shape(batch or 1, height or 1, width or 1)
    high = Shape(batch or LARGEST.batch, height or LARGEST.height, width or LARGEST.width)
    engine = Engine(
        file=FILE, api=OPENVINO, api_version=str(openvino.__version__), precision="int8", targets=(),
        profile=Profile(low, Shape(*best), high),
        options={"nncf": str(nncf.__version__), "images": len(readable)},
        outputs=tuple(
            TensorSpec(port.get_any_name(), "float32", tuple(
                f"{port.get_any_name()}_{axis}" if size.is_dynamic else size.get_length()
                for axis, size in enumerate(port.partial_shape)
            ))
            for port in model.outputs
        ),
    )  # fmt: skip
    return engine, contents


def quantise_model(
    model: Any, pictures: Sequence[Path], batch: int, size: tuple[int, int], transformer: bool,
    kept: Sequence[str] = (), progress: bool = True, channels: int = 0,
) -> Any:  # fmt: skip
    """Quantise an OpenVINO model by NNCF -> an OpenVINO model; ``images`` is as of `build_openvino_engine`.

    Args:
        model: float32 model.
        pictures: files by which ranges are measured, all of which can be read.
        batch: number of images in a batch, each picture repeated.
        size: height and width to which pictures are brought.
        transformer: use NNCF's preset for transformers, see `is_transformer`.
        kept: names of the nodes that stay in floating point.
        progress: show a bar on stderr.
        channels: as of `build_openvino_engine`.

    Raises:
        ModuleNotFoundError: nncf or openvino is not installed.
        ValueError: a graph that NNCF refuses.
    """
    _, nncf = _libraries()

    def to_input(path: Path) -> np.ndarray:
        image = covering_crop(read_picture(path, channels=channels), size)
        return np.repeat(image.astype(np.float32) if channels else image, batch, 0)

    # The library prints on both streams; only this module's own progress bar is shown.
    with (
        open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere),
        tqdm(desc="calibrate", unit="img", file=sys.__stderr__, disable=not progress, leave=False) as bar,
    ):  # fmt: skip
        logging.getLogger("nncf").setLevel(logging.ERROR)  # `nncf.set_log_level` also silences handlers of others
        with quantizer_errors("NNCF"):
            return nncf.quantize(
                model,
                nncf.Dataset(list(pictures), lambda path: (bar.update(), to_input(path))[1]),
                subset_size=len(pictures),
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                ignored_scope=nncf.IgnoredScope(names=list(kept), types=list(KEPT_OPERATORS), validate=False),
            )


def is_transformer(model: Any, tail: MaskTail | None) -> bool:
    """Whether the backbone is one of attention: before a softmax there is at most one convolution, the patch embedding.

    Only what leads to the pixel features counts. The attention of a pixel decoder comes after all convolutions of a
    backbone. Counting both would not tell them apart: a small Swin has as few softmaxes as its pixel decoder has
    convolutions.
    """
    start = (tail.features if tail else model.output("mask_logits")).get_node()
    attention = [node for node in _ancestors(start) if node.get_type_name() == "Softmax"]
    return any(
        sum(node.get_type_name() == "Convolution" for node in _ancestors(softmax)) <= 1 for softmax in attention
    )


def _ancestors(start: Any) -> list[Any]:
    """A node, and all nodes by whose outputs it is computed."""
    waiting, found = [start], {start.get_friendly_name(): start}
    while waiting:
        for before in (port.get_node() for port in waiting.pop().input_values()):
            if before.get_friendly_name() not in found:
                found[before.get_friendly_name()] = before
                waiting.append(before)
    return list(found.values())


def _libraries() -> tuple[Any, Any]:
    os.environ.setdefault("NNCF_CI", "1")  # no telemetry
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise ModuleNotFoundError(
            "int8 for openvino needs openvino and nncf (pip install maskformer_fast[quantize-openvino]): "
            f"{str(error).splitlines()[0]}"
        ) from error
    return openvino, nncf
