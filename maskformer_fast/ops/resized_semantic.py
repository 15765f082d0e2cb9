"""Semantic labels where class scores are computed at a grid and then resized, as transformers' processors do.

``label = argmax_c resize(sum_q P[q, c] * sigmoid(logits at the grid))``. On the CPU `grid_semantic_inference` works on
bands of the grid's rows and stores neither masks nor scores of more than a band. Where few queries have a class, it
first computes scores of these queries and of their classes. With bounds for the others they settle most cells
(`resized_argmax.decide_band`), and complete scores are computed only at the corners of the other cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.ops.resample import row_tiles
from maskformer_fast.ops.resized_argmax import (
    Band,
    bands,
    decide_band,
    label_band,
    padded_channels,
    resized_argmax_eager,
    resized_positions,
    resized_rows,
)

BAND_VALUES = 1 << 21
"""Values of masks and scores in a band of rows of the grid: temporaries stay below about 16 MiB."""
MAX_MISSING = 0.02
"""Most that the dropped queries may add to a class."""
MAX_KEPT = 0.5
"""Largest share of the queries that is kept; with more, all are computed at once."""
LIVE_TOTAL = 0.1
"""Least sum of a class's probabilities with which it is computed everywhere; others only where no class leads."""
MAX_POINTS = 0.5
"""Largest share of a band's points that are gathered; with more, complete scores of the band are computed."""
ROUNDING = 1e-5
"""Bound of a score's error in float32."""


class _Pruning(NamedTuple):
    """Queries and classes that are computed everywhere, and bounds of all others."""

    kept: Tensor  # [n] int64, queries
    classes: Tensor  # [c] int64
    slack: Tensor  # [c] float32, most that the dropped queries add to each class
    others: float  # largest score of the other classes


@torch.no_grad()
def grid_semantic_inference(
    mask_logits: Tensor,  # [Q, h, w] floating
    probabilities: Tensor,  # [Q, K] floating, of the classes without "no object"
    grid: tuple[int, int],
    window: tuple[int, int],
    output_size: tuple[int, int],
) -> Tensor:
    """Class of every pixel, from scores at the points of a grid -> [H, W] int64.

    Mask logits are resized to the grid, scores are computed there, cropped to the top-left window and resized to the
    output, bilinearly like ``F.interpolate(align_corners=False)``. Labels are right wherever the winner leads by more
    than 1e-5. Mask logits should be finite.

    Args:
        grid: height and width of the grid.
        window: height and width of its part that the output covers.

    Raises:
        ValueError: shapes that do not fit.
        ImportError: the extension is not built.
    """
    check(mask_logits.ndim == 3 and mask_logits.numel() > 0, "mask_logits", "[Q, h, w]", tuple(mask_logits.shape))
    fits = probabilities.ndim == 2 and len(probabilities) == len(mask_logits) and probabilities.shape[1] > 0
    check(fits, "probabilities", f"[{len(mask_logits)}, K]", tuple(probabilities.shape))
    check(all(0 < w <= g for w, g in zip(window, grid, strict=True)), "window", f"within {grid}", window)
    check(len(output_size) == 2 and min(output_size) > 0, "output_size", "positive height and width", output_size)
    probabilities = probabilities.to(torch.float32)
    with torch.autocast(mask_logits.device.type, enabled=False):
        if mask_logits.device.type != "cpu":
            return resized_argmax_eager(grid_scores(mask_logits, probabilities, grid, window), output_size)
        labels = torch.empty(output_size, dtype=torch.int64)
        pruning = _prune(probabilities)
        weights = _padded(probabilities)
        queries = len(mask_logits) if pruning is None else len(pruning.kept)
        kept_logits = mask_logits if pruning is None else mask_logits[pruning.kept]
        rows = max(1, BAND_VALUES // (window[1] * (queries + weights.shape[1])))
        for part in bands(window, rows):
            arguments = (weights, probabilities.shape[1], grid, window, part)
            if pruning is None:
                label_band(_complete_band(mask_logits, *arguments), labels)
                continue
            band, decided = _pruned_band(mask_logits, kept_logits, pruning, *arguments)
            label_band(band, labels, decided)
        return labels


def grid_scores(
    mask_logits: Tensor,  # [Q, h, w] floating
    probabilities: Tensor,  # [Q, K] float32
    grid: tuple[int, int],
    window: tuple[int, int],
) -> Tensor:
    """Scores of all classes in the window of the grid -> [K, *window] float32; in plain PyTorch, on any device."""
    scores = mask_logits.new_empty((probabilities.shape[1], *window), dtype=torch.float32)
    for rows in row_tiles(window, 2 * len(mask_logits), mask_logits.device):
        masks = _mask_rows(mask_logits, grid, window, rows)
        scores[:, rows] = (probabilities.T @ masks.flatten(1)).unflatten(1, masks.shape[1:])
    return scores


def _mask_rows(mask_logits: Tensor, grid: tuple[int, int], window: tuple[int, int], rows: slice) -> Tensor:
    """Mask probabilities in some rows of the window -> [Q, rows, width] float32."""
    return resized_rows(mask_logits, grid, rows)[..., : window[1]].sigmoid()


def _padded(
    weights: Tensor,  # [Q, C] float32
) -> Tensor:
    return F.pad(weights, (0, padded_channels(weights.shape[1]) - weights.shape[1]))


def _prune(
    probabilities: Tensor,  # [Q, K] float32
) -> _Pruning | None:
    order = probabilities.amax(1).argsort()
    missing = probabilities[order].cumsum(0).amax(1)  # nondecreasing; with NaN a query is never dropped
    dropped = int((missing <= MAX_MISSING).sum())
    if not 0 < len(order) - dropped <= MAX_KEPT * len(order):
        return None
    totals = probabilities.sum(0)
    live = totals > LIVE_TOTAL
    if not live.any():
        return None
    others = totals[~live].max().item() + ROUNDING if not live.all() else -torch.inf
    classes = live.nonzero()[:, 0]
    slack = probabilities[order[:dropped]].sum(0)[classes] + ROUNDING
    return _Pruning(order[dropped:], classes, slack, others)


def _complete_band(
    mask_logits: Tensor,  # [Q, h, w] floating
    weights: Tensor,  # [Q, pitch] float32
    num_classes: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    part: slice,
) -> Band:
    """Scores of all classes in a band of the window's rows."""
    masks = _mask_rows(mask_logits, grid, window, part).flatten(1)
    return Band(masks.T @ weights, num_classes, part.start, part.stop - part.start, window)


def _pruned_band(
    mask_logits: Tensor,  # [Q, h, w] floating
    kept_logits: Tensor,  # [n, h, w] floating
    pruning: _Pruning,
    weights: Tensor,  # [Q, pitch] float32
    num_classes: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    part: slice,
) -> tuple[Band, Tensor | None]:
    """Labels of the cells that bounds settle, and complete scores at the corners of the others."""
    rows = part.stop - part.start
    masks = _mask_rows(kept_logits, grid, window, part).flatten(1)
    kept_weights = _padded(weights[pruning.kept[:, None], pruning.classes])
    live = Band(masks.T @ kept_weights, len(pruning.classes), part.start, rows, window)
    decided = decide_band(live, pruning.slack, pruning.others, pruning.classes.to(torch.int32))
    points = _corners_of_open_cells(decided, part, window)
    if len(points) == 0:
        return live, decided
    if len(points) > MAX_POINTS * len(decided):
        return _complete_band(mask_logits, weights, num_classes, grid, window, part), None
    values = _masks_at(points, mask_logits, grid, window, part).T @ weights
    place = torch.full((len(decided),), -1, dtype=torch.int32)
    place[points] = torch.arange(len(points), dtype=torch.int32)
    return Band(values, num_classes, part.start, rows, window, place), decided


def _corners_of_open_cells(
    decided: Tensor,  # [rows * width] int32
    part: slice,
    window: tuple[int, int],
) -> Tensor:
    """Points of a band at the corners of cells without a label -> [n] int64."""
    is_open = (decided < 0).view(-1, window[1])
    if part.stop < window[0]:
        is_open[-1] = False  # these cells belong to the next band
    corner = is_open.clone()
    corner[1:] |= is_open[:-1]
    is_open = corner.clone()
    corner[:, 1:] |= is_open[:, :-1]
    return corner.flatten().nonzero()[:, 0]


def _masks_at(
    points: Tensor,  # [n] int64, of the band
    mask_logits: Tensor,  # [N, h, w] floating
    grid: tuple[int, int],
    window: tuple[int, int],
    part: slice,
) -> Tensor:
    """Mask probabilities at some points of a band of the window -> [N, n] float32."""
    width = mask_logits.shape[2]
    flat = mask_logits.flatten(1)
    row, column = points // window[1] + part.start, points % window[1]
    if mask_logits.shape[1:] == grid:
        return flat.index_select(1, row * width + column).to(torch.float32).sigmoid_()
    axes = []
    for index, source, size in ((row, mask_logits.shape[1], grid[0]), (column, width, grid[1])):
        axes.append([taps[index] for taps in resized_positions(source, size, slice(0, size), points.device)])
    (top, bottom, down), (left, right, across) = axes

    def edge(rows: Tensor) -> Tensor:
        ends = [flat.index_select(1, rows * width + columns).to(torch.float32) for columns in (left, right)]
        return torch.lerp(ends[0], ends[1], across)

    return torch.lerp(edge(top), edge(bottom), down).sigmoid_()
