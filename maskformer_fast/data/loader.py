"""Batches: padding, collation, and loaders whose every batch is a pure function of (seed, step).

Sample number n of a run (step x batch size + position) is item ``n % len`` of the permutation of epoch ``n // len``.
So a run resumes anywhere by its step alone, and neither the number of workers nor of micro-batches changes a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskformer_fast.config import AugmentConfig, Config, Task, TestConfig
from maskformer_fast.core.checks import check
from maskformer_fast.data.base import BrokenExampleError, SegmentationDataset
from maskformer_fast.data.buckets import bucket_side, bucket_targets
from maskformer_fast.data.transforms import Sample, TrainTransform, resize_image
from maskformer_fast.data.worker import worker_setup
from maskformer_fast.structures import Batch, Example, Targets

_PERMUTATION_STREAM = 1  # apart from [seed, epoch, index], which numpy reads as [seed, epoch, index, 0]

Broken = tuple[str, str]
"""Path and reason of an example that could not be read."""


def pad_images(
    images: Sequence[Tensor],  # each [3, h, w] uint8
    divisor: int,
    canvas: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Stack at the top left of a canvas -> images [B, 3, H, W], valid sizes int64 [B, 2] (height, width).

    H and W are the largest height and width (of the images and ``canvas``), rounded up to a multiple of ``divisor`` (0
    and 1: not rounded).

    Raises:
        ValueError: no image, or one that is not [3, h, w].
    """
    check(len(images) > 0, "images", "at least one", len(images))
    check(divisor >= 0, "divisor", ">= 0", divisor)
    for image in images:
        check(image.ndim == 3 and image.shape[0] == 3, "images", "shape [3, h, w]", tuple(image.shape))
    valid_sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64)
    step = max(divisor, 1)
    largest = [max(side, least) for side, least in zip(valid_sizes.amax(0).tolist(), canvas, strict=True)]
    height, width = (-(-side // step) * step for side in largest)
    batch = images[0].new_zeros((len(images), 3, height, width))
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch, valid_sizes


def collate(
    samples: Sequence[Sample],
    divisor: int,
    broken: Sequence[Broken] = (),
    canvas: tuple[int, int] = (0, 0),
    slots: int = 1,
) -> Batch:
    """Pad images and targets to one size, at least ``canvas``; T is the largest number of targets, at least ``slots``.
    """
    images, valid_sizes = pad_images([sample.image for sample in samples], divisor, canvas)
    height, width = images.shape[2:]
    counts = torch.tensor([len(sample.labels) for sample in samples], dtype=torch.int64)
    most = max(slots, int(counts.max()))
    labels = torch.zeros((len(samples), most), dtype=torch.int64)
    masks = torch.zeros((len(samples), most, height, (width + 7) // 8), dtype=torch.uint8)
    for row, sample in enumerate(samples):
        count, rows, columns = sample.masks.shape
        labels[row, :count] = sample.labels
        masks[row, :count, :rows, :columns] = sample.masks
    targets = Targets(labels, counts, masks, valid_sizes, (height, width))
    return Batch(images, targets, [sample.image_id for sample in samples], [sample.path for sample in samples],
                 list(broken))


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Endless micro-batches of (epoch, index), from ``start_step`` on; see the module for their order."""

    def __init__(
        self, length: int, batch_size: int, seed: int, *, accumulate: int = 1, start_step: int = 0, rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check(length > 0, "dataset", "at least one example", length)
        check(seed >= 0, "seed", ">= 0", seed)
        check(start_step >= 0, "start_step", ">= 0", start_step)
        check(0 <= rank < world_size, "rank", f"0 <= rank < world_size={world_size}", rank)
        check(batch_size % (accumulate * world_size) == 0, "solver.batch_size",
              f"a multiple of accumulate x ranks = {accumulate} x {world_size}", batch_size)
        self._length = length
        self._batch_size = batch_size
        self._seed = seed
        self._accumulate = accumulate
        self._start_step = start_step
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self._batch_size // (self._accumulate * self._world_size)
        stride = size * self._world_size
        first = self._start_step * self._batch_size + self._rank * size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            keys = []
            for number in range(first, first + size):
                if number // self._length != epoch:
                    epoch = number // self._length
                    rng = np.random.default_rng([self._seed, epoch, 0, _PERMUTATION_STREAM])
                    order = rng.permutation(self._length)
                keys.append((epoch, int(order[number % self._length])))
            yield keys
            first += stride


class TrainLoader:
    """Endless iterable of `Batch`; each iterator starts at the loader's first step. See `train_loader`."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        """Raises BrokenExampleError where an example cannot be read and is not to be skipped."""
        for item in self._loader:
            batch: Batch = _raise_broken(item)
            height, width = batch.targets.input_size  # a list where PyTorch's way of pinning memory makes one
            yield batch._replace(targets=batch.targets._replace(input_size=(height, width)))


def train_loader(
    dataset: SegmentationDataset,
    config: Config,
    task: Task,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """Micro-batches of this rank, ``config.solver.accumulate`` of them a step, from ``start_step`` on.

    With ``config.data.skip_broken`` an example that cannot be read is replaced by the next one of the data set and
    listed in ``Batch.broken``; without it BrokenExampleError reaches the caller.

    Raises:
        ValueError: an empty data set, or a batch size that ranks and micro-batches do not divide.
    """
    transform = TrainTransform(config.data.augment, task, dataset.metadata)
    sampler = TrainSampler(
        len(dataset), config.solver.batch_size, config.seed, accumulate=config.solver.accumulate,
        start_step=start_step, rank=rank, world_size=world_size,
    )
    samples = _TrainSamples(dataset, transform, config.seed, config.data.skip_broken)
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    return TrainLoader(
        DataLoader(
            samples,
            batch_sampler=sampler,
            num_workers=config.data.workers,
            collate_fn=partial(
                _collate_read,
                divisor=config.model.size_divisibility,
                canvas=config.data.augment.crop_size or (0, 0),  # so that every batch of a run has one shape
                buckets=config.data.augment if config.solver.compile else None,
            ),
            worker_init_fn=worker_setup(),
            pin_memory=on_gpu,
            generator=torch.Generator(),  # the workers' base seed would otherwise advance the training's generator
        )
    )


class EvalLoader:
    """Examples in the order of their index, each with its image resized for the network.

    Iterating yields (Example, uint8 [3, h, w]). Broken examples are left out and listed in ``broken``, or raise
    BrokenExampleError. ``indices`` names the examples, by default all.
    """

    def __init__(
        self, dataset: SegmentationDataset, test: TestConfig, workers: int, skip_broken: bool,
        indices: range | None = None,
    ) -> None:
        indices = range(len(dataset)) if indices is None else indices
        self.broken: list[Broken] = []
        self._skip_broken = skip_broken
        self._length = len(indices)
        self._loader: DataLoader[Any] = DataLoader(
            _EvalSamples(dataset, test),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=worker_setup(),
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Examples, the broken ones included."""
        return self._length

    def __iter__(self) -> Iterator[tuple[Example, Tensor]]:
        for batch in self.batches(1):
            yield from batch

    def batches(self, size: int) -> Iterator[list[tuple[Example, Tensor]]]:
        """Consecutive ``size`` indices at a time, without the broken ones among them (perhaps none is left)."""
        self.broken.clear()
        items = iter(self._loader)
        while found := list(islice(items, size)):
            batch = []
            for item in found:
                if isinstance(item, BrokenExampleError) and self._skip_broken:
                    self.broken.append((item.path, item.reason))
                else:
                    batch.append(_raise_broken(item))
            yield batch


def eval_loader(
    dataset: SegmentationDataset, test: TestConfig, workers: int, skip_broken: bool = False,
    indices: range | None = None,
) -> EvalLoader:
    """Examples in index order with their images resized by ``test``, read by ``workers`` processes."""
    return EvalLoader(dataset, test, workers, skip_broken, indices)


def eval_shard(length: int, batch_size: int, rank: int, world_size: int) -> range:
    """This rank's share of the first ``length`` examples, perhaps empty; the ranks' shares in order are the whole.

    Cut between batches, so that an image meets the same others, and thus the same padding, in any number of ranks.
    """
    batches = -(-length // batch_size)
    start, stop = (batches * n // world_size * batch_size for n in (rank, rank + 1))
    return range(min(start, length), min(stop, length))


class _TrainSamples(Dataset[Any]):
    """Transformed samples by (epoch, index).

    An error is returned, not raised: raised in a worker process it would reach the user wrapped in a traceback.
    """

    def __init__(self, dataset: SegmentationDataset, transform: TrainTransform, seed: int, skip_broken: bool) -> None:
        self._dataset = dataset
        self._transform = transform
        self._seed = seed
        self._skip_broken = skip_broken

    def __getitem__(self, key: tuple[int, int]) -> tuple[Sample, list[Broken]] | BrokenExampleError:
        epoch, index = key
        rng = np.random.default_rng([self._seed, epoch, index])
        broken: list[Broken] = []
        length = len(self._dataset)
        for step in range(length):
            try:
                return self._transform(self._dataset[(index + step) % length], rng), broken
            except BrokenExampleError as error:
                if not self._skip_broken:
                    return error
                broken.append((error.path, error.reason))
        path, reason = broken[0]
        return BrokenExampleError(path, f"{reason}; all {length} examples of the data set are broken")


class _EvalSamples(Dataset[Any]):
    """Examples with the network's image, or the error that kept one from being read."""

    def __init__(self, dataset: SegmentationDataset, test: TestConfig) -> None:
        self._dataset = dataset
        self._test = test

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Example, Tensor] | BrokenExampleError:
        try:
            example = self._dataset[index]
        except BrokenExampleError as error:
            return error
        return example, resize_image(example.image, self._test.short_edge, self._test.max_size)


def _collate_read(
    items: list[tuple[Sample, list[Broken]] | BrokenExampleError],
    divisor: int,
    canvas: tuple[int, int],
    buckets: AugmentConfig | None,  # whose levels sizes are padded to, None for no such levels
) -> Batch | BrokenExampleError:
    samples: list[Sample] = []
    broken: list[Broken] = []
    for item in items:
        if isinstance(item, BrokenExampleError):
            return item
        samples.append(item[0])
        broken += item[1]
    slots = 1
    if buckets is not None:
        slots = bucket_targets(max(len(sample.labels) for sample in samples))
        if buckets.crop_size is None:
            height, width = (max(sample.image.shape[axis] for sample in samples) for axis in (1, 2))
            canvas = bucket_side(height, buckets, divisor), bucket_side(width, buckets, divisor)
    return collate(samples, divisor, broken, canvas, slots)


def _raise_broken(item: Any) -> Any:
    if isinstance(item, BrokenExampleError):
        raise item
    return item


def _unchanged(item: Any) -> Any:
    return item
