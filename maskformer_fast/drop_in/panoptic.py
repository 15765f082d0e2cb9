"""Panoptic results of transformers' processors: each pixel goes to one query, and queries that keep too little go."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.drop_in.outputs import Size
from maskformer_fast.inference_config import PanopticRule
from maskformer_fast.ops.resized_argmax import (
    Band,
    Winners,
    bands,
    channels_innermost,
    label_band,
    padded_channels,
    resized_rows,
    resized_winners,
    twice_resized_winners,
)
from maskformer_fast.ops.segments import panoptic_inference

BAND_VALUES = 1 << 17
"""Values of masks in a band of rows: temporaries stay below about 1 MiB."""
RENUMBERED_PIXELS = 1 << 15
"""Pixels of a map that get their ids at a time: temporaries stay below about 1 MiB."""


class Candidates(NamedTuple):
    """Queries of one image that take part in panoptic inference."""

    masks: Tensor  # [Q, h, w] floating, logits of all queries: a copy of some would be the largest temporary
    queries: Tensor  # [N] int64
    scores: Tensor  # [N] float32
    labels: Tensor  # [N] int64


def best_classes(
    class_logits: Tensor,  # [Q, K+1] floating
    mask_logits: Tensor,  # [Q, h, w] floating
    threshold: float,
) -> Candidates:
    """Queries whose best class is not "no object" and has a probability above the threshold."""
    scores, labels = class_logits.to(torch.float32).softmax(-1).max(-1)
    kept = (labels != class_logits.shape[1] - 1) & (scores > threshold)
    return Candidates(mask_logits, kept.nonzero()[:, 0], scores[kept], labels[kept])


def empty_result(size: Size) -> dict[str, Any]:
    """Result of an image without candidates: a map of -1 in float32, as transformers returns it."""
    return {"segmentation": torch.full(size, -1.0), "segments_info": []}


def count_winners(
    candidates: Candidates,
    grid: Size,
    window: Size,
    size: Size,
    mask_threshold: float,
    values: str,  # "probabilities" or "logits" times scores are resized, or "sigmoids" are taken after resizing
    antialias: bool = False,
) -> Winners:
    """Winner of each pixel of the output and counts of pixels, from masks resized to the grid and cropped.

    With `antialias` values are resized to fewer rows or columns than the window's with antialiasing.
    """
    masks, queries, scores, _ = candidates
    sigmoids = values == "sigmoids"
    threshold = torch.full_like(scores, mask_threshold)
    own_value, scale = (threshold.logit(), scores) if sigmoids else (threshold, None)
    antialias = antialias and (size[0] < window[0] or size[1] < window[1])
    if masks.shape[1:] != grid and values != "logits" and not antialias:
        chosen = masks.index_select(0, queries)
        return twice_resized_winners(chosen, own_value, scores, sigmoids, grid, window, size)

    def rows_of(part: slice) -> Tensor:
        rows = resized_rows(masks, grid, part, queries)[..., : window[1]]
        if sigmoids:
            return rows
        return (rows.sigmoid_() if values == "probabilities" else rows).mul_(scores[:, None, None])

    if masks.device.type != "cpu" or antialias:
        maps = rows_of(slice(0, window[0]))
        if antialias:
            maps = F.interpolate(maps[None], size=size, mode="bilinear", antialias=True)[0]
        return resized_winners(maps, own_value, scale, size)
    labels = torch.empty(size, dtype=torch.int64 if sigmoids else torch.int32)
    counts = torch.zeros((3, len(queries)), dtype=torch.int64)
    for part in bands(window, max(1, BAND_VALUES // (window[1] * padded_channels(len(queries))))):
        band = Band(channels_innermost(rows_of(part)), len(queries), part.start, part.stop - part.start, window)
        label_band(band, labels, None, own_value, scale, counts)
    return Winners(labels, *counts.unbind())


def _renumber(
    labels: Tensor,  # [H, W] int32 or int64, indices into the table
    table: list[int],
) -> Tensor:
    """Replace each label by its entry, in place; -1 takes the last."""
    values = torch.tensor(table, dtype=labels.dtype, device=labels.device)
    for part in labels.flatten().split(RENUMBERED_PIXELS):
        part.copy_(values[part.where(part >= 0, len(table) - 1)])
    return labels


def fused_segments(
    winners: Winners,
    candidates: Candidates,
    overlap_threshold: float,
    labels_to_fuse: Collection[int],
) -> dict[str, Any]:
    """Segments as MaskFormer's, Mask2Former's and OneFormer's processors number them.

    The counter of segments goes back to a merged segment's id, so that the next one can have an id that is taken.
    """
    ids = [0] * (len(candidates.labels) + 1)
    segments: list[dict[str, Any]] = []
    first: dict[int, int] = {}
    current = 0
    ratios = (winners.won / winners.owned).tolist()
    columns = (winners.won, winners.owned, candidates.labels, candidates.scores)
    for k, (won, owned, label, score) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if not (won > 0 and owned > 0 and ratios[k] > overlap_threshold):
            continue
        fused = label in labels_to_fuse
        current = first[label] if label in first else current + 1
        ids[k] = current
        segments.append({"id": current, "label_id": label, "was_fused": fused, "score": round(score, 6)})
        if fused:
            first[label] = current
    return {"segmentation": _renumber(winners.labels, ids), "segments_info": segments}


def stuff_segments(
    winners: Winners,
    candidates: Candidates,
    overlap_threshold: float,
    stuff_classes: Collection[int] | None,
) -> dict[str, Any]:
    """Segments as EoMT's processor numbers them: from 0, -1 where none is, and merged stuff is listed once."""
    ids = [-1] * (len(candidates.labels) + 1)
    segments: list[dict[str, Any]] = []
    first: dict[int, int] = {}
    ratios = (winners.won / winners.owned).tolist()
    columns = (winners.owned, winners.both, candidates.labels, candidates.scores)
    for k, (owned, both, label, score) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if not (owned > 0 and both > 0 and ratios[k] > overlap_threshold):
            continue
        if label in first:
            ids[k] = first[label]
            continue
        ids[k] = len(segments)
        if stuff_classes and label in stuff_classes:
            first[label] = len(segments)
        segments.append({"id": len(segments), "label_id": label, "score": round(score, 6)})
    return {"segmentation": _renumber(winners.labels, ids), "segments_info": segments}


def official_segments(
    candidates: Candidates,
    num_classes: int,
    grid: Size,
    window: Size,
    size: Size,
    overlap_threshold: float,
    labels_to_fuse: Collection[int],
    rule: PanopticRule,
) -> dict[str, Any]:
    """Segments of the official code: mask logits are resized to the padded input, cropped, and resized again.

    Ids count from 1, pixels without a segment are 0, and merged stuff is listed once with its first query's score.
    """
    masks, queries, scores, labels = candidates
    resized = F.interpolate(masks[None, queries].to(torch.float32), size=grid, mode="bilinear", align_corners=False)
    resized = resized[..., : window[0], : window[1]]
    things = torch.tensor([label not in labels_to_fuse for label in range(num_classes)], device=masks.device)
    found = panoptic_inference(
        resized, scores[None], labels[None], things, window, size, overlap_threshold, rule
    )
    segments: dict[int, dict[str, Any]] = {}
    for number, label, score in zip(found.ids[0].tolist(), labels.tolist(), scores.tolist(), strict=True):
        if number > 0:
            fused = label in labels_to_fuse
            info = {"id": number, "label_id": label, "was_fused": fused, "score": round(score, 6)}
            segments.setdefault(number, info)
    return {"segmentation": found.id_map[0].clamp_(min=0), "segments_info": list(segments.values())}
