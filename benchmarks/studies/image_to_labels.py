"""A loaded network on the CPU beside its complete graph in other engines: from an image to its labels, at any size.

    python -m benchmarks.studies.image_to_labels --backbone swin_tiny --size 1024x2048 --classes 19
    python -m benchmarks.studies.image_to_labels --sides "ours, float32" "OpenVINO, float32"

By turns in one process, with random weights whose heads are rescaled so that a fifth of the queries is live. Inductor
compiles the same complete graph with frozen weights, Hugging Face is its model and post-processing; an engine that is
not installed says so. The time is that of the processor, on one thread, so that other processes on the machine hardly
change it; the peak memory is that of a process that runs one side alone, for Inductor with its compiler. The limit is
the time of the network's operations at the processor's matrix rate, which is measured in the same process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.cases.end_to_end import make_confident
from benchmarks.cases.engines import (
    INDUCTOR,
    ONNXRUNTIME,
    OPENVINO,
    PRECISIONS,
    export_graph,
    is_installed,
    open_engine,
    open_inductor,
)
from benchmarks.cases.network import HUGGINGFACE, RATES, class_metadata, huggingface_model, network_work
from benchmarks.harness.clock import ProcessorClock
from benchmarks.harness.machine import matrix_rate
from maskformer_fast.benchmark.runners import draw_frame
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import BackboneConfig, Config, ModelConfig, TestConfig
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.machine import peak_resident_bytes
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.inference.load import load, load_network
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights

OURS = "ours"
SIDES = (
    *(f"{side}, {dtype}" for dtype in PRECISIONS for side in (OURS, OPENVINO)), f"{ONNXRUNTIME}, float32",
    *(f"{side}, {dtype}" for side in (INDUCTOR, HUGGINGFACE) for dtype in PRECISIONS),
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
    memory: bool = True
    """Measure peak memory, each side in a process of its own."""
    sides: tuple[str, ...] = SIDES
    """Those of interest; Inductor takes minutes to compile each of its own."""
    alone: str | None = None
    """Run this side alone, and print its peak memory in MiB."""

    def __post_init__(self) -> None:
        for side in self.sides:
            check_choice("sides", side, SIDES)
        check(self.classes > 0, "classes", "> 0", self.classes)
        check(self.rounds > 0, "rounds", "> 0", self.rounds)


def write_sides(folder: Path, model: ModelConfig, image: np.ndarray) -> None:
    """Write a checkpoint and the complete graph of the same network, confident on the image."""
    network = write_checkpoint(folder, model, image)
    (folder / "complete.onnx").write_bytes(export_graph(network, "complete", image.shape[:2]))


def write_checkpoint(folder: Path, model: ModelConfig, image: np.ndarray) -> Any:
    """Write a checkpoint of a network that is confident on the image -> the network."""
    torch.manual_seed(0)
    network: Any = build_model(model).eval()
    with torch.no_grad():
        make_confident(network, torch.from_numpy(image).permute(2, 0, 1)[None])
    config = Config(model=model, test=TestConfig(short_edge=None))
    save_weights(folder / "ours.safetensors", network, config, class_metadata(model.num_classes), step=0)
    return network


def open_side(side: str, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A side's function from an image to its labels."""
    who, dtype = side.split(", ")
    if who == OURS:
        predictor = load(folder / "ours.safetensors", "cpu", amp="bf16" if dtype == "bfloat16" else "off")
        return lambda image: predictor.predict(image).labels.numpy()
    if who == HUGGINGFACE:
        return _open_huggingface(folder / "ours.safetensors", dtype)
    if who == INDUCTOR:
        run = open_inductor(load_network(folder / "ours.safetensors", "cpu").network, "complete", dtype)
    else:
        run = open_engine(who, (folder / "complete.onnx").read_bytes(), dtype)
    return lambda image: run(np.ascontiguousarray(image.transpose(2, 0, 1))[None])[0][0]


def _open_huggingface(checkpoint: Path, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

    processor = MaskFormerImageProcessorPil(do_resize=False)
    loaded = load_network(checkpoint, "cpu")
    network = huggingface_model(loaded.network, loaded.config.model, training=False)

    @torch.no_grad()
    def segment(image: np.ndarray) -> np.ndarray:
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            outputs = network(pixel_values=pixels)
            labels = processor.post_process_semantic_segmentation(outputs, [image.shape[:2]])[0]
        return np.asarray(labels.numpy())

    return segment


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
        for _ in range(2):
            segment(image)
        print(peak_resident_bytes() / 2**20)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sides(folder, model, image)
        found = [side for side in options.sides if is_installed(side.split(", ")[0])]
        peaks = {side: _peak(arguments, side, folder) for side in found if options.memory}
        sides = {side: open_side(side, folder) for side in found}
        labels = {side: segment(image) for side, segment in sides.items()}  # compiles, where that is needed
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, segment in sides.items():
                start = time.process_time()
                segment(image)
                times[side].append(1e3 * (time.process_time() - start))
    _, operations = network_work(model, size)
    limits = {dtype: 1e3 * operations / matrix_rate(ProcessorClock(), rate) for dtype, rate in RATES.items()}
    print("| side | ms | to OpenVINO | limit | MiB | labels of OpenVINO in float32 |\n" + "| --- " * 6 + "|")
    for side in options.sides:
        print(format_row(side, times, limits, peaks, labels))
    return 0


def format_row(
    side: str, times: Mapping[str, Sequence[float]], limits: Mapping[str, float], peaks: Mapping[str, float],
    labels: Mapping[str, np.ndarray],
) -> str:  # fmt: skip
    """The line of a side; ratios are to OpenVINO in the same dtype, those of a round at a time."""
    if side not in times:
        return f"| {side} | not installed | | | | |"
    dtype = side.split(", ")[1]
    peer, exact = (labels.get(f"{OPENVINO}, {name}") is not None for name in (dtype, "float32"))
    ratio = f"{np.median(np.divide(times[f'{OPENVINO}, {dtype}'], times[side])):.2f}x" if peer else "-"
    same = f"{100 * np.mean(labels[side] == labels[f'{OPENVINO}, float32']):.2f} %" if exact else "-"
    peak = f"{peaks[side]:.0f}" if side in peaks else "-"
    return f"| {side} | {np.median(times[side]):.0f} | {ratio} | {limits[dtype]:.0f} | {peak} | {same} |"


def _peak(arguments: list[str], side: str, folder: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.studies.image_to_labels", *arguments, "--alone", f"{side}@{folder}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_command(main)
