"""The training loader by itself: images a second, and the bytes of a batch that cross from its processes.

    python -m benchmarks.loader [--images 64] [--output FILE]

A folder of photograph-like JPEGs with panoptic truth at 512x683 is written first, then loaded with the augmentations of
the ADE20K recipe (short edge 256 to 1024, crop 512x512, colour jitter, flip) by 0, 1 and 2 processes, from files and
from memory (``data.cache``). Results go to benchmarks/results/loader.json.

`benchmarks.cpu` has rows where the same loader hands masks over as other training code does: dense, as float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Case, Operation, Sides, shared
from benchmarks.machine import describe_machine
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import AugmentConfig, Config, DataConfig, ShapesConfig, SolverConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write
from maskformer_fast.data import build_dataset
from maskformer_fast.data.loader import train_loader
from maskformer_fast.structures import Batch, unpack_masks

RESULTS = Path(__file__).parent / "results" / "loader.json"
SIZE = (512, 683)
BATCH = 4
AUGMENT = AugmentConfig(short_edge=tuple(range(256, 1025, 51)), crop_size=(512, 512), color_jitter=True)
CASE_IMAGES = 48
"""A call loads so many."""


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


def folder_config(root: Path) -> Config:
    """Training from that folder on the CPU."""
    data = DataConfig(dataset="folder", root=str(root), augment=AUGMENT)
    return Config(device="cpu", data=data, solver=SolverConfig(batch_size=BATCH))


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


def cases() -> list[Case]:
    """Those of the suite: the start of the processes is part of a call, as otherwise both sides' would work at once."""
    return [
        Case(f"loader, {CASE_IMAGES} images of {SIZE[0]}x{SIZE[1]} to 512x512, {workers} process{'es' * (workers > 1)}",
             "dense float32 masks from the same processes", None, partial(setup, workers, CASE_IMAGES), rank=1,
             memory=False)
        for workers in (1, 2)
    ]


def setup(workers: int, count: int) -> Sides:
    """Both give the batches' images and targets; the peer's masks are floats."""
    config = folder_config(shared(f"loader_{count}", lambda path: write_folder(path, count + 1)))
    config = replace(config, data=replace(config.data, workers=workers))
    return Sides(loads(config, count, dense=False), loads(config, count, dense=True), check_batches)


def loads(config: Config, count: int, dense: bool) -> Operation:
    """Starts the processes and loads so many images -> the last batch."""
    dataset = build_dataset(config.data, "train")
    loader = train_loader(dataset, config, dataset.task)
    if dense:
        inner = loader._loader
        inner.collate_fn = partial(with_dense_masks, inner.collate_fn)

    def load() -> Batch:
        *_, last = islice(iter(loader), count // BATCH)
        return last

    return load


def with_dense_masks(collate: Callable[[Any], Batch], samples: Any) -> Batch:
    """The batch with masks [B, T, H, W] float32."""
    batch = collate(samples)
    masks = unpack_masks(batch.targets.masks, batch.targets.input_size[1]).float()
    return batch._replace(targets=batch.targets._replace(masks=masks))


def check_batches(ours: Batch, theirs: Batch) -> None:
    masks = unpack_masks(ours.targets.masks, ours.targets.input_size[1])
    if not torch.equal(masks, theirs.targets.masks.bool()) or not torch.equal(ours.images, theirs.images):
        raise RuntimeError("the batches differ")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(LoaderOptions, arguments, prog="python -m benchmarks.loader")
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), options.images + 1)
        config = folder_config(Path(name))
        rows = [
            measure(replace(config, data=replace(config.data, workers=workers, cache=cache)), options.images)
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
