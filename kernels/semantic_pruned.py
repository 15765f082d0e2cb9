"""Labels of semantic inference from those queries alone that can matter in a tile; exact, as on the CPU
(csrc/semantic/kernels.cpp).

In a tile query q adds at most ``b_q = max_c P[q, c] * sigmoid(largest of the tile's taps)`` to any score, as bilinear
interpolation is convex. The `LIVE` queries of largest bounds are scored, the others together miss at most R = sum b_q.
A pixel whose winner leads the runner-up by more than R, and what float32 rounds, has the label that all queries would
give it: live queries are multiplied as the same halves. A tile with another pixel in it is done again with all queries:

    probabilities and each query's largest -> one program per tile: bounds, live queries, labels, proof
    -> one program for each place in the list of unproven tiles, most of which end at once: labels of all queries

Scoring all queries needs so many registers that in one kernel half as many tiles would be under way at a time. Nothing
is read by the host; the order of the list is that of chance, the labels are not.

Simulated on the CPU with the predictions of benchmarks/cpu_semantic.py (128x128 -> 512x512, Q=100): unproven are 17 %
(K=19) and 5 % (K=150) of the tiles of peaky predictions, 36 and 37 % of medium-hard ones, all of random ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.class_probabilities import SCALE, class_probabilities, class_probabilities_variant
from maskformer_fast.kernels.resample import limit_taps, sigmoid, tile_at
from maskformer_fast.kernels.semantic_tile import (
    CLASS_BLOCK,
    ELEMENTS,
    LAUNCH,
    MAX_QUERIES,
    SIZES,
    Tiling,
    classify_tile,
    constants_of,
    kernel_variant,
    load_taps,
    masks_of_logits,
    pixels_inside,
    rank_classes,
)
from maskformer_fast.kernels.variant import KernelVariant

LIVE = tl.constexpr(32)
"""Queries scored. 16 leave most tiles of peaky predictions unproven, 64 few more proven than 32 for twice the work."""
_THRESHOLDS = tl.constexpr(32)
"""Of bounds, each 0.6 of the one before: the smallest that leaves at most `LIVE` is taken, in place of a sort."""
_FIRST_THRESHOLD = tl.constexpr(0.1)
_LOG2_STEP = tl.constexpr(-0.7369656)
_MOST_MISSING = tl.constexpr(0.3)
"""Tiles that miss more of the largest bound are hardly ever proven: they are not tried."""
_ROUNDING = tl.constexpr(1e-4)
"""Of the best score: more than the float32 sums of two classes differ with and without the queries left out."""
_HALF_ROUNDING = tl.constexpr(1.002)
"""What is missing was to be multiplied as halves, which may be larger than the mask and the probability by 2^-11."""
_TINY = tl.constexpr(1e-8)
"""The same of numbers below the normal halves, in all."""
_CLASS_BLOCK = 16
"""Scored at once. With 32 a multiprocessor of sm_90 has registers for one tile at a time, with 16 for two;
and all queries spill on sm_120."""

MASK_COST = 300
"""A mask's resampling and sigmoid cost about as much as its product with so many classes, by counting instructions."""
PRUNED_WORK = 1 << 28
"""Pruning is chosen from so much work on: tiles x queries x (classes + `MASK_COST`)."""


def pruning_pays(tiles: int, queries: int, classes: int) -> bool:
    """Whether to prune, from shapes alone: how peaky the predictions are is known only on the device.

    No GPU has measured this. By counting, pruning spares up to 1 - `LIVE` / Q of the work on a trained network's
    predictions and adds two launches and the bounds, which is all that is left on random ones. So it takes more than
    twice `LIVE` queries and outputs larger than 512x512 with 100 queries and 150 classes, whose launches would weigh
    as much as what is spared. To measure: both paths at 512x512 and 1024x2048, B = 1 and 8, K = 19, 150, 847, on
    peaky, medium-hard and random predictions; where the lines cross is `PRUNED_WORK`.
    """
    return queries > 2 * LIVE.value and tiles * queries * (classes + MASK_COST) >= PRUNED_WORK


@triton.jit
def _live_queries(
    logits,  # [Q, h, w] of the tile's image
    largest,  # [Q] float32, of its probabilities
    tile, stride_q, stride_y, stride_x, num_queries, map_height, map_width, tap_rows, tap_columns,
    TAPS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """-> the queries of largest bounds [LIVE], how many of these count, the sum of the others' bounds (inf where too
    many are large), the largest bound."""
    query = tl.arange(0, QUERIES)
    present = query < num_queries
    peaks = tl.full((TAPS, QUERIES), float("-inf"), tl.float32)
    taps = tap_rows * tap_columns
    for start in tl.range(0, taps, TAPS):
        tap = tl.minimum(start + tl.arange(0, TAPS), taps - 1)
        values, _, _ = load_taps(
            logits, query, present, tap, tile, stride_q, stride_y, stride_x, map_height, map_width, tap_columns
        )
        peaks = tl.maximum(peaks, limit_taps(values))
    peak = tl.max(peaks, 0)
    mask = sigmoid(peak + tl.abs(peak) * 4e-6)  # the interpolation may round to more than its largest tap
    bound = mask * tl.load(largest + query, mask=present, other=0.0)
    bound = tl.where(bound == bound, bound, float("inf"))  # NaN must stay among the live queries
    top = tl.minimum(tl.max(bound, 0), 1.0)

    threshold = top * _FIRST_THRESHOLD * tl.exp2(tl.arange(0, _THRESHOLDS).to(tl.float32) * _LOG2_STEP)
    above = bound[:, None] > threshold[None, :]
    fits = tl.sum(above.to(tl.int32), 0) <= LIVE
    missing = tl.sum(tl.where(above, 0.0, bound[:, None]), 0)
    missing = tl.min(tl.where(fits, missing, float("inf")), 0)  # sums fall with the thresholds
    live = bound > tl.min(tl.where(fits, threshold, float("inf")), 0)

    place = tl.cumsum(live.to(tl.int32), 0) - 1
    here = live[None, :] & (place[None, :] == tl.arange(0, LIVE)[:, None])
    return tl.sum(tl.where(here, query[None, :], 0), 1), tl.sum(live.to(tl.int32), 0), missing, top


@triton.jit(do_not_specialize=SIZES)
def _pruned_kernel(
    labels,  # [B, H, W]
    unproven,  # int32 [1 + tiles]: how many, initially 0; which
    probabilities,  # [B, SPLIT + 1, ROWS, padded_classes]
    largest,  # [B, ROWS]
    logits, stride_b, stride_q, stride_y, stride_x,  # [B, Q, h, w]
    num_queries, num_classes, padded_classes, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    image, y, x, first_y, first_x, low_y, share_y, low_x, share_x = tile_at(
        tl.program_id(0), map_height, map_width, scale_y, rest_y, scale_x, rest_x, offset_y, offset_x,
        tiles_y, tiles_x, TILE_H, TILE_W,
    )  # fmt: skip
    tile = (first_y, first_x, low_y, share_y, low_x, share_x)
    query, count, missing, top = _live_queries(
        logits + image * stride_b, largest + image * ROWS, tile, stride_q, stride_y, stride_x,
        num_queries, map_height, map_width, tap_rows, tap_columns, TAPS, QUERIES,
    )  # fmt: skip
    doubts = 1
    if missing <= top * _MOST_MISSING:
        masks = masks_of_logits(
            logits + image * stride_b, query, tl.arange(0, LIVE) < count, tile,
            stride_q, stride_y, stride_x, map_height, map_width, tap_rows, tap_columns, TAPS,
        )  # fmt: skip
        value, label, runner_up = rank_classes(
            (masks,), query, probabilities + image * (SPLIT + 1) * ROWS * padded_classes, ROWS, num_classes,
            padded_classes, 1, CLASSES, SPLIT, True,
        )  # fmt: skip
        target, inside = pixels_inside(image, y, x, height, width)
        tl.store(labels + target, label.to(labels.dtype.element_ty), mask=inside)
        bar = (missing * _HALF_ROUNDING + _TINY) * (SCALE * SCALE) + value * _ROUNDING
        proven = (value >= 0.0) & ((runner_up < 0.0) | (value - runner_up > bar))  # not NaN; one class or a lead
        doubts = tl.max((inside & (proven == 0)).to(tl.int32), 0)
    if doubts > 0:
        place = tl.atomic_add(unproven, 1)
        tl.store(unproven + 1 + place, tl.program_id(0))


@triton.jit(do_not_specialize=SIZES)
def _unproven_kernel(
    labels, unproven, probabilities,
    logits, stride_b, stride_q, stride_y, stride_x,
    num_queries, num_classes, padded_classes, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All queries in one tile of the list; a loop over several would not fit the registers of every target."""
    if tl.program_id(0) < tl.load(unproven):
        classify_tile(
            tl.load(unproven + 1 + tl.program_id(0)), labels, labels, labels, probabilities,
            logits, stride_b, stride_q, stride_y, stride_x,
            num_queries, num_classes, padded_classes, map_height, map_width, height, width,
            scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
            TILE_H, TILE_W, TAPS, QUERIES, GROUPS, CLASSES, SPLIT, False, False,
        )  # fmt: skip


def semantic_pruned(
    mask_logits: Tensor,  # [B, Q, h, w] float16, bfloat16 or float32, any strides
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    tiling: Tiling,  # not of no tiles
    labels: Tensor,  # [B, H, W] uint8 or int16, written
) -> Tensor:
    """The labels that `semantic.semantic_from_logits` finds with all queries.

    -> [1 + tiles] int32, for tests: how many tiles took all queries, then which, in any order.
    """
    dense, pruned = _constants(mask_logits)
    with torch.cuda.device_of(labels):
        unproven = torch.zeros(1 + tiling.tiles, dtype=torch.int32, device=labels.device)
        largest = torch.empty(len(labels), pruned["ROWS"], device=labels.device)
        chances = class_probabilities(class_logits, pruned["ROWS"], CLASS_BLOCK, dense["SPLIT"], largest)
        arguments = (
            mask_logits, *mask_logits.stride(),
            mask_logits.shape[1], class_logits.shape[2] - 1, chances.shape[3], *mask_logits.shape[2:],
            *tiling.arguments,
        )  # fmt: skip
        _pruned_kernel[(tiling.tiles,)](labels, unproven, chances, largest, *arguments, **pruned, **LAUNCH)
        _unproven_kernel[(tiling.tiles,)](labels, unproven, chances, *arguments, **dense, **LAUNCH)
    return unproven


def _constants(maps: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time constants of the kernel of all queries and of the pruning one."""
    dense = constants_of(maps) | {"CLASSES": _CLASS_BLOCK}
    rows = dense["GROUPS"] * dense["QUERIES"]
    pruned = {**dense, "ROWS": rows, "QUERIES": triton.next_power_of_2(rows)}
    del pruned["GROUPS"]
    return dense, pruned


def variants() -> list[KernelVariant]:
    """What is compiled ahead of time: queries innermost, as a matrix product writes them; usual and most registers."""
    found = []
    for dtype, queries in ((torch.float16, 128), (torch.float32, MAX_QUERIES)):
        dense, pruned = _constants(torch.empty(0, queries, dtype=dtype))
        for name, kernel, constants in (("pruned", _pruned_kernel, pruned), ("unproven", _unproven_kernel, dense)):
            name = f"semantic_{name}_{ELEMENTS[dtype]}_q{pruned['ROWS']}"
            found.append(kernel_variant(name, kernel, dtype, {**constants, "stride_q": 1}))
    return [*found, class_probabilities_variant(split=True, largest=True)]
