"""A predictor of moving scenes: it reads the classes from the colours of the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from maskformer_fast.config import Task, TestConfig
from maskformer_fast.core.exchange import instances_of_masks
from maskformer_fast.core.metadata import SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from tests.support.moving_scene import METADATA

_COLORS = np.array(METADATA.colors, np.int32)


class ByColor:
    """Each pixel has the class of the nearest colour; a class is one segment."""

    def __init__(self, batch_size: int = 1) -> None:
        self.test, self.metadata, self.channels = TestConfig(batch_size=batch_size), METADATA, 0
        self.batches: list[int] = []

    def check_task(self, task: Task) -> None:
        assert task in ("semantic", "panoptic", "instance")

    def infer(self, images: Sequence[np.ndarray], tasks: Sequence[Task]) -> dict[Task, list[Result]]:
        self.batches.append(len(images))
        return {task: [self.result(image, task) for image in images] for task in tasks}

    def result(self, image: np.ndarray, task: Task) -> Result:
        labels = np.stack([np.abs(image.astype(np.int32) - color).sum(-1) for color in _COLORS]).argmin(0)
        if task == "semantic":
            return SemanticResult(torch.from_numpy(labels.astype(np.uint8)))
        present = np.unique(labels).tolist()
        if task == "panoptic":
            segments = [SegmentInfo(kind + 1, kind, METADATA.is_thing[kind], score=0.75,
                                    area=int((labels == kind).sum())) for kind in present]  # fmt: skip
            return PanopticResult(torch.from_numpy(labels.astype(np.int32) + 1), segments)
        kinds = [kind for kind in present if METADATA.is_thing[kind]]
        masks = np.array([labels == kind for kind in kinds], bool).reshape(-1, *labels.shape)
        arrays = instances_of_masks(kinds, np.linspace(0.9, 0.3, len(kinds)), masks)
        return InstanceResult(*map(torch.from_numpy, arrays), labels.shape)
