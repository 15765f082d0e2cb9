"""The training loader by itself: images a second, and the bytes of a batch that cross from its processes.

    python -m benchmarks.loader [--images 64] [--output FILE]

A folder of photograph-like JPEGs with panoptic truth at 512x683 is written first, then loaded with the augmentations of
the ADE20K recipe (short edge 256 to 1024, crop 512x512, colour jitter, flip) by 0, 1 and 2 processes, from files and
from memory (``data.cache``). Results go to benchmarks/results/loader.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import describe_machine
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import AugmentConfig, Config, DataConfig, ShapesConfig, SolverConfig, check
from maskformer_fast.data import build_dataset
from maskformer_fast.data.loader import train_loader
from maskformer_fast.files import atomic_write

RESULTS = Path(__file__).parent / "results" / "loader.json"
SIZE = (512, 683)
BATCH = 4


@dataclass(frozen=True)
class LoaderOptions:
    """Measure the training loader by itself."""

    images: int = 64
    """Images in the data set; as many are loaded for each row."""
    output: Path = RESULTS
    """JSON file."""

    def __post_init__(self) -> None:
        check(self.images >= 2 * BATCH, "images", f"at least {2 * BATCH}", self.images)


def write_folder(root: Path, count: int) -> None:
    """A folder data set of synthetic scenes, as JPEGs and index PNGs."""
    scenes = build_dataset(DataConfig(shapes=ShapesConfig(size=SIZE, train_images=count, num_stuff=8)), "train")
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
    for index in range(count):
        example = scenes[index]
        assert example.id_map is not None
        classes = np.full(max(segment.id for segment in example.segments) + 2, 255, dtype=np.uint8)
        for segment in example.segments:
            classes[segment.id] = segment.category
        split = "train" if index else "val"
        Image.fromarray(example.image).save(root / "images" / split / f"{index:05d}.jpg", quality=90)
        Image.fromarray(classes[example.id_map]).save(root / "annotations" / split / f"{index:05d}.png")


def measure(config: Config, count: int) -> dict[str, Any]:
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
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(LoaderOptions, arguments, prog="python -m benchmarks.loader")
    augment = AugmentConfig(short_edge=tuple(range(256, 1025, 51)), crop_size=(512, 512), color_jitter=True)
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), options.images + 1)
        data = DataConfig(dataset="folder", root=name, augment=augment)
        config = Config(device="cpu", data=data, solver=SolverConfig(batch_size=BATCH))
        rows = [
            measure(replace(config, data=replace(data, workers=workers, cache=cache)), options.images)
            for cache in (False, True)
            for workers in (0, 1, 2)
        ]
    with atomic_write(options.output) as file:
        file.write((json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n").encode())
    print(f"{'processes':>9} {'source':>7} {'images/s':>9} {'masks, KiB':>11} {'as float, KiB':>14} {'image, KiB':>11}")
    for row in rows:
        sizes = [row[name] / 1024 for name in list(row)[-3:]]
        source = "memory" if row["cache"] else "files"
        speed = f"{row['workers']:9d} {source:>7} {row['images_per_second']:9.1f}"
        print(f"{speed} {sizes[0]:11.1f} {sizes[1]:14.1f} {sizes[2]:11.1f}")
    return 0


if __name__ == "__main__":
    run_command(main)
