"""Semantic segmentation: mean IoU and its companions from one confusion matrix."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import Result, SemanticResult
from maskformer_fast.evaluation.common import Evaluator, check_merge, check_truth, class_keys, expect_result, where
from maskformer_fast.structures import Example

__all__ = ["SemanticEvaluator"]


class SemanticEvaluator:
    """mIoU, mean accuracy, pixel accuracy and frequency-weighted IoU over all pixels of all images.

    Pixels whose truth is `VOID` are left out. mIoU is the mean over the classes with a pixel in truth or prediction;
    mean accuracy is the mean over the classes with a pixel in the truth (Long et al., "Fully Convolutional Networks for
    Semantic Segmentation", section 5).
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        k = self.metadata.num_classes
        self.confusion = np.zeros((k, k), dtype=np.int64)  # [truth, prediction]

    def process(self, example: Example, result: Result) -> None:
        """Count one image (see `Evaluator.process`); the result is a `SemanticResult`, every label a class."""
        k = self.metadata.num_classes
        labels = expect_result(example, result, SemanticResult).labels.numpy()
        check_truth(example, k)
        if labels.dtype.kind not in "iu":
            raise TypeError(f"result.labels: expected integers, got {labels.dtype}")
        if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < k:
            raise ValueError(f"result.labels: expected classes in 0..{k - 1}, got {int(labels.min())}.."
                             f"{int(labels.max())} ({where(example)})")
        # Void is row 0 of the count and is dropped: cheaper than selecting the other pixels.
        cells = (example.semantic_map().astype(np.intp) + 1) * k + labels
        self.confusion += np.bincount(cells.ravel(), minlength=(k + 1) * k).reshape(k + 1, k)[1:]

    def merge(self, other: Evaluator) -> None:
        """Add another evaluator's images (see `Evaluator.merge`)."""
        check_merge(self, other)
        self.confusion += cast(SemanticEvaluator, other).confusion

    def evaluate(self) -> dict[str, Any]:
        """Keys: miou, mean_accuracy, pixel_accuracy, fwiou, per_class_iou (by name); ``None`` where undefined."""
        hits = np.diag(self.confusion)
        truth = self.confusion.sum(1)
        union = truth + self.confusion.sum(0) - hits
        total = int(truth.sum())
        iou = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
        names = class_keys(self.metadata)
        metrics: dict[str, Any] = dict.fromkeys(("miou", "mean_accuracy", "pixel_accuracy", "fwiou"))
        if total:
            present = truth > 0
            metrics["miou"] = float(np.nanmean(iou))
            metrics["mean_accuracy"] = float((hits[present] / truth[present]).mean())
            metrics["pixel_accuracy"] = int(hits.sum()) / total
            metrics["fwiou"] = float((truth[present] * iou[present]).sum() / total)
        metrics["per_class_iou"] = {
            name: None if np.isnan(value) else float(value) for name, value in zip(names, iou, strict=True)
        }
        return metrics
