"""Instances of a panoptic data set: its things are the only classes, and stuff is unlabelled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import VOID, Metadata
from maskformer_fast.data.base import SegmentationDataset
from maskformer_fast.structures import Example


def things_metadata(metadata: Metadata, name: str) -> Metadata:
    """The things of a data set in their order, as the classes of the data set ``name``."""
    kept = [index for index, is_thing in enumerate(metadata.is_thing) if is_thing]
    return Metadata(
        name,
        tuple(metadata.class_names[index] for index in kept),
        (True,) * len(kept),
        tuple(metadata.category_ids[index] for index in kept),
        tuple(metadata.colors[index] for index in kept),
    )


class ThingsDataset:
    """The examples of a data set whose truth is an id map, without its stuff."""

    task: Task = "instance"

    def __init__(self, dataset: SegmentationDataset, name: str) -> None:
        self._dataset = dataset
        self.metadata = things_metadata(dataset.metadata, name)
        things = [index for index, is_thing in enumerate(dataset.metadata.is_thing) if is_thing]
        self._numbers = {category: number for number, category in enumerate(things)}

    @property
    def file_names(self) -> list[str]:
        """File name of each image."""
        return self._dataset.file_names

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        """Read one example; raises as the data set does."""
        example = self._dataset[index]
        assert example.id_map is not None
        segments = [
            replace(segment, category=self._numbers[segment.category])
            for segment in example.segments
            if segment.category in self._numbers
        ]
        kept = np.isin(example.id_map, [segment.id for segment in segments])
        return replace(example, segments=segments, id_map=np.where(kept, example.id_map, np.int32(VOID)))
