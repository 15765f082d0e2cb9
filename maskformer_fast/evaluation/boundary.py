"""Boundary IoU (Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021).

The boundary of a mask is the part of it that erosion by ``d`` pixels takes away: pixels whose square of side 2d+1
leaves the mask or the image. ``d`` is 2 % of the image's diagonal.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.metadata import VOID, Metadata
from maskformer_fast.core.results import Result, SemanticResult
from maskformer_fast.evaluation.common import Evaluator, check_merge, class_keys, expect_result
from maskformer_fast.evaluation.instance import InstanceEvaluator
from maskformer_fast.structures import Example

_SHARE = 0.02  # of the diagonal


def boundary_width(size: tuple[int, int]) -> int:
    """Width ``d`` of boundaries in an image of this height and width, in pixels, at least 1."""
    return max(1, round(_SHARE * math.hypot(*size)))


def interior(
    labels: np.ndarray,  # [H, W] integers or bool
    width: int,
) -> np.ndarray:
    """Pixels whose square of side ``2 width + 1`` lies in the image and has one label -> bool [H, W].

    The cost depends neither on the width nor on the number of labels: changes are summed along rows, then columns.
    """
    height, columns = labels.shape
    inside = np.zeros((height, columns), dtype=bool)
    side = 2 * width + 1
    if height < side or columns < side:
        return inside
    changes = np.zeros((height, columns), dtype=np.int32)
    np.cumsum(labels[:, 1:] != labels[:, :-1], axis=1, out=changes[:, 1:])
    uniform = changes[:, 2 * width :] == changes[:, : columns - 2 * width]  # rows of the square, by its centre
    centre = labels[:, width : columns - width]
    problems = np.zeros((height + 1, centre.shape[1]), dtype=np.int32)  # rows that are not uniform
    np.cumsum(~uniform, axis=0, out=problems[1:])
    steps = np.zeros(centre.shape, dtype=np.int32)
    np.cumsum(centre[1:] != centre[:-1], axis=0, out=steps[1:])
    good = problems[side:] == problems[:-side]
    good &= steps[2 * width :] == steps[: height - 2 * width]
    inside[width : height - width, width : columns - width] = good
    return inside


class BoundarySemanticEvaluator:
    """Boundary IoU of each class over all pixels of all images, and its mean.

    The boundary of a class is that of the mask of its pixels. Pixels whose truth is `VOID` are left out; towards them,
    too, a class has a boundary.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        k = self.metadata.num_classes
        self.both, self.true, self.predicted = (np.zeros(k, dtype=np.int64) for _ in range(3))

    def process(self, example: Example, result: Result) -> None:
        """Count one image (see `Evaluator.process`); the result is a `SemanticResult`."""
        k = self.metadata.num_classes
        labels = expect_result(example, result, SemanticResult).labels.numpy()
        truth, width = example.semantic_map(), boundary_width(example.size)
        known = truth != VOID
        true = ~interior(truth, width) & known
        predicted = ~interior(labels, width) & known
        self.true += np.bincount(truth[true], minlength=k)
        self.predicted += np.bincount(labels[predicted], minlength=k)
        self.both += np.bincount(truth[true & predicted & (truth == labels)], minlength=k)

    def merge(self, other: Evaluator) -> None:
        """Add another evaluator's images (see `Evaluator.merge`)."""
        check_merge(self, other)
        other = cast(BoundarySemanticEvaluator, other)
        self.both += other.both
        self.true += other.true
        self.predicted += other.predicted

    def evaluate(self) -> dict[str, Any]:
        """Keys: boundary_iou, per_class_boundary_iou (by name); ``None`` for classes in neither truth nor result."""
        union = self.true + self.predicted - self.both
        values = [int(b) / int(u) if u else None for b, u in zip(self.both, union, strict=True)]
        defined = [value for value in values if value is not None]
        names = class_keys(self.metadata)
        return {"boundary_iou": sum(defined) / len(defined) if defined else None,
                "per_class_boundary_iou": dict(zip(names, values, strict=True))}


class BoundaryInstanceEvaluator(InstanceEvaluator):
    """Boundary AP: average precision in which the IoU is the lesser of mask IoU and boundary IoU."""

    def process(self, example: Example, result: Result) -> None:
        """Count one image (see `Evaluator.process`)."""
        before = len(self.truth), len(self.results)
        super().process(example, result)
        width = boundary_width(example.size)
        for annotation in (*self.truth[before[0] :], *self.results[before[1] :]):
            annotation["boundary"] = _boundary_rle(annotation["segmentation"], width)

    def evaluate(self) -> dict[str, Any]:
        """Keys: those of `InstanceEvaluator.evaluate` with ``boundary_`` before them."""
        return {f"per_class_boundary_{key.removeprefix('per_class_')}" if key.startswith("per_class_")
                else f"boundary_{key}": value for key, value in super().evaluate().items()}

    def _evaluation(self) -> Any:
        tools, evaluation = coco_tools(), super()._evaluation()
        iou_of_masks = evaluation.computeIoU

        def lesser_iou(image: int, category: int) -> Any:
            """IoU of results, best scores first, and truth of an image and class."""
            of_masks = iou_of_masks(image, category)
            if len(of_masks) == 0:
                return of_masks
            truth, results = evaluation._gts[image, category], evaluation._dts[image, category]
            order = np.argsort([-result["score"] for result in results], kind="mergesort")
            results = [results[index] for index in order[: evaluation.params.maxDets[-1]]]
            of_boundaries = tools.mask.iou(
                [result["boundary"] for result in results], [segment["boundary"] for segment in truth],
                [int(segment["iscrowd"]) for segment in truth],
            )  # fmt: skip
            return np.minimum(of_masks, of_boundaries)

        evaluation.computeIoU = lesser_iou
        return evaluation


def _boundary_rle(rle: dict[str, Any], width: int) -> dict[str, Any]:
    """Boundary of a mask, both in COCO's run-length encoding. Only the mask's box is looked at."""
    tools = coco_tools()
    mask = tools.mask.decode(rle).astype(bool)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows):
        # Beyond its box the mask has no pixels, so that a box with no pixel around it gives the same boundary.
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        mask[box] &= ~interior(mask[box], width)
    return cast("dict[str, Any]", tools.mask.encode(np.asfortranarray(mask.astype(np.uint8))))
