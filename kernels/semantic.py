"""Semantic inference in one kernel: labels of the output's pixels, nothing of size Q*H*W or K*H*W in memory.

label(y, x) = argmax_c sum_q P[q, c] * sigmoid(bilinear(mask logits)[q, y, x]), P = softmax(class logits) less its last
column (paper section 3.4). One program makes one tile of output pixels:

    resampling (`resample`) -> [pixels, queries] -> sigmoid -> @ P [queries, classes] -> running argmax.

The logits are read from memory (`semantic_from_logits`) or multiplied out of embeddings for just the tile's taps
(`semantic_from_embeddings`).

Precision: everything is summed in float32. Masks and P are multiplied as float16, scaled so that small values keep
their bits. For float32 inputs each is the sum of two such halves, which makes three products: results are those of
float32, scores within 1e-5 x max(1, score). For float16 and bfloat16 inputs one rounding remains: scores are within
2e-3 x max(1, score).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.class_probabilities import SCALE, class_probabilities, class_probabilities_variant
from maskformer_fast.kernels.resample import add_taps, axis_tiles, sigmoid, tap_weights, tile_of_program
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
DEPTH_BLOCKS = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 16}
"""Channels of embeddings multiplied at once."""
LAUNCH = {"num_warps": 8, "num_stages": 2}
"""With these and the sizes above no target spills, nor lacks shared memory."""
FUSED_REPEATS = 4
"""Logits are computed inside the kernel where tiles compute each at most as often as this. A guess: a GPU must tell."""

_ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_SIZES = [
    "num_queries", "num_classes", "map_height", "map_width", "height", "width",
    "offset_y", "offset_x", "tap_rows", "tap_columns", "tiles_y", "tiles_x",
]  # fmt: skip
"""Arguments of any value: a kernel of its own for a size of 1 would be compiled for nothing."""


@triton.jit
def _halves(resampled):
    """Masks [pixels, queries], scaled, as a sum of two float16."""
    masks = sigmoid(resampled) * SCALE
    high = masks.to(tl.float16)
    return high, (masks - high.to(tl.float32)).to(tl.float16)


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
def _classify(
    masks,  # GROUPS of [pixels, QUERIES], each a sum of two float16
    image, y, x, labels, scores, margins, probabilities, num_classes, padded_classes, height, width,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
    SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    """Product with the probabilities by blocks of classes, running argmax; stores the tile's results."""
    pixels: tl.constexpr = y.shape[0]
    column = tl.arange(0, CLASSES)
    step_to_rest = GROUPS * QUERIES * padded_classes
    source = probabilities + image * (SPLIT + 1) * step_to_rest
    source += tl.arange(0, QUERIES)[:, None] * padded_classes + column[None, :]
    # Maxima are kept for every column of the block and reduced at the end. Scores are not negative, and NaN beats
    # nothing: where all are NaN, -1 stays, with class 0.
    best = tl.full((pixels, CLASSES), -1.0, tl.float32)
    start_of_best = tl.zeros((pixels, CLASSES), tl.int32)
    second = tl.full((pixels, CLASSES), -1.0, tl.float32)
    for start in tl.range(0, padded_classes, CLASSES):
        score = tl.zeros((pixels, CLASSES), tl.float32)
        for group in tl.static_range(GROUPS):
            chances = source + (group * QUERIES * padded_classes + start)
            score = _add_queries(score, masks[group], chances, step_to_rest, SPLIT)
        if MARGINS:  # the repeated last class would be its own runner-up
            score = tl.where((start + column < num_classes)[None, :], score, -1.0)
            second = tl.where(score > best, best, tl.maximum(second, score))
        start_of_best = tl.where(score > best, start, start_of_best)
        best = tl.where(score > best, score, best)
    value = tl.max(best, 1)
    category = start_of_best + column[None, :]
    label = tl.min(tl.where(best == value[:, None], category, 0x7FFFFFFF), 1)  # of equal scores the lower class
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    target = (image * height + y) * width + x
    # a repeated last class could win by rounding only
    tl.store(labels + target, tl.minimum(label, num_classes - 1).to(labels.dtype.element_ty), mask=inside)
    if SCORES:
        tl.store(scores + target, tl.where(value < 0.0, float("nan"), value / (SCALE * SCALE)), mask=inside)
    if MARGINS:
        runner_up = tl.max(tl.where(category == label[:, None], second, best), 1)
        margin = tl.where(runner_up < 0.0, float("inf"), (value - runner_up) / (SCALE * SCALE))
        tl.store(margins + target, tl.where(value < 0.0, float("nan"), margin), mask=inside)


@triton.jit
def _masks_of_logits(
    logits, query, present, tile, stride_q, stride_y, stride_x, map_height, map_width, tap_rows, tap_columns,
    TAPS: tl.constexpr,
):  # fmt: skip
    first_y, first_x, low_y, share_y, low_x, share_x = tile
    resampled = tl.zeros((low_y.shape[0], query.shape[0]), tl.float32)
    source = logits + query.to(tl.int64)[None, :] * stride_q
    for start in tl.range(0, tap_rows * tap_columns, TAPS):
        tap = start + tl.arange(0, TAPS)
        row, column = first_y + tap // tap_columns, first_x + tap % tap_columns
        place = tl.minimum(row, map_height - 1) * stride_y + tl.minimum(column, map_width - 1) * stride_x
        values = tl.load(source + place[:, None], mask=present[None, :], other=0.0).to(tl.float32)
        resampled = add_taps(resampled, tap_weights(row, column, low_y, share_y, low_x, share_x), values)
    return _halves(resampled)


@triton.jit(do_not_specialize=_SIZES)
def _semantic_logits_kernel(
    labels, scores, margins,  # [B, H, W]
    probabilities,  # [B, SPLIT + 1, GROUPS * QUERIES, padded_classes]
    logits, stride_b, stride_q, stride_y, stride_x,  # [B, Q, h, w]
    num_queries, num_classes, padded_classes, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
    SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    image, y, x, first_y, first_x, low_y, share_y, low_x, share_x = tile_of_program(
        map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tiles_y, tiles_x, TILE_H, TILE_W
    )
    tile = (first_y, first_x, low_y, share_y, low_x, share_x)
    masks = ()
    for group in tl.static_range(GROUPS):
        query = group * QUERIES + tl.arange(0, QUERIES)
        masks += (_masks_of_logits(
            logits + image * stride_b, query, query < num_queries, tile,
            stride_q, stride_y, stride_x, map_height, map_width, tap_rows, tap_columns, TAPS,
        ),)  # fmt: skip
    _classify(
        masks, image, y, x, labels, scores, margins, probabilities, num_classes, padded_classes,
        height, width, QUERIES, GROUPS, CLASSES, SPLIT, SCORES, MARGINS,
    )  # fmt: skip


@triton.jit
def _masks_of_embeddings(
    embeddings, pixels, query, present, tile, stride_eq, stride_ed, stride_d, stride_y, stride_x,
    depth, map_height, map_width, tap_rows, tap_columns, TAPS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    first_y, first_x, low_y, share_y, low_x, share_x = tile
    resampled = tl.zeros((low_y.shape[0], query.shape[0]), tl.float32)
    for start in tl.range(0, tap_rows * tap_columns, TAPS):
        tap = start + tl.arange(0, TAPS)
        row, column = first_y + tap // tap_columns, first_x + tap % tap_columns
        place = tl.minimum(row, map_height - 1) * stride_y + tl.minimum(column, map_width - 1) * stride_x
        values = tl.zeros((TAPS, query.shape[0]), tl.float32)
        for first in tl.range(0, depth, DEPTH):
            channel = (first + tl.arange(0, DEPTH)).to(tl.int64)
            here = channel < depth
            pixel = tl.load(pixels + place[:, None] + channel[None, :] * stride_d, mask=here[None, :], other=0.0)
            embedding = tl.load(
                embeddings + channel[:, None] * stride_ed + query[None, :] * stride_eq,
                mask=here[:, None] & present[None, :],
                other=0.0,
            )
            values = tl.dot(pixel, embedding, values, input_precision="tf32x3")  # products of halves are exact anyway
        resampled = add_taps(resampled, tap_weights(row, column, low_y, share_y, low_x, share_x), values)
    return _halves(resampled)


@triton.jit(do_not_specialize=[*_SIZES, "depth"])
def _semantic_embeddings_kernel(
    labels, scores, margins,  # [B, H, W]
    probabilities,  # [B, SPLIT + 1, GROUPS * QUERIES, padded_classes]
    embeddings, stride_eb, stride_eq, stride_ed,  # [B, Q, D]
    pixels, stride_b, stride_d, stride_y, stride_x,  # [B, D, h, w]
    num_queries, num_classes, padded_classes, depth, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr, DEPTH: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
    SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    image, y, x, first_y, first_x, low_y, share_y, low_x, share_x = tile_of_program(
        map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tiles_y, tiles_x, TILE_H, TILE_W
    )
    tile = (first_y, first_x, low_y, share_y, low_x, share_x)
    masks = ()
    for group in tl.static_range(GROUPS):
        query = group * QUERIES + tl.arange(0, QUERIES)
        masks += (_masks_of_embeddings(
            embeddings + image * stride_eb, pixels + image * stride_b, query, query < num_queries, tile, stride_eq,
            stride_ed, stride_d, stride_y, stride_x, depth, map_height, map_width, tap_rows, tap_columns, TAPS, DEPTH,
        ),)  # fmt: skip
    _classify(
        masks, image, y, x, labels, scores, margins, probabilities, num_classes, padded_classes,
        height, width, QUERIES, GROUPS, CLASSES, SPLIT, SCORES, MARGINS,
    )  # fmt: skip


class _Tiling(NamedTuple):
    programs: int
    taps: int  # that one of them reads
    arguments: tuple[int | float, ...]  # of the kernels, from `height` to `tiles_x`


def semantic_from_logits(
    mask_logits: Tensor,  # [B, Q, h, w] float16, bfloat16 or float32, any strides
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    labels: Tensor,  # [B, H, W] uint8 or int16, written
    scores: Tensor | None = None,  # [B, H, W] float32, written
    margins: Tensor | None = None,  # [B, H, W] float32, written
) -> None:
    """Labels and, where given room, the winner's score and its lead over the runner-up, as the module says.

    `extent` is the part of the maps that the output covers, height and width in map pixels. Infinite logits count as
    ±1e30. A NaN logit makes the pixels that it is interpolated to label 0 with NaN score and margin, a query whose
    probabilities are NaN the whole image. Fastest where queries are innermost in memory (a matrix product can write
    them so): a tap's logits then lie side by side.

    Raises ValueError for more than `MAX_QUERIES` queries and for other dtypes.
    """
    tiling = _tiling(mask_logits, mask_logits.shape[2:], extent, labels)
    if not tiling.programs:
        return
    with torch.cuda.device_of(labels):
        constants = _constants(mask_logits, scores is not None, margins is not None)
        _semantic_logits_kernel[(tiling.programs,)](
            *_results(labels, scores, margins),
            chances := _chances(class_logits, constants),
            mask_logits, *mask_logits.stride(),
            mask_logits.shape[1], class_logits.shape[2] - 1, chances.shape[3], *mask_logits.shape[2:],
            *tiling.arguments, **constants, **LAUNCH,
        )  # fmt: skip


def semantic_from_embeddings(
    embeddings: Tensor,  # [B, Q, D] of masks
    pixels: Tensor,  # [B, D, h, w] of the same dtype
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    labels: Tensor,  # [B, H, W] uint8 or int16, written
    scores: Tensor | None = None,  # [B, H, W] float32, written
    margins: Tensor | None = None,  # [B, H, W] float32, written
    fused: bool | None = None,
) -> None:
    """`semantic_from_logits` of the mask logits ``einsum("bqd,bdhw->bqhw", embeddings, pixels)``.

    `fused` computes the logits inside the kernel, in float32; otherwise a matrix product writes them, in the inputs'
    dtype. None decides by `FUSED_REPEATS`.
    """
    if embeddings.dtype != pixels.dtype:
        raise ValueError(f"pixels: expected the embeddings' dtype {embeddings.dtype}, got {pixels.dtype}")
    tiling = _tiling(embeddings, pixels.shape[2:], extent, labels)
    if not tiling.programs:
        return
    if fused is None:
        computed = tiling.programs * triton.cdiv(tiling.taps, TAP_BLOCK) * TAP_BLOCK
        fused = computed <= FUSED_REPEATS * len(pixels) * pixels.shape[2] * pixels.shape[3]
    if not fused:
        logits = pixels.permute(0, 2, 3, 1).flatten(1, 2) @ embeddings.mT  # [B, h*w, Q]: queries innermost
        logits = logits.unflatten(1, pixels.shape[2:]).permute(0, 3, 1, 2)
        semantic_from_logits(logits, class_logits, extent, labels, scores, margins)
        return
    with torch.cuda.device_of(labels):
        constants = _constants(embeddings, scores is not None, margins is not None)
        _semantic_embeddings_kernel[(tiling.programs,)](
            *_results(labels, scores, margins),
            chances := _chances(class_logits, constants),
            embeddings, *embeddings.stride(),
            pixels, *pixels.stride(),
            embeddings.shape[1], class_logits.shape[2] - 1, chances.shape[3], *pixels.shape[1:],
            *tiling.arguments, **constants, DEPTH=DEPTH_BLOCKS[pixels.dtype], **LAUNCH,
        )  # fmt: skip


def _tiling(maps: Tensor, map_size: torch.Size, extent: tuple[float, float], labels: Tensor) -> _Tiling:
    """Check what would otherwise fail silently; how tiles cover the output."""
    if maps.dtype not in _ELEMENTS:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _ELEMENTS))}, got {maps.dtype}")
    if maps.shape[1] > MAX_QUERIES:
        raise ValueError(f"number of queries: expected at most {MAX_QUERIES}, got {maps.shape[1]}")
    if not labels.is_contiguous():
        raise ValueError(f"labels: expected contiguous memory, got strides {labels.stride()}")
    if labels.numel() == 0:
        return _Tiling(0, 0, ())
    batch, height, width = labels.shape
    rows = axis_tiles(map_size[0], float(extent[0]), height, TILE_H)
    columns = axis_tiles(map_size[1], float(extent[1]), width, TILE_W)
    arguments = (
        height, width, rows.scale, rows.rest, columns.scale, columns.rest, rows.offset, columns.offset,
        rows.taps, columns.taps, rows.tiles, columns.tiles,
    )  # fmt: skip
    return _Tiling(rows.tiles * columns.tiles * batch, rows.taps * columns.taps, arguments)


def _results(labels: Tensor, scores: Tensor | None, margins: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What is not wanted is never written; any pointer will do."""
    return labels, labels if scores is None else scores, labels if margins is None else margins


def _chances(class_logits: Tensor, constants: dict[str, Any]) -> Tensor:
    rows = constants["GROUPS"] * constants["QUERIES"]
    return class_probabilities(class_logits, rows, constants["CLASSES"], constants["SPLIT"])


def _constants(maps: Tensor, scores: bool, margins: bool) -> dict[str, Any]:
    """Compile-time constants of both kernels; ``maps`` is [B, Q, ...]."""
    queries = maps.shape[1]
    return {
        "TILE_H": TILE_H,
        "TILE_W": TILE_W,
        "TAPS": TAP_BLOCK,
        "QUERIES": max(16, min(QUERY_BLOCK, triton.next_power_of_2(queries))),
        "GROUPS": max(1, triton.cdiv(queries, QUERY_BLOCK)),
        "CLASSES": CLASS_BLOCK,
        "SPLIT": maps.dtype == torch.float32,
        "SCORES": scores,
        "MARGINS": margins,
    }


def variants() -> list[KernelVariant]:
    """What is compiled ahead of time."""
    shapes = ((torch.float16, 128), (torch.bfloat16, MAX_QUERIES), (torch.float32, MAX_QUERIES))
    found = [semantic_variant(form, *shape) for form in ("logits", "embeddings") for shape in shapes]
    found.append(semantic_variant("logits", torch.float32, MAX_QUERIES, scores=True, margins=True))
    return [*found, class_probabilities_variant(split=False), class_probabilities_variant(split=True)]


def semantic_variant(
    form: str, dtype: torch.dtype, queries: int, scores: bool = False, margins: bool = False, labels: str = "*u8"
) -> KernelVariant:
    """The kernel for contiguous inputs of at most so many queries. `form` is "logits" or "embeddings", `labels`
    Triton's type of them, ``*u8`` or ``*i16``."""
    kernel = _semantic_embeddings_kernel if form == "embeddings" else _semantic_logits_kernel
    constants = _constants(torch.empty(0, queries, dtype=dtype), scores, margins) | {"stride_x": 1}
    if form == "embeddings":
        constants |= {"DEPTH": DEPTH_BLOCKS[dtype], "stride_ed": 1}
    element = f"*{_ELEMENTS[dtype]}"
    types = {
        "labels": labels, "scores": "*fp32", "margins": "*fp32", "probabilities": "*fp16",
        "logits": element, "embeddings": element, "pixels": element,
    }  # fmt: skip
    aligned = (*(name for name in types if name in kernel.arg_names), "padded_classes")
    types |= dict.fromkeys(("scale_y", "rest_y", "scale_x", "rest_x"), "fp32")
    arguments = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    rows = constants["GROUPS"] * constants["QUERIES"]
    name = f"semantic_{form}_{_ELEMENTS[dtype]}_q{rows}{'_scores' * scores}{'_margins' * margins}"
    return KernelVariant(name, kernel, arguments, constants, **LAUNCH, aligned=aligned)
