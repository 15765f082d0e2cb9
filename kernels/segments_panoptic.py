"""Panoptic inference: the winning query of each pixel, the overlap filter of queries, and the numbers of segments.

Three kernels, one after the other, with nothing of size N*H*W in memory and no copy to the host:

- `_claim_kernel`, a tile of output pixels a program: argmax over the queries of score x sigmoid, one query at a time.
  A query is skipped where its largest tap in the tile proves that it neither wins nor owns a pixel. Writes the winners
  and counts pixels, with atomics of integers, whose order has no effect.
- `_decide_kernel`, an image a program: overlap filter, merging of stuff, numbers and areas.
- `_number_kernel`: replaces winners by numbers of segments, in place.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.resample import LIMIT, sigmoid
from maskformer_fast.kernels.segments_taps import (
    ELEMENTS,
    STRIDES,
    WINDOW,
    interpolate,
    pixel_taps,
    tap_bounds,
    tap_range,
    window_arguments,
    window_types,
)
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

MAX_QUERIES = 256
"""Most queries: one program decides for all queries of an image at once."""
TILE_H, TILE_W = 8, 8
"""Pixels of a program, one warp: sums over a tile need no shared memory. With twice as many, some targets spill."""
TAP_H, TAP_W = 4, 8
"""Taps read together, one a lane: more than a tile has at scale 4."""
PIXEL_BLOCK = 1024
"""Pixels that one program numbers. Not measured on a GPU."""
CLAIM_LAUNCH = {"num_warps": 1, "num_stages": 2}
_VOID = tl.constexpr(-1)
_CONSTANTS = {"TILE_H": TILE_H, "TILE_W": TILE_W, "TAP_H": TAP_H, "TAP_W": TAP_W}
_RULES = {
    "maskformer": {"SCALED": False, "INTERSECT": False},
    "mask2former": {"SCALED": False, "INTERSECT": True},
    "huggingface": {"SCALED": True, "INTERSECT": False},
}


@triton.jit(do_not_specialize=[*WINDOW, "tiles_y", "tiles_x"], do_not_specialize_on_alignment=STRIDES)
def _claim_kernel(
    winners,  # [B, H, W] int32, num_queries where there is none
    counts,  # [B, 3, num_queries] int64, zeros: pixels that each query won, owns, won and owns
    scores,  # [B, num_queries] float32
    categories,  # [B, num_queries] int64
    logits, stride_b, stride_q, stride_y, stride_x, num_queries, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, tiles_y, tiles_x,
    SCALED: tl.constexpr, INTERSECT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
):  # fmt: skip
    """Find each pixel's winner and count the pixels of queries.

    With SCALED a query owns pixels where score x sigmoid >= 0.5, else where sigmoid >= 0.5. With INTERSECT a segment is
    the pixels that were won and are owned.
    """
    program = tl.program_id(0)
    image = (program // (tiles_y * tiles_x)).to(tl.int64)
    top = program // tiles_x % tiles_y * TILE_H
    left = program % tiles_x * TILE_W
    y = top + tl.arange(0, TILE_H)
    x = left + tl.arange(0, TILE_W)
    inside = (y < height)[:, None] & (x < width)[None, :]
    rows = pixel_taps(y, scale_y, rest_y, map_height, stride_y)
    columns = pixel_taps(x, scale_x, rest_x, map_width, stride_x)
    row_taps = tap_range(top, tl.minimum(top + TILE_H, height) - 1, scale_y, rest_y, map_height)
    column_taps = tap_range(left, tl.minimum(left + TILE_W, width) - 1, scale_x, rest_x, map_width)
    tap_count = (row_taps[1] - row_taps[0] + 1) * (column_taps[1] - column_taps[0] + 1)
    worth_bounding = tap_count * 2 <= TILE_H * TILE_W  # where maps shrink, a tile has more taps than its pixels read

    best = tl.where(inside, -1.0, float("inf"))
    least_best = -1.0
    winner = tl.zeros((TILE_H, TILE_W), tl.int32) + num_queries  # if INTERSECT, ~query where it won but does not own
    won_counts = counts + image * 3 * num_queries
    source = logits + image * stride_b
    for query in tl.range(0, num_queries):
        if tl.load(categories + image * num_queries + query) >= 0:
            score = tl.load(scores + image * num_queries + query)
            score = tl.where(score > 0.0, score, 0.0)  # NaN is 0 too
            most = LIMIT
            if worth_bounding:
                _, most = tap_bounds(source, row_taps, column_taps, stride_y, stride_x, TAP_H, TAP_W)
            highest = score * sigmoid(most) * 1.000004  # beyond all rounding
            may_own = highest >= 0.5 if SCALED else most >= 0.0
            if may_own | (highest > least_best):
                logit = interpolate(source, rows, columns)
                value = score * sigmoid(logit)
                owns = value >= 0.5 if SCALED else logit >= 0.0
                owned = tl.sum((owns & inside).to(tl.int32))
                tl.atomic_add(won_counts + num_queries + query, owned.to(tl.int64), mask=owned > 0, sem="relaxed")
                better = value > best  # strictly: of equals the first wins
                winner = tl.where(better, tl.where(owns, query, ~query) if INTERSECT else query, winner)
                best = tl.where(better, value, best)
                least_best = tl.min(best)
        source += stride_q

    winner_owns = winner >= 0
    if INTERSECT:
        winner = tl.where(winner_owns, winner, ~winner)
    first = tl.min(tl.where(inside, winner, num_queries))
    last = tl.max(tl.where(inside & (winner < num_queries), winner, -1))
    for query in tl.range(first, last + 1):  # most tiles have one winner, or few neighbours
        here = (winner == query) & inside
        won = tl.sum(here.to(tl.int32))
        tl.atomic_add(won_counts + query, won.to(tl.int64), mask=won > 0, sem="relaxed")
        if INTERSECT:
            both = tl.sum((here & winner_owns).to(tl.int32))
            tl.atomic_add(won_counts + 2 * num_queries + query, both.to(tl.int64), mask=both > 0, sem="relaxed")
    if INTERSECT:
        winner = tl.where(winner_owns, winner, num_queries)
    tl.store(winners + (image * height + y[:, None]) * width + x[None, :], winner, mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_classes", "area_row", "threshold_bits", "strict"])
def _decide_kernel(
    ids,  # [B, num_queries] int32
    areas,  # [B, num_queries] int64
    counts,  # [B, 3, num_queries] int64
    categories,  # [B, num_queries] int64
    is_thing,  # [num_classes] uint8
    num_queries, num_classes,
    area_row,  # of counts, 0 or 2: which pixels are a segment's
    threshold_bits,  # of a float64, which Triton would pass as float32
    strict,  # 1: a ratio equal to the threshold is not enough
    QUERIES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    query = tl.arange(0, QUERIES)
    present = query < num_queries
    won_counts = counts + image * 3 * num_queries + query
    won = tl.load(won_counts, mask=present, other=0)
    owned = tl.load(won_counts + num_queries, mask=present, other=0)
    area = tl.load(won_counts + area_row * num_queries, mask=present, other=0)
    threshold = threshold_bits.to(tl.int64).to(tl.float64, bitcast=True)
    ratio = won.to(tl.float64) / tl.maximum(owned, 1).to(tl.float64)
    enough = (ratio > threshold) | ((ratio == threshold) & (strict == 0))
    kept = (area > 0) & (owned > 0) & enough
    category = tl.load(categories + image * num_queries + query, mask=present, other=_VOID)
    known = (category >= 0) & (category < num_classes)
    thing = tl.load(is_thing + category, mask=known, other=1)
    # 1 + the class of queries whose segment joins others of it, 0 elsewhere
    stuff = tl.where(kept & (thing == 0), category + 1, 0).to(tl.int32)
    first = query
    for step in tl.range(0, num_queries):  # backwards, so that the first of a class is written last
        other = num_queries - 1 - step
        wanted = tl.sum(tl.where(query == other, stuff, 0))
        first = tl.where((stuff > 0) & (stuff == wanted), other, first)
    number = tl.cumsum((kept & (first == query)).to(tl.int32), 0)
    segment = tl.where(kept, tl.gather(number, first, 0), _VOID)
    tl.store(ids + image * num_queries + query, segment, mask=present)
    tl.store(areas + image * num_queries + query, area, mask=present)


@triton.jit(do_not_specialize=["num_queries", "num_pixels", "num_blocks"])
def _number_kernel(
    id_map,  # [B, num_pixels] int32: queries become their segments' numbers
    ids,  # [B, num_queries] int32
    num_queries, num_pixels, num_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // num_blocks).to(tl.int64)
    pixel = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    place = id_map + image * num_pixels + pixel
    winner = tl.load(place, mask=inside, other=0)
    segment = tl.load(ids + image * num_queries + winner, mask=inside & (winner < num_queries), other=_VOID)
    tl.store(place, segment, mask=inside)


def panoptic_segments(
    mask_logits: Tensor,  # [B, N, h, w] float16, bfloat16 or float32, any strides
    scores: Tensor,  # [B, N] float32, contiguous
    categories: Tensor,  # [B, N] int64, contiguous; negative for a query that takes no part
    is_thing: Tensor,  # [K] bool, contiguous
    extent: tuple[float, float],
    overlap_threshold: float,
    rule: str,
    id_map: Tensor,  # [B, H, W] int32, written
    ids: Tensor,  # [B, N] int32, written
    areas: Tensor,  # [B, N] int64, written
) -> None:
    """Write the results of the operator `panoptic_inference` for the part `extent` of the maps.

    NaN logits count as -1e30, values beyond ±1e30 as ±1e30, a negative or NaN score as 0, a category from K on as a
    thing's. Counts are exact for any order of programs. Raises ValueError for more than `MAX_QUERIES` queries and for
    other dtypes.
    """
    batch, queries = mask_logits.shape[:2]
    height, width = id_map.shape[1:]
    if queries > MAX_QUERIES:
        raise ValueError(f"number of queries: expected at most {MAX_QUERIES}, got {queries}")
    window = window_arguments(mask_logits, extent, (height, width))
    if batch == 0:
        return
    constants = _RULES[rule]
    tiles_y, tiles_x = triton.cdiv(height, TILE_H), triton.cdiv(width, TILE_W)
    blocks = triton.cdiv(height * width, PIXEL_BLOCK)
    with torch.cuda.device_of(id_map):
        counts = areas.new_zeros((batch, 3, queries))
        _claim_kernel[(batch * tiles_y * tiles_x,)](
            id_map, counts, scores, categories, *window, tiles_y, tiles_x, **constants, **_CONSTANTS, **CLAIM_LAUNCH
        )
        _decide_kernel[(batch,)](
            ids, areas, counts, categories, is_thing.view(torch.uint8), queries, len(is_thing),
            2 if constants["INTERSECT"] else 0, struct.unpack("q", struct.pack("d", overlap_threshold))[0],
            int(rule == "huggingface"), QUERIES=MAX_QUERIES,
        )  # fmt: skip
        _number_kernel[(batch * blocks,)](id_map, ids, queries, height * width, blocks, BLOCK=PIXEL_BLOCK)


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: float32 for all rules, half precision for the default rule."""
    types = {
        "ids": "*i32", "areas": "*i64", "counts": "*i64", "categories": "*i64", "is_thing": "*u8",
        "num_queries": "i32", "num_classes": "i32", "area_row": "i32", "threshold_bits": "i64", "strict": "i32",
    }  # fmt: skip
    decide = KernelVariant("panoptic_decide", _decide_kernel, types, {"QUERIES": MAX_QUERIES})
    types = {"id_map": "*i32", "ids": "*i32", "num_queries": "i32", "num_pixels": "i32", "num_blocks": "i32"}
    number = KernelVariant("panoptic_number", _number_kernel, types, {"BLOCK": PIXEL_BLOCK}, aligned=("id_map",))
    claim = [_claim_variant(torch.float32, rule) for rule in _RULES]
    return [_claim_variant(torch.float16, "maskformer"), *claim, decide, number]


def _claim_variant(dtype: torch.dtype, rule: str) -> KernelVariant:
    constants = {**_RULES[rule], **_CONSTANTS, "stride_x": 1}
    types = {"winners": "*i32", "counts": "*i64", "scores": "*fp32", "categories": "*i64", **window_types(dtype)}
    arguments = {name: types.get(name, "i32") for name in _claim_kernel.arg_names if name not in constants}
    name = f"panoptic_claim_{ELEMENTS[dtype]}_{rule}"
    return KernelVariant(name, _claim_kernel, arguments, constants, **CLAIM_LAUNCH, aligned=("winners", "logits"))


def goal_calls() -> list[GoalLaunch]:
    """An image of 800x1333 with 30 kept queries, each of which matters in a part of the tiles."""
    queries, classes, (rows, columns), (height, width) = 30, 133, (200, 334), (800, 1333)
    masks = torch.empty(1, queries, rows, columns, device="meta")
    with torch.device("meta"):
        scores, things = torch.empty(1, queries), torch.empty(classes, dtype=torch.bool)
        categories, areas = (torch.empty(1, queries, dtype=torch.int64) for _ in range(2))
        id_map, ids = (torch.empty(1, *shape, dtype=torch.int32) for shape in ((height, width), (queries,)))
    claim = {
        "for query in tl.range(0, num_queries)": queries,
        "range(first_row, last_row + 1, TAP_H)": 1,
        "range(first_column, last_column + 1, TAP_W)": 1,
        "if may_own | (highest > least_best)": 0.15,
        "for query in tl.range(first, last + 1)": 3.0,
    }
    works = [
        Work("claim", claim, masks.numel() * 4 + id_map.numel() * 4),
        Work("decide", {"for step in tl.range(0, num_queries)": queries}),
        Work("number", bytes=id_map.numel() * 8),
    ]
    return goal_launches(
        "panoptic 800x1333 N=30 fp32",
        lambda: panoptic_segments(
            masks, scores, categories, things, (rows, columns), 0.8, "maskformer", id_map, ids, areas
        ),
        works,
    )
