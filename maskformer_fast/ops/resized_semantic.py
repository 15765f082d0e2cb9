"""Semantic labels where class scores are computed at a grid and then resized, as transformers' processors do.

``label = argmax_c resize(sum_q P[q, c] * sigmoid(logits at the grid))``. The grid may be covered by several windows,
each with queries of its own; where they overlap, the mean of their scores counts: the sum over the queries of all
windows, weighted by 1 / count.

On the CPU scores that are not resized are computed in C++ like those of `semantic_inference` (csrc/semantic/): in each
rectangle that the same windows cover, over the queries of all of them. Otherwise no masks and no scores of more than
some rows of the grid are stored. Where few queries have a class, scores of these queries and of their classes come
first, with bounds for the others (`live_queries`). One window that covers the grid is labelled in C++
(csrc/resized_semantic/), where bounds of these scores between the mask logits settle most pixels. Several windows are
computed in bands of rows by PyTorch, whose cells the bounds settle (`resized_argmax.decide_band`). Complete scores are
computed only at the corners of the cells that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops.live_queries import LiveQueries, find_live_queries
from maskformer_fast.ops.resample import row_tiles, without_float64
from maskformer_fast.ops.resized_argmax import (
    Band,
    bands,
    decide_band,
    label_band,
    padded_channels,
    resized_positions,
    resized_rows,
)
from maskformer_fast.ops.semantic import label_dtype

BAND_VALUES = 1 << 21
"""Values of masks and scores in a band of rows of the grid: temporaries stay below about 16 MiB."""
MAX_POINTS = 0.5
"""Largest share of a band's points that are gathered; with more, complete scores of the band are computed."""


class Windows(NamedTuple):
    """Predictions for windows of a grid."""

    mask_logits: Sequence[Tensor]  # of each window [Q, h, w] floating; numbers of queries may differ
    probabilities: Sequence[Tensor]  # of each window [Q, C] float32
    origins: Sequence[tuple[int, int]]  # first row and column of each window in the grid
    size: tuple[int, int]  # height and width of a window; what reaches beyond the grid is cut off
    grid: tuple[int, int]  # height and width

    def with_parts(self, mask_logits: Sequence[Tensor], probabilities: Sequence[Tensor]) -> Windows:
        """The same windows with other queries and classes."""
        return self._replace(mask_logits=mask_logits, probabilities=probabilities)

    def channels(self) -> int:
        """Number of classes, padded as the extension wants it."""
        return padded_channels(self.probabilities[0].shape[1])


def grid_semantic_inference(
    mask_logits: Tensor,  # [Q, h, w] floating
    probabilities: Tensor,  # [Q, K] floating, of the classes without "no object"
    grid: tuple[int, int],
    window: tuple[int, int],
    output_size: tuple[int, int],
) -> Tensor:
    """Class of every pixel, from scores at the points of a grid -> [H, W] int64.

    Mask logits are resized to the grid, scores are computed there, cropped to the top-left window and resized to the
    output, as `windowed_semantic_inference` does with one window.

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
    return windowed_semantic_inference(mask_logits[None], probabilities[None], [(0, 0)], grid, window, output_size)


@torch.no_grad()
def windowed_semantic_inference(
    mask_logits: Tensor,  # [W, Q, h, w] floating
    probabilities: Tensor,  # [W, Q, K] floating, of the classes without "no object"
    origins: Sequence[tuple[int, int]],
    window: tuple[int, int],
    grid: tuple[int, int],
    output_size: tuple[int, int],
) -> Tensor:
    """Class of every pixel of a picture that was predicted by overlapping windows -> [H, W] int64.

    Mask logits are resized to their window, and scores are computed there. At each point of the grid the mean of the
    scores of all windows that cover it counts, 0 where none does. Scores are resized to the output, bilinearly like
    ``F.interpolate(align_corners=False)``. Labels are right wherever the winner leads by more than 1e-5. Mask logits
    should be finite. No array of all classes and pixels is made, on the CPU and elsewhere.

    Args:
        origins: first row and column of each window in the grid, as many as windows, not negative.
        window: height and width of every window; what reaches beyond the grid is cut off.
        grid: height and width of the picture that the windows were cut from.
        output_size: height and width of the result.

    Raises:
        ValueError: shapes that do not fit, a window that lies outside of the grid.
        ImportError: the extension is not built.
    """
    windows = _checked(mask_logits, probabilities, origins, window, grid)
    check(len(output_size) == 2 and min(output_size) > 0, "output_size", "positive height and width", output_size)
    with torch.autocast(mask_logits.device.type, enabled=False):
        if mask_logits.device.type != "cpu":
            return _labels_by_tiles(windows, output_size)
        if tuple(output_size) == tuple(grid):
            return _labels_at_grid(mask_logits, probabilities, windows)
        if len(origins) == 1 and tuple(origins[0]) == (0, 0) and min(window[0] - grid[0], window[1] - grid[1]) >= 0:
            return _labels_of_one_window(windows, output_size)
        labels = torch.empty(output_size, dtype=torch.int64)
        found = find_live_queries(windows.probabilities)
        kept = windows if found is None else _kept_windows(windows, found)
        rows = max(1, BAND_VALUES // (grid[1] * (max(map(len, kept.mask_logits)) + windows.channels())))
        for part in bands(grid, rows):
            if found is None:
                label_band(_band(windows, part), labels)
                continue
            band, decided = _pruned_band(windows, kept, found, part)
            label_band(band, labels, decided)
        return labels


@torch.no_grad()
def windowed_semantic_eager(
    mask_logits: Tensor,  # [W, Q, h, w] floating
    probabilities: Tensor,  # [W, Q, K] floating
    origins: Sequence[tuple[int, int]],
    window: tuple[int, int],
    grid: tuple[int, int],
    output_size: tuple[int, int],
) -> Tensor:
    """`windowed_semantic_inference` in plain PyTorch, by tiles of the output's rows."""
    return _labels_by_tiles(_checked(mask_logits, probabilities, origins, window, grid), output_size)


def grid_scores(
    mask_logits: Tensor,  # [Q, h, w] floating
    probabilities: Tensor,  # [Q, K] floating
    grid: tuple[int, int],
    window: tuple[int, int],
) -> Tensor:
    """Scores of all classes in the top-left window of the grid -> [K, *window] float32, by `windowed_scores`."""
    return windowed_scores(mask_logits[None], probabilities[None], [(0, 0)], grid, window)


def windowed_scores(
    mask_logits: Tensor,  # [W, Q, h, w] floating
    probabilities: Tensor,  # [W, Q, K] floating
    origins: Sequence[tuple[int, int]],
    window: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Scores of all classes at the points of the grid -> [K, *grid] float32; in plain PyTorch, on any device.

    The arguments are those of `windowed_semantic_inference`.
    """
    windows = _checked(mask_logits, probabilities, origins, window, grid)
    scores = mask_logits.new_empty((probabilities.shape[2], *grid), dtype=torch.float32)
    for rows in row_tiles(grid, 2 * mask_logits.shape[1], mask_logits.device):
        scores[:, rows] = _score_rows(windows, rows)
    return scores


def _checked(
    mask_logits: Tensor, probabilities: Tensor, origins: Sequence[tuple[int, int]], window: tuple[int, int],
    grid: tuple[int, int],
) -> Windows:  # fmt: skip
    check(mask_logits.ndim == 4 and mask_logits.numel() > 0, "mask_logits", "[W, Q, h, w]", tuple(mask_logits.shape))
    fits = probabilities.ndim == 3 and probabilities.shape[:2] == mask_logits.shape[:2] and probabilities.shape[2] > 0
    check(fits, "probabilities", f"[{len(mask_logits)}, {mask_logits.shape[1]}, K]", tuple(probabilities.shape))
    check(len(window) == 2 and min(window) > 0, "window", "positive height and width", window)
    check(len(grid) == 2 and min(grid) > 0, "grid", "positive height and width", grid)
    check(len(origins) == len(mask_logits), "origins", f"{len(mask_logits)} of them", len(origins))
    for origin in origins:
        inside = len(origin) == 2 and all(0 <= o < g for o, g in zip(origin, grid, strict=True))
        check(inside, "origins", f"rows and columns of the grid {tuple(grid)}", origin)
    return Windows(list(mask_logits), list(probabilities.to(torch.float32)), origins, window, grid)


def _labels_at_grid(
    mask_logits: Tensor,  # [W, Q, h, w] floating
    probabilities: Tensor,  # [W, Q, K] floating
    windows: Windows,
) -> Tensor:
    mask_logits, probabilities = without_float64(mask_logits), probabilities.to(torch.float32).contiguous()
    num_classes = probabilities.shape[2]
    labels = torch.empty(windows.grid, dtype=label_dtype(num_classes))
    load_extension().windowed_semantic(
        address_of(mask_logits, "mask_logits", dtype_name(mask_logits), mask_logits.shape, any_strides=True),
        dtype_name(mask_logits),
        tuple(mask_logits.shape),
        mask_logits.stride(),
        address_of(probabilities, "probabilities", "float32", probabilities.shape),
        num_classes,
        [int(place) for origin in windows.origins for place in origin],
        windows.size,
        windows.grid,
        address_of(labels, "labels", dtype_name(labels), windows.grid),
        torch.get_num_threads(),
    )
    return labels.to(torch.int64)


def _labels_of_one_window(windows: Windows, output_size: tuple[int, int]) -> Tensor:
    """Labels where one window covers the grid from its upper left corner on."""
    masks, probabilities = windows.mask_logits[0].to(torch.float32).contiguous(), windows.probabilities[0]
    found = find_live_queries([probabilities])
    order = torch.arange(len(masks)) if found is None else found.orders[0]
    weights = _padded(probabilities[order])
    kept, others = 0, 0.0
    live: Tensor | None = None
    slack: Tensor | None = None
    classes: Tensor | None = None
    if found is not None:
        kept, others, classes = found.kept[0], found.others, found.classes.to(torch.int32)
        live, slack = _padded(probabilities[order[:kept]][:, found.classes]), _padded(found.slack[None])[0]
    order = order.to(torch.int32)
    labels = torch.empty(output_size, dtype=torch.int64)
    load_extension().grid_semantic(
        address_of(masks, "masks", "float32", masks.shape), tuple(masks.shape),
        address_of(order, "order", "int32", (len(masks),)),
        address_of(weights, "weights", "float32", weights.shape), (probabilities.shape[1], weights.shape[1]), kept,
        address_of(live, "live", "float32", () if live is None else live.shape),
        address_of(slack, "slack", "float32", () if slack is None else slack.shape),
        address_of(classes, "classes", "int32", () if classes is None else classes.shape),
        (0, 0) if classes is None or live is None else (len(classes), live.shape[1]), others,
        windows.size, windows.grid, address_of(labels, "labels", "int64", output_size), output_size,
        torch.get_num_threads(),
    )  # fmt: skip
    return labels


def _labels_by_tiles(windows: Windows, output_size: tuple[int, int]) -> Tensor:
    device = windows.mask_logits[0].device
    labels = torch.empty(output_size, dtype=torch.int64, device=device)
    channels = 2 * len(windows.mask_logits[0]) + 3 * windows.probabilities[0].shape[1]
    for rows in row_tiles((output_size[0], max(output_size[1], windows.grid[1])), channels, device):
        top, bottom, share = resized_positions(windows.grid[0], output_size[0], rows, device)
        first, last = (_position(windows.grid[0], output_size[0], row) for row in (rows.start, rows.stop - 1))
        scores = _score_rows(windows, slice(first, min(last + 2, windows.grid[0])))
        tile = torch.lerp(scores[:, top - first], scores[:, bottom - first], share[:, None])
        if output_size[1] != windows.grid[1]:
            tile = F.interpolate(tile, output_size[1], mode="linear", align_corners=False)
        labels[rows] = tile.argmax(0)
    return labels


def _position(source: int, size: int, row: int) -> int:
    """Upper source row of an output row, on the host."""
    return int(resized_positions(source, size, slice(row, row + 1), torch.device("cpu"))[0])


def _score_rows(windows: Windows, part: slice) -> Tensor:
    """Scores of some rows of the grid -> [C, rows, width] float32."""
    values = _band_values(windows, part, windows.probabilities)
    return values.T.reshape(-1, part.stop - part.start, windows.grid[1])


def _band_values(
    windows: Windows,
    part: slice,
    weights: Sequence[Tensor],  # of each window [Q, channels] float32
) -> Tensor:
    """Mean weighted mask probabilities at the points of some rows of the grid -> [points, channels] float32."""
    size, width = windows.size, windows.grid[1]
    rows, channels = part.stop - part.start, weights[0].shape[1]
    parts = [
        (number, slice(max(part.start, top), min(part.stop, top + size[0])), slice(left, min(left + size[1], width)))
        for number, (top, left) in enumerate(windows.origins)
    ]
    parts = [(number, down, across) for number, down, across in parts if down.start < down.stop]
    values = None
    for number, down, across in parts:
        top, left = windows.origins[number]
        masks = resized_rows(windows.mask_logits[number], size, slice(down.start - top, down.stop - top))
        masks = masks[..., : across.stop - left].sigmoid().flatten(1)
        product = masks.T @ weights[number]
        if len(parts) == 1 and (down, across) == (part, slice(0, width)):
            return product
        if values is None:
            values = product.new_zeros((rows, width, channels))
        place = values[down.start - part.start : down.stop - part.start, across]
        place += product.view(place.shape)
    if values is None:
        return weights[0].new_zeros((rows * width, channels))
    if len(parts) > 1:
        counts = values.new_zeros((rows, width, 1))
        for _, down, across in parts:
            counts[down.start - part.start : down.stop - part.start, across] += 1
        values /= counts.clamp_(min=1)
    return values.flatten(0, 1)


def _padded(
    weights: Tensor,  # [Q, C] float32
) -> Tensor:
    return F.pad(weights, (0, padded_channels(weights.shape[1]) - weights.shape[1]))


def _kept_windows(windows: Windows, live: LiveQueries) -> Windows:
    """The kept queries of each window, with the live classes."""
    chosen = [order[:kept] for order, kept in zip(live.orders, live.kept, strict=True)]
    logits = [masks[order] for masks, order in zip(windows.mask_logits, chosen, strict=True)]
    kept = [classes[order][:, live.classes] for classes, order in zip(windows.probabilities, chosen, strict=True)]
    return windows.with_parts(logits, kept)


def _band(windows: Windows, part: slice) -> Band:
    """Scores of all classes in a band of the grid's rows."""
    values = _band_values(windows, part, [_padded(weights) for weights in windows.probabilities])
    return Band(values, windows.probabilities[0].shape[1], part.start, part.stop - part.start, windows.grid)


def _pruned_band(windows: Windows, kept: Windows, found: LiveQueries, part: slice) -> tuple[Band, Tensor | None]:
    """Labels of the cells that bounds settle, and complete scores at the corners of the others."""
    live = _band(kept, part)
    decided = decide_band(live, found.slack, found.others, found.classes.to(torch.int32))
    points = _corners_of_open_cells(decided, part, windows.grid)
    if len(points) == 0:
        return live, decided
    if len(points) > MAX_POINTS * len(decided):
        return _band(windows, part), None
    place = torch.full((len(decided),), -1, dtype=torch.int32)
    place[points] = torch.arange(len(points), dtype=torch.int32)
    values = _values_at(points, windows, part)
    return Band(values, windows.probabilities[0].shape[1], part.start, live.rows, windows.grid, place), decided


def _corners_of_open_cells(
    decided: Tensor,  # [rows * width] int32
    part: slice,
    grid: tuple[int, int],
) -> Tensor:
    """Points of a band at the corners of cells without a label -> [n] int64."""
    is_open = (decided < 0).view(-1, grid[1])
    if part.stop < grid[0]:
        is_open[-1] = False  # these cells belong to the next band
    corner = is_open.clone()
    corner[1:] |= is_open[:-1]
    is_open = corner.clone()
    corner[:, 1:] |= is_open[:, :-1]
    return corner.flatten().nonzero()[:, 0]


def _values_at(
    points: Tensor,  # [n] int64, of the band
    windows: Windows,
    part: slice,
) -> Tensor:
    """Scores of all classes at some points of a band -> [n, channels] float32."""
    row, column = points // windows.grid[1] + part.start, points % windows.grid[1]
    values = points.new_zeros((len(points), windows.channels()), dtype=torch.float32)
    counts = points.new_zeros((len(points), 1), dtype=torch.float32)
    height, width = windows.size
    for masks, probabilities, (top, left) in zip(*windows[:3], strict=True):
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        at = inside.nonzero()[:, 0]
        found = _masks_at(row[at] - top, column[at] - left, masks, windows.size).T @ _padded(probabilities)
        values.index_add_(0, at, found)
        counts[at] += 1
    return values.div_(counts.clamp_(min=1))


def _masks_at(
    row: Tensor,  # [n] int64, of the window
    column: Tensor,  # [n] int64
    mask_logits: Tensor,  # [N, h, w] floating
    size: tuple[int, int],
) -> Tensor:
    """Mask probabilities at some points of a window -> [N, n] float32."""
    width = mask_logits.shape[2]
    flat = mask_logits.flatten(1)
    if mask_logits.shape[1:] == size:
        return flat.index_select(1, row * width + column).to(torch.float32).sigmoid_()
    axes = []
    for index, source, length in ((row, mask_logits.shape[1], size[0]), (column, width, size[1])):
        axes.append([taps[index] for taps in resized_positions(source, length, slice(0, length), row.device)])
    (top, bottom, down), (left, right, across) = axes

    def edge(rows: Tensor) -> Tensor:
        ends = [flat.index_select(1, rows * width + columns).to(torch.float32) for columns in (left, right)]
        return torch.lerp(ends[0], ends[1], across)

    return torch.lerp(edge(top), edge(bottom), down).sigmoid_()
