"""Scenes of known truth for tiles, and a predictor that reads the truth from the picture's colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from maskformer_fast.config import Task, TestConfig
from maskformer_fast.core.exchange import boxes_of, pack
from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult

METADATA = Metadata("scene", ("sky", "road", "car", "bus"), (False, False, True, True), (0, 1, 2, 3),
                    ((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)))  # fmt: skip


def scene_keys(scene: np.ndarray) -> np.ndarray:
    """One number for each class and object -> [H, W] int64; the class is the number >> 16."""
    return scene[..., 0].astype(np.int64) << 16 | scene[..., 1].astype(np.int64) << 8 | scene[..., 2]


class Truth:
    """A predictor that knows the scene: the red channel is a class, green and blue an object."""

    def __init__(self, test: TestConfig) -> None:
        self.test, self.metadata, self.channels = test, METADATA, 0

    def infer(self, images: Sequence[np.ndarray], tasks: Sequence[Task]) -> dict[Task, list[Result]]:
        return {task: [self.result(image, task) for image in images] for task in tasks}

    def result(self, image: np.ndarray, task: Task) -> Result:
        if task == "semantic":
            return SemanticResult(torch.from_numpy(image[..., 0].copy()))
        key = scene_keys(image)
        keys = np.flatnonzero(np.bincount(key.ravel()))  # a sort would take far longer
        table = np.zeros(int(keys[-1]) + 1, np.int64)
        table[keys] = np.arange(len(keys))
        rows = table[key]
        categories = keys >> 16
        if task == "panoptic":
            segments = [SegmentInfo(number + 1, int(kind), METADATA.is_thing[kind], score=0.5, area=1)
                        for number, kind in enumerate(categories)]  # fmt: skip
            return PanopticResult(torch.from_numpy(rows.astype(np.int32) + 1), segments)
        things = [number for number, kind in enumerate(categories) if METADATA.is_thing[kind]]
        masks = np.stack([rows == number for number in things]) if things else np.zeros((0, *key.shape), bool)
        labels, scores = categories[things], np.linspace(1, 0.5, len(things), dtype=np.float32)
        packed = pack(masks)
        arrays = labels, scores, packed, boxes_of(packed, key.shape[1])
        return InstanceResult(*map(torch.from_numpy, arrays), key.shape)


def draw_scene(size: tuple[int, int], count: int, seed: int = 0, radius: tuple[int, int] = (4, 30)) -> np.ndarray:
    """A scene for `Truth` of two kinds of ground and discs that do not touch."""
    make = np.random.default_rng(seed)
    scene = np.zeros((*size, 3), np.uint8)
    scene[size[0] // 2 :, :, 0] = 1
    taken = np.zeros(size, bool)
    number = 0
    for _ in range(50 * count):
        reach = int(make.integers(*radius))
        y, x = make.integers(0, size[0]), make.integers(0, size[1])
        outer = (slice(max(0, y - reach - 1), y + reach + 2), slice(max(0, x - reach - 1), x + reach + 2))
        if taken[outer].any():
            continue
        rows, columns = (np.arange(side)[part] for side, part in zip(size, outer, strict=True))
        disc = (rows[:, None] - y) ** 2 + (columns - x) ** 2 <= reach**2
        number += 1
        scene[outer][disc] = 2 + number % 2, number >> 8, number & 255
        taken[outer] = True
        if number == count:
            break
    return scene


def partition(values: np.ndarray) -> set[tuple[int, ...]]:
    """A map's regions, whatever their values: first pixel and number of pixels of each."""
    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    return set(zip(first.tolist(), counts.tolist(), strict=True))
