"""Mask2Former's graph in OpenVINO and onnxruntime, beside Hugging Face's model exported by PyTorch.

    python -m benchmarks.studies.mask2former_graphs FOLDER

Swin-T, 512x512, 150 classes, random weights, one image, by turns in one process. The time is that of the processor, on
one thread: of the graphs, which give class logits and mask logits, and from pixels to labels of each pixel, with the
post-processing of this package's runtime and of Hugging Face's processor. This package's graph also normalises uint8
images. Both graphs are exported for one size, into the folder, and are read from there the next time. Needs
`transformers`.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import ModelConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.results import SemanticResult
from maskformer_fast.deploy.bundle.manifest import Postprocess
from maskformer_fast.deploy.runtime.cpu_postprocess import CpuPostprocessor, ImageLogits
from maskformer_fast.recipes import load_recipe

CLASSES = 150


@dataclass(frozen=True)
class Mask2FormerGraphsOptions:
    """Time exported graphs of Mask2Former on one thread of the CPU."""

    folder: tyro.conf.Positional[Path]
    """Folder of the two graphs."""
    rounds: int = 5
    """Calls of each side."""
    precisions: tuple[str, ...] = ("f32", "bf16")
    """Precisions in OpenVINO: f32, bf16."""
    size: int = 512
    """Height and width of the image."""

    def __post_init__(self) -> None:
        check(self.rounds > 0, "rounds", "> 0", self.rounds)
        check(self.size > 0, "size", "> 0", self.size)


def own_config() -> ModelConfig:
    """Configuration of this package's network."""
    model = load_recipe("mask2former/ade20k_semantic_swin_tiny").model
    return replace(model, num_classes=CLASSES, weights=None, backbone=replace(model.backbone, weights=None))


def other_config() -> Any:
    """Configuration of Hugging Face's network of the same sizes."""
    from transformers import Mask2FormerConfig, SwinConfig

    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7,
                          out_features=stages)  # fmt: skip
    return Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES)


def export_own(path: Path, size: int) -> None:
    """Write the graph ``raw`` of this package's network."""
    import torch

    from maskformer_fast.deploy.build.onnx import export_graphs
    from maskformer_fast.deploy.bundle.manifest import Shape
    from maskformer_fast.modeling import build_model

    torch.manual_seed(0)
    path.write_bytes(export_graphs(build_model(own_config()).eval(), ["raw"], Shape(1, size, size))["raw"][0])


def export_other(path: Path, size: int) -> None:
    """Write the graph of Hugging Face's model of the same sizes."""
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(other_config()).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> Any:
            output = self.model(pixel_values=images)
            return output.class_queries_logits, output.masks_queries_logits

    images = (torch.zeros(1, 3, size, size),)
    with torch.no_grad():
        torch.onnx.export(Logits().eval(), images, path, dynamo=True, opset_version=20, external_data=False,
                          verbose=False)  # fmt: skip


def own_labels(logits: Sequence[Any], size: int) -> np.ndarray:
    """Labels [size, size] of the logits of this package's session."""
    classes, masks = logits
    image = ImageLogits(classes[0], masks[0], (float(masks.shape[2]), float(masks.shape[3])), (size, size))
    result = _postprocessor(classes.shape[2] - 1)(image, "semantic")
    assert isinstance(result, SemanticResult)
    return np.asarray(result.labels)


@functools.cache
def _postprocessor(classes: int) -> CpuPostprocessor:
    settings = Postprocess(0.8, 0.8, 100, "mask2former")
    return CpuPostprocessor(settings, [True] * classes, 1)


def other_labels(logits: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Labels [size, size] of class logits and mask logits by Hugging Face's processor."""
    import torch
    from transformers import Mask2FormerImageProcessor
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

    classes, masks = (torch.from_numpy(np.asarray(array)) for array in logits)
    outputs = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
    with torch.inference_mode():
        labels = Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs, [(size, size)])[0]
    return np.asarray(labels)


def open_sides(own: Path, other: Path, precisions: Sequence[str], size: int) -> dict[str, Callable[[], Any]]:
    """Functions that run a graph once, to logits or to labels, by name."""
    import onnxruntime
    import torch

    from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession, shared_core

    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (1, 3, size, size), np.uint8)
    pixels = generator.standard_normal((1, 3, size, size), np.float32)
    sides: dict[str, Callable[[], Any]] = {}
    for precision in precisions:
        session = OpenvinoSession(own.read_bytes(), 1, precision="bf16" if precision == "bf16" else "fp32")
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
        request = shared_core().compile_model(other, "CPU", settings).create_infer_request()
        sides[f"OpenVINO {precision}, this package"] = lambda session=session: session.run(images)
        sides[f"OpenVINO {precision}, Hugging Face"] = lambda request=request: [*request.infer([pixels]).values()]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for name, path, array in (("this package", own, images), ("Hugging Face", other, pixels)):
        run = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {run.get_inputs()[0].name: array}
        sides[f"onnxruntime f32, {name}"] = lambda run=run, feed=feed: run.run(None, feed)
    for name, run in list(sides.items()):
        end = own_labels if "this package" in name else other_labels
        sides[f"{name}, labels"] = lambda run=run, end=end: end(run(), size)
    return sides


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(Mask2FormerGraphsOptions, list(sys.argv[1:] if argv is None else argv),
                    prog="python -m benchmarks.studies.mask2former_graphs")  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"
    options.folder.mkdir(parents=True, exist_ok=True)
    own, other = options.folder / "maskformer_fast.onnx", options.folder / "huggingface.onnx"
    for path, export in ((own, export_own), (other, export_other)):
        if not path.exists():
            export(path, options.size)
    sides = open_sides(own, other, options.precisions, options.size)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, options.rounds):  # a first round to warm up
        for name, run in sides.items():
            start = time.process_time()
            run()
            if number >= 0:
                times[name].append(1e3 * (time.process_time() - start))
    print("| side | ms, median | least | most |\n| --- | --- | --- | --- |")
    for name, taken in times.items():
        print(f"| {name} | {statistics.median(taken):.0f} | {min(taken):.0f} | {max(taken):.0f} |")
    return 0


if __name__ == "__main__":
    run_command(main)
