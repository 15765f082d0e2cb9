"""Loaders, padding and collation. Every training batch is a pure function of (seed, step).

Sample number n of a run (step x batch size + position) is item ``n % len`` of the permutation of epoch ``n // len``.
With repeat factors, epochs have lengths of their own, which depend on the seed alone, and so do their permutations.
So a run can resume from its step number, and the numbers of workers and micro-batches do not change a step's samples.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskformer_fast.config import AugmentConfig, Config, DataConfig, Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.image_resize import MAX_PIXELS
from maskformer_fast.data.base import BrokenExampleError, SegmentationDataset
from maskformer_fast.data.buckets import bucket_side, bucket_targets
from maskformer_fast.data.copy_paste import paste_objects
from maskformer_fast.data.transforms import Sample, TrainTransform
from maskformer_fast.data.worker import iterate_over, worker_setup
from maskformer_fast.structures import Batch, Example, Targets

_LOGGER = logging.getLogger("maskformer_fast.data")
_PERMUTATION_STREAM = 1  # last part of the permutations' seed; examples have 0 there, as NumPy appends zeros
_REPEAT_STREAM = 2  # fourth part of the seed of an example that comes again in an epoch, before the number of repeats
_PASTE_STREAM = 3  # the same for what is pasted onto an example
_ROUNDING_STREAM = 4  # last part of the seed by which an epoch's repeat factors are rounded
_MAX_BATCH_SIZE = 1 << 20  # images of a step, whose list takes memory before the first is read

Broken = tuple[str, str]
"""Path and reason of an example that could not be read."""


def pad_images(
    images: Sequence[Tensor],  # each [C, h, w] uint8 or float32
    divisor: int,
    canvas: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Stack images at the top left of zeros -> images [B, C, H, W], valid sizes int64 [B, 2] (height, width).

    H and W are the largest height and width of the images and of ``canvas``, rounded up to a multiple of ``divisor`` (0
    and 1: not rounded).

    Raises:
        ValueError: there is no image, or an image is not [C, h, w] with the C of the first.
    """
    check(len(images) > 0, "images", "at least one", len(images))
    check(divisor >= 0, "divisor", ">= 0", divisor)
    for image in images:
        channels = images[0].shape[0] if images[0].ndim == 3 else 3
        check(image.ndim == 3 and image.shape[0] == channels, "images", f"shape [{channels}, h, w]", tuple(image.shape))
    valid_sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64)
    step = max(divisor, 1)
    largest = [max(side, least) for side, least in zip(valid_sizes.amax(0).tolist(), canvas, strict=True)]
    height, width = (-(-side // step) * step for side in largest)
    dtype = torch.uint8 if all(image.dtype == torch.uint8 for image in images) else torch.float32
    batch = images[0].new_zeros((len(images), images[0].shape[0], height, width), dtype=dtype)
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
    """Pad samples to a batch: images to at least ``canvas``, targets to the largest number and at least ``slots``."""
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


def check_batch_size(batch_size: int, accumulate: int, world_size: int) -> None:
    """Raise ``ValueError`` unless a step's images can be divided among micro-batches and ranks, and be listed."""
    check(batch_size <= _MAX_BATCH_SIZE, "solver.batch_size", f"at most {_MAX_BATCH_SIZE}", batch_size)
    check(batch_size % (accumulate * world_size) == 0, "solver.batch_size",
          f"a multiple of accumulate x ranks = {accumulate} x {world_size}", batch_size)


def check_copy_paste(augment: AugmentConfig, dataset: SegmentationDataset) -> None:
    """Raise ``ValueError`` if objects are to be pasted, but no class of the data set is a thing."""
    check(any(dataset.metadata.is_thing) or augment.copy_paste == 0.0, "data.augment.copy_paste",
          "0 for a data set without things", augment.copy_paste)


class TrainSampler(Sampler[list[tuple[int, ...]]]):
    """Endless micro-batches of (epoch, index) from step ``start_step`` on, in the order of the module's docstring.

    With ``repeats``, the mean number of times that each index comes in an epoch, keys are (epoch, index, n): the index
    comes for the n-th time, from 0. The fraction of a factor is the probability of one more time, drawn in each epoch.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, *, accumulate: int = 1, start_step: int = 0, rank: int = 0,
        world_size: int = 1,
        repeats: np.ndarray | None = None,  # [length] float64, at least 1
    ) -> None:
        check(length > 0, "dataset", "at least one example", length)
        check(seed >= 0, "seed", ">= 0", seed)
        check(start_step >= 0, "start_step", ">= 0", start_step)
        check(0 <= rank < world_size, "rank", f"0 <= rank < world_size={world_size}", rank)
        check_batch_size(batch_size, accumulate, world_size)
        self._length = length
        self._batch_size = batch_size
        self._seed = seed
        self._accumulate = accumulate
        self._start_step = start_step
        self._rank = rank
        self._world_size = world_size
        self._repeats = repeats

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        size = self._batch_size // (self._accumulate * self._world_size)
        stride = size * self._world_size
        first = self._start_step * self._batch_size + self._rank * size
        epoch = first // self._length if self._repeats is None else 0  # lengths of epochs with repeats are drawn
        start = epoch * self._length
        order = self._order(epoch)
        while True:
            keys: list[tuple[int, ...]] = []
            for number in range(first, first + size):
                while number >= start + len(order):
                    epoch, start = epoch + 1, start + len(order)
                    order = self._order(epoch)
                keys.append((epoch, *order[number - start].tolist()))
            yield keys
            first += stride

    def _order(self, epoch: int) -> np.ndarray:
        """Indices of an epoch in their order -> [n, 1], with repeats [n, 2]: index, and how many times it came."""
        rng = np.random.default_rng([self._seed, epoch, 0, _PERMUTATION_STREAM])
        if self._repeats is None:
            return rng.permutation(self._length)[:, None]
        rounding = np.random.default_rng([self._seed, epoch, 0, _ROUNDING_STREAM])
        times = (self._repeats + rounding.random(self._length)).astype(np.int64)
        indices = np.repeat(np.arange(self._length), times)
        came = np.arange(len(indices)) - np.repeat(np.cumsum(times) - times, times)
        return np.stack([indices, came], 1)[rng.permutation(len(indices))]


class TrainLoader:
    """Endless iterable of `Batch`, made by `train_loader`; each iterator starts at the loader's first step."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over batches.

        Raises:
            BrokenExampleError: an example cannot be read and is not skipped.
            WorkerDied: a loader process died.
        """
        for item in iterate_over(self._loader):
            batch: Batch = _raise_broken(item)
            height, width = batch.targets.input_size  # pinning memory makes a list of the tuple
            yield batch._replace(targets=batch.targets._replace(input_size=(height, width)))


def train_loader(
    dataset: SegmentationDataset,
    config: Config,
    task: Task,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    repeats: np.ndarray | None = None,
) -> TrainLoader:
    """Make the loader of this rank's micro-batches, ``config.solver.accumulate`` for each step from ``start_step`` on.

    With ``config.data.skip_broken`` the next example of the data set replaces one that cannot be read, and
    ``Batch.broken`` lists it. Without it, iterating raises BrokenExampleError. ``repeats`` as for `TrainSampler`.

    Raises:
        ValueError: the data set is empty, or the batch size is not a multiple of ranks times micro-batches.
    """
    check_copy_paste(config.data.augment, dataset)
    transform = TrainTransform(config.data.augment, task, dataset.metadata)
    queries = config.model.decoder.num_queries if config.model.classifies_masks else None
    sampler = TrainSampler(
        len(dataset), config.solver.images, config.seed, accumulate=config.solver.accumulate,
        start_step=start_step, rank=rank, world_size=world_size, repeats=repeats,
    )
    samples = _TrainSamples(dataset, transform, config.seed, config.data, queries)
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
            generator=torch.Generator(),  # otherwise drawing the workers' seed would advance the training's generator
        )
    )


class EvalLoader:
    """Examples in the order of their index, read by ``workers`` processes.

    With ``skip_broken``, broken examples are left out and listed in ``broken``; otherwise they raise
    BrokenExampleError. ``indices`` are the examples to read, by default all.
    """

    def __init__(
        self, dataset: SegmentationDataset, workers: int, skip_broken: bool = False, indices: range | None = None
    ) -> None:
        indices = range(len(dataset)) if indices is None else indices
        self.broken: list[Broken] = []
        self._skip_broken = skip_broken
        self._indices = indices
        self._loader: DataLoader[Any] = DataLoader(
            _EvalSamples(dataset),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=worker_setup(),
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Return the number of examples, including broken ones."""
        return len(self._indices)

    def __iter__(self) -> Iterator[Example]:
        for batch in self.batches(1):
            yield from (example for _, example in batch)

    def batches(self, size: int) -> Iterator[list[tuple[int, Example]]]:
        """Iterate over groups of ``size`` consecutive indices with their examples.

        A group lacks its broken examples and may be empty.
        """
        self.broken.clear()
        items = zip(self._indices, iterate_over(self._loader), strict=True)
        while group := list(islice(items, size)):
            batch = []
            for index, item in group:
                if isinstance(item, BrokenExampleError) and self._skip_broken:
                    self.broken.append((item.path, item.reason))
                else:
                    batch.append((index, _raise_broken(item)))
            yield batch


def eval_shard(length: int, batch_size: int, rank: int, world_size: int) -> range:
    """Return the examples of this rank, which may be none; in order of ranks, the parts make up ``range(length)``.

    Parts begin and end between batches, so that the batches are the same for any number of ranks.
    """
    batches = -(-length // batch_size)
    start, stop = (batches * n // world_size * batch_size for n in (rank, rank + 1))
    return range(min(start, length), min(stop, length))


class _TrainSamples(Dataset[Any]):
    """Transformed samples by (epoch, index).

    The first image with more targets than ``queries`` is logged, since the others cannot be learned; None for a network
    without queries.

    An error is returned instead of raised: PyTorch would wrap an error raised in a worker in that worker's traceback.
    """

    def __init__(self, dataset: SegmentationDataset, transform: TrainTransform, seed: int, config: DataConfig,
                 queries: int | None = None) -> None:
        self._dataset = dataset
        self._queries = queries
        self._warned = multiprocessing.Event()  # shared by the worker processes
        self._transform = transform
        self._seed = seed
        self._skip_broken = config.skip_broken
        self._augment = config.augment

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Sample, list[Broken]] | BrokenExampleError:
        epoch, index, *came = key
        again = [_REPEAT_STREAM, *came] if any(came) else []
        rng = np.random.default_rng([self._seed, epoch, index, *again])
        broken: list[Broken] = []
        length = len(self._dataset)
        for step in range(length):
            try:
                example = self._dataset[(index + step) % length]
                self._warn_of_many_targets(example)
                placed = self._transform.place(example, rng)
                if self._augment.copy_paste > 0.0:
                    placed = self._pasted(placed, key, broken)
                return self._transform.sample(placed), broken
            except BrokenExampleError as error:
                if not self._skip_broken:
                    return error
                broken.append((error.path, error.reason))
        path, reason = broken[0]
        return BrokenExampleError(path, f"{reason}; all {length} examples of the data set are broken")

    def _pasted(self, placed: Example, key: tuple[int, ...], broken: list[Broken]) -> Example:
        """Paste objects of a random other example onto a sample, or not, by a generator of its own."""
        epoch, index, *came = key
        rng = np.random.default_rng([self._seed, epoch, index, _PASTE_STREAM, *came])
        if rng.random() >= self._augment.copy_paste:
            return placed
        length = len(self._dataset)
        other = (index + 1 + int(rng.integers(max(length - 1, 1)))) % length
        try:
            source = self._dataset[other]
        except BrokenExampleError as error:
            if not self._skip_broken:
                raise
            broken.append((error.path, error.reason))
            return placed
        metadata = self._dataset.metadata
        return paste_objects(placed, source, self._transform, self._augment.copy_paste_scale, metadata, rng)

    def _warn_of_many_targets(self, example: Example) -> None:
        if self._queries is None or len(example.segments) <= self._queries or self._warned.is_set():
            return
        if (count := self._transform.count_targets(example)) > self._queries:
            self._warned.set()
            _LOGGER.warning(
                "%s: expected at most %d objects, one for each query, got %d: the others of an image can be neither "
                "learned nor found. Raise model.decoder.num_queries, and test.top_k, which limits the instances of a "
                "result. Further images are not logged", example.path or example.image_id, self._queries, count
            )


class _EvalSamples(Dataset[Any]):
    """Examples by index; an error is returned instead of raised, as in `_TrainSamples`."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example | BrokenExampleError:
        try:
            return self._dataset[index]
        except BrokenExampleError as error:
            return error


def _collate_read(
    items: list[tuple[Sample, list[Broken]] | BrokenExampleError],
    divisor: int,
    canvas: tuple[int, int],
    buckets: AugmentConfig | None,  # its levels are those of `bucket_side`; None: no padding to levels
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
    height, width = (max(canvas[axis], *(sample.image.shape[axis + 1] for sample in samples)) for axis in (0, 1))
    if height * width > MAX_PIXELS:
        tallest = max(samples, key=lambda sample: sample.image.shape[1])
        widest = max(samples, key=lambda sample: sample.image.shape[2])
        return BrokenExampleError(
            tallest.path, f"expected at most {MAX_PIXELS} pixels an image after padding, got {height} x {width} beside "
            f"{widest.path} in a batch: set data.augment.crop_size or scale_mode"
        )
    return collate(samples, divisor, broken, canvas, slots)


def _raise_broken(item: Any) -> Any:
    if isinstance(item, BrokenExampleError):
        raise item
    return item


def _unchanged(item: Any) -> Any:
    return item
