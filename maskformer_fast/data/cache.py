"""A data set held in memory: decoded once, before the loader's processes start, which then share it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.base import BrokenExampleError, SegmentationDataset
from maskformer_fast.structures import Example

_SAMPLE = 16  # examples by whose size that of all is judged
_SHARE = 0.7  # of the free memory, which training needs too


class CachedDataset:
    """Every example of another data set, read ahead by threads; broken ones are kept as their error.

    Processes that are forked from this one read the same memory. Under torchrun each rank holds a copy.
    """

    def __init__(self, dataset: SegmentationDataset, free_bytes: int | None = None) -> None:
        """Read everything.

        Args:
            free_bytes: memory to stay within, by default what the system says is free; unknown is no limit.

        Raises:
            ValueError: the data set would not fit.
        """
        self.metadata: Metadata = dataset.metadata
        self.task: Task = dataset.task
        self._examples: list[Example | BrokenExampleError] = []
        free_bytes = _free_bytes() if free_bytes is None else free_bytes
        limit = None if free_bytes is None else _SHARE * free_bytes / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

        def read(index: int) -> Example | BrokenExampleError:
            try:
                return _read_only(dataset[index])
            except BrokenExampleError as error:
                return error

        length, size = len(dataset), 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, length, _SAMPLE):  # in batches, so that what does not fit is never read
                for example in pool.map(read, range(start, min(start + _SAMPLE, length))):
                    self._examples.append(example)
                    size += 0 if isinstance(example, BrokenExampleError) else _bytes(example)
                expected = size / len(self._examples) * length
                if limit is not None and expected > limit:
                    raise ValueError(
                        f"data.cache: expected a data set of at most {limit / 2**30:.1f} GiB, {_SHARE:.0%} of the free "
                        f"memory of a rank, got about {expected / 2**30:.1f} GiB ({length} examples): leave it off"
                    )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        """As of the data set that was read; the arrays cannot be written to."""
        example = self._examples[index]
        if isinstance(example, BrokenExampleError):
            raise example
        return example


def _read_only(example: Example) -> Example:
    for array in (example.image, example.id_map, example.masks):
        if array is not None:
            array.setflags(write=False)
    return example


def _bytes(example: Example) -> int:
    return sum(array.nbytes for array in (example.image, example.id_map, example.masks) if array is not None)


def _free_bytes() -> int | None:
    """What Linux can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines)}
        return int(kibibytes["MemAvailable"]) << 10
    except (OSError, KeyError):
        return None
