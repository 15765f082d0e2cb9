"""Predictions of one image as NumPy arrays -> a result, by the C++ operators that PyTorch calls on the CPU.

The counterpart of `inference.postprocess` in its ``direct`` order, without torch: the same selection of queries,
the same operators, so results are equal where the logits are (softmax may round the last bit differently).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension
from maskformer_fast.core.metadata import VOID, segments_of_rows
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from maskformer_fast.deploy.bundle.manifest import Postprocess
from maskformer_fast.deploy.runtime.ranking import QueryMasks, Size, best_instances, best_pairs, softmax


class Maps(NamedTuple):
    """What the network says of one image."""

    class_logits: np.ndarray  # [Q, K+1] float32, "no object" last
    mask_logits: np.ndarray  # [Q, h, w] float32
    extent: tuple[float, float]  # height and width of the image in mask pixels
    size: Size  # height, width of the result


class HostPostprocessor:
    """Results of any task by the thresholds of a bundle, on at most ``threads`` threads."""

    def __init__(self, settings: Postprocess, is_thing: Sequence[bool], threads: int) -> None:
        """Raises ``ImportError``, with the command that builds it, where the extension is missing."""
        self._operators = load_extension()
        self._settings = settings
        self._is_thing = np.array(is_thing, dtype=np.bool_)
        self._threads = threads

    def __call__(self, maps: Maps, task: Task) -> Result:
        """Result of one image. Raises ``ValueError`` for maps that do not fit each other or the classes."""
        queries, classes = maps.class_logits.shape
        check(classes == len(self._is_thing) + 1, "class_logits", f"[Q, {len(self._is_thing) + 1}]", (queries, classes))
        check(maps.mask_logits.ndim == 3 and len(maps.mask_logits) == queries, "mask_logits", f"[{queries}, h, w]",
              maps.mask_logits.shape)
        if task == "semantic":
            return self._semantic(maps)
        return self._panoptic(maps) if task == "panoptic" else self._instances(maps)

    def _semantic(self, maps: Maps) -> SemanticResult:
        masks = np.ascontiguousarray(maps.mask_logits, dtype=np.float32)
        classes = np.ascontiguousarray(maps.class_logits, dtype=np.float32)
        labels = np.empty(maps.size, dtype=label_dtype(len(self._is_thing)))
        self._operators.semantic_inference(
            masks.ctypes.data,
            "float32",
            (1, *masks.shape),
            (masks.size, *_strides(masks)),
            classes.ctypes.data,
            "float32",
            len(self._is_thing),
            (classes.size, *_strides(classes)),
            maps.extent,
            maps.size,
            labels.ctypes.data,
            0,
            0,
            "auto",
            self._threads,
        )
        return SemanticResult(labels)

    def _panoptic(self, maps: Maps) -> PanopticResult:
        """As `postprocess.panoptic`: queries that are sure of an object compete for the pixels."""
        probabilities = softmax(maps.class_logits)
        scores, categories = probabilities.max(-1), probabilities.argmax(-1)
        wanted = (categories < len(self._is_thing)) & (scores > self._settings.object_mask_threshold)
        kept = np.flatnonzero(wanted)  # NaN is not above any threshold
        scores, categories = scores[kept], categories[kept].astype(np.int64)
        masks = _masks(maps, kept)
        id_map = np.full(maps.size, VOID, dtype=np.int32)
        ids, areas = np.empty(len(kept), dtype=np.int32), np.empty(len(kept), dtype=np.int64)
        self._operators.panoptic_inference(
            masks.ctypes.data,
            (1, *masks.shape),
            (masks.size, *_strides(masks)[:2]),
            maps.extent,
            maps.size,
            scores.ctypes.data,
            categories.ctypes.data,
            self._is_thing.ctypes.data,
            len(self._is_thing),
            self._settings.overlap_threshold,
            self._settings.panoptic_rule,
            id_map.ctypes.data,
            ids.ctypes.data,
            areas.ctypes.data,
            self._threads,
        )
        rows = zip(ids.tolist(), categories.tolist(), areas.tolist(), scores.tolist(), strict=True)
        return PanopticResult(id_map, segments_of_rows(rows, self._is_thing.tolist()))

    def _instances(self, maps: Maps) -> InstanceResult:
        """As `postprocess.instances`: the best pairs of query and thing class, less those with an empty mask."""
        pairs = best_pairs(maps.class_logits, self._is_thing, self._settings.top_k)
        used, slots = np.unique(pairs.queries, return_inverse=True)
        masks = _masks(maps, used)
        height, width = maps.size
        packed = np.empty((len(used), height, (width + 7) // 8), dtype=np.uint8)
        areas, boxes = np.empty(len(used), dtype=np.int64), np.empty((len(used), 4), dtype=np.float32)
        mask_scores = np.empty(len(used), dtype=np.float32)
        self._operators.instance_inference(
            masks.ctypes.data,
            (1, *masks.shape),
            (masks.size, *_strides(masks)[:2]),
            maps.extent,
            maps.size,
            packed.ctypes.data,
            areas.ctypes.data,
            boxes.ctypes.data,
            mask_scores.ctypes.data,
            self._threads,
        )
        return best_instances(pairs, slots, QueryMasks(packed, boxes, areas, mask_scores), maps.size)


def label_dtype(num_classes: int) -> type[np.uint8] | type[np.int16]:
    """dtype of a label map of K classes: uint8 up to 255, int16 up to 32767, else ``ValueError``."""
    check(1 <= num_classes <= 32767, "number of classes", "1..32767", num_classes)
    return np.uint8 if num_classes <= 255 else np.int16


def _masks(maps: Maps, queries: np.ndarray) -> np.ndarray:
    """Mask logits of some queries, rows of adjacent values -> float32 [N, h, w]."""
    return np.ascontiguousarray(maps.mask_logits[queries], dtype=np.float32)


def _strides(array: np.ndarray) -> tuple[int, ...]:
    """In elements."""
    return tuple(stride // array.itemsize for stride in array.strides)
