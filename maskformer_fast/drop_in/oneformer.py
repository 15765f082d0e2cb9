"""Post-processing with the signatures and results of transformers' OneFormerImageProcessor.

Semantic and panoptic results are MaskFormer's, see `maskformer_fast.drop_in.maskformer`, but for outputs smaller than
the mask logits, which torchvision's resize antialiases. Instances are segments that do not overlap, made of mask logits
in place of probabilities.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from maskformer_fast.core.checks import check
from maskformer_fast.drop_in.instances import best_pairs
from maskformer_fast.drop_in.maskformer import Sizes, panoptic_by_grid, semantic_by_grid
from maskformer_fast.drop_in.outputs import Exact, image_sizes, read_logits, segment_map_runs
from maskformer_fast.drop_in.panoptic import Candidates, count_winners, empty_result, fused_segments
from maskformer_fast.drop_in.semantic import class_probabilities, scored_map
from maskformer_fast.ops.resized_semantic import grid_scores


@torch.no_grad()
def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sizes = None,
    return_segmentation_scores: bool = False,
    *,
    exact: Exact = "huggingface",
    input_sizes: Sizes = None,
    antialias: bool = True,
) -> list[Any]:
    """Class of every pixel -> one [H, W] int64 tensor an image; arguments as of MaskFormer.

    Args:
        antialias: resize to fewer rows or columns than the mask logits have with antialiasing, as the processor with
            torchvision does; the one with Pillow does not.
    """
    results = semantic_by_grid(
        outputs, None, target_sizes, return_segmentation_scores, exact=exact, input_sizes=input_sizes
    )
    classes, masks = read_logits(outputs)
    grid = (masks.shape[2], masks.shape[3])
    if not antialias or exact == "official" or masks.shape[1] == 0:
        return results
    for image, size in enumerate(image_sizes("target_sizes", target_sizes, len(masks), grid)):
        if size[0] < grid[0] or size[1] < grid[1]:
            scores = grid_scores(masks[image], class_probabilities(classes[image]), grid, grid)
            scores = F.interpolate(scores[None], size=size, mode="bilinear", antialias=True)[0]
            results[image] = scored_map(scores, size) if return_segmentation_scores else scores.argmax(0)
    return results


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
    """Segments of each image -> ``{"segmentation": [H, W] int32, "segments_info"}``; arguments as of MaskFormer."""
    return panoptic_by_grid(
        outputs, None, threshold, mask_threshold, overlap_mask_area_threshold, label_ids_to_fuse, target_sizes,
        exact, input_sizes, "mask2former", antialias=True,
    )  # fmt: skip


@torch.no_grad()
def post_process_instance_segmentation(
    outputs: Any,
    task_type: str = "instance",
    is_demo: bool = True,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Sizes = None,
    return_coco_annotation: bool | None = False,
    *,
    metadata: Mapping[str, Any] | None = None,
    class_info_file: str | None = None,
) -> list[dict[str, Any]]:
    """Instances of each image, which do not overlap -> ``{"segmentation": [H, W] int32, "segments_info"}``.

    Args:
        task_type: with ``panoptic`` only classes of things take part.
        is_demo: only pairs of query and class with a probability above the threshold take part.
        mask_threshold: least value (score times mask logit) of the pixels that a pair owns.
        target_sizes: height and width of each result; by default those of the mask logits.
        return_coco_annotation: return run lengths in transformers' own format, as lists of tensors.
        metadata: the processor's, whose "thing_ids" are the classes of things.
        class_info_file: the processor's; where it names ADE20K, labels of instances without `is_demo` become places
            in "thing_ids".

    Raises:
        ValueError: sizes of another number than images; `metadata` is needed and missing.
    """
    classes, masks = read_logits(outputs)
    ade20k = "ade20k" in (class_info_file or "") and not is_demo and "instance" in task_type
    needed = task_type == "panoptic" or ade20k
    check(not needed or metadata is not None, "metadata", "the processor's, which names the things", metadata)
    things = list(metadata["thing_ids"]) if metadata is not None and needed else []
    grid = (masks.shape[2], masks.shape[3])
    results = []
    for image, size in enumerate(image_sizes("target_sizes", target_sizes, len(masks), grid)):
        queries, labels, scores = best_pairs(classes[image])
        kept = scores > threshold if is_demo else torch.ones_like(scores, dtype=torch.bool)
        if task_type == "panoptic":
            kept &= torch.isin(labels, torch.tensor(things, dtype=labels.dtype, device=labels.device))
        if not kept.any():
            results.append(empty_result(size))
            continue
        if ade20k:
            labels = torch.tensor([things.index(label) for label in labels[kept].tolist()], device=labels.device)
        else:
            labels = labels[kept]
        candidates = Candidates(masks[image], queries[kept], scores[kept], labels)
        winners = count_winners(candidates, grid, grid, size, mask_threshold, "logits", antialias=True)
        result = fused_segments(winners, candidates, overlap_mask_area_threshold, ())
        if return_coco_annotation:
            result["segmentation"] = [list(runs) for runs in segment_map_runs(result["segmentation"])]
        results.append(result)
    return results
