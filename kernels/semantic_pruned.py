"""Labels of semantic inference from only those queries that can matter in a tile; exact, like the C++ on the CPU.

In a tile query q adds at most ``b_q = max_c P[q, c] * sigmoid(largest of the tile's taps)`` to any score, as bilinear
interpolation is convex. The `LIVE` queries with the largest bounds are scored; the others together miss at most R = sum
b_q. A pixel whose winner leads the runner-up by more than R, plus float32 rounding, has the same label with all
queries: live queries are multiplied as the same halves. A tile with any other pixel is computed again with all queries:

    probabilities and each query's largest -> one program per tile: bounds, live queries, labels, proof
    -> one program per entry of the list of unproven tiles, most of which end at once: labels of all queries

Scoring all queries takes so many registers that one kernel for both would halve the number of concurrent tiles. The
host reads nothing. The order of the list varies between runs, the labels do not.

Simulated on the CPU with the predictions of benchmarks/cases/semantic.py (128x128 -> 512x512, Q=100): unproven are 17 %
(K=19) and 5 % (K=150) of the tiles of peaky predictions, 36 and 37 % of medium-hard ones, all of random ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.class_probabilities import (
    SCALE,
    class_probabilities,
    class_probabilities_variant,
    class_probabilities_work,
)
from maskformer_fast.kernels.resample import limit_taps, sigmoid
from maskformer_fast.kernels.semantic_tile import (
    CLASS_BLOCK,
    ELEMENTS,
    LAUNCH,
    MAX_QUERIES,
    SIZES,
    TAP_BLOCK,
    Tiling,
    classify_tile,
    constants_of,
    kernel_variant,
    load_taps,
    masks_of_logits,
    pixels_inside,
    place_tile,
    plan_tiles,
    rank_classes,
)
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

LIVE = tl.constexpr(32)
"""Queries scored. 16 leave most tiles of peaky predictions unproven; 64 prove few more than 32, for twice the work."""
_THRESHOLDS = tl.constexpr(32)
"""Number of candidate thresholds of bounds, each 0.6 of the one before. The smallest that leaves at most `LIVE` queries
is taken, in place of a sort."""
_FIRST_THRESHOLD = tl.constexpr(0.1)
"""Largest threshold, as a share of the largest bound."""
_LOG2_STEP = tl.constexpr(-0.7369656)
"""Base-2 logarithm of the ratio of two thresholds, 0.6."""
_MOST_MISSING = tl.constexpr(0.3)
"""Largest R, as a share of the largest bound, of a tile that is tried: beyond it hardly any tile is proven."""
_ROUNDING = tl.constexpr(1e-4)
"""Share of the best score by which float32 sums of two classes may differ with and without the dropped queries."""
_HALF_ROUNDING = tl.constexpr(1.002)
"""Factor of R: dropped masks and probabilities as halves may be larger than themselves by 2^-11 each."""
_TINY = tl.constexpr(1e-8)
"""Addend of R, in total, for dropped values below the normal halves."""
_CLASS_BLOCK = 16
"""Classes scored at once. With 32 a multiprocessor of sm_90 has registers for one tile at a time, with 16 for two; and
with 32 the kernel of all queries spills on sm_120."""

MASK_COST = 300
"""Cost of a mask's resampling and sigmoid in products with one class, by counting instructions."""
PRUNED_WORK = 1 << 28
"""Least work for which pruning is chosen: tiles x queries x (classes + `MASK_COST`)."""


def pruning_pays(tiles: int, queries: int, classes: int) -> bool:
    """Decide by shapes alone whether to prune: only the device knows how peaky the predictions are.

    Not measured on a GPU. By counting, pruning saves up to 1 - `LIVE` / Q of the work on a trained network's
    predictions. It adds two launches and the bounds, and saves nothing on random predictions. So it takes more than
    twice `LIVE` queries, and outputs larger than 512x512 with 100 queries and 150 classes, where the launches would
    cost what pruning saves. To measure: both paths at 512x512 and 1024x2048, B = 1 and 8, K = 19, 150, 847, on peaky,
    medium-hard and random predictions; `PRUNED_WORK` is where the times are equal.
    """
    return queries > 2 * LIVE.value and tiles * queries * (classes + MASK_COST) >= PRUNED_WORK


@triton.jit
def _live_queries(
    logits,  # [Q, h, w] of the tile's image
    largest,  # [Q] float32, largest probability of each query
    tile,
    strides,
    num_queries,
    geometry,
    TAPS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Choose the queries with the largest bounds -> four values.

    These are the queries [LIVE], how many of them count, the sum of the others' bounds (inf where too many are large),
    and the largest bound.
    """
    tap_rows, tap_columns = geometry[4]
    query = tl.arange(0, QUERIES)
    present = query < num_queries
    peaks = tl.full((TAPS, QUERIES), float("-inf"), tl.float32)
    taps = tap_rows * tap_columns
    for start in tl.range(0, taps, TAPS):
        tap = tl.minimum(start + tl.arange(0, TAPS), taps - 1)
        values, _, _ = load_taps(logits, query, present, tap, tile, strides, geometry)
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
    geometry = (
        (map_height, map_width), (height, width), (scale_y, rest_y, scale_x, rest_x), (offset_y, offset_x),
        (tap_rows, tap_columns), (tiles_y, tiles_x),
    )  # fmt: skip
    strides = (stride_q, stride_y, stride_x)
    image, y, x, tile = place_tile(tl.program_id(0), geometry, TILE_H, TILE_W)
    query, count, missing, top = _live_queries(
        logits + image * stride_b, largest + image * ROWS, tile, strides, num_queries, geometry, TAPS, QUERIES
    )
    doubts = 1
    if missing <= top * _MOST_MISSING:
        masks = masks_of_logits(
            logits + image * stride_b, query, tl.arange(0, LIVE) < count, tile, strides, geometry, TAPS
        )
        value, label, runner_up = rank_classes(
            (masks,), query, probabilities + image * (SPLIT + 1) * ROWS * padded_classes, ROWS,
            (num_classes, padded_classes), 1, CLASSES, SPLIT, True,
        )  # fmt: skip
        target, inside = pixels_inside(image, y, x, geometry)
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
    """Score all queries in one tile of the list; a loop over several tiles would not fit every target's registers."""
    geometry = (
        (map_height, map_width), (height, width), (scale_y, rest_y, scale_x, rest_x), (offset_y, offset_x),
        (tap_rows, tap_columns), (tiles_y, tiles_x),
    )  # fmt: skip
    if tl.program_id(0) < tl.load(unproven):
        classify_tile(
            tl.load(unproven + 1 + tl.program_id(0)), (labels, labels, labels), probabilities,
            logits, stride_b, (stride_q, stride_y, stride_x), num_queries, (num_classes, padded_classes), geometry,
            TILE_H, TILE_W, TAPS, QUERIES, GROUPS, CLASSES, SPLIT, False, False,
        )  # fmt: skip


def semantic_pruned(
    mask_logits: Tensor,  # [B, Q, h, w] float16, bfloat16 or float32, any strides
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    tiling: Tiling,  # of at least one tile
    labels: Tensor,  # [B, H, W] uint8 or int16, written
) -> Tensor:
    """Write the labels of `semantic.semantic_from_logits` with all queries.

    -> [1 + tiles] int32, for tests: the number of tiles that took all queries, then their indices, in any order.
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
    """Compile-time constants of the kernel of all queries and of the pruning kernel."""
    dense = constants_of(maps) | {"CLASSES": _CLASS_BLOCK}
    rows = dense["GROUPS"] * dense["QUERIES"]
    pruned = {**dense, "ROWS": rows, "QUERIES": triton.next_power_of_2(rows)}
    del pruned["GROUPS"]
    return dense, pruned


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: queries innermost, for the usual and the most registers."""
    kernels = []
    for dtype, queries in ((torch.float16, 128), (torch.float32, MAX_QUERIES)):
        dense, pruned = _constants(torch.empty(0, queries, dtype=dtype))
        for name, kernel, constants in (("pruned", _pruned_kernel, pruned), ("unproven", _unproven_kernel, dense)):
            name = f"semantic_{name}_{ELEMENTS[dtype]}_q{pruned['ROWS']}"
            kernels.append(kernel_variant(name, kernel, dtype, {**constants, "stride_q": 1}))
    return [*kernels, class_probabilities_variant(split=True, largest=True)]


def goal_calls() -> list[GoalLaunch]:
    """1024x2048 pixels of 100 queries and 150 classes, of predictions where few tiles and where all are unproven."""
    classes, rows, columns = 150, 256, 512
    masks = torch.empty(1, rows, columns, 100, dtype=torch.float16, device="meta").permute(0, 3, 1, 2)
    logits = torch.empty(1, 100, classes + 1, device="meta")
    labels = torch.empty(1, 4 * rows, 4 * columns, dtype=torch.uint8, device="meta")
    tiling = plan_tiles(masks, masks.shape[2:], (rows, columns), labels)
    calls = []
    for name, tried, unproven in (("peaky", 1.0, 0.05), ("random", 0.0, 1.0)):
        loops = {
            "tap_rows * tap_columns, TAPS)": triton.cdiv(tiling.taps, TAP_BLOCK),
            "range(0, padded_classes, CLASSES)": triton.cdiv(classes, _CLASS_BLOCK),
        }
        pruned = {**loops, "range(0, taps, TAPS)": triton.cdiv(tiling.taps, TAP_BLOCK)}
        works = [
            class_probabilities_work(classes, _CLASS_BLOCK),
            Work("pruned", {**pruned, "if missing <= top": tried, "if doubts > 0": unproven}, masks.numel() * 2),
            Work("unproven", {**loops, "if tl.program_id(0) < tl.load(unproven)": unproven}),
        ]
        call = f"semantic 1024x2048 K=150 pruned {name} fp16"
        calls += goal_launches(call, lambda: semantic_pruned(masks, logits, tiling, labels), works)
    return calls
