"""A data set kept in memory: decoded once, before the loader's processes start, and shared by them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.base import BrokenExampleError, SegmentationDataset
from maskformer_fast.structures import Example

_SAMPLE = 16  # examples read between two estimates of the total size
_SHARE = 0.7  # largest share of the free memory; training needs the rest


class CachedDataset:
    """All examples of another data set, read in advance by threads.

    A broken example is kept as its error, which is raised when the example is asked for. Forked processes share the
    memory. Under torchrun each rank has a copy.
    """

    def __init__(self, dataset: SegmentationDataset, free_bytes: int | None = None) -> None:
        """Read all examples.

        Args:
            free_bytes: free memory; None asks the system, and there is no limit if the system does not say.

        Raises:
            ValueError: the data set needs more than the allowed share of the free memory.
        """
        self.metadata: Metadata = dataset.metadata
        self.task: Task = dataset.task
        self.file_names: list[str] = dataset.file_names
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
            for start in range(0, length, _SAMPLE):  # in parts, so that reading stops before memory is full
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
        """Return the example of the original data set, with read-only arrays; raises as that data set does."""
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
    """Return the memory that Linux can give without swapping; None if it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines)}
        return int(kibibytes["MemAvailable"]) << 10
    except (OSError, KeyError):
        return None
