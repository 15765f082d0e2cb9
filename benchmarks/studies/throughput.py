"""A folder of pictures, images a second on all cores: ours beside OpenVINO in its throughput mode.

    python -m benchmarks.studies.throughput --backbone swin_tiny [--images FOLDER]

From JPEG files to labels in memory, by turns in one process. OpenVINO runs the complete graph, labels out, with its own
number of streams and requests (`PERFORMANCE_HINT=THROUGHPUT`), and reads the next pictures while the requests run. Ours
are a checkpoint with an image in flight for each core, and a bundle by OpenVINO with as many. The rate is that of the
clock on the wall; the processor's time an image, beside it, depends less on what else the machine does.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.cases.end_to_end import SIDE, prepare_images
from benchmarks.cases.engines import OPENVINO, PRECISIONS
from benchmarks.studies.image_to_labels import write_sides
from maskformer_fast import export
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import BackboneConfig, ModelConfig
from maskformer_fast.core.checks import check
from maskformer_fast.data.images import read_image
from maskformer_fast.deploy.runtime import load as load_bundle
from maskformer_fast.deploy.runtime.cpu_backend import default_threads
from maskformer_fast.deploy.runtime.openvino_session import shared_core
from maskformer_fast.inference.load import load

CHECKPOINT, BUNDLE = "checkpoint", "bundle"
SIDES = tuple(f"{side}, {dtype}" for dtype in PRECISIONS for side in (CHECKPOINT, BUNDLE, OPENVINO))
Segment = Callable[[Sequence[Path]], list[np.ndarray]]


@dataclass(frozen=True)
class ThroughputOptions:
    """Segment a folder of pictures of 512x512 on all cores."""

    backbone: Literal["resnet50", "swin_tiny"] = "resnet50"
    images: Path | None = None
    """Folder of photographs, cropped to squares and resized; without it, drawn scenes."""
    count: int = 16
    """Pictures."""
    classes: int = 150
    rounds: int = 5
    """Times that each side segments all pictures."""

    def __post_init__(self) -> None:
        for name in ("count", "classes", "rounds"):
            check(getattr(self, name) > 0, name, "> 0", getattr(self, name))


def write_networks(folder: Path, model: ModelConfig, image: np.ndarray) -> None:
    """Write a checkpoint, a bundle and the complete graph for other engines, of the same weights."""
    write_sides(folder, model, image)
    size = f"1x{image.shape[0]}x{image.shape[1]}"
    status = export.main([
        str(folder / "ours.safetensors"), "--output", str(folder / "bundle"), "--static", size, "--flavours", "raw",
    ])  # fmt: skip
    check(status == 0, "export", "status 0", status)


def open_side(side: str, folder: Path, threads: int) -> Segment:
    """A side's function from picture files to their labels."""
    who, dtype = side.split(", ")
    if who == CHECKPOINT:
        amp: Literal["off", "bf16"] = "bf16" if dtype == "bfloat16" else "off"
        predictor = load(folder / "ours.safetensors", "cpu", amp=amp, in_flight=threads)
        return lambda files: [result.labels.numpy() for result in predictor.predict(list(files))]
    if who == BUNDLE:
        precision: Literal["fp32", "bf16"] = "bf16" if dtype == "bfloat16" else "fp32"
        runtime = load_bundle(folder / "bundle", "openvino", precision=precision, in_flight=threads)
        return lambda files: [result.labels for result in runtime.stream(_frames(files))]  # type: ignore[union-attr]
    return _open_openvino(folder / "complete.onnx", dtype, threads)


def _open_openvino(graph: Path, dtype: str, threads: int) -> Segment:
    import openvino

    core = shared_core()
    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": threads,
    }  # fmt: skip
    queue: Any = openvino.AsyncInferQueue(core.compile_model(core.read_model(graph), "CPU", settings))

    def segment(files: Sequence[Path]) -> list[np.ndarray]:
        labels: dict[int, np.ndarray] = {}
        queue.set_callback(lambda request, index: labels.update({index: request.get_output_tensor(0).data[0].copy()}))
        for index, frame in enumerate(_frames(files)):
            queue.start_async([np.ascontiguousarray(frame.transpose(2, 0, 1))[None]], index)
        queue.wait_all()
        return [labels[index] for index in range(len(files))]

    return segment


def _frames(files: Sequence[Path]) -> Iterator[np.ndarray]:
    return map(read_image, files)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(ThroughputOptions, arguments, prog="python -m benchmarks.studies.throughput")
    threads = default_threads()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    backbone = BackboneConfig(options.backbone, norm="batch" if options.backbone == "resnet50" else None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = prepare_images(options.images, options.count, folder / "images")
        write_networks(folder, ModelConfig(num_classes=options.classes, backbone=backbone), read_image(files[0]))
        sides = {side: open_side(side, folder, threads) for side in SIDES}
        labels = {side: segment(files[:threads]) for side, segment in sides.items()}
        seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}  # wall, processor
        for _ in range(options.rounds):
            for side, segment in sides.items():
                start = time.perf_counter(), time.process_time()
                segment(files)
                seconds[side].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    network = f"{options.backbone}, {SIDE}x{SIDE}, {options.classes} classes"
    print(f"{network}, {threads} threads, medians of {options.rounds} rounds of {options.count} pictures")
    print("| side | images/s | to OpenVINO | ms of processor time an image | to OpenVINO | labels of OpenVINO |")
    print("| --- " * 6 + "|")
    for side in SIDES:
        peer = f"{OPENVINO}, {side.split(', ')[1]}"
        wall, work = np.median(np.array(seconds[side]), 0) / options.count
        ratios = np.median(np.divide(seconds[peer], seconds[side]), 0)
        same = 100 * np.mean(np.equal(labels[side], labels[peer]))
        print(f"| {side} | {1 / wall:.2f} | {ratios[0]:.2f}x | {1e3 * work:.0f} | {ratios[1]:.2f}x | {same:.2f} % |")
    return 0


if __name__ == "__main__":
    run_command(main)
