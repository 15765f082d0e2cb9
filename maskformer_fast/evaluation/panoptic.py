"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4) by the COCO rules."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import PanopticResult, Result
from maskformer_fast.evaluation.common import Evaluator, check_merge, check_truth, class_keys, expect_result, where
from maskformer_fast.output.id_maps import result_rows, segment_rows
from maskformer_fast.structures import Example

__all__ = ["PanopticEvaluator"]


class PanopticEvaluator:
    """PQ, SQ and RQ over all classes, things, stuff, and of each class.

    - A true and a predicted segment of one class match if their IoU, without the truth's void pixels in the union, is
      above 0.5; such matches are unique.
    - Crowd segments of the truth match nothing and are not missed.
    - An unmatched prediction with more than half of its pixels on void, or on crowds of its class, is no error.
    - Means are over the classes with a match or an error.

    Pixels of the truth whose id is not listed are void; a listed true segment without pixels is no segment.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        k = self.metadata.num_classes
        # IoUs are kept and summed at the end, so that their order, and with it the rounding, is that of the images,
        # however many evaluators shared them.
        self.matched: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]  # class of each match
        self.ious: list[np.ndarray] = [np.zeros(0)]
        self.tp, self.fp, self.fn = (np.zeros(k, dtype=np.int64) for _ in range(3))

    def process(self, example: Example, result: Result) -> None:
        """Count one image (see `Evaluator.process`); the truth is an id map, the result a `PanopticResult`.

        Raises:
            TypeError, ValueError: as `Evaluator.process`; or the result's ids and its list of segments disagree, or
                the truth has overlapping masks.
        """
        k = self.metadata.num_classes
        predicted = expect_result(example, result, PanopticResult)
        check_truth(example, k)
        if example.id_map is None:
            raise ValueError(f"example: expected truth without overlap (id_map) for panoptic quality, got masks "
                             f"({where(example)})")
        try:
            rows = result_rows(predicted)
        except ValueError as error:
            raise ValueError(f"result: {error} ({where(example)})") from error
        classes = np.array([segment.category for segment in predicted.segments], dtype=np.int64)
        if classes.size and not 0 <= classes.min() <= classes.max() < k:
            raise ValueError(f"result.segments: expected categories in 0..{k - 1}, got {classes.min()}.."
                             f"{classes.max()} ({where(example)})")
        true_classes = np.array([segment.category for segment in example.segments], dtype=np.int64)
        crowd = np.array([segment.is_crowd for segment in example.segments], dtype=bool)

        shape = len(true_classes) + 1, len(classes) + 1
        cells = (segment_rows(example.id_map, example.segments) + 1) * np.int32(shape[1]) + (rows + 1)
        overlap = np.bincount(cells.ravel(), minlength=shape[0] * shape[1]).reshape(shape)  # row, column 0: void
        both = overlap[1:, 1:]
        true_area, area = overlap[1:].sum(1), overlap[:, 1:].sum(0)
        union = true_area[:, None] + area - both - overlap[0, 1:]
        same_class = true_classes[:, None] == classes
        match = same_class & ~crowd[:, None] & (2 * both > union)

        true_index, index = np.nonzero(match)
        self.matched.append(classes[index])
        self.ious.append(both[true_index, index] / union[true_index, index])
        self.tp += np.bincount(classes[index], minlength=k)
        missed = ~match.any(1) & ~crowd & (true_area > 0)
        self.fn += np.bincount(true_classes[missed], minlength=k)
        excused = overlap[0, 1:] + (both * (same_class & crowd[:, None])).sum(0)
        wrong = ~match.any(0) & (2 * excused <= area)
        self.fp += np.bincount(classes[wrong], minlength=k)

    def merge(self, other: Evaluator) -> None:
        """Add another evaluator's images (see `Evaluator.merge`)."""
        check_merge(self, other)
        other = cast(PanopticEvaluator, other)
        self.matched += other.matched
        self.ious += other.ious
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn

    def evaluate(self) -> dict[str, Any]:
        """Keys: pq, sq, rq, each also with _things and _stuff, and per_class_pq, _sq, _rq (by name).

        ``None`` where no class has a match or an error.
        """
        weight = self.tp + 0.5 * self.fp + 0.5 * self.fn
        counted = weight > 0
        iou_sum = np.bincount(np.concatenate(self.matched), np.concatenate(self.ious), minlength=len(weight))
        nan = np.full(len(weight), np.nan)
        values = {
            "pq": np.divide(iou_sum, weight, out=nan.copy(), where=counted),
            "sq": np.where(counted, iou_sum / np.maximum(self.tp, 1), nan),
            "rq": np.divide(self.tp, weight, out=nan.copy(), where=counted),
        }
        things = np.array(self.metadata.is_thing, dtype=bool)
        metrics: dict[str, Any] = {}
        for suffix, group in (("", np.ones_like(things)), ("_things", things), ("_stuff", ~things)):
            chosen = group & counted
            for key, value in values.items():
                metrics[key + suffix] = float(value[chosen].mean()) if chosen.any() else None
        names = class_keys(self.metadata)
        for key, value in values.items():
            metrics[f"per_class_{key}"] = {
                name: float(v) if c else None for name, v, c in zip(names, value, counted, strict=True)
            }
        return metrics
