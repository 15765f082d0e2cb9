"""Panoptic inference: the winning query of each pixel, the overlap filter of queries, and the numbers of segments.

Four kernels, one after the other, with nothing of size N*H*W in memory and no copy to the host:

- `_bounds_kernel`: least and largest tap of every query in every tile of output pixels.
- `_claim_kernel`, a tile a program: argmax over the queries of score x sigmoid. The bounds of all queries, together,
  leave a bit mask of those that may win a pixel, and one of those that own a part of the tile; only these are
  interpolated, one at a time. Where one query is left, all pixels are its. Writes the winners and counts pixels, with
  atomics of integers, whose order has no effect.
- `_decide_kernel`, an image a program: overlap filter, merging of stuff, numbers and areas.
- `_number_kernel`: replaces winners by numbers of segments, in place.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.resample import LIMIT
from maskformer_fast.kernels.segments_taps import (
    ELEMENTS,
    STRIDES,
    WINDOW,
    across,
    axis_step,
    limited,
    pixel_place,
    place_range,
    query_map,
    window_arguments,
    window_types,
)
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

MAX_QUERIES = 256
"""Most queries: one program decides for all queries of an image at once."""
TILE_H, TILE_W = 4, 32
"""Pixels of a program, one warp, a column a lane: sums over a tile need no shared memory. Not measured on a GPU."""
TAPS = 4
"""Taps of a row that are read together for the bounds of a tile, which has 9 or 10 at scale 4."""
OTHERS = 32
"""Queries with which all are compared at once, to find those of the same class."""
PIXEL_BLOCK = 1024
"""Pixels that one program numbers. Not measured on a GPU."""
CLAIM_LAUNCH = {"num_warps": 1, "num_stages": 2}
DECIDE_LAUNCH = {"num_warps": 8, "num_stages": 2}
_VOID = tl.constexpr(-1)
_TILE = {"TILE_H": TILE_H, "TILE_W": TILE_W}
_RULES = {
    "maskformer": {"SCALED": False, "INTERSECT": False},
    "mask2former": {"SCALED": False, "INTERSECT": True},
    "huggingface": {"SCALED": True, "INTERSECT": False},
}


@triton.jit(do_not_specialize=[*WINDOW, "tiles_y", "tiles_x"], do_not_specialize_on_alignment=STRIDES)
def _bounds_kernel(
    bounds,  # [B, tiles, 2, num_queries] float32, written but for absent queries: least and largest tap
    categories,  # [B, num_queries] int64
    logits, stride_b, stride_q, stride_y, stride_x, num_queries, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Bounds of one query in 32 tiles side by side, one a lane."""
    query = tl.program_id(0) % num_queries
    image = (tl.program_id(0) // num_queries).to(tl.int64)
    if tl.load(categories + image * num_queries + query) >= 0:
        tile_y = tl.program_id(1)
        tile_x = tl.program_id(2) * 32 + tl.arange(0, 32)
        step_y = axis_step(scale_y, rest_y)
        step_x = axis_step(scale_x, rest_x)
        top = tile_y * TILE_H
        left = tl.minimum(tile_x, tiles_x - 1) * TILE_W
        first_row, last_row = place_range(top, tl.minimum(top + TILE_H, height) - 1, step_y, map_height)
        first_column, last_column = place_range(left, tl.minimum(left + TILE_W, width) - 1, step_x, map_width)
        taps = tl.max(last_column - first_column) + 1
        least = tl.full((TAPS, 32), LIMIT, tl.float32)
        most = tl.full((TAPS, 32), -LIMIT, tl.float32)
        if taps * (last_row - first_row + 1) <= 4 * TILE_H * TILE_W:
            source = query_map(logits, tl.program_id(0), num_queries, stride_b, stride_q)
            for row in tl.range(first_row, last_row + 1):
                for start in tl.range(0, taps, TAPS):
                    column = first_column[None, :] + (start + tl.arange(0, TAPS)[:, None])
                    column = tl.minimum(column, last_column[None, :])
                    value = limited(tl.load(source + row * stride_y + column * stride_x))
                    least = tl.minimum(least, value)
                    most = tl.maximum(most, value)
        else:  # where maps shrink, reading all taps is more work than the tile's pixels
            least -= 2 * LIMIT
            most += 2 * LIMIT
        tile = (image * tiles_y + tile_y) * tiles_x + tile_x
        target = bounds + tile * 2 * num_queries + query
        tl.store(target, tl.min(least, 0), mask=tile_x < tiles_x)
        tl.store(target + num_queries, tl.max(most, 0), mask=tile_x < tiles_x)


@triton.jit
def _inverse(score):
    """1 / score, infinite for a score that is not positive, or NaN."""
    return 1.0 / tl.minimum(tl.where(score > 0.0, score, 0.0), LIMIT)


@triton.jit
def _cost(logit, inverse):
    """1 / (score x sigmoid): least where that is largest."""
    return (1.0 + tl.exp2(logit * -1.4426950408889634)) * inverse


@triton.jit
def _next_bit(bits):
    """Number of the lowest bit of a word that is not 0, word without it."""
    lowest = bits & (0 - bits)
    # of a power of two as float32, the exponent is the number
    number = (lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return number, bits ^ lowest


@triton.jit
def _add(target, number, mask):
    """Add pixels to counts, as integers: the order has no effect."""
    tl.atomic_add(target, number.to(tl.int64), mask=mask, sem="relaxed")


@triton.jit
def _select(words, index):
    """The word at `index` of a small tensor."""
    return tl.sum(tl.where(tl.arange(0, words.shape[0]) == index, words, 0), 0)


@triton.jit(do_not_specialize=[*WINDOW, "tiles_y", "tiles_x"], do_not_specialize_on_alignment=STRIDES)
def _claim_kernel(
    winners,  # [B, H, W] int32, num_queries where there is none
    counts,  # [B, 3, num_queries] int64, zeros: pixels that each query won, owns, won and owns
    bounds,  # [B, tiles, 2, num_queries] float32 of `_bounds_kernel`
    scores,  # [B, num_queries] float32
    categories,  # [B, num_queries] int64
    logits, stride_b, stride_q, stride_y, stride_x, num_queries, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, tiles_y, tiles_x,
    SCALED: tl.constexpr, INTERSECT: tl.constexpr, QUERIES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Find each pixel's winner and count the pixels of queries.

    With SCALED a query owns pixels where score x sigmoid >= 0.5, else where sigmoid >= 0.5. With INTERSECT a segment is
    the pixels that were won and are owned.
    """
    tile = tl.program_id(0)
    image = (tile // (tiles_y * tiles_x)).to(tl.int64)
    top = (tile // tiles_x) % tiles_y * TILE_H
    left = tile % tiles_x * TILE_W
    pixels = tl.minimum(TILE_H, height - top) * tl.minimum(TILE_W, width - left)

    # queries: a word of 32 a row
    query = 32 * tl.arange(0, QUERIES // 32)[:, None] + tl.arange(0, 32)[None, :]
    there = query < num_queries
    present = tl.load(categories + image * num_queries + query, mask=there, other=-1) >= 0
    inverse = _inverse(tl.load(scores + image * num_queries + query, mask=present, other=0.0))
    place = bounds + tile.to(tl.int64) * 2 * num_queries + query
    least = tl.load(place, mask=present, other=0.0)
    most = tl.load(place + num_queries, mask=present, other=0.0)
    # bounds of costs, beyond all rounding
    most_cost = tl.where(present, _cost(least, inverse) * 1.000004, float("inf"))
    least_cost = _cost(most, inverse) * 0.999996
    may_win = present & (least_cost <= tl.min(most_cost))
    if SCALED:
        may_own = present & (least_cost <= 2.0)
        owns_all = present & (most_cost <= 2.0)
    else:
        may_own = present & (most >= 0.0)
        owns_all = present & (least >= 0.0)
    bit = 1 << tl.arange(0, 32)[None, :]
    rivals = tl.sum(tl.where(may_win, bit, 0), 1)
    divided = tl.sum(tl.where(may_own & (owns_all == 0), bit, 0), 1)  # own some pixels, perhaps
    first = tl.min(tl.where(may_win, query, num_queries))
    alone = tl.sum(may_win.to(tl.int32)) == 1
    won_counts = counts + image * 3 * num_queries
    owned_counts = won_counts + num_queries
    both_counts = owned_counts + num_queries
    alone_owns = tl.max((may_win & owns_all).to(tl.int32)) > 0  # if it is alone
    every = tl.zeros_like(query) + pixels
    _add(won_counts + query, every, may_win & alone)
    _add(owned_counts + query, every, owns_all)
    if INTERSECT:
        _add(both_counts + query, every, may_win & alone & owns_all)

    y = top + tl.arange(0, TILE_H)[:, None]
    x = left + tl.arange(0, TILE_W)[None, :]
    inside = (y < height) & (x < width)
    winner = tl.zeros((TILE_H, TILE_W), tl.int32) + first
    if INTERSECT:  # ~query where it won but does not own
        winner = tl.where(alone_owns, winner, ~winner)
        winner = tl.where(first < num_queries, winner, num_queries)
    undecided = rivals * (alone == 0).to(tl.int32) | divided
    if tl.max((undecided != 0).to(tl.int32)) > 0:
        low_y, share_y = pixel_place(y, axis_step(scale_y, rest_y), map_height)
        low_x, share_x = pixel_place(x, axis_step(scale_x, rest_x), map_width)
        upper = low_y * stride_y
        lower = tl.minimum(low_y + 1, map_height - 1) * stride_y
        before = low_x * stride_x
        after = tl.minimum(low_x + 1, map_width - 1) * stride_x
        share_y = tl.broadcast_to(share_y, (TILE_H, TILE_W))
        share_x = tl.broadcast_to(share_x, (TILE_H, TILE_W))
        best = tl.full((TILE_H, TILE_W), float("inf"), tl.float32)
        for word in tl.range(0, QUERIES // 32):
            bits = _select(undecided, word)
            while bits != 0:
                number, bits = _next_bit(bits)
                index = word * 32 + number
                source = logits + image * stride_b + index.to(tl.int64) * stride_q
                start = across(source + upper, before, after, share_x)
                logit = tl.fma(share_y, across(source + lower, before, after, share_x) - start, start)
                cost = _cost(logit, _inverse(tl.load(scores + image * num_queries + index)))
                owns = cost <= 2.0 if SCALED else logit >= 0.0
                owned = tl.sum((owns & inside).to(tl.int32))
                is_divided = (_select(divided, word) >> number) & 1 > 0
                _add(owned_counts + index, owned, is_divided & (owned > 0))
                if (_select(rivals, word) >> number) & 1 > 0:
                    better = (cost < best) | (index == first)  # strictly: of equals the first wins
                    winner = tl.where(better, tl.where(owns, index, ~index) if INTERSECT else index, winner)
                    best = tl.where(better, cost, best)
        if alone == 0:
            for word in tl.range(0, QUERIES // 32):
                bits = _select(rivals, word)
                while bits != 0:
                    number, bits = _next_bit(bits)
                    index = word * 32 + number
                    won = tl.sum(((winner == index) & inside).to(tl.int32))
                    if INTERSECT:
                        _add(both_counts + index, won, won > 0)
                        won += tl.sum(((winner == ~index) & inside).to(tl.int32))
                    _add(won_counts + index, won, won > 0)
        elif INTERSECT:
            owned = tl.sum(((winner == first) & inside).to(tl.int32))
            _add(both_counts + first, owned, (owned > 0) & (alone_owns == 0))
    if INTERSECT:
        winner = tl.where(winner >= 0, winner, num_queries)
    tl.store(winners + (image * height + y) * width + x, winner, mask=inside)


@triton.jit
def _kept_queries(
    counts, categories, is_thing, image, query, num_queries, num_classes, area_row, threshold_bits, strict
):  # fmt: skip
    """Queries by their counts -> area, whether the query is kept, 1 + class of a query that joins others of it or 0."""
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
    return area, kept, tl.where(kept & (thing == 0), category + 1, 0).to(tl.int32)


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
    QUERIES: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    query = tl.arange(0, QUERIES)
    present = query < num_queries
    rules = (num_queries, num_classes, area_row, threshold_bits, strict)
    area, kept, stuff = _kept_queries(counts, categories, is_thing, image, query, *rules)
    first = tl.zeros((QUERIES, OTHERS), tl.int32) + query[:, None]
    for start in tl.range(0, num_queries, OTHERS):
        other = start + tl.arange(0, OTHERS)
        _, _, wanted = _kept_queries(counts, categories, is_thing, image, other, *rules)
        same = (stuff[:, None] > 0) & (stuff[:, None] == wanted[None, :])
        first = tl.where(same, tl.minimum(first, other[None, :]), first)
    first = tl.min(first, 1)
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
    padded = max(32, triton.next_power_of_2(queries))
    with torch.cuda.device_of(id_map):
        counts = areas.new_zeros((batch, 3, queries))
        bounds = scores.new_empty((batch, tiles_y * tiles_x, 2, queries))
        if queries > 0:
            _bounds_kernel[(batch * queries, tiles_y, triton.cdiv(tiles_x, 32))](
                bounds, categories, *window, tiles_y, tiles_x, TAPS=TAPS, **_TILE, **CLAIM_LAUNCH
            )
        _claim_kernel[(batch * tiles_y * tiles_x,)](
            id_map, counts, bounds, scores, categories, *window, tiles_y, tiles_x,
            **constants, QUERIES=padded, **_TILE, **CLAIM_LAUNCH,
        )  # fmt: skip
        _decide_kernel[(batch,)](
            ids, areas, counts, categories, is_thing.view(torch.uint8), queries, len(is_thing),
            2 if constants["INTERSECT"] else 0, struct.unpack("q", struct.pack("d", overlap_threshold))[0],
            int(rule == "huggingface"), QUERIES=padded, OTHERS=OTHERS, **DECIDE_LAUNCH,
        )  # fmt: skip
        _number_kernel[(batch * blocks,)](id_map, ids, queries, height * width, blocks, BLOCK=PIXEL_BLOCK)


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: float32 for all rules, half precision for the default rule.

    For up to 128 queries; the claims of most queries also for `MAX_QUERIES`.
    """
    types = {
        "ids": "*i32", "areas": "*i64", "counts": "*i64", "categories": "*i64", "is_thing": "*u8",
        "num_queries": "i32", "num_classes": "i32", "area_row": "i32", "threshold_bits": "i64", "strict": "i32",
    }  # fmt: skip
    constants = {"QUERIES": MAX_QUERIES, "OTHERS": OTHERS}
    decide = KernelVariant("panoptic_decide", _decide_kernel, types, constants, **DECIDE_LAUNCH)
    types = {"id_map": "*i32", "ids": "*i32", "num_queries": "i32", "num_pixels": "i32", "num_blocks": "i32"}
    number = KernelVariant("panoptic_number", _number_kernel, types, {"BLOCK": PIXEL_BLOCK}, aligned=("id_map",))
    kernels = [decide, number]
    for dtype in (torch.float16, torch.float32):
        kernels.append(_variant(f"bounds_{ELEMENTS[dtype]}", _bounds_kernel, dtype, {"TAPS": TAPS}))
        for rule, constants in _RULES.items():
            if dtype == torch.float32 or rule == "maskformer":
                name = f"claim_{ELEMENTS[dtype]}_{rule}"
                kernels.append(_variant(name, _claim_kernel, dtype, {**constants, "QUERIES": 128}))
    return [*kernels, _variant("claim_most", _claim_kernel, torch.float32, {**constants, "QUERIES": MAX_QUERIES})]


def _variant(name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, int]) -> KernelVariant:
    constants = {**constants, **_TILE, "stride_x": 1}
    types = {
        "winners": "*i32", "counts": "*i64", "bounds": "*fp32", "scores": "*fp32", "categories": "*i64",
        **window_types(dtype),
    }  # fmt: skip
    arguments = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = tuple(name for name in ("winners", "bounds", "logits") if name in arguments)
    return KernelVariant(f"panoptic_{name}", kernel, arguments, constants, **CLAIM_LAUNCH, aligned=aligned)


def goal_calls() -> list[GoalLaunch]:
    """An image of 800x1333 with 30 kept queries at scale 4, of which five matter in a tile."""
    queries, classes, (rows, columns), (height, width) = 30, 133, (200, 334), (800, 1333)
    masks = torch.empty(1, queries, rows, columns, device="meta")
    with torch.device("meta"):
        scores, things = torch.empty(1, queries), torch.empty(classes, dtype=torch.bool)
        categories, areas = (torch.empty(1, queries, dtype=torch.int64) for _ in range(2))
        id_map, ids = (torch.empty(1, *shape, dtype=torch.int32) for shape in ((height, width), (queries,)))
    bounds = {"for row in tl.range(first_row, last_row + 1)": 2.3, "for start in tl.range(0, taps, TAPS)": 3}
    claim = {"for word in tl.range(0, QUERIES // 32)": 5}  # of the loop within it, as there is one word
    works = [
        Work("bounds", bounds, masks.numel() * 4), Work("claim", claim, id_map.numel() * 4),
        Work("decide", {"for start in tl.range(0, num_queries, OTHERS)": 1}), Work("number", bytes=id_map.numel() * 8),
    ]  # fmt: skip
    return goal_launches(
        "panoptic 800x1333 N=30 fp32",
        lambda: panoptic_segments(
            masks, scores, categories, things, (rows, columns), 0.8, "maskformer", id_map, ids, areas
        ),
        works,
    )
