"""The training loader, which passes packed masks between its processes, beside one that passes them as floats.

A folder of photograph-like JPEGs with panoptic truth at 512x683 is loaded with the augmentations of the ADE20K recipe
(short edge 256 to 1024, crop 512x512, colour jitter, flip). Images a second by number of processes:
`benchmarks.studies.loader`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.cases.inputs import Size
from benchmarks.harness.case import Case, Operation, Work
from benchmarks.harness.runner import shared
from maskformer_fast.config import AugmentConfig, Config, DataConfig, ShapesConfig, SolverConfig
from maskformer_fast.data import build_dataset
from maskformer_fast.data.loader import Batch, collate, train_loader
from maskformer_fast.data.transforms import Sample, TrainTransform
from maskformer_fast.structures import pack_masks, unpack_masks

SIZE, CROP = (512, 683), (512, 512)
EXAMPLE_SIZE = (480, 640)
BATCH = 4
AUGMENT = AugmentConfig(short_edge=tuple(range(256, 1025, 51)), crop_size=CROP, color_jitter=True)
IMAGES = 48
"""Images that a call loads."""
DENSE, FLOATS = "dense float32 masks from the same processes", "float masks"


def write_images(root: Path, count: int, size: Size = SIZE) -> None:
    """Write a folder data set of synthetic scenes, as JPEGs and index PNGs: one to validate, the others to train."""
    scenes = build_dataset(DataConfig(shapes=ShapesConfig(size=size, train_images=count, num_stuff=8)), "train")
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


def folder_config(root: Path, augment: AugmentConfig = AUGMENT, batch: int = BATCH) -> Config:
    """Configuration of training from the folder of `write_images` on the CPU."""
    data = DataConfig(dataset="folder", root=str(root), augment=augment)
    return Config(device="cpu", data=data, solver=SolverConfig(batch_size=batch))


def setup(
    device: torch.device, workers: int, count: int = IMAGES, size: Size = SIZE, augment: AugmentConfig = AUGMENT,
    batch: int = BATCH,
) -> Work:  # fmt: skip
    """Batches of images and targets. A call starts the processes, as otherwise those of both would work at once."""
    config = folder_config(shared(f"loader_{count}", lambda path: write_images(path, count + 1, size)), augment, batch)
    config = replace(config, data=replace(config.data, workers=workers))
    return Work(
        load_with(config, count, dense=False), {DENSE: load_with(config, count, dense=True)},
        agreement=same_batches, least={DENSE: 1.0},
    )  # fmt: skip


def load_with(config: Config, count: int, dense: bool) -> Operation:
    """A call that starts the processes and loads so many images -> the last batch."""
    dataset = build_dataset(config.data, "train")
    loader = train_loader(dataset, config, dataset.task)
    if dense:
        inner = loader._loader
        inner.collate_fn = partial(with_dense_masks, inner.collate_fn)

    def load() -> Batch:
        *_, last = islice(iter(loader), count // config.solver.batch_size)
        return last

    return load


def with_dense_masks(collate: Callable[[Any], Batch], samples: Any) -> Batch:
    """Collate a batch, with masks [B, T, H, W] float32."""
    batch = collate(samples)
    masks = unpack_masks(batch.targets.masks, batch.targets.input_size[1]).float()
    return batch._replace(targets=batch.targets._replace(masks=masks))


def same_batches(ours: Batch, theirs: Batch) -> float:
    masks = unpack_masks(ours.targets.masks, ours.targets.input_size[1])
    return float(torch.equal(masks, theirs.targets.masks.bool()) and torch.equal(ours.images, theirs.images))


def example_setup(device: torch.device) -> Work:
    """A training example that is read already: resizing, crop, colour jitter, flip, packed masks."""
    augment = AugmentConfig(short_edge=(512,), crop_size=CROP, color_jitter=True)
    dataset = build_dataset(DataConfig(shapes=ShapesConfig(size=EXAMPLE_SIZE, train_images=1, num_stuff=8)), "train")
    transform, example = TrainTransform(augment, "panoptic", dataset.metadata), dataset[0]
    return Work(lambda: transform(example, np.random.default_rng(0)), {})


def batch_setup(device: torch.device) -> Work:
    """Four examples to a batch: bit-packed targets as ours are, or float masks as other loaders give them."""
    packed = (torch.rand(20, *CROP) > 0.9).cumsum(0) == 1
    sample = Sample(torch.zeros(3, *CROP, dtype=torch.uint8), torch.arange(20), pack_masks(packed), image_id=0, path="")
    floats, images = [unpack_masks(sample.masks, CROP[1]).float()] * BATCH, [sample.image] * BATCH

    def dense() -> tuple[Tensor, Tensor]:
        return torch.stack(images), torch.stack(floats)

    return Work(lambda: collate([sample] * BATCH, 32), {FLOATS: dense})


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    return [
        *(
            Case(f"loader, {IMAGES} images of {SIZE[0]}x{SIZE[1]} to 512x512, {workers} process{'es' * (workers > 1)}",
                 DENSE, None, partial(setup, workers=workers), rank=1, memory=False)
            for workers in (1, 2)
        ),
        Case("loader, one example 512x512", None, None, example_setup, rank=3, memory=False),
        Case(f"loader, batch of {BATCH} x 20 masks 512x512", FLOATS, None, batch_setup, rank=3, memory=False),
    ]  # fmt: skip
