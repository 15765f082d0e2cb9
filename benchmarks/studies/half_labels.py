"""Share of the labels that half precision keeps, by what stays in float32: the measurement behind
`deploy.build.precision.PINNED`.

    python -m maskformer_fast.train --config demo --output run
    python -m benchmarks.studies.half_labels run [--images 16]

Takes a trained run or checkpoint and images of its validation data at their own size, which must be one. No GPU: each
graph runs in onnxruntime on the CPU, which rounds every operator's result to halves and computes it in float32, so
this is what rounding costs; sums that an engine makes in halves cost more. (bfloat16 it does not run.)
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import tyro

from maskformer_fast.cli import parse, run_command
from maskformer_fast.data import build_dataset
from maskformer_fast.deploy.build.onnx import export_graphs, padded_size
from maskformer_fast.deploy.build.precision import PINNED, to_half
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_into, load_weights
from maskformer_fast.ops.semantic import semantic_inference

BATCH = 4


@dataclass(frozen=True)
class HalfOptions:
    """Count the labels that half precision keeps."""

    checkpoint: tyro.conf.Positional[str]
    """Run folder, checkpoint folder, or weights file."""
    images: int = 16
    """Number of validation images to use."""


def run(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    """Run the graph node by node, unoptimised -> class logits and mask logits in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = ["class_logits", "mask_logits"]
    parts = [session.run(names, {"images": images[at : at + BATCH]}) for at in range(0, len(images), BATCH)]
    return [np.concatenate(tensors).astype(np.float32) for tensors in zip(*parts, strict=True)]


def labels_of(logits: Sequence[np.ndarray], size: tuple[int, int], divisibility: int) -> np.ndarray:
    """Labels [B, H, W], as every backend makes them of logits."""
    classes, masks = (torch.from_numpy(tensor) for tensor in logits)
    padded = padded_size(*size, divisibility)
    extent = (size[0] * masks.shape[2] / padded[0], size[1] * masks.shape[3] / padded[1])
    return semantic_inference(masks, classes, extent, size).labels.numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(HalfOptions, arguments, prog="python -m benchmarks.studies.half_labels")
    config, _, weights, _ = load_weights(options.checkpoint)
    network = build_model(config.model).eval()
    load_into(network, weights, options.checkpoint)
    examples = build_dataset(config.data, "val")
    count = min(options.images, len(examples))
    images = np.stack([np.asarray(examples[index].image).transpose(2, 0, 1) for index in range(count)])
    size = images.shape[2:]
    model = onnx.load_from_string(export_graphs(network, ["raw"])["raw"][0])
    exact = run(model, images)
    expected = labels_of(exact, size, config.model.size_divisibility)
    num_seen = len(np.unique(expected))
    print(f"{count} images of {size[0]}x{size[1]}, {num_seen} classes seen\n")
    print("| in float32 | mask logits | labels kept | error of class logits | error of mask logits |")
    print("| --- | --- | --- | --- | --- |")
    rows: list[tuple[str, Collection[str], Collection[str]]] = [("nothing", (), ())]
    rows += [(name, (name,), ()) for name in sorted(PINNED)]
    rows += [("all these", PINNED, ()), ("all these", PINNED, ("mask_logits",))]
    for name, pinned, half_outputs in rows:
        logits = run(to_half(model, "fp16", pinned=pinned, half_outputs=half_outputs), images)
        kept = np.mean(labels_of(logits, size, config.model.size_divisibility) == expected)
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(logits, exact, strict=True)]
        kind = "float16" if half_outputs else "float32"
        print(f"| {name} | {kind} | {100 * kept:.3f} % | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
