"""Instance segmentation: COCO average precision of masks, computed by pycocotools in memory."""

from __future__ import annotations

import contextlib
import io
from typing import Any, cast

import numpy as np

from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult, Result
from maskformer_fast.evaluation.common import Evaluator, check_merge, check_truth, class_keys, expect_result, where
from maskformer_fast.ops.rle import encode_masks, encode_packed_masks
from maskformer_fast.structures import Example

__all__ = ["InstanceEvaluator"]

_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # order of COCOeval.stats


class InstanceEvaluator:
    """AP over IoU 0.50:0.95, AP50, AP75, AP by object size (32^2 and 96^2 pixels), and AP of each thing class.

    As in COCO, at most 100 results an image and class count; crowds of the truth and results on them are ignored.
    An object's size is its segment's ``area`` if the data set gives one, else its number of pixels.

    Raises:
        ModuleNotFoundError: pycocotools is missing.
    """

    def __init__(self, metadata: Metadata) -> None:
        coco_tools()  # fail before the first image, not after the last
        self.metadata = metadata
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self.sizes: list[tuple[int, int]] = []  # of each image; image i has id i + 1
        self.truth: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []

    def process(self, example: Example, result: Result) -> None:
        """Count one image (see `Evaluator.process`); the result is an `InstanceResult` of thing classes."""
        is_thing = self.metadata.is_thing
        predicted = expect_result(example, result, InstanceResult)
        check_truth(example, self.metadata.num_classes)
        labels, scores = predicted.labels.tolist(), predicted.scores.float().tolist()
        if len(labels) != len(scores) or len(labels) != len(predicted.masks):
            raise ValueError(f"result: expected as many labels as scores and masks, got {len(labels)}, {len(scores)} "
                             f"and {len(predicted.masks)} ({where(example)})")
        for label in labels:
            if not (0 <= label < len(is_thing) and is_thing[label]):
                raise ValueError(f"result.labels: expected thing classes, got {label} ({where(example)})")
        if not np.isfinite(scores).all():
            raise ValueError(f"result.scores: expected finite numbers, got NaN or infinity ({where(example)})")

        things = [segment for segment in example.segments if is_thing[segment.category]]
        true_masks = encode_masks(example.segment_masks(things)) if things else []
        masks = encode_packed_masks(predicted.masks.numpy(), example.size[1]) if labels else []
        self.sizes.append(example.size)
        image_id, area = len(self.sizes), coco_tools().mask.area
        for segment, rle in zip(things, true_masks, strict=True):
            self.truth.append({"image_id": image_id, "category_id": segment.category, "segmentation": rle,
                               "area": segment.area or int(area(rle)), "iscrowd": int(segment.is_crowd)})
        for label, score, rle in zip(labels, scores, masks, strict=True):
            self.results.append({"image_id": image_id, "category_id": label, "segmentation": rle, "score": score,
                                 "area": int(area(rle)), "iscrowd": 0})

    def merge(self, other: Evaluator) -> None:
        """Add another evaluator's images (see `Evaluator.merge`)."""
        check_merge(self, other)
        other, before = cast(InstanceEvaluator, other), len(self.sizes)
        self.sizes += other.sizes
        for target, added in ((self.truth, other.truth), (self.results, other.results)):
            target += [{**annotation, "image_id": annotation["image_id"] + before} for annotation in added]

    def evaluate(self) -> dict[str, Any]:
        """Keys: ap, ap50, ap75, ap_small, ap_medium, ap_large, per_class_ap (thing classes by name).

        0 if the truth has objects and none is matched; ``None`` if the truth has no object.
        """
        things = [index for index, thing in enumerate(self.metadata.is_thing) if thing]
        names = class_keys(self.metadata)
        metrics: dict[str, Any] = dict.fromkeys(_STATS)
        metrics["per_class_ap"] = {names[index]: None for index in things}
        if not self.truth or not things:
            return metrics
        with contextlib.redirect_stdout(io.StringIO()):
            coco = self._evaluation()
            coco.params.catIds = things
            coco.evaluate()
            coco.accumulate()
            coco.summarize()
        metrics.update({key: _defined(value) for key, value in zip(_STATS, coco.stats, strict=False)})
        precision = coco.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]: all sizes, 100 results an image
        for column, index in enumerate(things):
            of_class = precision[:, :, column]
            metrics["per_class_ap"][names[index]] = _defined(of_class[of_class > -1].mean() if of_class.max() > -1
                                                             else -1.0)
        return metrics

    def _evaluation(self) -> Any:
        """Comparison of results with the truth by pycocotools, not yet run."""
        return coco_tools().cocoeval.COCOeval(self._coco(self.truth), self._coco(self.results), "segm")

    def _coco(self, annotations: list[dict[str, Any]]) -> Any:
        """The annotations as a data set of pycocotools. They are copied, as it writes into them."""
        coco = coco_tools().coco.COCO()
        coco.dataset = {
            "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(self.sizes, start=1)],
            "categories": [{"id": index} for index in range(self.metadata.num_classes)],
            # Ids start at 1: pycocotools reads 0 as "unmatched".
            "annotations": [{**annotation, "id": i} for i, annotation in enumerate(annotations, start=1)],
        }
        coco.createIndex()
        return coco


def _defined(value: float) -> float | None:
    """The value, or None for -1, by which pycocotools marks an undefined one."""
    return None if value < 0 else float(value)
