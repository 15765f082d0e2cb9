"""From a folder of photographs to label PNGs: where the time goes, whether labels are the same, and peak memory.

    python -m benchmarks.studies.end_to_end [--images FOLDER] [--classes 150 847] [--processor-time] [--output FILE]

Implementations and networks are those of `benchmarks.cases.end_to_end`. They take turns image by image in one process;
the peak resident memory is that of a process which runs one implementation alone. Results go to
benchmarks/output/end_to_end.json.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases.end_to_end import (
    GOALS,
    HUGGINGFACE,
    IMPLEMENTATIONS,
    SIDE,
    Kind,
    Ours,
    open_implementation,
    prepare_images,
    write_network,
)
from benchmarks.cases.engines import is_installed
from benchmarks.harness.case import Row
from benchmarks.harness.machine import describe
from benchmarks.harness.measure import quartiles
from benchmarks.harness.report import build_goal
from benchmarks.harness.runner import ROOT, environment
from benchmarks.studies import OUTPUT
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.files import write_json
from maskformer_fast.core.machine import peak_resident_bytes

THREADS = 2
HEADS = ("network", "implementation", "ms", "images/s", "ratio", "goal", "MiB", "same labels")
WIDTHS = (18, 24, 7, 9, 6, 8, 6, 12)


@dataclass(frozen=True)
class EndToEndOptions:
    """Segment photographs by this project and by Hugging Face's code, from files to files."""

    images: Path | None = None
    """Folder of photographs, cropped to squares and resized to 512x512; without it, drawn scenes."""
    count: int = 8
    """Photographs."""
    classes: tuple[int, ...] = (150, 847)
    kinds: tuple[Kind, ...] = ("random", "confident")
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    """Those of interest beside Hugging Face in float32; Inductor compiles for minutes. One that is not installed is
    left out and named."""
    processor_time: bool = False
    """Measure the processor's time of one thread, for machines whose cores are shared, not the wall's with two."""
    output: Path = OUTPUT / "end_to_end.json"
    """JSON file."""

    def __post_init__(self) -> None:
        check(self.count >= 1, "count", ">= 1", self.count)
        for name in self.implementations:
            check_choice("implementations", name, IMPLEMENTATIONS)
        check(len(self.classes) > 0 and min(self.classes) >= 1, "classes", "positive numbers", self.classes)


def measure(
    network: Path, files: Sequence[Path], folder: Path, names: Sequence[str], clock: Callable[[], float]
) -> dict[str, Row]:
    """Images per second, stages, and the share of labels that equal Hugging Face's in float32, by implementation."""
    opened = {name: open_implementation(name, network) for name in names}
    for implementation in opened.values():
        implementation.clock = clock
    seconds: dict[str, list[float]] = {name: [] for name in names}
    labels: dict[str, list[np.ndarray]] = {name: [] for name in names}
    stages: dict[str, Counter[str]] = {name: Counter() for name in names}
    for name, implementation in opened.items():  # warm-up
        implementation.segment(files[0], folder / name)
    for number, file in enumerate(files):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            start = clock()
            labels[name].append(opened[name].segment(file, folder / name))
            seconds[name].append(clock() - start)
            stages[name].update(opened[name].watch.seconds)
    same_order = Ours(network / "ours.safetensors", "float32", "huggingface")
    ordered = [same_order.segment(file, folder / "ordered") for file in files]
    figures: dict[str, Row] = {}
    for name in names:
        figures[name] = {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "quartiles_ms": [1e3 * value for value in quartiles(seconds[name])],
            "images_per_second": 1 / statistics.median(seconds[name]),
            "stages_ms": {stage: 1e3 * value / len(files) for stage, value in stages[name].items()},
            "identical_labels": share_identical(labels[name], labels[HUGGINGFACE]),
        }
    if "ours, float32" in figures:
        figures["ours, float32"]["identical_labels_in_their_order"] = share_identical(ordered, labels[HUGGINGFACE])
    return figures


def share_identical(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Share of the pixels with one label."""
    return float(np.mean([(a == b).mean() for a, b in zip(ours, theirs, strict=True)]))


def measure_peak(name: str, network: Path, images: Path, threads: int) -> float:
    """Peak resident MiB of a process that segments all images by one implementation."""
    command = [sys.executable, "-m", "benchmarks.studies.end_to_end", "--alone"]
    command += [name, str(network), str(images), str(threads)]
    process = subprocess.run(
        command, cwd=ROOT, env=environment("time", threads), check=True, stdout=subprocess.PIPE, text=True
    )
    return float(process.stdout.splitlines()[-1])


def run_alone(name: str, network: str, images: str, threads: str) -> None:
    """Segment all images by one implementation, and print the peak resident MiB of this process."""
    torch.set_num_threads(int(threads))
    implementation = open_implementation(name, Path(network))
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(Path(images).iterdir()):
            implementation.segment(file, Path(folder))
    print(peak_resident_bytes() / 2**20)


def build_row(classes: int, kind: Kind, measured: dict[str, Row], peaks: dict[str, float]) -> Row:
    """The row of one network: implementations with ratios, peaks and goals; a goal asks for less memory too."""
    theirs = measured[HUGGINGFACE]["milliseconds"]
    for name, figures in measured.items():
        figures |= {"ratio": theirs / figures["milliseconds"], "peak_mib": peaks[name], "goals": []}
        wanted = GOALS.get((classes, name.split(", ")[1])) if name.startswith("ours") else None
        if wanted is not None:
            goal = build_goal(">= {:g}x", wanted, figures["ratio"], failed=False)
            goal["reached"] = goal["reached"] and peaks[name] < peaks[HUGGINGFACE]
            figures["goals"].append(goal)
    return {"name": f"K={classes}, {kind}", "classes": classes, "kind": kind, "implementations": measured}


def format_rows(rows: Sequence[Row]) -> str:
    """A line an implementation."""
    lines = [HEADS]
    for row in rows:
        for name, figures in row["implementations"].items():
            lines.append((
                row["name"], name, f"{figures['milliseconds']:.0f}", f"{figures['images_per_second']:.2f}",
                f"{figures['ratio']:.2f}", "; ".join(goal["text"] for goal in figures["goals"]),
                f"{figures['peak_mib']:.0f}", f"{figures['identical_labels']:.5f}",
            ))  # fmt: skip
    return "\n".join(
        " ".join(
            f"{cell:{'<' if k < 2 else '>'}{width}}" for k, (cell, width) in enumerate(zip(line, WIDTHS, strict=True))
        )
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--alone"]:
        run_alone(*arguments[1:])
        return 0
    options = parse(EndToEndOptions, arguments, prog="python -m benchmarks.studies.end_to_end")
    wanted = [name for name in IMPLEMENTATIONS if name in (*options.implementations, HUGGINGFACE)]
    names = [name for name in wanted if is_installed(name.split(", ")[0])]
    rows = []
    threads, clock = (1, time.process_time) if options.processor_time else (THREADS, time.perf_counter)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = prepare_images(options.images, options.count, folder / "images")
        for classes in options.classes:
            for kind in options.kinds:
                network = folder / f"{classes}_{kind}"
                write_network(network, classes, kind, files)
                measured = measure(network, files, folder / "labels", names, clock)
                peaks = {name: measure_peak(name, network, folder / "images", threads) for name in names}
                rows.append(build_row(classes, kind, measured, peaks))
    write_json(options.output, {
        "machine": describe("cpu"), "images": options.count, "size": [SIDE, SIDE],
        "source": "drawn scenes" if options.images is None else "photographs", "threads": threads,
        "time": "processor" if options.processor_time else "wall", "rows": rows,
    })  # fmt: skip
    print(format_rows(rows))
    for name in sorted(set(wanted) - set(names)):
        print(f"{name}: not installed")
    return 0


if __name__ == "__main__":
    run_command(main)
