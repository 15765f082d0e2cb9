"""Loaders: equal batches for any number of workers, exact resume, padding, broken examples."""

from __future__ import annotations

import itertools
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import threadpoolctl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    ShapesConfig,
    SolverConfig,
    Task,
)
from maskformer_fast.data.base import BrokenExampleError, SegmentationDataset
from maskformer_fast.data.datasets.shapes import ShapesDataset
from maskformer_fast.data.loader import (
    EvalLoader,
    TrainLoader,
    TrainSampler,
    collate,
    pad_images,
    train_loader,
)
from maskformer_fast.data.transforms import Sample, TrainTransform, target_segments
from maskformer_fast.structures import Batch, Example, pack_masks, unpack_masks


class PartlyBroken:
    """A data set of which some examples cannot be read."""

    task = "panoptic"

    def __init__(self, dataset: SegmentationDataset, broken: Iterable[int]) -> None:
        self.metadata = dataset.metadata
        self.file_names = dataset.file_names
        self._dataset = dataset
        self._broken = set(broken)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        if index in self._broken:
            raise BrokenExampleError(f"images/{index}.jpg", "truncated")
        return self._dataset[index]


def config(workers: int = 0, batch_size: int = 4, accumulate: int = 1, skip_broken: bool = False) -> Config:
    augment = AugmentConfig(short_edge=(40, 52, 64), crop_size=(48, 48), color_jitter=True)
    return Config(
        seed=3,
        device="cpu",
        model=ModelConfig(size_divisibility=16),
        data=DataConfig(augment=augment, workers=workers, skip_broken=skip_broken),
        solver=SolverConfig(batch_size=batch_size, accumulate=accumulate),
    )


def shapes(count: int = 10) -> ShapesDataset:
    return ShapesDataset(ShapesConfig(size=(40, 56), train_images=count), "train")


def take(loader: Iterable[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def assert_same(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images) and a.image_ids == b.image_ids and a.paths == b.paths
        assert all(torch.equal(x, y) for x, y in zip(a.targets[:4], b.targets[:4], strict=True))
        assert a.targets.input_size == b.targets.input_size and a.broken == b.broken


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    expected = take(train_loader(shapes(), config(0), "panoptic"), 6)
    assert_same(take(train_loader(shapes(), config(workers), "panoptic"), 6), expected)
    assert not torch.equal(expected[0].images[0], expected[1].images[0])


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_start_step_resumes_exactly(accumulate: int, workers: int) -> None:
    uninterrupted = take(train_loader(shapes(), config(0, accumulate=accumulate), "panoptic"), 6 * accumulate)
    rest = train_loader(shapes(), config(workers, accumulate=accumulate), "panoptic", start_step=4)
    assert_same(take(rest, 2 * accumulate), uninterrupted[4 * accumulate :])


def test_ranks_and_micro_batches_divide_the_samples_of_a_step() -> None:
    def images(batches: Iterable[Batch]) -> list[tuple[int | str, bytes]]:
        return sorted(
            (image_id, image[:, : int(h), : int(w)].numpy().tobytes())
            for batch in batches
            for image_id, image, (h, w) in zip(batch.image_ids, batch.images, batch.targets.valid_sizes, strict=True)
        )

    one_batch = take(train_loader(shapes(), config(batch_size=8), "panoptic", start_step=1), 1)
    parts = [
        take(train_loader(shapes(), config(batch_size=8, accumulate=2), "panoptic", 1, rank, 2), 2) for rank in (0, 1)
    ]
    assert all(len(batch.paths) == 2 for part in parts for batch in part)
    assert images(one_batch) == images(itertools.chain(*parts))


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 20), batch_size=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_every_epoch_has_every_example_once(length: int, batch_size: int, seed: int) -> None:
    count = 3 * length // batch_size + 1
    keys = list(itertools.chain(*itertools.islice(TrainSampler(length, batch_size, seed), count)))
    orders = []
    for epoch in range(len(keys) // length):
        part = keys[epoch * length : (epoch + 1) * length]
        assert all(key[0] == epoch for key in part)
        assert sorted(index for _, index in part) == list(range(length))
        orders.append(tuple(index for _, index in part))
    assert length < 9 or len(set(orders)) == len(orders)


def test_epochs_augment_the_same_example_differently() -> None:
    first, second = take(train_loader(shapes(1), config(batch_size=1), "semantic"), 2)
    assert first.paths == second.paths
    assert first.images.shape != second.images.shape or not torch.equal(first.images, second.images)


def test_a_data_set_smaller_than_a_batch_is_repeated() -> None:
    batch = take(train_loader(shapes(3), config(batch_size=8), "instance"), 1)[0]
    assert len(batch.paths) == 8 and set(batch.image_ids) == {0, 1, 2}


def test_input_sizes_are_tuples_even_if_pinning_memory_made_lists() -> None:
    batch = next(iter(train_loader(shapes(), config(), "panoptic")))
    pinned = batch._replace(targets=batch.targets._replace(input_size=list(batch.targets.input_size)))
    assert next(iter(TrainLoader([pinned]))).targets.input_size == batch.targets.input_size


def test_loaders_do_not_advance_the_global_generator() -> None:
    before = torch.get_rng_state()
    take(train_loader(shapes(), config(), "panoptic"), 2)
    list(EvalLoader(shapes(2), 0, False))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "dataset: expected at least one example"),
        ({"batch_size": 10**9}, r"solver\.batch_size: expected at most 1048576, got 1000000000"),
        ({"batch_size": 6, "world_size": 4}, r"solver\.batch_size: expected a multiple of accumulate x ranks = 1 x 4"),
        ({"rank": 1}, "rank: expected 0 <= rank < world_size=1, got 1"),
        ({"seed": -1}, "seed: expected >= 0"),
        ({"start_step": -1}, "start_step: expected >= 0"),
    ],
)
def test_the_sampler_names_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSampler(**{"length": 4, "batch_size": 4, "seed": 0, **arguments})


SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, divisor=st.sampled_from([0, 1, 7, 8, 32]))
def test_pad_images_keeps_every_pixel_and_fits_the_divisor(sizes: list[tuple[int, int]], divisor: int) -> None:
    images = [torch.randint(1, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    batch, valid_sizes = pad_images(images, divisor)
    assert batch.dtype == torch.uint8 and valid_sizes.dtype == torch.int64
    assert valid_sizes.tolist() == [list(size) for size in sizes]
    for side, largest in zip(batch.shape[2:], valid_sizes.amax(0).tolist(), strict=True):
        assert largest <= side < largest + max(divisor, 1) and side % max(divisor, 1) == 0
    for row, image in zip(batch, images, strict=True):
        assert torch.equal(row[:, : image.shape[1], : image.shape[2]], image)
        assert torch.count_nonzero(row) == image.numel()  # the padding is zero


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, divisor=st.sampled_from([0, 8, 12]), data=st.data())
def test_collate_keeps_every_mask_and_label(sizes: list[tuple[int, int]], divisor: int, data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, 3)) for _ in sizes]
    dense = [torch.rand(count, *size) < 0.5 for count, size in zip(counts, sizes, strict=True)]
    samples = [
        Sample(torch.zeros(3, *size, dtype=torch.uint8), torch.arange(1, count + 1), pack_masks(masks), i, f"{i}.png")
        for i, (size, count, masks) in enumerate(zip(sizes, counts, dense, strict=True))
    ]
    batch = collate(samples, divisor)
    targets = batch.targets
    height, width = targets.input_size
    assert batch.images.shape == (len(sizes), 3, height, width)
    assert targets.masks.shape == (len(sizes), max(1, *counts, 0), height, (width + 7) // 8)
    assert targets.counts.tolist() == counts and batch.broken == []
    masks = unpack_masks(targets.masks, width)
    for row, (image_masks, (h, w)) in enumerate(zip(dense, sizes, strict=True)):
        count = len(image_masks)
        assert torch.equal(masks[row, :count, :h, :w], image_masks)
        assert masks[row].sum() == image_masks.sum()
        assert targets.labels[row].tolist() == [*range(1, count + 1)] + [0] * (targets.labels.shape[1] - count)


def test_pad_images_names_bad_arguments() -> None:
    with pytest.raises(ValueError, match="images: expected at least one"):
        pad_images([], 32)
    with pytest.raises(ValueError, match=r"images: expected shape \[3, h, w\], got \(4, 5\)"):
        pad_images([torch.zeros(4, 5)], 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_example_reaches_the_caller_with_its_path(workers: int) -> None:
    with pytest.raises(BrokenExampleError, match=r"^images/5\.jpg: truncated$") as caught:
        take(train_loader(PartlyBroken(shapes(), [5]), config(workers), "panoptic"), 5)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_examples_are_replaced_by_the_next_and_listed(workers: int) -> None:
    dataset = PartlyBroken(shapes(), [5, 6, 9])
    batches = take(train_loader(dataset, config(workers, batch_size=5, skip_broken=True), "panoptic"), 2)
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    assert sorted(ids) == [0, 0, 1, 2, 3, 4, 7, 7, 7, 8]  # 5 and 6 become 7, 9 wraps to 0
    reasons = [entry for batch in batches for entry in batch.broken]
    # The sample of 5 lists 5 and 6, that of 6 only 6.
    assert sorted(reasons) == [(f"images/{i}.jpg", "truncated") for i in (5, 6, 6, 9)]


def test_a_data_set_of_broken_examples_is_an_error() -> None:
    loader = train_loader(PartlyBroken(shapes(3), range(3)), config(skip_broken=True), "panoptic")
    with pytest.raises(BrokenExampleError, match="truncated; all 3 examples of the data set are broken"):
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_order_and_lists_broken_examples(workers: int) -> None:
    dataset = shapes(7)
    examples = list(EvalLoader(dataset, workers))
    assert [example.image_id for example in examples] == list(range(7))
    np.testing.assert_array_equal(examples[3].image, dataset[3].image)
    np.testing.assert_array_equal(examples[3].id_map, dataset[3].id_map)
    loader = EvalLoader(PartlyBroken(dataset, [0, 4]), workers, skip_broken=True)
    for _ in range(2):
        assert [example.image_id for example in loader] == [1, 2, 3, 5, 6]
        assert loader.broken == [("images/0.jpg", "truncated"), ("images/4.jpg", "truncated")]
    assert len(loader) == 7
    with pytest.raises(BrokenExampleError, match=r"^images/4\.jpg: truncated$"):
        list(EvalLoader(PartlyBroken(dataset, [4]), workers))


def test_batches_have_labels_of_hundreds_of_classes() -> None:
    dataset = ShapesDataset(ShapesConfig(num_things=150, num_stuff=50, size=(40, 56), train_images=30), "train")
    batches = take(train_loader(dataset, replace(config(), seed=0), "panoptic"), 8)
    labels = torch.cat([row[:count] for b in batches for row, count in zip(*b.targets[:2], strict=True)])
    assert labels.max() < 200 and labels[labels < 150].unique().numel() > 20 and (labels >= 150).any()


def test_the_canvas_is_a_minimum_size() -> None:
    images = [torch.ones(3, 10, 20, dtype=torch.uint8), torch.ones(3, 7, 9, dtype=torch.uint8)]
    for canvas, expected in (((16, 16), (16, 24)), ((0, 0), (16, 24)), ((30, 10), (32, 24)), ((16, 40), (16, 40))):
        batch, valid_sizes = pad_images(images, 8, canvas)
        assert batch.shape[2:] == expected and valid_sizes.tolist() == [[10, 20], [7, 9]]
        assert torch.count_nonzero(batch) == sum(image.numel() for image in images)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_with_more_targets_than_queries_is_logged_once(workers: int, capfd, caplog) -> None:
    few = config(workers)
    few = replace(few, model=replace(few.model, decoder=DecoderConfig(num_queries=2)))
    logging.getLogger("maskformer_fast.data").addHandler(handler := logging.StreamHandler(sys.stderr))
    try:
        with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
            take(train_loader(shapes(), few, "panoptic"), 5)
    finally:
        logging.getLogger("maskformer_fast.data").removeHandler(handler)
    assert capfd.readouterr().err.count("expected at most 2 objects, one for each query") == 1
    dense = replace(few, model=replace(few.model, type="per_pixel"))
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        caplog.clear()
        take(train_loader(shapes(), replace(dense, data=replace(dense.data, workers=0)), "panoptic"), 2)
    assert not caplog.records


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_targets_are_counted_as_they_are_made(task: Task) -> None:
    transform = TrainTransform(AugmentConfig(), task, shapes().metadata)
    for index in range(10):
        example = shapes()[index]
        assert transform.count_targets(example) == len(target_segments(example, task, shapes().metadata)[0])


class Strips(ShapesDataset):
    """A tall image beside a wide one."""

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        size = (20_000, 1) if index % 2 else (1, 20_000)
        return replace(example, image=np.zeros((*size, 3), np.uint8), id_map=np.full(size, example.segments[0].id),
                       path=f"{index}.png")


def test_a_batch_that_padding_makes_enormous_is_refused_with_both_images() -> None:
    strips = Strips(ShapesConfig(size=(40, 56), train_images=10), "train")
    plain = replace(config(), data=DataConfig(augment=AugmentConfig(scale_mode="none", crop_size=None), workers=0))
    with pytest.raises(BrokenExampleError, match=r"\d\.png: .*got 20000 x 20000 beside \d\.png.*crop_size"):
        take(train_loader(strips, plain, "semantic"), 5)


class ThreadCounts:
    """A data set whose image ids are the number of threads that NumPy's libraries use in the reading process."""

    def __init__(self, dataset: ShapesDataset) -> None:
        self.metadata, self.task, self._dataset = dataset.metadata, dataset.task, dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        pools = threadpoolctl.threadpool_info()
        return replace(self._dataset[index], image_id=max(pool["num_threads"] for pool in pools))


def test_workers_use_one_thread() -> None:
    dataset = ThreadCounts(ShapesDataset(ShapesConfig(size=(16, 16), train_images=4, val_images=2), "train"))
    config = Config(data=DataConfig(workers=1), solver=SolverConfig(batch_size=2))
    with threadpoolctl.threadpool_limits(2):  # the number that workers would inherit on a larger machine
        assert dataset[0].image_id == 2
        assert next(iter(train_loader(dataset, config, "panoptic"))).image_ids == [1, 1]
        assert [example.image_id for example in EvalLoader(dataset, workers=1)] == [1] * 4


def test_a_process_with_an_unfinished_iterator_exits() -> None:
    script = (
        "from maskformer_fast.config import Config, DataConfig, ShapesConfig, SolverConfig\n"
        "from maskformer_fast.data.loader import train_loader\n"
        "from maskformer_fast.data.datasets.shapes import ShapesDataset\n"
        "config = Config(data=DataConfig(workers=2), solver=SolverConfig(batch_size=2))\n"
        "dataset = ShapesDataset(ShapesConfig(size=(16, 16), train_images=64, val_images=2), 'train')\n"
        "batches = iter(train_loader(dataset, config, 'panoptic'))\n"
        "print(len(next(batches).image_ids))\n"
        "import sys; sys.batches = batches\n"  # referenced until the interpreter exits
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr
