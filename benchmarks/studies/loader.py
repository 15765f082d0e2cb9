"""The training loader by itself: images a second, and the bytes of a batch that cross from its processes.

    python -m benchmarks.studies.loader [--images 64] [--output FILE]

The folder and the augmentations are those of `benchmarks.cases.loader`, loaded by 0, 1 and 2 processes, from files and
from memory (``data.cache``). Results go to benchmarks/output/loader.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from benchmarks.cases.loader import BATCH, folder_config, write_images
from benchmarks.harness.case import Row
from benchmarks.harness.machine import describe
from benchmarks.studies import OUTPUT
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import Config
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import write_json
from maskformer_fast.data import build_dataset
from maskformer_fast.data.loader import train_loader


@dataclass(frozen=True)
class LoaderOptions:
    """Measure the training loader by itself."""

    images: int = 64
    """Images in the data set; as many are loaded for each row."""
    output: Path = OUTPUT / "loader.json"
    """JSON file."""

    def __post_init__(self) -> None:
        check(self.images >= 2 * BATCH, "images", f"at least {2 * BATCH}", self.images)


def measure(config: Config, count: int) -> Row:
    """One row: load `count` images after two batches of warm-up."""
    dataset = build_dataset(config.data, "train")
    batches = iter(train_loader(dataset, config, dataset.task))
    list(islice(batches, 2))
    start = time.perf_counter()
    measured = list(islice(batches, count // BATCH))
    seconds = time.perf_counter() - start
    images = len(measured) * BATCH
    targets = [batch.targets for batch in measured]
    dense = sum(t.labels.numel() * t.input_size[0] * t.input_size[1] * 4 for t in targets)
    return {
        "workers": config.data.workers,
        "cache": config.data.cache,
        "images_per_second": images / seconds,
        "targets_per_image": sum(int(t.counts.sum()) for t in targets) / images,
        "mask_bytes_per_image": sum(t.masks.numel() for t in targets) / images,
        "dense_float_mask_bytes_per_image": dense / images,
        "image_bytes_per_image": sum(batch.images.numel() for batch in measured) / images,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(LoaderOptions, arguments, prog="python -m benchmarks.studies.loader")
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), options.images + 1)
        config = folder_config(Path(name))
        rows = [
            measure(replace(config, data=replace(config.data, workers=workers, cache=cache)), options.images)
            for cache in (False, True)
            for workers in (0, 1, 2)
        ]
    write_json(options.output, {"machine": describe("cpu"), "rows": rows})
    print(f"{'processes':>9} {'source':>7} {'images/s':>9} {'masks, KiB':>11} {'as float, KiB':>14} {'image, KiB':>11}")
    for row in rows:
        sizes = [row[name] / 1024 for name in list(row)[-3:]]
        source = "memory" if row["cache"] else "files"
        speed = f"{row['workers']:9d} {source:>7} {row['images_per_second']:9.1f}"
        print(f"{speed} {sizes[0]:11.1f} {sizes[1]:14.1f} {sizes[2]:11.1f}")
    return 0


if __name__ == "__main__":
    run_command(main)
