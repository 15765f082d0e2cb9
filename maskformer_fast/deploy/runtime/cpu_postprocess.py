"""Post-processing of one image's logits on the CPU, by the C++ operators that PyTorch calls too.

It does the work of `inference.postprocess` in its ``direct`` order without torch: the same selection of queries and the
same operators. Equal logits give equal results, though softmax may round the last bit differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension
from maskformer_fast.core.metadata import VOID, segments_of_rows
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from maskformer_fast.deploy.bundle.manifest import Postprocess
from maskformer_fast.deploy.runtime.ranking import QueryMasks, Size, best_instances, best_pairs, softmax


class ImageLogits(NamedTuple):
    """Logits of one image, and the sizes that its result needs."""

    class_logits: np.ndarray  # [Q, K+1] float32, "no object" last
    mask_logits: np.ndarray  # [Q, h, w] float32
    extent: tuple[float, float]  # height and width of the image in mask pixels
    size: Size  # height, width of the result


class CpuPostprocessor:
    """Post-processing of any task with the settings of a bundle, on at most ``threads`` threads."""

    def __init__(self, settings: Postprocess, is_thing: Sequence[bool], threads: int) -> None:
        """Load the extension. Raises ``ImportError`` with the command that builds it where it is missing."""
        self._operators = load_extension()
        self._settings = settings
        self._is_thing = np.array(is_thing, dtype=np.bool_)
        self._threads = threads

    def __call__(self, logits: ImageLogits, task: Task) -> Result:
        """Result of one image. Raises ``ValueError`` for logits of contradicting shapes or of another type."""
        for name, values in zip(logits._fields[:2], logits[:2], strict=True):
            check(values.dtype == np.float32, name, "float32", str(values.dtype))
        check(logits.class_logits.ndim == 2, "class_logits", "[Q, K+1]", logits.class_logits.shape)
        queries, classes = logits.class_logits.shape
        check(classes == len(self._is_thing) + 1, "class_logits", f"[Q, {len(self._is_thing) + 1}]", (queries, classes))
        check(logits.mask_logits.ndim == 3 and len(logits.mask_logits) == queries, "mask_logits", f"[{queries}, h, w]",
              logits.mask_logits.shape)
        if task == "semantic":
            return self._semantic(logits)
        return self._panoptic(logits) if task == "panoptic" else self._instances(logits)

    def _semantic(self, logits: ImageLogits) -> SemanticResult:
        masks = np.ascontiguousarray(logits.mask_logits, dtype=np.float32)
        classes = np.ascontiguousarray(logits.class_logits, dtype=np.float32)
        labels = np.empty(logits.size, dtype=label_dtype(len(self._is_thing)))
        self._operators.semantic_inference(
            address_of(masks, "mask_logits", "float32", logits.mask_logits.shape),
            "float32",
            (1, *masks.shape),
            (masks.size, *_strides(masks)),
            address_of(classes, "class_logits", "float32", (len(masks), len(self._is_thing) + 1)),
            "float32",
            len(self._is_thing),
            (classes.size, *_strides(classes)),
            logits.extent,
            logits.size,
            address_of(labels, "labels", dtype_name(labels), logits.size),
            0,
            0,
            "auto",
            self._threads,
        )
        return SemanticResult(labels)

    def _panoptic(self, logits: ImageLogits) -> PanopticResult:
        """Do as `postprocess.panoptic`: queries with a probable object compete for the pixels."""
        probabilities = softmax(logits.class_logits)
        scores, categories = probabilities.max(-1), probabilities.argmax(-1)
        is_kept = (categories < len(self._is_thing)) & (scores > self._settings.object_mask_threshold)
        kept = np.flatnonzero(is_kept)  # NaN is not above any threshold
        scores, categories = scores[kept], categories[kept].astype(np.int64)
        masks = _masks(logits, kept)
        id_map = np.full(logits.size, VOID, dtype=np.int32)
        ids, areas = np.empty(len(kept), dtype=np.int32), np.empty(len(kept), dtype=np.int64)
        self._operators.panoptic_inference(
            address_of(masks, "masks", "float32", (len(kept), *logits.mask_logits.shape[1:])),
            (1, *masks.shape),
            (masks.size, *_strides(masks)[:2]),
            logits.extent,
            logits.size,
            address_of(scores, "scores", "float32", kept.shape),
            address_of(categories, "categories", "int64", kept.shape),
            address_of(self._is_thing, "is_thing", "bool", self._is_thing.shape),
            len(self._is_thing),
            self._settings.overlap_threshold,
            self._settings.panoptic_rule,
            address_of(id_map, "id_map", "int32", logits.size),
            address_of(ids, "ids", "int32", kept.shape),
            address_of(areas, "areas", "int64", kept.shape),
            self._threads,
        )
        rows = zip(ids.tolist(), categories.tolist(), areas.tolist(), scores.tolist(), strict=True)
        return PanopticResult(id_map, segments_of_rows(rows, self._is_thing.tolist()))

    def _instances(self, logits: ImageLogits) -> InstanceResult:
        """Do as `postprocess.instances`: the best pairs of query and thing class, without those of an empty mask."""
        pairs = best_pairs(logits.class_logits, self._is_thing, self._settings.top_k)
        used, slots = np.unique(pairs.queries, return_inverse=True)
        masks = _masks(logits, used)
        height, width = logits.size
        packed = np.empty((len(used), height, (width + 7) // 8), dtype=np.uint8)
        areas, boxes = np.empty(len(used), dtype=np.int64), np.empty((len(used), 4), dtype=np.float32)
        mask_scores = np.empty(len(used), dtype=np.float32)
        self._operators.instance_inference(
            address_of(masks, "masks", "float32", (*used.shape, *logits.mask_logits.shape[1:])),
            (1, *masks.shape),
            (masks.size, *_strides(masks)[:2]),
            logits.extent,
            logits.size,
            address_of(packed, "packed", "uint8", (*used.shape, height, (width + 7) // 8)),
            address_of(areas, "areas", "int64", used.shape),
            address_of(boxes, "boxes", "float32", (*used.shape, 4)),
            address_of(mask_scores, "scores", "float32", used.shape),
            self._threads,
        )
        return best_instances(pairs, slots, QueryMasks(packed, boxes, areas, mask_scores), logits.size)


def label_dtype(num_classes: int) -> type[np.uint8] | type[np.int16]:
    """dtype of a label map of K classes: uint8 up to 255, int16 up to 32767. Raises ``ValueError`` for more."""
    check(1 <= num_classes <= 32767, "number of classes", "1..32767", num_classes)
    return np.uint8 if num_classes <= 255 else np.int16


def _masks(logits: ImageLogits, queries: np.ndarray) -> np.ndarray:
    """Mask logits of some queries -> C-contiguous float32 [N, h, w]."""
    return np.ascontiguousarray(logits.mask_logits[queries], dtype=np.float32)


def _strides(array: np.ndarray) -> tuple[int, ...]:
    """Strides in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)
