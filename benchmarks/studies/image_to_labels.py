"""A loaded network on the CPU beside its complete graph in other engines: from an image to its labels, at any size.

    python -m benchmarks.studies.image_to_labels --backbone swin_tiny --size 1024x2048 --classes 19

By turns in one process, with random weights whose heads are rescaled so that a fifth of the queries is live. The time
is that of the processor, on one thread, so that other processes on the machine hardly change it; the peak memory is
that of a process that runs one side alone. The limit is the time of the network's operations at the processor's matrix
rate, which is measured in the same process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases.end_to_end import make_confident
from benchmarks.cases.engines import ONNXRUNTIME, OPENVINO, PRECISIONS, export_graph, open_engine
from benchmarks.cases.network import class_metadata, network_work
from maskformer_fast.benchmark.runners import draw_frame
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import BackboneConfig, Config, ModelConfig, TestConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.machine import peak_resident_bytes
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.inference.load import load
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights

OURS = "ours"
SIDES = (
    *(f"{side}, {dtype}" for dtype in PRECISIONS for side in (OURS, OPENVINO)), f"{ONNXRUNTIME}, float32",
)  # fmt: skip


@dataclass(frozen=True)
class ImageToLabelsOptions:
    """Time semantic segmentation of one image on one thread of the CPU."""

    backbone: Literal["resnet50", "swin_tiny"] = "resnet50"
    size: str = "512x512"
    """HEIGHTxWIDTH of the image."""
    classes: int = 150
    rounds: int = 6
    """Calls of each side."""
    alone: str | None = None
    """Run this side alone, and print its peak memory in MiB."""

    def __post_init__(self) -> None:
        check(self.classes > 0, "classes", "> 0", self.classes)
        check(self.rounds > 0, "rounds", "> 0", self.rounds)


def write_sides(folder: Path, model: ModelConfig, image: np.ndarray) -> None:
    """Write a checkpoint and the complete graph of the same network, confident on the image."""
    torch.manual_seed(0)
    network: Any = build_model(model).eval()
    with torch.no_grad():
        make_confident(network, torch.from_numpy(image).permute(2, 0, 1)[None])
    config = Config(model=model, test=TestConfig(short_edge=None))
    save_weights(folder / "ours.safetensors", network, config, class_metadata(model.num_classes), step=0)
    (folder / "complete.onnx").write_bytes(export_graph(network, "complete", image.shape[:2]))


def open_side(side: str, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A side's function from an image to its labels."""
    who, dtype = side.split(", ")
    if who == OURS:
        predictor = load(folder / "ours.safetensors", "cpu", amp="bf16" if dtype == "bfloat16" else "off")
        return lambda image: predictor.predict(image).labels.numpy()
    run = open_engine(who, (folder / "complete.onnx").read_bytes(), dtype)
    return lambda image: run(np.ascontiguousarray(image.transpose(2, 0, 1))[None])[0][0]


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of processor time: of oneDNN's product of matrices of 1536, and in float32 of MKL's too."""
    left, right = torch.randn(1536, 1536, dtype=dtype), torch.randn(1536, 1536, dtype=dtype)
    products: list[Callable[[Tensor, Tensor], Tensor]] = [torch.mm]
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products.append(lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = 0.0
    for product in products:
        for _ in range(4):
            start = time.process_time()
            product(left, right)
            best = max(best, 2 * 1536**3 / (time.process_time() - start))
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(ImageToLabelsOptions, arguments, prog="python -m benchmarks.studies.image_to_labels")
    os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that run one side alone
    torch.set_num_threads(1)
    shape = Shape.parse(options.size)
    size = (shape.height, shape.width)
    image = draw_frame(np.random.default_rng(0), size)
    backbone = BackboneConfig(options.backbone, norm="batch" if options.backbone == "resnet50" else None)
    model = ModelConfig(num_classes=options.classes, backbone=backbone)
    if options.alone is not None:
        side, folder = options.alone.rsplit("@", 1)
        segment = open_side(side, Path(folder))
        for _ in range(3):
            segment(image)
        print(peak_resident_bytes() / 2**20)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sides(folder, model, image)
        peaks = {side: _peak(arguments, side, folder) for side in SIDES}
        sides = {side: open_side(side, folder) for side in SIDES}
        labels = {side: segment(image) for side, segment in sides.items()}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, segment in sides.items():
                start = time.process_time()
                segment(image)
                times[side].append(1e3 * (time.process_time() - start))
    _, operations = network_work(model, size)
    rates = {dtype: matrix_rate(getattr(torch, dtype)) for dtype in PRECISIONS}
    print("| side | ms | to OpenVINO | limit | MiB | labels of OpenVINO in float32 |\n" + "| --- " * 6 + "|")
    for side in SIDES:
        dtype = side.split(", ")[1]
        ratio = np.median(np.divide(times[f"{OPENVINO}, {dtype}"], times[side]))
        same = 100 * np.mean(labels[side] == labels[f"{OPENVINO}, float32"])
        print(f"| {side} | {np.median(times[side]):.0f} | {ratio:.2f}x | {1e3 * operations / rates[dtype]:.0f} | "
              f"{peaks[side]:.0f} | {same:.2f} % |")  # fmt: skip
    return 0


def _peak(arguments: list[str], side: str, folder: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.studies.image_to_labels", *arguments, "--alone", f"{side}@{folder}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_command(main)
