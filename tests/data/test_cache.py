"""The cached data set: equal batches, one read of each example, errors of broken examples, limit of memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from maskformer_fast.config import AugmentConfig, Config, DataConfig, ShapesConfig, SolverConfig
from maskformer_fast.data import build_dataset
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.cache import CachedDataset
from maskformer_fast.data.loader import train_loader
from maskformer_fast.structures import Example


class CountingDataset:
    """Synthetic scenes with a count of the reads of each; number 2 is broken."""

    task = "panoptic"

    def __init__(self, count: int = 5, size: tuple[int, int] = (24, 32)) -> None:
        self._shapes = build_dataset(DataConfig(shapes=ShapesConfig(size=size, train_images=count)), "train")
        self.metadata = self._shapes.metadata
        self.reads = [0] * count
        self.file_names = [f"{index}.jpg" for index in range(count)]

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> Example:
        self.reads[index] += 1
        if index == 2:
            raise BrokenExampleError("images/2.jpg", "truncated")
        return self._shapes[index]


def test_examples_are_read_once_and_errors_are_raised_at_their_index() -> None:
    plain = CountingDataset()
    cached = CachedDataset(plain)
    assert cached.metadata is plain.metadata and cached.task == "panoptic" and len(cached) == 5
    assert cached.file_names == plain.file_names
    for index in (0, 1, 3, 4, 4):
        example, expected = cached[index], CountingDataset()[index]
        assert np.array_equal(example.image, expected.image) and np.array_equal(example.id_map, expected.id_map)
        assert example.segments == expected.segments and example.path == expected.path
        with pytest.raises(ValueError, match="read-only"):
            example.image[0, 0, 0] = 0
    with pytest.raises(BrokenExampleError, match=r"images/2\.jpg: truncated"):
        cached[2]
    assert plain.reads == [1] * 5


@pytest.mark.parametrize("workers", [0, 2])
def test_caching_does_not_change_batches(workers: int) -> None:
    config = Config(
        device="cpu",
        data=DataConfig(
            shapes=ShapesConfig(size=(40, 56), train_images=6), workers=workers, skip_broken=True,
            augment=AugmentConfig(short_edge=(40, 64), crop_size=(48, 48), color_jitter=True),
        ),
        solver=SolverConfig(batch_size=4),
    )  # fmt: skip
    assert isinstance(build_dataset(replace(config.data, cache=True), "val"), CachedDataset)
    plain, cached = (
        list(islice(train_loader(dataset, config, "panoptic"), 4))
        for dataset in (CountingDataset(), CachedDataset(CountingDataset()))
    )
    for a, b in zip(plain, cached, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets.masks, b.targets.masks)
        assert a.broken == b.broken


def test_a_data_set_that_does_not_fit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CountingDataset(1000, (64, 64))  # 7 bytes a pixel
    message = r"data\.cache: expected a data set of at most 0\.0 GiB, 70% .* of a rank, got about 0\.0 GiB \(1000 ex"
    with pytest.raises(ValueError, match=message):
        CachedDataset(dataset, free_bytes=10 << 20)
    assert sum(dataset.reads) == 16
    small = CountingDataset(16)
    total_bytes = 15 * 24 * 32 * 7
    assert len(CachedDataset(small, free_bytes=int(total_bytes / 0.7) + 2)) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each rank has a copy
    with pytest.raises(ValueError, match=r"data\.cache"):
        CachedDataset(small, free_bytes=int(total_bytes / 0.7) + 2)
