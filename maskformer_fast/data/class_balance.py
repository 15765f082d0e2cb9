"""Repeat factor sampling: images of rare classes come several times in an epoch (Gupta et al., "LVIS", CVPR 2019)."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from maskformer_fast.config import Task
from maskformer_fast.core.files import atomic_write
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.base import BrokenExampleError, SegmentationDataset
from maskformer_fast.data.transforms import is_target
from maskformer_fast.data.worker import iterate_over, worker_setup
from maskformer_fast.distributed import gather_objects, is_main, on_main, rank, world_size
from maskformer_fast.structures import Example

logger = logging.getLogger(__name__)


def repeat_factors(
    presence: np.ndarray,  # [N, K] bool: image has a target of the class
    threshold: float,
) -> np.ndarray:
    """Mean number of times that each image comes in an epoch -> [N] float64, at least 1.

    A class in a share ``f`` of the images has the factor ``max(1, sqrt(threshold / f))``, an image the largest of its
    classes.
    """
    share = presence.mean(0)
    of_class = np.sqrt(np.divide(threshold, share, out=np.zeros_like(share), where=share > 0))
    return np.maximum(np.where(presence, of_class, 0.0).max(1, initial=0.0), 1.0)


def present_classes(example: Example, task: Task, metadata: Metadata) -> np.ndarray:
    """Classes with a pixel among the targets of a task -> bool [K]."""
    present = np.zeros(metadata.num_classes, dtype=bool)
    if example.id_map is not None:
        ids = set(np.unique(example.id_map).tolist())
        filled: list[bool] = [segment.id in ids for segment in example.segments]
    else:
        assert example.masks is not None  # by Example.__post_init__
        filled = [bool(mask.any()) for mask in example.masks]
    for segment, has_pixels in zip(example.segments, filled, strict=True):
        if has_pixels and is_target(segment, task, metadata):
            present[segment.category] = True
    return present


def count_classes(
    dataset: SegmentationDataset, indices: range, workers: int, skip_broken: bool, show_progress: bool
) -> np.ndarray:
    """Read the truth of examples -> their `present_classes`, bool [len(indices), K]; broken ones are skipped as empty.

    Raises:
        BrokenExampleError: an example cannot be read, and ``skip_broken`` is False.
    """
    loader: DataLoader[Any] = DataLoader(
        _Presence(dataset), batch_size=None, sampler=indices, num_workers=workers, collate_fn=_unchanged,
        worker_init_fn=worker_setup(),
    )  # fmt: skip
    presence = np.zeros((len(indices), dataset.metadata.num_classes), dtype=bool)
    rows = tqdm(iterate_over(loader), total=len(indices), desc="count classes", unit="img", leave=False,
                dynamic_ncols=True, disable=not show_progress)
    for number, row in enumerate(rows):
        if not isinstance(row, BrokenExampleError):
            presence[number] = row
        elif not skip_broken:
            raise row
    return presence


def cached_presence(path: Path, dataset: SegmentationDataset, workers: int, skip_broken: bool) -> np.ndarray:
    """Classes of every example -> bool [N, K], from a file if they were counted before; every rank calls it.

    Several ranks share out the counting. A file that cannot be written only gives a warning.

    Raises:
        BrokenExampleError: see `count_classes`.
    """
    presence = on_main(lambda: read_presence(path, dataset))
    if presence is not None:
        return presence
    shares = [len(dataset) * number // world_size() for number in (rank(), rank() + 1)]
    counted = count_classes(dataset, range(*shares), workers, skip_broken, is_main())
    presence = np.concatenate(gather_objects(counted))
    if is_main():
        try:
            write_presence(path, dataset, presence)
        except OSError as error:
            logger.warning("%s: the counted classes could not be kept: %s", path, error)
    return presence


def fingerprint(dataset: SegmentationDataset) -> str:
    """Hash of what the counts depend on: task, classes and names of the images."""
    metadata = dataset.metadata
    content = [dataset.task, metadata.name, metadata.class_names, metadata.is_thing, len(dataset), dataset.file_names]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_presence(path: Path, dataset: SegmentationDataset) -> np.ndarray | None:
    """Read what `write_presence` wrote for this data set; ``None`` if there is no such file, or it is damaged."""
    shape = len(dataset), dataset.metadata.num_classes
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["fingerprint"]) != fingerprint(dataset):
                return None
            bits = file["presence"]
        if bits.dtype != np.uint8 or bits.shape != (shape[0], -(-shape[1] // 8)):
            raise ValueError(f"presence: expected packed bits of {shape}, got {bits.dtype} {bits.shape}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: not readable, counting the classes again: %s", path, error)
        return None
    return np.unpackbits(bits, axis=1, count=shape[1]).astype(bool)


def write_presence(path: Path, dataset: SegmentationDataset, presence: np.ndarray) -> None:
    """Write the classes of all examples for `read_presence`. Raises ``OSError``."""
    with atomic_write(path) as file:
        np.savez_compressed(file, fingerprint=np.array(fingerprint(dataset)), presence=np.packbits(presence, axis=1))


class _Presence(Dataset[Any]):
    """Classes by index; an error is returned instead of raised, as PyTorch would wrap it in a worker's traceback."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> np.ndarray | BrokenExampleError:
        try:
            example = self._dataset[index]
        except BrokenExampleError as error:
            return error
        return present_classes(example, self._dataset.task, self._dataset.metadata)


def _unchanged(item: Any) -> Any:
    return item
