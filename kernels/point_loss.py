"""Choice of uncertain points of maps, sums of losses at points, and their gradient (Mask2Former, section 3.3.2).

- `choose_points_forward` samples a map's candidates into keys, the bits of |logit|, which order as the numbers do with
  NaN last. A program then finds the key up to which candidates are chosen by counting them by 8 bits at a time, and
  writes the chosen ones in a second pass.
- `point_sums_forward` samples a map at its points and adds up the terms of its losses.
- `point_sums_backward` computes the slopes of a map's points and the largest of them, and then adds each slope's four
  shares to the map in integers of 64 bits. The unit is a power of two, of which the largest slope has 2^45 or more at
  up to 2^16 points, so that rounding is far below that of float32. Sums of integers are the same in any order, and so
  the gradients are in every run. The integers of up to `MAPS` maps exist at once.

No float is added atomically. A map of which a point's logit is NaN or infinite gets a gradient of NaN in all cells;
other maps are not affected.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.activations import LOG2_E, logistic
from maskformer_fast.kernels.points import corner, kernel_variant, located, map_values
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

BLOCK = 512
"""Points processed at once, 4 a thread. Not measured on a GPU, like all constants."""
LAUNCH = {"num_warps": 4, "num_stages": 1}
CANDIDATES = 512
"""Candidates of which a block's threads count keys at once."""
CHOICE_LAUNCH = {"num_warps": 4, "num_stages": 1}
MAPS = 256
"""Maps that are processed at once, which bounds the memory of keys and of integer gradients."""
_DIGITS = tl.constexpr(256)
_INFINITY = tl.constexpr(0x7F800000)
"""Bits of float32; those of NaN are larger, all others of positive numbers smaller."""
_ELEMENTS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_SIZES = ["blocks", "count", "cells", "height", "width", "candidate_count", "random_count", "uncertain", "bits"]
"""Arguments that are not specialised: a separate kernel for a size of 1 would be compiled without need."""


@triton.jit(do_not_specialize=_SIZES)
def _nearness_kernel(
    keys,  # [N, M] int32
    logits,  # [N, h, w]
    groups,  # [N] int64
    candidates,  # [G, M, 2] float32
    blocks, candidate_count, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.load(groups + number)
    point = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = (point < candidate_count) & (group >= 0)
    places = candidates + (tl.maximum(group, 0) * candidate_count + point) * 2
    values = map_values(logits + number * height * width, places, live, height, width)
    tl.store(keys + number * candidate_count + point, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _choose_points_kernel(
    result,  # [N, uncertain + R, 2] float32, zeros
    keys,  # [N, M] int32
    groups,  # [N] int64
    candidates,  # [G, M, 2] float32
    random,  # [G, R, 2] float32
    candidate_count, random_count, uncertain, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + number)
    if group < 0:
        return
    result += number * (uncertain + random_count) * 2
    keys += number * candidate_count
    candidates += group * candidate_count * 2
    random += group * random_count * 2
    offset = tl.arange(0, BLOCK)
    for start in range(0, 2 * random_count, BLOCK):
        there = start + offset < 2 * random_count
        tl.store(result + 2 * uncertain + start + offset, tl.load(random + start + offset, mask=there), mask=there)
    if uncertain == 0:
        return
    digit = tl.arange(0, _DIGITS)
    limit = 0  # leading bits of the largest key that is chosen
    equal = uncertain  # of the keys that begin with these bits, that many are chosen
    for place in tl.static_range(4):
        counts = tl.zeros((_DIGITS,), tl.int32)
        for start in range(0, candidate_count, BLOCK):
            there = start + offset < candidate_count
            key = tl.load(keys + start + offset, mask=there, other=0) >> (24 - 8 * place)
            counts += tl.histogram(key & 255, _DIGITS, mask=there & (key >> 8 == limit))
        found = tl.sum((tl.cumsum(counts, 0) < equal).to(tl.int32), 0)
        equal -= tl.sum(tl.where(digit < found, counts, 0), 0)
        limit = limit * 256 + found
    smaller_seen = 0
    equal_seen = 0
    for first in range(0, candidate_count, BLOCK):
        index = first + offset
        key = tl.load(keys + index, mask=index < candidate_count, other=0x7FFFFFFF)
        smaller = (index < candidate_count) & (key < limit)
        same = (index < candidate_count) & (key == limit)
        both = smaller.to(tl.int32) + (same.to(tl.int32) << 16)  # counts of both, of a block each below 2^16
        before = tl.cumsum(both, 0) - both
        rank = equal_seen + (before >> 16)
        target = tl.where(smaller, smaller_seen + (before & 0xFFFF), uncertain - equal + rank)
        chosen = smaller | (same & (rank < equal))
        for axis in tl.static_range(2):
            tl.store(result + 2 * target + axis, tl.load(candidates + 2 * index + axis, mask=chosen), mask=chosen)
        total = tl.sum(both, 0)
        smaller_seen += total & 0xFFFF
        equal_seen += total >> 16


@triton.jit
def _power(cross_entropy, probability, gamma, POWER: tl.constexpr):
    """probability ** gamma, where probability is exp(-cross_entropy)."""
    if POWER == 0:
        return tl.full(probability.shape, 1.0, tl.float32)
    if POWER == 1:
        return probability
    if POWER == 2:
        return probability * probability
    return tl.exp2(cross_entropy * (-LOG2_E * gamma))


@triton.jit
def _terms(x, gamma, POWER: tl.constexpr):
    """Of logits: probability, 1 - probability, cross-entropies with the target on and off, their focal factors."""
    small, likely, unlikely = logistic(x)
    probability, rest = tl.where(x >= 0, likely, unlikely), tl.where(x >= 0, unlikely, likely)
    probability, rest = tl.where(x == x, probability, x), tl.where(x == x, rest, x)
    on, off = tl.maximum(-x, 0.0) + small, tl.maximum(x, 0.0) + small
    return probability, rest, on, off, _power(off, rest, gamma, POWER), _power(on, probability, gamma, POWER)


@triton.jit(do_not_specialize=_SIZES)
def _point_sums_kernel(
    sums,  # [N, 4] float32
    logits,  # [N, h, w]
    rows,  # [N] int64
    points,  # [N, P, 2] float32
    truth,  # [N, P] float32
    count, height, width, on_weight, off_weight, gamma,
    POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    logits += number * height * width
    points += number * count * 2
    truth += number * count
    focal = tl.zeros((BLOCK,), tl.float32)
    overlap = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    area = tl.zeros((BLOCK,), tl.float32)
    end = tl.where(tl.load(rows + number) >= 0, count, 0)
    for start in range(0, end, BLOCK):
        point = start + tl.arange(0, BLOCK)
        live = point < end
        x = map_values(logits, points + 2 * point, live, height, width)
        t = tl.load(truth + point, mask=live, other=0.0)
        probability, _, on, off, on_factor, off_factor = _terms(x, gamma, POWER)
        loss = t * (on_weight * on * on_factor) + (1.0 - t) * (off_weight * off * off_factor)
        focal += tl.where(live, loss, 0.0)
        overlap += probability * t
        total += tl.where(live, probability, 0.0)
        area += t
    sums += 4 * number
    tl.store(sums, tl.sum(focal, 0))
    tl.store(sums + 1, tl.sum(overlap, 0))
    tl.store(sums + 2, tl.sum(total, 0))
    tl.store(sums + 3, tl.sum(area, 0))


@triton.jit(do_not_specialize=_SIZES)
def _slopes_kernel(
    slopes,  # [N, P] float32
    largest,  # [N] int32, bits of the largest |slope|, those of NaN where a logit at a point is not finite
    gradient,  # [N, 4] float32
    logits,  # [N, h, w]
    rows,  # [N] int64
    points,  # [N, P, 2] float32
    truth,  # [N, P] float32
    count, height, width, on_weight, off_weight, gamma,
    POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    logits += number * height * width
    points += number * count * 2
    truth += number * count
    slopes += number * count
    by_loss, by_overlap, by_total = (
        tl.load(gradient + 4 * number), tl.load(gradient + 4 * number + 1), tl.load(gradient + 4 * number + 2)
    )  # fmt: skip
    most = tl.zeros((BLOCK,), tl.int32)
    end = tl.where(tl.load(rows + number) >= 0, count, 0)
    for start in range(0, end, BLOCK):
        point = start + tl.arange(0, BLOCK)
        live = point < end
        x = map_values(logits, points + 2 * point, live, height, width)
        t = tl.load(truth + point, mask=live, other=0.0)
        probability, rest, on, off, on_factor, off_factor = _terms(x, gamma, POWER)
        on_slope, off_slope = rest, probability
        if POWER != 0:
            on_slope += gamma * on * probability
            off_slope += gamma * off * rest
        on_slope, off_slope = on_weight * on_factor * on_slope, off_weight * off_factor * off_slope
        slope = by_loss * ((1.0 - t) * off_slope - t * on_slope) + (by_overlap * t + by_total) * probability * rest
        slope = tl.where(tl.abs(x) < float("inf"), slope, float("nan"))
        tl.store(slopes + point, slope, mask=live)
        bits = slope.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        most = tl.maximum(most, tl.where(live, bits, 0))
    tl.store(largest + number, tl.max(most, 0))


@triton.jit
def _unit(largest, bits):
    """Exponent of the power of two that slopes are multiplied by, so that all are below 2^bits."""
    return tl.minimum(bits + 126 - (largest >> 23), 126)


@triton.jit
def _power_of_two(exponent):
    """2^exponent for -126 to 127, as float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_SIZES)
def _scatter_kernel(
    integers,  # [N, h, w] int64, zeros
    slopes,  # [N, P] float32
    largest,  # [N] int32
    rows,  # [N] int64
    points,  # [N, P, 2] float32
    blocks, count, height, width, bits, BLOCK: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) // blocks).to(tl.int64)
    point = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    most = tl.load(largest + number)
    if (most >= _INFINITY) | (tl.load(rows + number) < 0):
        return
    live = point < count
    slope = tl.load(slopes + number * count + point, mask=live, other=0.0) * _power_of_two(_unit(most, bits))
    inside, column, line, right, low = located(
        points + (number * count + point) * 2, live, height, width, height, width
    )
    integers += number * height * width
    for which in tl.static_range(4):
        there, x, y, share = corner(inside, column, line, right, low, height, width, which)
        tl.atomic_add(integers + y * width + x, (slope * share).to(tl.int64), mask=there, sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def _rounded_kernel(
    result,  # [N, h, w]
    integers,  # [N, h, w] int64
    largest,  # [N] int32
    blocks, cells, bits, BLOCK: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    most = tl.load(largest + number)
    values = tl.load(integers + number * cells + cell, mask=cell < cells, other=0).to(tl.float32)
    values = tl.where(most >= _INFINITY, float("nan"), values * _power_of_two(-_unit(most, bits)))
    tl.store(result + number * cells + cell, values.to(result.dtype.element_ty), mask=cell < cells)


def _check(logits: Tensor) -> None:
    """Raise ValueError for logits that kernels would read wrongly; `maskformer_fast.ops` checks the shapes."""
    if logits.dtype not in _ELEMENTS:
        raise ValueError(f"logits: expected float16, bfloat16 or float32, got {logits.dtype}")


def _chunks(number: int) -> list[slice]:
    return [slice(first, min(first + MAPS, number)) for first in range(0, number, MAPS)]


def choose_points_forward(
    logits: Tensor,  # [N, h, w] float16, bfloat16 or float32, contiguous like all others
    groups: Tensor,  # [N] int64, the points of each map, -1 for none
    candidates: Tensor,  # [G, M, 2] float32
    random: Tensor,  # [G, R, 2] float32
    uncertain: int,
) -> Tensor:
    """Choose the candidates of least |logit|, and the random points -> [N, uncertain + R, 2] float32.

    Among equal candidates the first are chosen. Raises ValueError for other dtypes of logits.
    """
    _check(logits)
    result = random.new_zeros(len(logits), uncertain + random.shape[1], 2)
    if result.numel() == 0:
        return result
    count = candidates.shape[1]
    blocks = triton.cdiv(count, BLOCK)
    with torch.cuda.device_of(logits):
        for chunk in _chunks(len(logits)):
            own = groups[chunk]
            keys = torch.empty(len(own), count if uncertain else 0, dtype=torch.int32, device=logits.device)
            if uncertain:
                _nearness_kernel[(len(own) * blocks,)](
                    keys, logits[chunk], own, candidates, blocks, count, *logits.shape[1:], BLOCK=BLOCK, **LAUNCH
                )
            _choose_points_kernel[(len(own),)](
                result[chunk], keys, own, candidates, random, count, random.shape[1], uncertain,
                BLOCK=CANDIDATES, **CHOICE_LAUNCH,
            )  # fmt: skip
    return result


def _constants(gamma: float) -> dict[str, Any]:
    return {"POWER": int(gamma) if gamma in (0.0, 1.0, 2.0) else -1, "BLOCK": BLOCK}


def point_sums_forward(
    logits: Tensor,  # [N, h, w] float16, bfloat16 or float32, contiguous like all others
    rows: Tensor,  # [N] int64, negative for a map that is left out
    points: Tensor,  # [N, P, 2] float32
    truth: Tensor,  # [N, P] float32
    focal: tuple[float, float, float],  # weight of mask points, weight of other points, exponent
) -> Tensor:
    """Sums of focal loss, p t, p and t over the points -> [N, 4] float32. Raises ValueError for other dtypes."""
    _check(logits)
    sums = truth.new_empty(len(logits), 4)
    if len(sums):
        with torch.cuda.device_of(logits):
            _point_sums_kernel[(len(sums),)](
                sums, logits, rows, points, truth, truth.shape[1], *logits.shape[1:], *focal,
                **_constants(focal[2]), **LAUNCH,
            )  # fmt: skip
    return sums


def point_sums_backward(
    gradient: Tensor,  # [N, 4] float32
    logits: Tensor,
    rows: Tensor,
    points: Tensor,
    truth: Tensor,
    focal: tuple[float, float, float],
) -> Tensor:
    """Gradient of `point_sums_forward`, whose other arguments and errors it has, by the logits -> [N, h, w]."""
    _check(logits)
    result = torch.empty_like(logits)
    if result.numel() == 0:
        return result
    count, cells = truth.shape[1], logits[0].numel()
    bits = 62 - count.bit_length()  # so that no sum of that many slopes leaves the range
    blocks, cell_blocks = triton.cdiv(count, BLOCK), triton.cdiv(cells, BLOCK)
    with torch.cuda.device_of(logits):
        for chunk in _chunks(len(logits)):
            maps, own, places, targets = logits[chunk], rows[chunk], points[chunk], truth[chunk]
            slopes, largest = torch.empty_like(targets), targets.new_empty(len(maps), dtype=torch.int32)
            integers = torch.zeros_like(maps, dtype=torch.int64)
            _slopes_kernel[(len(maps),)](
                slopes, largest, gradient[chunk], maps, own, places, targets, count, *maps.shape[1:], *focal,
                **_constants(focal[2]), **LAUNCH,
            )  # fmt: skip
            _scatter_kernel[(len(maps) * blocks,)](
                integers, slopes, largest, own, places, blocks, count, *maps.shape[1:], bits, BLOCK=BLOCK, **LAUNCH
            )
            _rounded_kernel[(len(maps) * cell_blocks,)](
                result[chunk], integers, largest, cell_blocks, cells, bits, BLOCK=BLOCK, **LAUNCH
            )
    return result


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: exponents 0 and 2, and any, which takes the most registers."""
    pointers = dict.fromkeys(("candidates", "random", "points", "truth", "sums", "gradient", "slopes"), "*fp32")
    pointers |= {"keys": "*i32", "largest": "*i32", "groups": "*i64", "rows": "*i64", "integers": "*i64"}
    pointers |= dict.fromkeys(("on_weight", "off_weight", "gamma"), "fp32")
    blocks, found = {"BLOCK": BLOCK}, []
    for element in _ELEMENTS.values():
        types = pointers | {"logits": f"*{element}", "result": f"*{element}"}
        for name, kernel in (("nearness", _nearness_kernel), ("gradient_rounded", _rounded_kernel)):
            found.append(kernel_variant(f"point_{name}_{element}", kernel, types, blocks, LAUNCH))
        for name, kernel in (("sums", _point_sums_kernel), ("slopes", _slopes_kernel)):
            for gamma, word in ((0.0, "0"), (2.0, "2"), (1.5, "any")):
                found.append(kernel_variant(
                    f"point_{name}_{element}_gamma_{word}", kernel, types, _constants(gamma), LAUNCH
                ))  # fmt: skip
    types = pointers | {"result": "*fp32"}
    return [
        *found, kernel_variant("point_gradient_scatter", _scatter_kernel, types, blocks, LAUNCH),
        kernel_variant("choose_points", _choose_points_kernel, types, {"BLOCK": CANDIDATES}, CHOICE_LAUNCH),
    ]  # fmt: skip


def goal_calls() -> list[GoalLaunch]:
    """Losses of 256 pairs of a 128x128 map and a target, 12,544 points of each of which 9,408 of 37,632 candidates."""
    maps, count, random, candidates = MAPS, 12544, 3136, 37632
    with torch.device("meta"):
        logits, rows = torch.empty(maps, 128, 128), torch.empty(maps, dtype=torch.int64)
        points, truth, gradient = torch.empty(maps, count, 2), torch.empty(maps, count), torch.empty(maps, 4)
        drawn = (torch.empty(2, candidates, 2), torch.empty(2, random, 2))
    loops = {"range(0, end, BLOCK)": triton.cdiv(count, BLOCK)}
    passes = triton.cdiv(candidates, CANDIDATES)
    keys, places = 4 * maps * candidates, 4 * (points.numel() + truth.numel())
    choice = {"for start in range(0, 2 * random_count, BLOCK)": triton.cdiv(2 * random, CANDIDATES),
              "for start in range(0, candidate_count, BLOCK)": passes,
              "for first in range(0, candidate_count, BLOCK)": passes}  # fmt: skip
    focal = (1.0, 1.0, 0.0)
    name = "losses at points N=256 128x128 P=12544 M=37632"
    return [
        *goal_launches(name, lambda: choose_points_forward(logits, rows, *drawn, count - random),
                       [Work("nearness", {}, 4 * logits.numel() + keys), Work("choose", choice, keys + places)]),
        *goal_launches(name, lambda: point_sums_forward(logits, rows, points, truth, focal),
                       [Work("sums", loops, 4 * logits.numel() + places)]),
        *goal_launches(name, lambda: point_sums_backward(gradient, logits, rows, points, truth, focal), [
            Work("slopes", loops, 4 * logits.numel() + places), Work("scatter", {}, 8 * logits.numel() + places),
            Work("round", {}, 12 * logits.numel()),
        ]),
    ]  # fmt: skip

