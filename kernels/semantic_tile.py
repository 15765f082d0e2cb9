"""Parts of the kernels of semantic inference: masks of a tile, the argmax over classes, the tiling of the output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.class_probabilities import SCALE
from maskformer_fast.kernels.resample import add_taps, axis_tiles, sigmoid, tap_weights, tile_at
from maskformer_fast.kernels.variant import KernelVariant

MAX_QUERIES = 256
"""Most queries of a kernel: a tile's masks of all queries are in registers at once."""
TILE_H, TILE_W = 8, 16
"""Pixels of a tile."""
TAP_BLOCK = 16
"""Taps multiplied at once; a tile with more taps takes more rounds."""
QUERY_BLOCK = 64
"""Queries resampled at once."""
CLASS_BLOCK = 32
"""Classes scored at once."""
LAUNCH = {"num_warps": 8, "num_stages": 2}
"""Options of every launch. With them and the sizes above no target spills registers or lacks shared memory."""
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Types of logits and embeddings -> Triton's names."""
SIZES = [
    "num_queries", "num_classes", "map_height", "map_width", "height", "width",
    "offset_y", "offset_x", "tap_rows", "tap_columns", "tiles_y", "tiles_x",
]  # fmt: skip
"""Arguments that are not specialised: a separate kernel for a size of 1 would be compiled without need."""


# Helpers take related values as one tuple, which costs nothing in the compiled code. Parameters of the kernels stay
# single values: compilation ahead of time and recorded launches describe a kernel's interface by them.
#
# geometry: map_size (height, width), output_size (height, width), scales (scale_y, rest_y, scale_x, rest_x), offsets
#     (y, x), tap_counts (rows, columns of a tile), tile_counts (y, x); see `resample.AxisTiles`
# tile: row and column of its first tap; for each pixel the tap before it and the share of the tap after it, along y, x
# strides: stride_q, stride_y, stride_x of the logits
# classes: num_classes, padded_classes


@triton.jit
def halves(resampled):
    """Masks [pixels, queries], scaled, as a sum of two float16."""
    masks = sigmoid(resampled) * SCALE
    high = masks.to(tl.float16)
    return high, (masks - high.to(tl.float32)).to(tl.float16)


@triton.jit
def place_tile(index, geometry, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image of tile `index`, rows and columns of its pixels, the tile; see `resample.tile_at`."""
    map_size, _, scales, offsets, _, tile_counts = geometry
    map_height, map_width = map_size
    scale_y, rest_y, scale_x, rest_x = scales
    offset_y, offset_x = offsets
    tiles_y, tiles_x = tile_counts
    image, y, x, first_y, first_x, low_y, share_y, low_x, share_x = tile_at(
        index, map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tiles_y, tiles_x,
        TILE_H, TILE_W,
    )  # fmt: skip
    return image, y, x, (first_y, first_x, low_y, share_y, low_x, share_x)


@triton.jit
def load_taps(logits, query, present, tap, tile, strides, geometry):
    """Logits of a tile's taps -> [taps, queries] float32, -inf for queries that are not present; rows, columns."""
    first_y, first_x, _, _, _, _ = tile
    stride_q, stride_y, stride_x = strides
    map_size, _, _, _, tap_counts, _ = geometry
    map_height, map_width = map_size
    _, tap_columns = tap_counts
    row, column = first_y + tap // tap_columns, first_x + tap % tap_columns
    place = tl.minimum(row, map_height - 1) * stride_y + tl.minimum(column, map_width - 1) * stride_x
    source = logits + query.to(tl.int64)[None, :] * stride_q + place[:, None]
    values = tl.load(source, mask=present[None, :], other=float("-inf")).to(tl.float32)
    return values, row, column


@triton.jit
def masks_of_logits(
    logits,  # [Q, h, w] of the tile's image
    query,  # [QUERIES] int32
    present,  # [QUERIES]: the masks of others are 0
    tile,
    strides,
    geometry,
    TAPS: tl.constexpr,
):
    """Masks of the given queries at a tile's pixels, as `halves`."""
    _, _, low_y, share_y, low_x, share_x = tile
    _, _, _, _, tap_counts, _ = geometry
    tap_rows, tap_columns = tap_counts
    resampled = tl.zeros((low_y.shape[0], query.shape[0]), tl.float32)
    for start in tl.range(0, tap_rows * tap_columns, TAPS):
        tap = start + tl.arange(0, TAPS)
        values, row, column = load_taps(logits, query, present, tap, tile, strides, geometry)
        resampled = add_taps(resampled, tap_weights(row, column, low_y, share_y, low_x, share_x), values)
    return halves(resampled)


@triton.jit
def _add_queries(
    score,  # [pixels, CLASSES] float32
    masks,  # [pixels, QUERIES], a sum of two float16
    source,  # [QUERIES, CLASSES] pointers to their probabilities
    step_to_rest,
    SPLIT: tl.constexpr,
):
    high, rest = masks
    chance = tl.load(source)
    score = tl.dot(high, chance, score)
    if SPLIT:
        score = tl.dot(rest, chance, score)
        score = tl.dot(high, tl.load(source + step_to_rest), score)
    return score


@triton.jit
def rank_classes(
    masks,  # GROUPS of [pixels, QUERIES], each a sum of two float16
    queries,  # [QUERIES]: rows of the first group's probabilities; each further group's are the next QUERIES
    probabilities,  # [SPLIT + 1, num_rows, padded_classes] of the tile's image
    num_rows,
    classes,
    GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Multiply by the probabilities in blocks of classes, with a running argmax -> three values of each pixel.

    These are the best score times SCALE^2, or -1 where all are NaN; its class, 0 where all are NaN; with SECOND the
    second score, -1 where there is none.
    """
    num_classes, padded_classes = classes
    pixels: tl.constexpr = masks[0][0].shape[0]
    column = tl.arange(0, CLASSES)
    # Maxima are kept for every column of the block and reduced at the end. Scores are not negative, and NaN beats
    # nothing: where all are NaN, -1 stays, with class 0.
    best = tl.full((pixels, CLASSES), -1.0, tl.float32)
    start_of_best = tl.zeros((pixels, CLASSES), tl.int32)
    second = tl.full((pixels, CLASSES), -1.0, tl.float32)
    group_rows: tl.constexpr = masks[0][0].shape[1]
    offsets = queries[:, None] * padded_classes + column[None, :]  # one tensor for all groups, which spares registers
    for start in tl.range(0, padded_classes, CLASSES):
        score = tl.zeros((pixels, CLASSES), tl.float32)
        for group in tl.static_range(GROUPS):
            source = probabilities + (start + group * group_rows * padded_classes) + offsets
            score = _add_queries(score, masks[group], source, num_rows * padded_classes, SPLIT)
        if SECOND:  # the repeated last class would be its own runner-up
            score = tl.where((start + column < num_classes)[None, :], score, -1.0)
            second = tl.where(score > best, best, tl.maximum(second, score))
        start_of_best = tl.where(score > best, start, start_of_best)
        best = tl.where(score > best, score, best)
    value = tl.max(best, 1)
    category = start_of_best + column[None, :]
    label = tl.min(tl.where(best == value[:, None], category, 0x7FFFFFFF), 1)  # of equal scores the lower class
    runner_up = tl.max(tl.where(category == label[:, None], second, best), 1)
    return value, tl.minimum(label, num_classes - 1), runner_up  # a repeated last class could win by rounding only


@triton.jit
def pixels_inside(image, y, x, geometry):
    """Offsets of pixels in the results, and a flag for each pixel that is inside the output."""
    _, output_size, _, _, _, _ = geometry
    height, width = output_size
    return (image * height + y) * width + x, (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def classify(
    masks, queries, probabilities, num_rows, classes,  # as in `rank_classes`
    results,  # labels, scores, margins, [B, H, W] each
    image, y, x, geometry,
    GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr, SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    """Rank the classes and store the results of a tile."""
    labels, scores, margins = results
    _, padded_classes = classes
    value, label, runner_up = rank_classes(
        masks, queries, probabilities + image * (SPLIT + 1) * num_rows * padded_classes, num_rows, classes,
        GROUPS, CLASSES, SPLIT, MARGINS,
    )  # fmt: skip
    target, inside = pixels_inside(image, y, x, geometry)
    tl.store(labels + target, label.to(labels.dtype.element_ty), mask=inside)
    if SCORES:
        tl.store(scores + target, tl.where(value < 0.0, float("nan"), value / (SCALE * SCALE)), mask=inside)
    if MARGINS:
        margin = tl.where(runner_up < 0.0, float("inf"), (value - runner_up) / (SCALE * SCALE))
        tl.store(margins + target, tl.where(value < 0.0, float("nan"), margin), mask=inside)


@triton.jit
def classify_tile(
    index,
    results,  # labels, scores, margins, [B, H, W] each
    probabilities,  # [B, SPLIT + 1, GROUPS * QUERIES, padded_classes]
    logits,  # [B, Q, h, w]
    stride_b,
    strides,
    num_queries,
    classes,
    geometry,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
    SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    """Score all queries and classes at the pixels of tile `index`, from logits."""
    image, y, x, tile = place_tile(index, geometry, TILE_H, TILE_W)
    masks = ()
    for group in tl.static_range(GROUPS):
        query = group * QUERIES + tl.arange(0, QUERIES)
        masks += (
            masks_of_logits(logits + image * stride_b, query, query < num_queries, tile, strides, geometry, TAPS),
        )
    classify(
        masks, tl.arange(0, QUERIES), probabilities, GROUPS * QUERIES, classes, results, image, y, x, geometry,
        GROUPS, CLASSES, SPLIT, SCORES, MARGINS,
    )  # fmt: skip


class Tiling(NamedTuple):
    """Tiles that cover the output."""

    tiles: int
    taps: int  # of one tile
    arguments: tuple[int | float, ...]  # of the kernels, from `height` to `tiles_x`


def plan_tiles(maps: Tensor, map_size: torch.Size, extent: tuple[float, float], labels: Tensor) -> Tiling:
    """Check what would otherwise fail silently, and choose the tiles."""
    if maps.dtype not in ELEMENTS:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, ELEMENTS))}, got {maps.dtype}")
    if maps.shape[1] > MAX_QUERIES:
        raise ValueError(f"number of queries: expected at most {MAX_QUERIES}, got {maps.shape[1]}")
    if not labels.is_contiguous():
        raise ValueError(f"labels: expected contiguous memory, got strides {labels.stride()}")
    if labels.numel() == 0:
        return Tiling(0, 0, ())
    batch, height, width = labels.shape
    rows = axis_tiles(map_size[0], float(extent[0]), height, TILE_H)
    columns = axis_tiles(map_size[1], float(extent[1]), width, TILE_W)
    arguments = (
        height, width, rows.scale, rows.rest, columns.scale, columns.rest, rows.offset, columns.offset,
        rows.taps, columns.taps, rows.tiles, columns.tiles,
    )  # fmt: skip
    return Tiling(rows.tiles * columns.tiles * batch, rows.taps * columns.taps, arguments)


def constants_of(maps: Tensor) -> dict[str, int]:
    """Compile-time constants of kernels that score all queries; ``maps`` is [B, Q, ...]."""
    queries = maps.shape[1]
    return {
        "TILE_H": TILE_H,
        "TILE_W": TILE_W,
        "TAPS": TAP_BLOCK,
        "QUERIES": max(16, min(QUERY_BLOCK, triton.next_power_of_2(queries))),
        "GROUPS": max(1, triton.cdiv(queries, QUERY_BLOCK)),
        "CLASSES": CLASS_BLOCK,
        "SPLIT": maps.dtype == torch.float32,
    }


def kernel_variant(
    name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, int], labels: str = "*u8"
) -> KernelVariant:
    """A kernel for masks of `dtype`; `labels` is Triton's type of the labels, ``*u8`` or ``*i16``."""
    types = {
        "labels": labels, "probabilities": "*fp16", "unproven": "*i32",
        **dict.fromkeys(("logits", "embeddings", "pixels"), f"*{ELEMENTS[dtype]}"),
        **dict.fromkeys(("scores", "margins", "largest"), "*fp32"),
    }  # fmt: skip
    aligned = (*(name for name in types if name in kernel.arg_names), "padded_classes")
    types |= dict.fromkeys(("scale_y", "rest_y", "scale_x", "rest_x"), "fp32")
    arguments = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return KernelVariant(name, kernel, arguments, constants, **LAUNCH, aligned=aligned)
