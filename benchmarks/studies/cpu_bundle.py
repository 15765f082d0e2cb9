"""A bundle on the CPU by every library and precision, beside its complete graph in OpenVINO, which others would run.

    python -m maskformer_fast.export CHECKPOINT --output bundle
    python -m maskformer_fast.export bundle --engine-only --engine.api openvino --engine.precision int8 \
        --engine.calibration pictures
    python -m benchmarks.studies.cpu_bundle bundle [--pictures FOLDER] [--calibration pictures]

From a frame to its labels, by turns in one process. With `--calibration` the complete graph is also quantised by NNCF,
with the preset of the bundle's INT8 graph, and nothing of it is kept in floating point. The time is that of the
processor, on one thread, so that other processes on the machine hardly change it; the peak memory is that of a process
that runs one side alone.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import tyro

from maskformer_fast.benchmark.runners import make_frames
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.checks import check
from maskformer_fast.core.machine import peak_resident_bytes
from maskformer_fast.deploy.build.openvino_engine import is_transformer, quantise_model
from maskformer_fast.deploy.build.quantize import image_files, readable_images
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import OPENVINO, Shape
from maskformer_fast.deploy.runtime import load
from maskformer_fast.deploy.runtime.openvino_session import find_mask_tail, shared_core
from maskformer_fast.deploy.runtime.selection import CPU_PRECISIONS, BackendName

COMPLETE = "complete graph"
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Precision of the complete graph -> OpenVINO's name of that of what is not quantised."""
FRAMES = 4
PICTURES = 64
"""Largest number of pictures by which the complete graph is quantised."""
Segment = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class CpuBundleOptions:
    """Time a bundle on one thread of the CPU."""

    bundle: tyro.conf.Positional[Path]
    """Bundle with both graphs."""
    size: str = "512x512"
    """HEIGHTxWIDTH of the frames."""
    pictures: str | None = None
    """Folder of pictures to run on; by default random rectangles."""
    calibration: Path | None = None
    """Folder of pictures by which the complete graph is quantised; without it, there is no such row."""
    rounds: int = 8
    """Calls of each side."""
    alone: str | None = None
    """Run this side alone, and print its peak memory. A complete graph in INT8 needs its file, after an @."""

    def __post_init__(self) -> None:
        check(self.rounds > 0, "rounds", "> 0", self.rounds)


def sides_of(bundle: Bundle, quantised: Path | None = None) -> list[str]:
    """Library and precision of each side; `quantised` is the complete graph in INT8."""
    has_engine = any(engine.api == OPENVINO for engine in bundle.manifest.engines)
    sides = [
        f"{library}, {precision}" for library, precisions in CPU_PRECISIONS.items() for precision in precisions
        if precision != "int8" or has_engine
    ]  # fmt: skip
    return [*sides, *(f"{COMPLETE}, {precision}" for precision in HINTS if precision != "int8" or quantised)]


def quantise_complete(bundle: Bundle, pictures: Path, size: tuple[int, int], path: Path) -> None:
    """Quantise the complete graph by the pictures that can be read, none of it kept in floating point -> ``path``."""
    import openvino

    raw = shared_core().read_model(bundle.folder / bundle.manifest.graphs["raw"].file)
    complete = shared_core().read_model(bundle.folder / bundle.manifest.graphs["complete"].file)
    transformer = is_transformer(raw, find_mask_tail(raw))
    files = readable_images(image_files(pictures, PICTURES), progress=False)
    openvino.save_model(quantise_model(complete, files, 1, size, transformer), path, compress_to_fp16=False)


def open_side(side: str, bundle: Bundle, quantised: Path | None = None) -> Segment:
    """A side's function from a frame to labels."""
    library, precision = side.split(", ")
    if library != COMPLETE:
        assert library in get_args(BackendName)
        runtime = load(bundle, library, precision=precision, in_flight=1)  # type: ignore[arg-type]
        return lambda frame: runtime.predict(frame).labels
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": 1,
    }  # fmt: skip
    graph = quantised if precision == "int8" else bundle.folder / bundle.manifest.graphs["complete"].file
    request = shared_core().compile_model(graph, "CPU", settings).create_infer_request()
    return lambda frame: request.infer([frame.transpose(2, 0, 1)[None].copy()])[0][0].copy()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(CpuBundleOptions, arguments, prog="python -m benchmarks.studies.cpu_bundle")
    os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that run one side alone
    shape = Shape.parse(options.size)
    size = (shape.height, shape.width)
    frames = make_frames(FRAMES, size, options.pictures)
    bundle = Bundle.open(options.bundle)
    if options.alone is not None:
        side, _, graph = options.alone.partition("@")
        segment = open_side(side, bundle, Path(graph))
        for frame in frames:
            segment(frame)
        print(peak_resident_bytes() / 2**20)
        return 0
    with tempfile.TemporaryDirectory(prefix="maskformer_fast_bundle_") as folder:
        quantised = Path(folder) / "complete_int8.xml" if options.calibration else None
        if quantised and options.calibration:
            quantise_complete(bundle, options.calibration, size, quantised)
        sides = {side: open_side(side, bundle, quantised) for side in sides_of(bundle, quantised)}
        expected = [sides[f"{COMPLETE}, fp32"](frame) for frame in frames]
        times: dict[str, list[float]] = {side: [] for side in sides}
        equal: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(-1, options.rounds):  # a first round to warm up
            for side, segment in sides.items():
                start = time.process_time()
                labels = segment(frames[number % FRAMES])
                if number >= 0:
                    times[side].append(1e3 * (time.process_time() - start))
                    equal[side].append(float(np.mean(labels == expected[number % FRAMES])))
        print("| side | ms | to complete graph | MiB | labels of the complete graph in fp32 |\n" + "| --- " * 5 + "|")
        for side in sides:
            command = [sys.executable, "-m", "benchmarks.studies.cpu_bundle", *arguments]
            command += ["--alone", f"{side}@{quantised or ''}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peak = float(done.stdout.splitlines()[-1])
            peer = times.get(f"{COMPLETE}, {side.split(', ')[1]}")
            ratio = f"{np.median(np.divide(peer, times[side])):.2f}x" if peer else "-"
            print(f"| {side} | {statistics.median(times[side]):.1f} | {ratio} | {peak:.0f} "
                  f"| {100 * np.mean(equal[side]):.2f} % |", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    run_command(main)
