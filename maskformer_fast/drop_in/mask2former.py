"""Post-processing with the signatures and results of transformers' Mask2FormerImageProcessor.

It differs from MaskFormer's in one step: mask logits are first resized to 384x384, whatever the image's size. Arguments
that are not explained here are those of `maskformer_fast.drop_in.maskformer`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from maskformer_fast.core.results import InstanceResult
from maskformer_fast.drop_in.maskformer import (
    Sizes,
    instances_by_grid,
    packed_by_grid,
    panoptic_by_grid,
    semantic_by_grid,
)
from maskformer_fast.drop_in.outputs import Exact

GRID = (384, 384)
"""Height and width to which the processor resizes all mask logits."""


def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sizes = None,
    return_segmentation_scores: bool = False,
    *,
    exact: Exact = "huggingface",
    input_sizes: Sizes = None,
) -> list[Any]:
    """Class of every pixel -> one [H, W] int64 tensor an image; 384x384 without `target_sizes`."""
    return semantic_by_grid(
        outputs, GRID, target_sizes, return_segmentation_scores, exact=exact, input_sizes=input_sizes
    )


def post_process_instance_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Sizes = None,
    return_coco_annotation: bool | None = False,
    return_binary_maps: bool | None = False,
    *,
    exact: Exact = "huggingface",
    input_sizes: Sizes = None,
) -> list[dict[str, Any]]:
    """Instances of each image -> ``{"segmentation", "segments_info"}``; 384x384 without `target_sizes`."""
    return instances_by_grid(
        outputs, GRID, threshold, target_sizes, bool(return_coco_annotation), bool(return_binary_maps), exact,
        input_sizes,
    )  # fmt: skip


def post_process_panoptic_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    target_sizes: Sizes = None,
    *,
    exact: Exact = "huggingface",
    input_sizes: Sizes = None,
) -> list[dict[str, Any]]:
    """Segments of each image -> ``{"segmentation": [H, W] int32, "segments_info"}``; 384x384 without `target_sizes`."""
    return panoptic_by_grid(
        outputs, GRID, threshold, mask_threshold, overlap_mask_area_threshold, label_ids_to_fuse, target_sizes,
        exact, input_sizes, "mask2former",
    )  # fmt: skip


def instance_results(
    outputs: Any,
    threshold: float = 0.5,
    target_sizes: Sizes = None,
    *,
    exact: Exact = "huggingface",
    input_sizes: Sizes = None,
) -> list[InstanceResult[Tensor]]:
    """Instances of `post_process_instance_segmentation` with packed masks, which may overlap, and boxes."""
    return packed_by_grid(outputs, GRID, threshold, target_sizes, exact, input_sizes)
