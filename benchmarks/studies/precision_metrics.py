"""mIoU, PQ and AP that each precision keeps of a trained network: by PyTorch, and as a bundle by each CPU library.

    python -m maskformer_fast.train --config demo --output run
    python -m benchmarks.studies.precision_metrics run --task semantic panoptic instance --data.shapes.val-images 512

Nothing is trained. The checkpoint is exported to a temporary bundle, and quantised on pictures of the training split;
every library and precision is measured on the validation split. Differences are to PyTorch in float32.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from PIL import Image

from maskformer_fast.cli import leading_path, parse, run_command
from maskformer_fast.config import Amp, DataConfig, Task, TestConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.image_resize import short_edge_size
from maskformer_fast.data import SegmentationDataset, build_dataset
from maskformer_fast.deploy.build.quantize import LEAST_IMAGES
from maskformer_fast.deploy.build.tensorrt import EngineConfig
from maskformer_fast.deploy.bundle.manifest import OPENVINO, Precision
from maskformer_fast.deploy.runtime.selection import CPU_PRECISIONS, Backend
from maskformer_fast.evaluation.measure import check_classes, check_measurable, measure
from maskformer_fast.export import ExportOptions, extend_with_engine, make_bundle
from maskformer_fast.inference.load import load, load_network, stored_options

HEADLINES: dict[Task, str] = {"semantic": "miou", "panoptic": "pq", "instance": "ap"}
"""Metric of each task that is compared."""
NAMES = {"miou": "mIoU", "pq": "PQ", "ap": "AP"}
PYTORCH: dict[Precision, Amp] = {"fp32": "off", "bf16": "bf16"}
"""Precisions of PyTorch's way -> their option."""
MARGINS: dict[Precision, float] = {"fp32": 0.05, "bf16": 0.3, "int8": 1.0}
"""Points by which mIoU and PQ of a precision may be lower, the goal."""

logger = logging.getLogger("benchmarks.studies.precision_metrics")


@dataclass(frozen=True)
class PrecisionMetricsOptions:
    """Measure a checkpoint in every precision. Data settings default to those of its training."""

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder, or weights file."""
    task: tuple[Task, ...] = ("semantic", "panoptic")
    """Tasks to measure."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "int8")
    """Precisions to measure, some of these three; fp32 by PyTorch is always measured."""
    calibration: int = 64
    """Number of pictures of the training split by which INT8 is calibrated, spread evenly over it."""
    limit: int | None = None
    """Number of images to measure, the first ones; default: all."""
    data: DataConfig = field(default_factory=DataConfig)
    test: TestConfig = field(default_factory=TestConfig)

    def __post_init__(self) -> None:
        check(len(self.task) > 0, "task", "at least one", self.task)
        known = len(self.precisions) > 0 and set(self.precisions) <= set(MARGINS)
        check(known, "precisions", f"some of {', '.join(MARGINS)}", self.precisions)
        check(self.calibration >= LEAST_IMAGES, "calibration", f">= {LEAST_IMAGES}", self.calibration)


class Row(NamedTuple):
    """Figures of one library and precision."""

    library: str
    precision: Precision
    metrics: dict[str, float]  # as fractions of 1


def write_pictures(dataset: SegmentationDataset, count: int, folder: Path) -> tuple[int, int]:
    """Write pictures of a data set, spread evenly -> height and width of the first."""
    count = min(count, len(dataset))
    size = (0, 0)
    for number in range(count):
        image = dataset[number * len(dataset) // count].image
        Image.fromarray(image).save(folder / f"{number:05d}.png")
        size = size if number else image.shape[:2]
    return size


def write_bundle(options: PrecisionMetricsOptions, folder: Path) -> Path:
    """Export the checkpoint, with an INT8 graph if that is wanted -> the bundle."""
    bundle, pictures = folder / "bundle", folder / "pictures"
    pictures.mkdir()
    height, width = write_pictures(build_dataset(options.data, "train"), options.calibration, pictures)
    test = options.test
    if test.edge is not None:
        height, width = short_edge_size(height, width, test.edge, test.max_size)
    predictor = load_network(options.checkpoint, "cpu", test=test)
    make_bundle(predictor, ExportOptions(options.checkpoint, str(bundle), ("raw",), sizes=(f"{height}x{width}",)))
    if "int8" in options.precisions:
        calibration = {"calibration": str(pictures), "calibration_images": options.calibration}
        extend_with_engine(
            str(bundle), EngineConfig("int8", OPENVINO, opt_shape=(1, height, width), **calibration)  # type: ignore[arg-type]
        )  # fmt: skip
    return bundle


def rows(options: PrecisionMetricsOptions, folder: Path) -> Iterator[Row]:
    """Measure each library and precision; PyTorch in float32 is the first."""
    dataset = build_dataset(options.data, "val")
    check_measurable(dataset, options.task)
    bundle = write_bundle(options, folder)
    sides: list[tuple[str, Precision]] = [("PyTorch", "fp32")]
    sides += [("PyTorch", name) for name in options.precisions if name in PYTORCH and name != "fp32"]
    sides += [
        (library, name) for library, known in CPU_PRECISIONS.items() for name in options.precisions if name in known
    ]  # fmt: skip
    for library, precision in sides:
        if library == "PyTorch":
            predictor = load(options.checkpoint, "cpu", options.test, amp=PYTORCH[precision])
        else:
            backend: Backend = library  # type: ignore[assignment]
            predictor = load(bundle, "cpu", backend=backend, precision=precision)
        check_classes(predictor.metadata, dataset.metadata)
        metrics: dict[str, Any] = measure(
            predictor, dataset, options.task, workers=options.data.workers, skip_broken=options.data.skip_broken,
            limit=options.limit,
        )[0]  # fmt: skip
        yield Row(library, precision, {HEADLINES[task]: metrics[HEADLINES[task]] for task in options.task})


def format_row(row: Row, first: Row) -> str:
    """A line of the table: metrics in per cent, in brackets the difference in points, and whether the goal is met."""
    gains = {name: 100 * (value - first.metrics[name]) for name, value in row.metrics.items()}
    cells = [f"{100 * value:.2f} ({gains[name]:+.2f})" for name, value in row.metrics.items()]
    kept = all(gain >= -MARGINS[row.precision] for name, gain in gains.items() if name != "ap")
    goal = f"{MARGINS[row.precision]} {'met' if kept else 'missed'}"
    return f"| {row.library}, {row.precision} | {' | '.join(cells)} | {goal} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = leading_path(arguments)
    stored = stored_options(path) if path else None
    options = parse(
        PrecisionMetricsOptions, arguments, prog="python -m benchmarks.studies.precision_metrics",
        default=PrecisionMetricsOptions(tyro.MISSING, data=stored[0], test=stored[1]) if stored else None,
    )  # fmt: skip
    names = [NAMES[HEADLINES[task]] for task in options.task]
    with tempfile.TemporaryDirectory(prefix="maskformer_fast_precision_") as folder:
        first: Row | None = None
        for row in rows(options, Path(folder)):
            if first is None:
                first = row
                print(f"| library, precision | {' | '.join(names)} | goal, points |\n|{' --- |' * (len(names) + 2)}")
            print(format_row(row, first), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
