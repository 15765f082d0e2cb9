"""A bundle on the CPU by every library and precision, beside its complete graph in OpenVINO, which others would run.

    python -m maskformer_fast.export CHECKPOINT --output bundle
    python -m maskformer_fast.export bundle --engine-only --engine.api openvino --engine.precision int8 \
        --engine.calibration pictures
    python -m benchmarks.studies.cpu_bundle bundle [--pictures FOLDER]

From a frame to its labels, by turns in one process. The time is that of the processor, on one thread, so that other
processes on the machine hardly change it; the peak memory is that of a process that runs one side alone.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
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
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import OPENVINO, Shape
from maskformer_fast.deploy.runtime import load
from maskformer_fast.deploy.runtime.openvino_session import shared_core
from maskformer_fast.deploy.runtime.selection import CPU_PRECISIONS, BackendName

COMPLETE = "complete graph"
FRAMES = 4
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
    rounds: int = 8
    """Calls of each side."""
    alone: str | None = None
    """Run this side alone, and print its peak memory."""

    def __post_init__(self) -> None:
        check(self.rounds > 0, "rounds", "> 0", self.rounds)


def sides_of(bundle: Bundle) -> list[str]:
    """Library and precision of each side."""
    quantised = any(engine.api == OPENVINO for engine in bundle.manifest.engines)
    sides = [
        f"{library}, {precision}" for library, precisions in CPU_PRECISIONS.items() for precision in precisions
        if precision != "int8" or quantised
    ]  # fmt: skip
    return [*sides, f"{COMPLETE}, fp32", f"{COMPLETE}, bf16"]


def open_side(side: str, bundle: Bundle) -> Segment:
    """A side's function from a frame to labels."""
    library, precision = side.split(", ")
    if library != COMPLETE:
        assert library in get_args(BackendName)
        runtime = load(bundle, library, precision=precision, in_flight=1)  # type: ignore[arg-type]
        return lambda frame: runtime.predict(frame).labels
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": 1,
    }  # fmt: skip
    model = shared_core().compile_model(bundle.folder / bundle.manifest.graphs["complete"].file, "CPU", settings)
    request = model.create_infer_request()
    return lambda frame: request.infer([frame.transpose(2, 0, 1)[None].copy()])[0][0].copy()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(CpuBundleOptions, arguments, prog="python -m benchmarks.studies.cpu_bundle")
    os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that run one side alone
    shape = Shape.parse(options.size)
    frames = make_frames(FRAMES, (shape.height, shape.width), options.pictures)
    bundle = Bundle.open(options.bundle)
    if options.alone is not None:
        segment = open_side(options.alone, bundle)
        for frame in frames:
            segment(frame)
        print(peak_resident_bytes() / 2**20)
        return 0
    sides = {side: open_side(side, bundle) for side in sides_of(bundle)}
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
    print("| side | ms | MiB | labels of the complete graph in fp32 |\n| --- | --- | --- | --- |")
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.studies.cpu_bundle", *arguments, "--alone", side]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peak = float(done.stdout.splitlines()[-1])
        print(f"| {side} | {statistics.median(times[side]):.1f} | {peak:.0f} | {100 * np.mean(equal[side]):.2f} % |")
    return 0


if __name__ == "__main__":
    run_command(main)
