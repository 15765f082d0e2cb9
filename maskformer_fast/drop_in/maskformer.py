"""Post-processing with the signatures and results of transformers' MaskFormerImageProcessor.

Mask2Former and OneFormer share the functions that differ only in a grid. docs/drop_in.md lists each difference between
the processors and the official code.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.core.results import InstanceResult
from maskformer_fast.drop_in.instances import (
    best_pairs,
    instance_map,
    instance_result,
    painted_map,
    resampled_instances,
    scored_masks,
)
from maskformer_fast.drop_in.outputs import Exact, Size, check_exact, image_sizes, padded_input, read_logits
from maskformer_fast.drop_in.panoptic import (
    best_classes,
    count_winners,
    empty_result,
    fused_segments,
    official_segments,
)
from maskformer_fast.drop_in.semantic import semantic_maps
from maskformer_fast.inference_config import PanopticRule

Sizes = Sequence[Sequence[int]] | Tensor | None


def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sizes = None,
    return_segmentation_scores: bool = False,
    *,
    exact: Exact = "huggingface",
    input_sizes: Sizes = None,
) -> list[Any]:
    """Class of every pixel -> one [H, W] int64 tensor an image.

    Args:
        outputs: has class_queries_logits [B, Q, K+1] and masks_queries_logits [B, Q, h, w].
        target_sizes: height and width of each result; by default those of the mask logits (with ``exact="official"``
            of the image in the padded input).
        return_segmentation_scores: return transformers' objects with ``segmentation`` and ``segmentation_scores``
            [K, H, W].
        exact: ``huggingface`` resizes class scores from the mask logits' size. ``official`` resizes mask logits to the
            padded input, crops the scores to the image and resizes them.
        input_sizes: height and width of each image within the padded input, for ``official``; by default all of it.

    Raises:
        ValueError: an unknown `exact`, sizes of another number than images, `input_sizes` without ``official``.
    """
    return semantic_by_grid(
        outputs, None, target_sizes, return_segmentation_scores, exact=exact, input_sizes=input_sizes
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
    """Instances of each image -> ``{"segmentation", "segments_info"}``.

    The map [H, W] float32 has an instance's id, counted from 0 and painted in the order of `segments_info`, or -1.
    `mask_threshold` and `overlap_mask_area_threshold` have no effect, as in transformers.

    Args:
        threshold: least score of an instance.
        target_sizes: height and width of each result; by default those of the mask logits.
        return_coco_annotation: return run lengths of the map's values in transformers' own format, ascending.
        return_binary_maps: return masks [N, H, W] float32, where there are any.
        exact: ``huggingface`` takes masks at the mask logits' size and resizes them by nearest neighbours.
            ``official`` resizes the logits to the padded input, crops them and resizes them again.
        input_sizes: as in `post_process_semantic_segmentation`.

    Raises:
        ValueError: as in `post_process_semantic_segmentation`; both formats at once.
    """
    return instances_by_grid(
        outputs, None, threshold, target_sizes, bool(return_coco_annotation), bool(return_binary_maps), exact,
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
    """Segments of each image -> ``{"segmentation": [H, W] int32, "segments_info"}``.

    Args:
        threshold: queries take part whose best class has a probability above it.
        mask_threshold: least value (score times mask probability; ``official``: 0.5 of the mask probability, whatever
            this says) of the pixels that a query owns.
        overlap_mask_area_threshold: the pixels that a query wins must be more than this share of those that it owns.
        label_ids_to_fuse: classes whose segments are merged.
        target_sizes: height and width of each result; by default those of the mask logits.
        exact: ``huggingface`` resizes mask probabilities. ``official`` resizes logits to the padded input, crops them
            and resizes them again, and makes segments as the official code does.
        input_sizes: as in `post_process_semantic_segmentation`.

    Raises:
        ValueError: as in `post_process_semantic_segmentation`.
    """
    return panoptic_by_grid(
        outputs, None, threshold, mask_threshold, overlap_mask_area_threshold, label_ids_to_fuse, target_sizes,
        exact, input_sizes, "maskformer",
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
    return packed_by_grid(outputs, None, threshold, target_sizes, exact, input_sizes)


@torch.no_grad()
def semantic_by_grid(
    outputs: Any,
    grid: Size | None,
    target_sizes: Sizes,
    with_scores: bool,
    *,
    exact: Exact,
    input_sizes: Sizes,
) -> list[Any]:
    """`post_process_semantic_segmentation` of a processor that first resizes mask logits to a grid."""
    check_exact(exact, input_sizes)
    classes, masks = read_logits(outputs)
    grid = padded_input(masks) if exact == "official" else grid or (masks.shape[2], masks.shape[3])
    windows = image_sizes("input_sizes", input_sizes, len(masks), grid)
    sizes = windows if target_sizes is None else image_sizes("target_sizes", target_sizes, len(masks), grid)
    return semantic_maps(classes, masks, grid, windows, sizes, with_scores)


@torch.no_grad()
def packed_by_grid(
    outputs: Any,
    grid: Size | None,
    threshold: float,
    target_sizes: Sizes,
    exact: Exact,
    input_sizes: Sizes,
) -> list[InstanceResult[Tensor]]:
    """`instance_results` of a processor that first resizes mask logits to a grid."""
    check_exact(exact, input_sizes)
    classes, masks = read_logits(outputs)
    grid = padded_input(masks) if exact == "official" else grid or (masks.shape[2], masks.shape[3])
    windows = image_sizes("input_sizes", input_sizes, len(masks), grid)
    sizes = windows if target_sizes is None else image_sizes("target_sizes", target_sizes, len(masks), grid)
    if exact == "official":
        return [
            resampled_instances(best_pairs(c), m, grid, window, size, threshold)
            for c, m, window, size in zip(classes, masks, windows, sizes, strict=True)
        ]
    return [
        instance_result(scored_masks(best_pairs(c), m, grid, size, threshold), size)
        for c, m, size in zip(classes, masks, sizes, strict=True)
    ]


@torch.no_grad()
def instances_by_grid(
    outputs: Any,
    grid: Size | None,
    threshold: float,
    target_sizes: Sizes,
    return_coco_annotation: bool,
    return_binary_maps: bool,
    exact: Exact,
    input_sizes: Sizes,
) -> list[dict[str, Any]]:
    """`post_process_instance_segmentation` of a processor that first resizes mask logits to a grid."""
    formats = (return_coco_annotation, return_binary_maps)
    if exact == "official":
        results = packed_by_grid(outputs, grid, threshold, target_sizes, exact, input_sizes)
        return [painted_map(result, True, *formats) for result in results]
    check_exact(exact, input_sizes)
    classes, masks = read_logits(outputs)
    grid = grid or (masks.shape[2], masks.shape[3])
    sizes = image_sizes("target_sizes", target_sizes, len(masks), grid)
    return [
        instance_map(scored_masks(best_pairs(c), m, grid, size, threshold), size, *formats)
        for c, m, size in zip(classes, masks, sizes, strict=True)
    ]


@torch.no_grad()
def panoptic_by_grid(
    outputs: Any,
    grid: Size | None,
    threshold: float,
    mask_threshold: float,
    overlap_threshold: float,
    label_ids_to_fuse: Collection[int] | None,
    target_sizes: Sizes,
    exact: Exact,
    input_sizes: Sizes,
    rule: PanopticRule,
    antialias: bool = False,
) -> list[dict[str, Any]]:
    """`post_process_panoptic_segmentation` of a processor that first resizes mask logits to a grid."""
    check_exact(exact, input_sizes)
    classes, masks = read_logits(outputs)
    grid = padded_input(masks) if exact == "official" else grid or (masks.shape[2], masks.shape[3])
    windows = image_sizes("input_sizes", input_sizes, len(masks), grid)
    sizes = windows if target_sizes is None else image_sizes("target_sizes", target_sizes, len(masks), grid)
    fuse = frozenset() if label_ids_to_fuse is None else frozenset(label_ids_to_fuse)
    results = []
    for image, (window, size) in enumerate(zip(windows, sizes, strict=True)):
        candidates = best_classes(classes[image], masks[image], threshold)
        if len(candidates.labels) == 0:
            # without a target transformers takes the mask logits' size here, after a resize if there is one
            results.append(empty_result(size))
        elif exact == "official":
            num_classes = classes.shape[2] - 1
            results.append(official_segments(
                candidates, num_classes, grid, window, size, overlap_threshold, fuse, rule
            ))  # fmt: skip
        else:
            winners = count_winners(candidates, grid, window, size, mask_threshold, "probabilities", antialias)
            results.append(fused_segments(winners, candidates, overlap_threshold, fuse))
    return results
