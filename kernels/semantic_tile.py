"""What the kernels of semantic inference share: masks of a tile, the argmax over classes, how tiles cover an output."""

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
"""A tile's masks of all queries are held in registers at once."""
TILE_H, TILE_W = 8, 16
TAP_BLOCK = 16
"""Taps multiplied at once; a tile with more of them takes more rounds."""
QUERY_BLOCK = 64
"""Queries resampled at once."""
CLASS_BLOCK = 32
"""Classes scored at once."""
LAUNCH = {"num_warps": 8, "num_stages": 2}
"""With these and the sizes above no target spills, nor lacks shared memory."""
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
SIZES = [
    "num_queries", "num_classes", "map_height", "map_width", "height", "width",
    "offset_y", "offset_x", "tap_rows", "tap_columns", "tiles_y", "tiles_x",
]  # fmt: skip
"""Arguments of any value: a kernel of its own for a size of 1 would be compiled for nothing."""


@triton.jit
def halves(resampled):
    """Masks [pixels, queries], scaled, as a sum of two float16."""
    masks = sigmoid(resampled) * SCALE
    high = masks.to(tl.float16)
    return high, (masks - high.to(tl.float32)).to(tl.float16)


@triton.jit
def load_taps(logits, query, present, tap, tile, stride_q, stride_y, stride_x, map_height, map_width, tap_columns):
    """Logits [taps, queries] float32 of a tile, -inf for queries that are not present; the taps' rows and columns."""
    first_y, first_x, _, _, _, _ = tile
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
    tile, stride_q, stride_y, stride_x, map_height, map_width, tap_rows, tap_columns, TAPS: tl.constexpr,
):  # fmt: skip
    """Of some queries at a tile's pixels, as `halves`."""
    _, _, low_y, share_y, low_x, share_x = tile
    resampled = tl.zeros((low_y.shape[0], query.shape[0]), tl.float32)
    for start in tl.range(0, tap_rows * tap_columns, TAPS):
        tap = start + tl.arange(0, TAPS)
        values, row, column = load_taps(
            logits, query, present, tap, tile, stride_q, stride_y, stride_x, map_height, map_width, tap_columns
        )
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
    queries,  # [QUERIES]: whose the first group's are; each further group's are the next QUERIES
    probabilities,  # [SPLIT + 1, num_rows, padded_classes] of the tile's image
    num_rows, num_classes, padded_classes,
    GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Product with the probabilities by blocks of classes, running argmax.

    -> for each pixel the best score, times SCALE twice, or -1 where all are NaN; its class, 0 there; with SECOND the
    next score, -1 where there is none.
    """
    pixels: tl.constexpr = masks[0][0].shape[0]
    column = tl.arange(0, CLASSES)
    # Maxima are kept for every column of the block and reduced at the end. Scores are not negative, and NaN beats
    # nothing: where all are NaN, -1 stays, with class 0.
    best = tl.full((pixels, CLASSES), -1.0, tl.float32)
    start_of_best = tl.zeros((pixels, CLASSES), tl.int32)
    second = tl.full((pixels, CLASSES), -1.0, tl.float32)
    rows: tl.constexpr = masks[0][0].shape[1]
    offsets = queries[:, None] * padded_classes + column[None, :]
    for start in tl.range(0, padded_classes, CLASSES):
        score = tl.zeros((pixels, CLASSES), tl.float32)
        for group in tl.static_range(GROUPS):
            source = probabilities + (start + group * rows * padded_classes) + offsets
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
def pixels_inside(image, y, x, height, width):
    """Offsets of pixels in the results, and which of them exist."""
    return (image * height + y) * width + x, (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def classify(
    masks, queries, probabilities, num_rows, num_classes, padded_classes,
    labels, scores, margins, image, y, x, height, width,
    GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr, SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    """`rank_classes`, stored."""
    value, label, runner_up = rank_classes(
        masks, queries, probabilities + image * (SPLIT + 1) * num_rows * padded_classes, num_rows, num_classes,
        padded_classes, GROUPS, CLASSES, SPLIT, MARGINS,
    )  # fmt: skip
    target, inside = pixels_inside(image, y, x, height, width)
    tl.store(labels + target, label.to(labels.dtype.element_ty), mask=inside)
    if SCORES:
        tl.store(scores + target, tl.where(value < 0.0, float("nan"), value / (SCALE * SCALE)), mask=inside)
    if MARGINS:
        margin = tl.where(runner_up < 0.0, float("inf"), (value - runner_up) / (SCALE * SCALE))
        tl.store(margins + target, tl.where(value < 0.0, float("nan"), margin), mask=inside)


@triton.jit
def classify_tile(
    index, labels, scores, margins,  # [B, H, W]
    probabilities,  # [B, SPLIT + 1, GROUPS * QUERIES, padded_classes]
    logits, stride_b, stride_q, stride_y, stride_x,  # [B, Q, h, w]
    num_queries, num_classes, padded_classes, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
    SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    """All queries and classes at the pixels of tile `index`, from logits."""
    image, y, x, first_y, first_x, low_y, share_y, low_x, share_x = tile_at(
        index, map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tiles_y, tiles_x,
        TILE_H, TILE_W,
    )  # fmt: skip
    tile = (first_y, first_x, low_y, share_y, low_x, share_x)
    masks = ()
    for group in tl.static_range(GROUPS):
        query = group * QUERIES + tl.arange(0, QUERIES)
        masks += (masks_of_logits(
            logits + image * stride_b, query, query < num_queries, tile,
            stride_q, stride_y, stride_x, map_height, map_width, tap_rows, tap_columns, TAPS,
        ),)  # fmt: skip
    classify(
        masks, tl.arange(0, QUERIES), probabilities, GROUPS * QUERIES, num_classes, padded_classes,
        labels, scores, margins, image, y, x, height, width, GROUPS, CLASSES, SPLIT, SCORES, MARGINS,
    )  # fmt: skip


class Tiling(NamedTuple):
    tiles: int
    taps: int  # that one of them reads
    arguments: tuple[int | float, ...]  # of the kernels, from `height` to `tiles_x`


def plan_tiles(maps: Tensor, map_size: torch.Size, extent: tuple[float, float], labels: Tensor) -> Tiling:
    """Check what would otherwise fail silently; how tiles cover the output."""
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
    """A kernel for masks of `dtype`. `labels` is Triton's type of them, ``*u8`` or ``*i16``."""
    types = {
        "labels": labels, "probabilities": "*fp16", "unproven": "*i32",
        **dict.fromkeys(("logits", "embeddings", "pixels"), f"*{ELEMENTS[dtype]}"),
        **dict.fromkeys(("scores", "margins", "largest"), "*fp32"),
    }  # fmt: skip
    aligned = (*(name for name in types if name in kernel.arg_names), "padded_classes")
    types |= dict.fromkeys(("scale_y", "rest_y", "scale_x", "rest_x"), "fp32")
    arguments = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return KernelVariant(name, kernel, arguments, constants, **LAUNCH, aligned=aligned)
