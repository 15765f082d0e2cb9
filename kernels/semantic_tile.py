"""Parts of the kernels of semantic inference: the argmax over classes, the results, the tiling of the output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.class_probabilities import SCALE
from maskformer_fast.kernels.resample import axis_tiles, tile_at
from maskformer_fast.kernels.variant import KernelVariant

TILE_H, TILE_W = 8, 16
"""Pixels of a tile."""
QUICK_QUERIES = 128
"""Most queries whose masks at a tile's pixels stay in registers beside the scores of a block of classes."""
TAP_BLOCK = 16
"""Taps multiplied at once, or twice as many where a tile has that many; with more taps it takes rounds."""
QUERY_BLOCK = 64
"""Queries resampled at once."""
LAUNCH = {"num_warps": 8, "num_stages": 2}
"""Options of every launch. With them and the sizes of the kernels no target spills registers or lacks shared memory."""
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Types of logits and embeddings -> Triton's names."""
SIZES = [
    "num_queries", "num_classes", "map_height", "map_width", "height", "width",
    "offset_y", "offset_x", "tap_rows", "tap_columns", "tiles_y", "tiles_x", "programs",
]  # fmt: skip
"""Arguments that are not specialised: a separate kernel for a size of 1 would be compiled without need."""
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_NAN = tl.constexpr(0x7F800000)
"""Bits of scores, read as integers, from which on a score is NaN; no sum of masks is infinite."""
_CODE = tl.constexpr(15)
"""Lowest bits of a score, in which `_keys` writes a class: with scores that differ by less, the lower class wins."""
_UNSCALE = tl.constexpr(1.0 / (SCALE.value * SCALE.value))


# Running argmax: the classes of a block of 64 are 8 groups x 4 lanes x 2, as a tensor core leaves them in registers.
# Each pixel has one candidate for each lane, so that lanes are compared once a tile and not once a block.
#
# ranks: best key [pixels, 4] int32, -1 where there is none, first class of its block, second key
# A key is a score's bits, which order not negative scores as their values do, with the class inside its lane of the
# block in the lowest 4 bits, the lower class as the larger number. They change a score by less than 2^-19 of it.


@triton.jit
def no_ranks(PIXELS: tl.constexpr):
    """Ranks of no class."""
    none = tl.full((PIXELS, 4), -1, tl.int32)
    return none, tl.zeros((PIXELS, 4), tl.int32), none


@triton.jit
def _keys(score):
    CLASSES: tl.constexpr = score.shape[1]
    code = _CODE - (tl.arange(0, CLASSES // 8)[:, None, None] * 2 + tl.arange(0, 2)[None, None, :])[None]
    bits = tl.reshape(score.to(tl.int32, bitcast=True), (score.shape[0], CLASSES // 8, 4, 2))
    if _INTERPRETED:
        keys = (bits & (0x7FFFFFFF - _CODE)) | code
    else:
        keys = tl.inline_asm_elementwise(  # the same, which the compiler would make two instructions
            "lop3.b32 $0, $1, $2, $3, 0xf8;", "=r,r,r,r",
            [bits, tl.full(bits.shape, 0x7FFFFFFF - _CODE, tl.int32), tl.broadcast_to(code, bits.shape)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return keys


@triton.jit
def rank_block(ranks, score, start, SECOND: tl.constexpr):
    """Ranks with the classes from `start` on, whose scores are given [pixels, 32 or 64]."""
    best, first, second = ranks
    keys = _keys(score)
    key = tl.max(tl.max(keys, 3), 1)
    if SECOND:
        others = tl.where(keys == key[:, None, :, None], -1, keys)  # the keys of a lane differ
        second = tl.maximum(tl.maximum(second, tl.max(tl.max(others, 3), 1)), tl.minimum(best, key))
    better = key > (best | _CODE)  # of equal scores the earlier block stays
    return tl.where(better, key, best), tl.where(better, start, first), second


@triton.jit
def winners(ranks):
    """Winning classes -> the bits of its score times SCALE^2 [pixels], the class, the bits of the second score."""
    best, first, second = ranks
    value = best & ~_CODE
    highest = tl.max(value, 1)
    code = _CODE - (best & _CODE)
    category = first + (code >> 1) * 8 + (code & 1) + tl.arange(0, 4)[None, :] * 2
    label = tl.min(tl.where(value == highest[:, None], category, 0x7FFFFFFF), 1)  # of equal scores the lower class
    runner_up = tl.max(tl.where(category == label[:, None], second, best), 1)
    return highest, label, tl.maximum(runner_up, 0) & ~_CODE


@triton.jit
def is_nan(highest):
    return highest >= _NAN


@triton.jit
def store_winners(
    results,  # labels, scores, margins, [H, W] each, of the tile's image
    ranks, num_classes, y, x, output_size, SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    """Store the results of a tile's pixels that are inside the output -> bits of the best scores."""
    labels, scores, margins = results
    height, width = output_size
    highest, label, runner_up = winners(ranks)
    target = y * width + x
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    valid = highest < _NAN
    tl.store(labels + target, tl.where(valid, label, 0).to(labels.dtype.element_ty), mask=inside)
    value = highest.to(tl.float32, bitcast=True) * _UNSCALE
    if SCORES:
        tl.store(scores + target, tl.where(valid, value, float("nan")), mask=inside)
    if MARGINS:
        margin = value - runner_up.to(tl.float32, bitcast=True) * _UNSCALE
        margin = tl.where(num_classes == 1, float("inf"), margin)
        tl.store(margins + target, tl.where(valid, margin, float("nan")), mask=inside)
    return highest


@triton.jit
def load_chances(
    probabilities, groups, padded_classes, start, ROWS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr
):
    """Probabilities [queries, CLASSES] of the groups and the classes from `start` on; where SPLIT then their rests."""
    chances = ()
    column = (start + tl.arange(0, CLASSES))[None, :]
    for part in tl.static_range(SPLIT + 1):
        for group in tl.static_range(len(groups)):
            row = (groups[group] + part * ROWS)[:, None]
            chances += (tl.load(probabilities + row * padded_classes + column),)
    return chances


@triton.jit
def score_block(masks, chances, FIRST: tl.constexpr, SPLIT: tl.constexpr):
    """Scores of a block of classes, whose probabilities are `load_chances` from place FIRST on."""
    highs, rests = masks
    GROUPS: tl.constexpr = len(highs)
    score = tl.dot(highs[0], chances[FIRST])
    for group in tl.static_range(1, GROUPS):
        score = tl.dot(highs[group], chances[FIRST + group], score)
    if SPLIT:
        for group in tl.static_range(GROUPS):
            score = tl.dot(rests[group], chances[FIRST + group], score)
            score = tl.dot(highs[group], chances[FIRST + GROUPS + group], score)
    return score


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


class Tiling(NamedTuple):
    """Tiles that cover one image of the output."""

    tiles: int
    taps: int  # of one tile
    arguments: tuple[int | float, ...]  # of the kernels, from `height` to `tiles_x`


def plan_tiles(maps: Tensor, map_size: torch.Size, extent: tuple[float, float], labels: Tensor) -> Tiling:
    """Check what would otherwise fail silently, and choose the tiles: none where there is no output."""
    if maps.dtype not in ELEMENTS:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, ELEMENTS))}, got {maps.dtype}")
    if not labels.is_contiguous():
        raise ValueError(f"labels: expected contiguous memory, got strides {labels.stride()}")
    if labels.numel() == 0:
        return Tiling(0, 0, ())
    height, width = labels.shape[1:]
    rows = axis_tiles(map_size[0], float(extent[0]), height, TILE_H)
    columns = axis_tiles(map_size[1], float(extent[1]), width, TILE_W)
    arguments = (
        height, width, rows.scale, rows.rest, columns.scale, columns.rest, rows.offset, columns.offset,
        rows.taps, columns.taps, rows.tiles, columns.tiles,
    )  # fmt: skip
    return Tiling(rows.tiles * columns.tiles, rows.taps * columns.taps, arguments)


def result_arguments(labels: Tensor, scores: Tensor | None, margins: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments for the results; one that is not wanted is never written, so that any pointer serves."""
    return labels, labels if scores is None else scores, labels if margins is None else margins


def shape_constants(dtype: torch.dtype, queries: int, classes: int) -> dict[str, int]:
    step = 16 if queries <= QUICK_QUERIES else QUERY_BLOCK
    return {"TILE_H": TILE_H, "TILE_W": TILE_W, "ROWS": max(1, triton.cdiv(queries, step)) * step,
            "CLASSES": 32 if classes <= 32 or dtype == torch.float32 else 64}  # fmt: skip


def variant_name(kernel: str, dtype: torch.dtype, parts: str, scores: bool, margins: bool) -> str:
    return f"semantic_{kernel}_{ELEMENTS[dtype]}_{parts}{'_scores' * scores}{'_margins' * margins}"


def kernel_variant(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, int],
    labels: str = "*u8",
    aligned: tuple[str, ...] = (),
) -> KernelVariant:
    """A kernel for masks of `dtype`; `labels` is Triton's type of the labels, ``*u8`` or ``*i16``."""
    types = {
        "labels": labels, "probabilities": "*fp16", "undone": "*i32",
        **dict.fromkeys(("logits", "embeddings", "pixels"), f"*{ELEMENTS[dtype]}"),
        **dict.fromkeys(("scores", "margins"), "*fp32"),
    }  # fmt: skip
    aligned = (*(name for name in types if name in kernel.arg_names), "padded_classes", *aligned)
    types |= dict.fromkeys(("scale_y", "rest_y", "scale_x", "rest_x"), "fp32")
    arguments = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return KernelVariant(name, kernel, arguments, constants, **LAUNCH, aligned=aligned)
