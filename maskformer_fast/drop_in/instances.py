"""Instance results of transformers' processors: masks of scored pairs of query and class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.core.results import InstanceResult, unpack_mask_array
from maskformer_fast.drop_in.outputs import Size, segment_map_runs
from maskformer_fast.drop_in.semantic import class_probabilities
from maskformer_fast.ops.nearest_masks import nearest_masks, nearest_positions
from maskformer_fast.ops.segments import instance_inference
from maskformer_fast.structures import pack_masks, unpack_masks

CHUNK_VALUES = 1 << 20
"""Values of masks that are computed at a time."""
SCORE_ROUNDING = 1e-5
"""Relative error of a mean of mask probabilities: no class probability this far below the threshold can reach it."""


class Pairs(NamedTuple):
    """Pairs of query and class of one image, in the order in which the processor lists them."""

    queries: Tensor  # [P] int64
    labels: Tensor  # [P] int64
    scores: Tensor  # [P] float32


class ScoredMasks(NamedTuple):
    """Masks of the pairs that reach the threshold, at the grid's size."""

    masks: Tensor  # [N, h, ceil(w/8)] uint8, packed
    labels: Tensor  # [N] int64
    scores: Tensor  # [N] float32
    grid: Size


def best_pairs(
    class_logits: Tensor,  # [Q, K+1] floating
) -> Pairs:
    """As many best pairs of query and class as there are queries, in the order of torch's unsorted top-k."""
    probabilities = class_probabilities(class_logits)
    scores, index = probabilities.flatten().topk(len(probabilities), sorted=False)
    return Pairs(index // probabilities.shape[1], index % probabilities.shape[1], scores)


def _reaching(pairs: Pairs, threshold: float) -> Pairs:
    """Pairs whose class probability does not rule out that they reach the threshold."""
    kept = pairs.scores.to(torch.float64) >= threshold - abs(threshold) * SCORE_ROUNDING
    return Pairs(*(column[kept] for column in pairs))


def scored_masks(
    pairs: Pairs,
    mask_logits: Tensor,  # [Q, h, w] floating
    grid: Size,
    size: Size,
    threshold: float,
) -> ScoredMasks:
    """Masks (logit > 0) at the grid and scores, of pairs with a score of the threshold whose masks have pixels.

    The score is the class probability times the mean probability of the mask at the grid. Pixels are those that
    nearest neighbours read for the output.
    """
    pairs = _reaching(pairs, threshold)
    if len(pairs.queries) == 0:
        empty = mask_logits.new_empty((0, grid[0], (grid[1] + 7) // 8), dtype=torch.uint8)
        return ScoredMasks(empty, pairs.labels, pairs.scores, grid)
    logits = mask_logits[pairs.queries][None].to(torch.float32)
    found = instance_inference(logits, (logits.shape[2], logits.shape[3]), grid)
    scores = pairs.scores * found.scores[0]
    seen = (found.masks[0] & _read_pixels(grid, size, mask_logits.device)).flatten(1).amax(1) > 0
    kept = (scores.to(torch.float64) >= threshold) & seen
    return ScoredMasks(found.masks[0, kept], pairs.labels[kept], scores[kept], grid)


def _read_pixels(grid: Size, size: Size, device: torch.device) -> Tensor:
    """Pixels of a grid that nearest neighbours read -> [h, ceil(w/8)] uint8, packed."""
    down, across = (torch.zeros(side, dtype=torch.bool, device=device) for side in grid)
    for line, side in ((down, size[0]), (across, size[1])):
        line[nearest_positions(len(line), side, device)] = True
    return pack_masks(down[:, None] & across)


def instance_result(
    scored: ScoredMasks,
    size: Size,
) -> InstanceResult[Tensor]:
    """Packed masks at the output size, by nearest neighbours, with boxes."""
    return InstanceResult(scored.labels, scored.scores, *nearest_masks(scored.masks, scored.grid[1], size), size)


def _segments(labels: Tensor, scores: Tensor, fused: bool) -> list[dict[str, Any]]:
    flag = {"was_fused": False} if fused else {}
    pairs = zip(labels.tolist(), scores.tolist(), strict=True)
    return [{"id": i, "label_id": label, **flag, "score": round(score, 6)} for i, (label, score) in enumerate(pairs)]


def instance_map(
    scored: ScoredMasks,
    size: Size,
    return_coco_annotation: bool,
    return_binary_maps: bool,
) -> dict[str, Any]:
    """Result of MaskFormer's and Mask2Former's processors: a map in which later instances cover earlier ones."""
    check_formats(return_coco_annotation, return_binary_maps)
    segmentation: Any
    if return_binary_maps and len(scored.labels) > 0:
        masks = nearest_masks(scored.masks, scored.grid[1], size).masks
        segmentation = _unpacked(masks, size[1]).to(torch.float32)
    else:
        device = scored.masks.device
        rows, columns = (nearest_positions(g, s, device) for g, s in zip(scored.grid, size, strict=True))
        segmentation = _paint(scored.masks, scored.grid)[rows][:, columns]
        if return_coco_annotation:
            segmentation = [runs.tolist() for runs in segment_map_runs(segmentation)]
    return {"segmentation": segmentation, "segments_info": _segments(scored.labels, scored.scores, True)}


def resampled_instances(
    pairs: Pairs,
    mask_logits: Tensor,  # [Q, h, w] floating
    grid: Size,
    window: Size,
    size: Size,
    threshold: float,
) -> InstanceResult[Tensor]:
    """Instances whose logits are resized to the grid, cropped and resized to the output before they are masks.

    The score is the class probability times the mean probability of the mask in the output.
    """
    pairs = _reaching(pairs, threshold)
    logits = mask_logits[pairs.queries][None].to(torch.float32)
    if len(pairs.queries) == 0:
        empty = logits.new_empty((0, size[0], (size[1] + 7) // 8), dtype=torch.uint8)
        return InstanceResult(pairs.labels, pairs.scores, empty, logits.new_empty((0, 4)), size)
    if logits.shape[2:] != grid:
        logits = F.interpolate(logits, size=grid, mode="bilinear", align_corners=False)
    found = instance_inference(logits[..., : window[0], : window[1]], window, size)
    scores = pairs.scores * found.scores[0]
    kept = (scores.to(torch.float64) >= threshold) & (found.areas[0] > 0)
    return InstanceResult(pairs.labels[kept], scores[kept], found.masks[0, kept], found.boxes[0, kept], size)


def painted_map(
    result: InstanceResult[Tensor],
    fused: bool,
    return_coco_annotation: bool = False,
    return_binary_maps: bool = False,
) -> dict[str, Any]:
    """Map in float32 of packed instances, in which later instances cover earlier ones, and -1 is none."""
    check_formats(return_coco_annotation, return_binary_maps)
    segmentation: Any
    if return_binary_maps and len(result.masks) > 0:
        segmentation = _unpacked(result.masks, result.size[1]).to(torch.float32)
    else:
        segmentation = _paint(result.masks, result.size)
        if return_coco_annotation:
            segmentation = [runs.tolist() for runs in segment_map_runs(segmentation)]
    return {"segmentation": segmentation, "segments_info": _segments(result.labels, result.scores, fused)}


def check_formats(return_coco_annotation: bool, return_binary_maps: bool) -> None:
    """Check that at most one other format is wanted."""
    check(not (return_coco_annotation and return_binary_maps), "return_coco_annotation, return_binary_maps",
          "at most one of them", (return_coco_annotation, return_binary_maps))


def _unpacked(
    masks: Tensor,  # [..., ceil(W/8)] uint8
    width: int,
) -> Tensor:
    """`unpack_masks` -> [..., width] bool; on the CPU by NumPy, which does it several times faster than PyTorch."""
    if masks.device.type == "cpu":
        return torch.from_numpy(unpack_mask_array(masks.numpy(), width))
    return unpack_masks(masks, width)


def _paint(
    masks: Tensor,  # [N, H, ceil(W/8)] uint8
    size: Size,
) -> Tensor:
    """Number of the last mask at each pixel, or -1 -> [H, W] float32."""
    count, (height, width) = len(masks), size
    segmentation = torch.full(size, -1.0, device=masks.device)
    if count == 0:
        return segmentation
    rows = max(1, 4 * CHUNK_VALUES // (count * width))
    numbers = torch.arange(1, count + 1, dtype=torch.uint8 if count < 256 else torch.int32, device=masks.device)
    for start in range(0, height, rows):
        part = _unpacked(masks[:, start : start + rows], width).view(torch.uint8)
        painted = (part * numbers[:, None, None]).amax(0)
        segmentation[start : start + rows] = painted.to(torch.float32) - 1
    return segmentation
