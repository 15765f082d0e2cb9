"""A folder of pictures, images a second on all cores: ours beside OpenVINO in its throughput mode.

    python -m benchmarks.studies.throughput --backbone swin_tiny [--images FOLDER]

From JPEG files to labels in memory, by turns in one process. OpenVINO runs the complete graph, labels out, with its own
number of streams and requests (`PERFORMANCE_HINT=THROUGHPUT`), and reads the next pictures while the requests run. Ours
are a checkpoint, and a bundle by OpenVINO, with so many images in flight: with 1 all cores work on one image, with more
the cores are divided, and reading, network and post-processing of different images overlap. The rate is that of the
clock on the wall, so the machine must be quiet; the processor's time an image, beside it, depends less on what else it
does. 16 pictures of 512x512 and 3 rounds take about three minutes on two cores with ResNet-50.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.cases.end_to_end import SIDE, prepare_images
from benchmarks.cases.engines import OPENVINO, PRECISIONS, is_installed
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
GOAL = 1.2
"""Images a second of the best of ours, over OpenVINO's."""
Segment = Callable[[Sequence[Path]], list[np.ndarray]]
Seconds = Mapping[str, Sequence[tuple[float, float]]]
"""By side: of each round the seconds on the wall, and of the processor."""


@dataclass(frozen=True)
class ThroughputOptions:
    """Segment a folder of pictures on all cores."""

    backbone: Literal["resnet50", "swin_tiny"] = "resnet50"
    images: Path | None = None
    """Folder of photographs, cropped to squares and resized; without it, drawn scenes."""
    side: int = SIDE
    """Height and width of the pictures."""
    count: int = 16
    """Pictures."""
    classes: int = 150
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    in_flight: tuple[int, ...] = (1, 2)
    """Numbers of images in flight of the checkpoint and of the bundle."""
    rounds: int = 3
    """Times that each side segments all pictures."""

    def __post_init__(self) -> None:
        for name in ("side", "count", "classes", "rounds"):
            check(getattr(self, name) > 0, name, "> 0", getattr(self, name))
        check(len(self.in_flight) > 0 and min(self.in_flight) > 0, "in_flight", "numbers > 0", self.in_flight)

    def sides(self) -> list[str]:
        """What is measured, in the order of the turns: who, dtype and for ours the images in flight."""
        numbers = [f", {number} in flight" for number in sorted(set(self.in_flight))]
        ours = [(who, number) for who in (CHECKPOINT, BUNDLE) for number in numbers]
        return [f"{who}, {dtype}{more}" for dtype in self.dtypes for who, more in (*ours, (OPENVINO, ""))]


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
    who, dtype, *flight = side.split(", ")
    if who == OPENVINO:
        return _open_openvino(folder / "complete.onnx", dtype, threads)
    in_flight = int(flight[0].split()[0])
    if who == CHECKPOINT:
        amp: Literal["off", "bf16"] = "bf16" if dtype == "bfloat16" else "off"
        predictor = load(folder / "ours.safetensors", "cpu", amp=amp, in_flight=in_flight)
        return lambda files: [result.labels.numpy() for result in predictor.predict(list(files))]
    precision: Literal["fp32", "bf16"] = "bf16" if dtype == "bfloat16" else "fp32"
    runtime = load_bundle(folder / "bundle", "openvino", precision=precision, in_flight=in_flight)
    return lambda files: [result.labels for result in runtime.stream(_frames(files))]  # type: ignore[union-attr]


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
    found = [side for side in options.sides() if side.startswith(CHECKPOINT) or is_installed(OPENVINO)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = prepare_images(options.images, options.count, folder / "images", options.side)
        write_networks(folder, ModelConfig(num_classes=options.classes, backbone=backbone), read_image(files[0]))
        sides = {side: open_side(side, folder, threads) for side in found}
        labels = {side: segment(files[: max(threads, 2)]) for side, segment in sides.items()}
        seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in found}
        for _ in range(options.rounds):
            for side, segment in sides.items():
                start = time.perf_counter(), time.process_time()
                segment(files)
                seconds[side].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    network = f"{options.backbone}, {options.side}x{options.side}, {options.classes} classes"
    print(f"{network}, {threads} threads, medians of {options.rounds} rounds of {options.count} pictures")
    print("\n".join(format_table(options.sides(), seconds, labels, options.count)))
    return 0


def format_table(
    sides: Sequence[str], seconds: Seconds, labels: Mapping[str, Sequence[np.ndarray]], count: int
) -> list[str]:
    """Lines of the table, ratios to OpenVINO in the same dtype, and after it a line for each dtype with the goal."""
    lines = ["| side | images/s | to OpenVINO | ms of processor time an image | to OpenVINO | labels of OpenVINO |",
             "| --- " * 6 + "|"]  # fmt: skip
    best: dict[str, tuple[float, str]] = {}
    for side in sides:
        dtype = side.split(", ")[1]
        peer = f"{OPENVINO}, {dtype}"
        if side not in seconds:
            lines.append(f"| {side} | not installed | | | | |")
            continue
        wall, work = np.median(np.array(seconds[side]), 0) / count
        cells = ["-", f"{1e3 * work:.0f}", "-", "-"]
        if peer in seconds:
            ratios = np.median(np.divide(seconds[peer], seconds[side]), 0)
            same = 100 * np.mean(np.equal(labels[side], labels[peer]))
            cells = [f"{ratios[0]:.2f}x", f"{1e3 * work:.0f}", f"{ratios[1]:.2f}x", f"{same:.2f} %"]
            if side != peer:
                best[dtype] = max(best.get(dtype, (0.0, "")), (float(ratios[0]), side))
        lines.append(f"| {side} | {1 / wall:.2f} | {' | '.join(cells)} |")
    for dtype, (ratio, side) in best.items():
        word = "met" if ratio >= GOAL else "missed"
        lines.append(f"{dtype}: the best of ours is {side}, {ratio:.2f}x OpenVINO's rate; goal {GOAL}, {word}")
    return lines


if __name__ == "__main__":
    run_command(main)
