"""Semantic inference from embeddings: mask logits are computed inside the kernel for the taps of each tile.

One program computes one tile of the output as `semantic` does, which also states the precision, but for the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.class_probabilities import SCALE, class_probabilities
from maskformer_fast.kernels.resample import add_taps, narrow_maps, sigmoid, tap_weights
from maskformer_fast.kernels.semantic import semantic_from_logits
from maskformer_fast.kernels.semantic_masks import halves, query_groups
from maskformer_fast.kernels.semantic_tile import (
    LAUNCH,
    SIZES,
    TAP_BLOCK,
    kernel_variant,
    load_chances,
    no_ranks,
    place_tile,
    plan_tiles,
    rank_block,
    result_arguments,
    score_block,
    shape_constants,
    store_winners,
    variant_name,
)
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant

EMBEDDED_QUERIES = 256
"""Most queries whose masks are computed from embeddings inside the kernel."""
DEPTH_BLOCKS = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 16}
"""Channels of embeddings multiplied at once."""
FUSED_REPEATS = 4
"""Most times that tiles may compute one logit for logits to be computed inside the kernel. Not measured on a GPU."""


@triton.jit
def _masks_of_embeddings(
    embeddings,  # [Q, D] of the tile's image
    embedding_strides,
    pixels,  # [D, h, w] of the tile's image
    pixel_strides,
    depth,
    query,  # [QUERIES] int32
    present,  # [QUERIES]: the masks of others are 0
    tile,
    geometry,
    TAPS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Masks of the given queries at a tile's pixels, as `halves`."""
    stride_eq, stride_ed = embedding_strides
    stride_d, stride_y, stride_x = pixel_strides
    map_size, _, _, _, tap_counts, _ = geometry
    map_height, map_width = map_size
    tap_rows, tap_columns = tap_counts
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
    return halves(sigmoid(resampled) * SCALE)


@triton.jit(do_not_specialize=[*SIZES, "depth"])
def _semantic_embeddings_kernel(
    labels, scores, margins,  # [B, H, W]
    probabilities,  # [B, SPLIT + 1, ROWS, padded_classes]
    embeddings, stride_eb, stride_eq, stride_ed,  # [B, Q, D]
    pixels, stride_b, stride_d, stride_y, stride_x,  # [B, D, h, w]
    num_queries, num_classes, padded_classes, depth, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr, SPLIT: tl.constexpr, SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    geometry = (
        (map_height, map_width), (height, width), (scale_y, rest_y, scale_x, rest_x), (offset_y, offset_x),
        (tap_rows, tap_columns), (tiles_y, tiles_x),
    )  # fmt: skip
    image, y, x, tile = place_tile(tl.program_id(0), geometry, TILE_H, TILE_W)
    groups = query_groups(ROWS)
    highs = ()
    rests = ()
    for group in tl.static_range(len(groups)):
        high, rest = _masks_of_embeddings(
            embeddings + image * stride_eb, (stride_eq, stride_ed),
            pixels + image * stride_b, (stride_d, stride_y, stride_x),
            depth, groups[group], groups[group] < num_queries, tile, geometry, TAPS, DEPTH,
        )  # fmt: skip
        highs += (high,)
        rests += (rest,)
    probabilities += image * (SPLIT + 1) * ROWS * padded_classes
    ranks = no_ranks(TILE_H * TILE_W)
    for start in tl.range(0, padded_classes, CLASSES):
        chances = load_chances(probabilities, groups, padded_classes, start, ROWS, CLASSES, SPLIT)
        ranks = rank_block(ranks, score_block((highs, rests), chances, 0, SPLIT), start, MARGINS)
    offset = image * height * width
    results = (labels + offset, scores + offset, margins + offset)
    store_winners(results, ranks, num_classes, y, x, (height, width), SCORES, MARGINS)


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
    """Run `semantic_from_logits` on the mask logits ``einsum("bqd,bdhw->bqhw", embeddings, pixels)``.

    With `fused` the kernel computes the logits, in float32; otherwise a matrix product writes them, in the inputs'
    dtype. With None, `FUSED_REPEATS` decides.

    Raises ValueError also for a fused call of more than `EMBEDDED_QUERIES` queries.
    """
    if embeddings.dtype != pixels.dtype:
        raise ValueError(f"pixels: expected the embeddings' dtype {embeddings.dtype}, got {pixels.dtype}")
    tiling = plan_tiles(embeddings, pixels.shape[2:], extent, labels)
    batch, queries = embeddings.shape[:2]
    if fused and queries > EMBEDDED_QUERIES:
        raise ValueError(f"number of queries: expected at most {EMBEDDED_QUERIES} for a fused call, got {queries}")
    if not tiling.tiles:
        return
    if fused is None:
        computed = batch * tiling.tiles * triton.cdiv(tiling.taps, TAP_BLOCK) * TAP_BLOCK
        repeats = computed / max(1, batch * pixels.shape[2] * pixels.shape[3])
        fused = queries <= EMBEDDED_QUERIES and repeats <= FUSED_REPEATS
    if not fused:
        logits = pixels.permute(0, 2, 3, 1).flatten(1, 2) @ embeddings.mT  # [B, h*w, Q]: queries innermost
        logits = logits.unflatten(1, pixels.shape[2:]).permute(0, 3, 1, 2)
        semantic_from_logits(logits, class_logits, extent, labels, scores, margins)
        return
    pixels = narrow_maps(pixels)
    constants = embeddings_constants(embeddings.dtype, queries, scores is not None, margins is not None)
    with torch.cuda.device_of(labels):
        chances = class_probabilities(class_logits, constants["ROWS"], constants["CLASSES"], constants["SPLIT"])
        _semantic_embeddings_kernel[(batch * tiling.tiles,)](
            *result_arguments(labels, scores, margins), chances,
            embeddings, *embeddings.stride(),
            pixels, *pixels.stride(),
            queries, class_logits.shape[2] - 1, chances.shape[3], *pixels.shape[1:],
            *tiling.arguments, **constants, **LAUNCH,
        )  # fmt: skip


def embeddings_constants(dtype: torch.dtype, queries: int, scores: bool, margins: bool) -> dict[str, int]:
    """Compile-time constants of the kernel that computes masks from embeddings."""
    return {
        **shape_constants(dtype, queries, 1), "CLASSES": 16 if margins else 32, "TAPS": TAP_BLOCK,
        "DEPTH": DEPTH_BLOCKS[dtype], "SPLIT": dtype == torch.float32, "SCORES": scores, "MARGINS": margins,
    }  # fmt: skip


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time."""
    return [
        embeddings_variant(torch.float16, 100),
        embeddings_variant(torch.bfloat16, EMBEDDED_QUERIES),
        embeddings_variant(torch.float32, EMBEDDED_QUERIES, scores=True, margins=True),
    ]


def embeddings_variant(
    dtype: torch.dtype, queries: int, scores: bool = False, margins: bool = False, labels: str = "*u8"
) -> KernelVariant:
    """Specialisation for contiguous embeddings and pixels."""
    constants = embeddings_constants(dtype, queries, scores, margins) | {"stride_ed": 1, "stride_x": 1}
    name = variant_name("embeddings", dtype, f"q{queries}", scores, margins)
    return kernel_variant(name, _semantic_embeddings_kernel, dtype, constants, labels)


def goal_calls() -> list[GoalLaunch]:
    """None: the network writes mask logits."""
    return []
