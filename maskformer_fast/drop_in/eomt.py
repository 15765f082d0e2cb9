"""Post-processing with the signatures and results of transformers' EomtImageProcessor, which EoMT-DINOv3 shares.

Mask logits are first resized to the network's input, cropped to the image and resized to the target.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.core.results import InstanceResult
from maskformer_fast.drop_in.instances import Pairs, painted_map, resampled_instances
from maskformer_fast.drop_in.outputs import Size, image_sizes, read_logits
from maskformer_fast.drop_in.panoptic import best_classes, count_winners, empty_result, stuff_segments
from maskformer_fast.drop_in.semantic import class_probabilities, scored_map, semantic_maps
from maskformer_fast.ops.resized_semantic import windowed_scores, windowed_semantic_inference

DEFAULT_SIZE = {"shortest_edge": 640, "longest_edge": 640}
"""Size of the network's input where none is given, as that of the processor."""
TargetSizes = Sequence[Sequence[int]] | Tensor


@torch.no_grad()
def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: TargetSizes,
    size: Mapping[str, Any] | None = None,
    return_segmentation_scores: bool = False,
) -> list[Any]:
    """Class of every pixel -> one [H, W] int64 tensor an image.

    Args:
        outputs: has class_queries_logits [B, Q, K+1], masks_queries_logits [B, Q, h, w], and patch_offsets: image,
            first and last pixel of each patch along the longer side, or None where the batch has complete images.
        target_sizes: height and width of each result.
        size: the processor's, with ``shortest_edge`` and ``longest_edge``; 640x640 by default.
        return_segmentation_scores: return transformers' objects with ``segmentation`` and ``segmentation_scores``.
    """
    classes, masks = read_logits(outputs)
    edges = DEFAULT_SIZE if size is None else size
    grid = _input_size(edges)
    offsets = getattr(outputs, "patch_offsets", None)
    if not offsets:
        sizes = image_sizes("target_sizes", target_sizes, len(masks), grid)
        return semantic_maps(classes, masks, grid, [grid] * len(masks), sizes, return_segmentation_scores)
    sizes = image_sizes("target_sizes", target_sizes, len(target_sizes), grid)
    results = []
    for image, target in enumerate(sizes):
        patches = [number for number, offset in enumerate(offsets) if int(offset[0]) == image]
        starts = [int(offsets[number][1]) for number in patches]
        parts = (classes[patches], masks[patches], grid, starts, target, edges)
        results.append(_merged_map(*parts, return_segmentation_scores))
    return results


@torch.no_grad()
def post_process_panoptic_segmentation(
    outputs: Any,
    target_sizes: TargetSizes,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    stuff_classes: Collection[int] | None = None,
    size: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Segments of each image -> ``{"segmentation": [H, W] int64, "segments_info"}``, -1 where none is.

    Args:
        target_sizes: height and width of each result.
        threshold: queries take part whose best class has a probability above it.
        mask_threshold: least mask probability of the pixels that a query owns.
        overlap_mask_area_threshold: the pixels that a query wins must be more than this share of those that it owns.
        stuff_classes: classes whose segments are merged; the merged ones are listed once.
        size: as in `post_process_semantic_segmentation`.
    """
    classes, masks = read_logits(outputs)
    edges = DEFAULT_SIZE if size is None else size
    grid = _input_size(edges)
    results = []
    for image, target in enumerate(image_sizes("target_sizes", target_sizes, len(masks), grid)):
        candidates = best_classes(classes[image], masks[image], threshold)
        if len(candidates.labels) == 0:
            results.append(empty_result(target))
            continue
        winners = count_winners(candidates, grid, _window(target, edges, grid), target, mask_threshold, "sigmoids")
        results.append(stuff_segments(winners, candidates, overlap_mask_area_threshold, stuff_classes))
    return results


def post_process_instance_segmentation(
    outputs: Any,
    target_sizes: TargetSizes,
    threshold: float = 0.8,
    size: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Instances of each image -> ``{"segmentation": [H, W] float32, "segments_info"}``.

    The map has an instance's id, counted from 0 and painted in the order of queries, or -1. `threshold` is the least
    score of an instance; the other arguments are those of `post_process_panoptic_segmentation`.
    """
    return [painted_map(result, False) for result in instance_results(outputs, target_sizes, threshold, size)]


@torch.no_grad()
def instance_results(
    outputs: Any,
    target_sizes: TargetSizes,
    threshold: float = 0.8,
    size: Mapping[str, Any] | None = None,
) -> list[InstanceResult[Tensor]]:
    """Instances of `post_process_instance_segmentation` with packed masks, which may overlap, and boxes."""
    classes, masks = read_logits(outputs)
    edges = DEFAULT_SIZE if size is None else size
    grid = _input_size(edges)
    scores, labels = class_probabilities(classes).max(-1)
    queries = torch.arange(masks.shape[1], device=masks.device)
    return [
        resampled_instances(
            Pairs(queries, labels[image], scores[image]), masks[image], grid, _window(target, edges, grid), target,
            threshold,
        )
        for image, target in enumerate(image_sizes("target_sizes", target_sizes, len(masks), grid))
    ]  # fmt: skip


def _input_size(edges: Mapping[str, Any]) -> Size:
    return int(edges["shortest_edge"]), int(edges["longest_edge"] or edges["shortest_edge"])


def _window(target: Size, edges: Mapping[str, Any], grid: Size) -> Size:
    height, width = _resized_size(target, edges)
    return min(height, grid[0]), min(width, grid[1])


def _resized_size(image: Size, edges: Mapping[str, Any]) -> Size:
    """Size that the processor resizes an image to: by its shorter side, unless the longer would be too long."""
    short, longest = int(edges["shortest_edge"]), edges["longest_edge"]
    low, high = min(image), max(image)
    exact_short: float = short
    if longest is not None and high / low * short > longest:
        exact_short = int(longest) * low / high
        short = round(exact_short)
    if low == short:
        return image
    long_side = int(exact_short * high / low)
    return (long_side, short) if image[1] < image[0] else (short, long_side)


def _merged_map(
    classes: Tensor,  # [P, Q, K+1] floating, of an image's patches
    masks: Tensor,  # [P, Q, h, w] floating
    grid: Size,
    starts: list[int],  # first pixel of each patch along the longer side
    target: Size,
    edges: Mapping[str, Any],
    with_scores: bool,
) -> Any:
    """Result of one image, by the mean scores of the patches that cover each of its points."""
    down = target[0] > target[1]
    origins = [(start, 0) if down else (0, start) for start in starts]
    windows = (masks, class_probabilities(classes), origins, grid, _resized_size(target, edges))
    if with_scores:
        return scored_map(windowed_scores(*windows), target)
    return windowed_semantic_inference(*windows, target)
