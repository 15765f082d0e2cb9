"""What post-processing leaves on a device for a batch, and the results that it becomes.

Each part has the `numbers` that the host must read before `results` can make the results. `read_results` reads those of
all parts in one transfer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskformer_fast.core.metadata import segments_of_rows
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult

Size = tuple[int, int]


class SemanticMaps(NamedTuple):
    """Label maps of a batch's images."""

    labels: list[Tensor]  # [H, W] uint8 or int16, one an image
    scores: list[Tensor] | None  # [H, W] float32
    numbers: None = None  # nothing is to be read

    def results(self, numbers: np.ndarray) -> list[Result]:
        """One result an image."""
        if self.scores is None:
            return [SemanticResult(labels) for labels in self.labels]
        return [SemanticResult(*maps) for maps in zip(self.labels, self.scores, strict=True)]


class PanopticMaps(NamedTuple):
    """Id maps of a batch's images, and a row for each query that may be a segment."""

    id_maps: list[Tensor]  # [H, W] int32, one an image
    is_thing: tuple[bool, ...]
    numbers: Tensor  # [B, N, 4] float64: id, category, area, score; exact, as all are below 2**53

    def results(
        self,
        numbers: np.ndarray,  # the tensor `numbers` on the host
    ) -> list[Result]:
        """One result an image."""
        return [
            PanopticResult(id_map, segments_of_rows(rows, self.is_thing))
            for id_map, rows in zip(self.id_maps, numbers.tolist(), strict=True)
        ]


class RankedInstances(NamedTuple):
    """P candidates of each of a batch's images, best first; those with an empty mask are last."""

    labels: Tensor  # [B, P] int64
    scores: Tensor  # [B, P] float32, negative with an empty mask
    slots: Tensor  # [B, P] int64, index of the candidate's mask and box
    masks: list[Tensor]  # [N, H, ceil(W/8)] uint8, one an image
    boxes: list[Tensor]  # [N, 4] float32
    sizes: tuple[Size, ...]
    numbers: Tensor  # [B] float64: candidates with a mask

    def results(
        self,
        numbers: np.ndarray,  # the tensor `numbers` on the host
    ) -> list[Result]:
        """One result an image, with the masks and boxes of its candidates."""
        results: list[Result] = []
        for image, count in enumerate(map(int, numbers)):
            slots = self.slots[image, :count]
            # index_select copies complete masks: five times faster here than masks[slots]
            masks, boxes = (tensors[image].index_select(0, slots) for tensors in (self.masks, self.boxes))
            labels, scores = self.labels[image, :count], self.scores[image, :count]
            results.append(InstanceResult(labels, scores, masks, boxes, self.sizes[image]))
        return results


DevicePart = SemanticMaps | PanopticMaps | RankedInstances


def read_results(parts: Sequence[DevicePart]) -> list[list[Result]]:
    """Results of each part, a list with one an image. All that the host needs comes in one transfer, the only wait."""
    numbers = [part.numbers for part in parts if part.numbers is not None]
    read = np.empty(0)
    if numbers:
        read = (numbers[0].flatten() if len(numbers) == 1 else torch.cat([n.flatten() for n in numbers])).cpu().numpy()
    results, start = [], 0
    for part in parts:
        shape = (0,) if part.numbers is None else tuple(part.numbers.shape)
        end = start + math.prod(shape)
        results.append(part.results(read[start:end].reshape(shape)))
        start = end
    return results
