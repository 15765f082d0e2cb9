"""Instance results of transformers' processors: masks of scored pairs of query and class."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.core.exchange import pack
from maskformer_fast.core.results import InstanceResult, unpack_mask_array
from maskformer_fast.drop_in.outputs import Size, nearest_positions, segment_map_runs
from maskformer_fast.drop_in.semantic import class_probabilities
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

    masks: Tensor  # [N, h, w] bool
    labels: Tensor  # [N] int64
    scores: Tensor  # [N] float32


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
    rows, columns = (nearest_positions(g, s, mask_logits.device) for g, s in zip(grid, size, strict=True))
    used = _read_pixels(rows, columns, mask_logits.new_empty((1, *grid)))
    if len(pairs.queries) == 0:
        return ScoredMasks(used.new_empty((0, *grid)), pairs.labels, pairs.scores)
    logits = mask_logits[pairs.queries][None].to(torch.float32)
    found = instance_inference(logits, (logits.shape[2], logits.shape[3]), grid)
    scores = pairs.scores * found.scores[0]
    kept = (scores.to(torch.float64) >= threshold) & (found.areas[0] > 0)
    scored = ScoredMasks(unpack_masks(found.masks[0, kept], grid[1]), pairs.labels[kept], scores[kept])
    if used.device.type == "cpu" and bool(used.all()):  # as where masks become larger
        return scored
    seen = (scored.masks & used).flatten(1).any(1)
    return ScoredMasks(*(part[seen] for part in scored))


def _read_pixels(rows: Tensor, columns: Tensor, maps: Tensor) -> Tensor:
    """Pixels of maps [N, h, w] that are read at the given rows and columns -> [h, w] bool."""
    down, across = (torch.zeros(side, dtype=torch.bool, device=maps.device) for side in maps.shape[1:])
    down[rows], across[columns] = True, True
    return down[:, None] & across


def instance_result(
    scored: ScoredMasks,
    size: Size,
) -> InstanceResult[Tensor]:
    """Packed masks at the output size, by nearest neighbours, with boxes."""
    masks = scored.masks
    rows, columns = (nearest_positions(g, s, masks.device) for g, s in zip(masks.shape[1:], size, strict=True))
    if masks.device.type == "cpu":  # NumPy does both several times faster than PyTorch
        packed = torch.from_numpy(pack(np.take(masks.numpy(), columns.numpy(), axis=2)))
    else:
        packed = pack_masks(masks[:, :, columns])
    packed = packed.index_select(1, rows)
    seen = (masks & _read_pixels(rows, columns, masks)).view(torch.uint8)  # their maximum is faster than any()
    down, across = (seen.amax(side) > 0 for side in (2, 1))
    down, across = down[:, rows], across[:, columns]
    sides = [side.to(torch.int8) for side in (across, down)]
    first = [side.argmax(1) for side in sides]
    last = [side.shape[1] - side.flip(1).argmax(1) for side in sides]
    boxes = torch.stack([*first, *last], 1).to(torch.float32)
    return InstanceResult(scored.labels, scored.scores, packed, boxes, size)


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
    masks = scored.masks
    rows, columns = (nearest_positions(g, s, masks.device) for g, s in zip(masks.shape[1:], size, strict=True))
    segmentation: Any
    if return_binary_maps and len(masks) > 0:
        segmentation = masks[:, rows][:, :, columns].to(torch.float32)
    else:
        numbers = torch.arange(len(masks), dtype=torch.float32, device=masks.device)
        painted = torch.full(masks.shape[1:], -1.0, device=masks.device)
        chunk = max(1, CHUNK_VALUES // painted.numel())
        for part, number in zip(masks.split(chunk), numbers.split(chunk), strict=True):
            if len(part) > 0:
                painted = torch.maximum(painted, number[:, None, None].where(part, -1.0).amax(0))
        segmentation = painted[rows][:, columns]
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
        segmentation = unpack_masks(result.masks, result.size[1]).to(torch.float32)
    else:
        segmentation = _paint(result)
        if return_coco_annotation:
            segmentation = [runs.tolist() for runs in segment_map_runs(segmentation)]
    return {"segmentation": segmentation, "segments_info": _segments(result.labels, result.scores, fused)}


def check_formats(return_coco_annotation: bool, return_binary_maps: bool) -> None:
    """Check that at most one other format is wanted."""
    check(not (return_coco_annotation and return_binary_maps), "return_coco_annotation, return_binary_maps",
          "at most one of them", (return_coco_annotation, return_binary_maps))


def _paint(result: InstanceResult[Tensor]) -> Tensor:
    device, (height, width) = result.masks.device, result.size
    segmentation = torch.full(result.size, -1.0, device=device)
    count = len(result.masks)
    if count == 0:
        return segmentation
    rows = max(1, 4 * CHUNK_VALUES // (count * width))
    dtype = np.uint8 if count < 256 else np.int32
    numbers = np.arange(1, count + 1, dtype=dtype)[:, None, None]
    for start in range(0, height, rows):
        part = result.masks[:, start : start + rows]
        if device.type == "cpu":
            bits = unpack_mask_array(part.numpy(), width).astype(dtype)
            bits *= numbers
            painted = torch.from_numpy(bits.max(0))
        else:
            painted = (unpack_masks(part, width) * torch.from_numpy(numbers).to(device)).amax(0)
        segmentation[start : start + rows] = painted.to(torch.float32) - 1
    return segmentation
