"""Instance masks as bits, with area, box and the sum of their scores; of size N*H*W only the bits are written.

A program of one warp walks down some bands of one query's mask. For most bands it only stores zeros, because no tap is
positive. Rows of the others are interpolated from two rows of taps, which are interpolated across once for all rows
between them. Sums are added to one row of integers a mask, by atomics whose order has no effect: sigmoids of a mask's
pixels are in [0.5, 1], so that with 24 fractional bits the sum of scores is also a sum of integers. `_finish_kernel`
computes the results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.segments_taps import (
    ELEMENTS,
    STRIDES,
    WINDOW,
    axis_step,
    pixel_place,
    place_range,
    row_logits,
    tap_signs,
    window_arguments,
    window_types,
)
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

BAND_H, BANDS = 16, 4
"""Rows that are checked for a positive tap at once, and such bands of a program. Not measured on a GPU."""
COLUMN_BYTES = 32
"""Bytes of a row that a program writes: one a lane."""
TAP_H, TAP_W = 8, 32
"""Taps read together: at scale 4 a band has 5 or 6 rows of 65 or 66."""
FINISH_BLOCK = 128
"""Masks that one program finishes."""
LAUNCH = {"num_warps": 1, "num_stages": 2}
_ONE = tl.constexpr(1 << 24)
"""Value of score 1 in the sums: eight pixels have a float32 of 24 bits between 0.5 and 8, hence an integer here."""
_COUNTED = tl.constexpr(1 << 8)
"""A pixel in the number that also holds the bits of a byte."""
_SUMS = 6
"""Rows of the sums: area, score and the four sides of the box."""
_CONSTANTS = {
    "BANDS": BANDS, "BAND_H": BAND_H, "COLUMN_BYTES": COLUMN_BYTES, "TAP_H": TAP_H, "TAP_W": TAP_W,
}  # fmt: skip


@triton.jit(do_not_specialize=[*WINDOW, "num_masks"], do_not_specialize_on_alignment=STRIDES)
def _masks_kernel(
    masks,  # [num_masks, H, ceil(W/8)] uint8
    sums,  # [6, num_masks] int64, zeros: area, score, largest of H - y, W - x, y + 1, x + 1
    logits, stride_b, stride_q, stride_y, stride_x, num_queries, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, num_masks,
    BANDS: tl.constexpr, BAND_H: tl.constexpr, COLUMN_BYTES: tl.constexpr, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    source = logits + index // num_queries * stride_b + index % num_queries * stride_q
    step_y = axis_step(scale_y, rest_y)
    step_x = axis_step(scale_x, rest_x)
    left = tl.program_id(2) * COLUMN_BYTES * 8
    byte = tl.arange(0, COLUMN_BYTES)
    bit = tl.arange(0, 8)[:, None]
    x = left + 8 * byte[None, :] + bit  # the bits of a byte are in one thread
    inside = x < width
    low, share_x = pixel_place(x, step_x, map_width)
    before = low * stride_x
    after = tl.minimum(low + 1, map_width - 1) * stride_x
    first_column, last_column = place_range(left, tl.minimum(left + COLUMN_BYTES * 8, width) - 1, step_x, map_width)

    row_bytes = (width + 7) // 8
    in_row = left // 8 + byte < row_bytes
    count = (bit >= 0).to(tl.int32) * _COUNTED | 1 << bit  # of a pixel: 1, and its bit
    start = tl.program_id(1) * BANDS * BAND_H
    target = masks + (index * height + start) * row_bytes + left // 8 + byte
    area = tl.zeros((COLUMN_BYTES,), tl.int32)
    columns = tl.zeros((COLUMN_BYTES,), tl.int32)  # bits of all rows
    first_y = tl.zeros((COLUMN_BYTES,), tl.int32) + height
    last_y = tl.zeros((COLUMN_BYTES,), tl.int32) - 1
    score = tl.zeros((COLUMN_BYTES,), tl.int64)
    upper = tl.zeros((8, COLUMN_BYTES), tl.float32)
    lower = tl.zeros((8, COLUMN_BYTES), tl.float32)
    tap_row = -2
    for top in tl.range(start, tl.minimum(start + BANDS * BAND_H, height), BAND_H):
        bottom = tl.minimum(top + BAND_H, height)
        first_row, last_row = place_range(top, bottom - 1, step_y, map_height)
        rows = last_row - first_row + 1
        any_positive = 1
        if rows * (last_column - first_column + 1) <= BAND_H * COLUMN_BYTES * 4:
            # where maps shrink, reading all taps of a tile is more work than its pixels
            taps = (first_row, last_row), (first_column, last_column)
            _, any_positive = tap_signs(source, *taps, stride_y, stride_x, TAP_H, TAP_W)
        if any_positive == 0:
            row = tl.arange(0, BAND_H)[:, None]
            place = target[None, :] + row * row_bytes
            tl.store(place, tl.zeros((BAND_H, COLUMN_BYTES), tl.uint8), mask=(row < bottom - top) & in_row[None, :])
        else:
            for y in tl.range(top, bottom):
                logit, upper, lower, tap_row = row_logits(
                    source, y, step_y, map_height, stride_y, before, after, share_x, upper, lower, tap_row
                )
                mask = (logit > 0.0) & inside
                # a pixel that is not the mask's has the sigmoid 0
                sigmoids = 1.0 / (1.0 + tl.exp2(tl.where(mask, logit * -1.4426950408889634, float("inf"))))
                score += (tl.sum(sigmoids, 0) * _ONE).to(tl.int32).to(tl.int64)
                counted = tl.sum(tl.where(mask, count, 0), 0)
                packed = counted & 255
                tl.store(target + (y - top) * row_bytes, packed.to(tl.uint8), mask=in_row)
                area += counted // _COUNTED
                columns |= packed
                first_y = tl.minimum(first_y, tl.where(packed > 0, y, height))
                last_y = tl.where(packed > 0, y, last_y)
        target += BAND_H * row_bytes
    total = tl.sum(area)
    if total > 0:
        hit = (columns[None, :] >> bit) & 1 > 0
        goal = sums + index
        tl.atomic_add(goal, total.to(tl.int64), sem="relaxed")
        tl.atomic_add(goal + num_masks, tl.sum(score), sem="relaxed")
        tl.atomic_max(goal + 2 * num_masks, (height - tl.min(first_y)).to(tl.int64), sem="relaxed")
        tl.atomic_max(goal + 3 * num_masks, tl.max(tl.where(hit, width - x, 0)).to(tl.int64), sem="relaxed")
        tl.atomic_max(goal + 4 * num_masks, (tl.max(last_y) + 1).to(tl.int64), sem="relaxed")
        tl.atomic_max(goal + 5 * num_masks, tl.max(tl.where(hit, x + 1, 0)).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["num_masks", "height", "width"])
def _finish_kernel(
    areas,  # [num_masks] int64
    boxes,  # [num_masks, 4] float32
    scores,  # [num_masks] float32
    sums,  # [6, num_masks] int64
    num_masks, height, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = index < num_masks
    source = sums + index
    area = tl.load(source, mask=real, other=0)
    total = tl.load(source + num_masks, mask=real, other=0).to(tl.float64) / _ONE
    tl.store(areas + index, area, mask=real)
    tl.store(scores + index, (total / (area.to(tl.float64) + 1e-6)).to(tl.float32), mask=real)
    empty = area == 0
    y0 = height - tl.load(source + 2 * num_masks, mask=real, other=0)
    x0 = width - tl.load(source + 3 * num_masks, mask=real, other=0)
    y1 = tl.load(source + 4 * num_masks, mask=real, other=0)
    x1 = tl.load(source + 5 * num_masks, mask=real, other=0)
    tl.store(boxes + 4 * index, tl.where(empty, 0, x0).to(tl.float32), mask=real)
    tl.store(boxes + 4 * index + 1, tl.where(empty, 0, y0).to(tl.float32), mask=real)
    tl.store(boxes + 4 * index + 2, x1.to(tl.float32), mask=real)
    tl.store(boxes + 4 * index + 3, y1.to(tl.float32), mask=real)


def instance_masks(
    mask_logits: Tensor,  # [B, N, h, w] float16, bfloat16 or float32, any strides
    extent: tuple[float, float],
    output_size: tuple[int, int],
    masks: Tensor,  # [B, N, H, ceil(W/8)] uint8, written
    areas: Tensor,  # [B, N] int64, written
    boxes: Tensor,  # [B, N, 4] float32, written
    scores: Tensor,  # [B, N] float32, written
) -> None:
    """Write packed masks (logit > 0 after resampling the part `extent` of the maps), areas, boxes and scores.

    The results are those of `instance_inference`. NaN logits count as -1e30, values beyond ±1e30 as ±1e30. Results are
    equal bit for bit in every run. Raises ValueError for other dtypes.
    """
    window = window_arguments(mask_logits, extent, output_size)
    count = areas.numel()
    if count == 0:
        return
    height, width = output_size
    grid = (count, triton.cdiv(height, BANDS * BAND_H), triton.cdiv(width, COLUMN_BYTES * 8))
    with torch.cuda.device_of(masks):
        sums = areas.new_zeros((_SUMS, count))
        _masks_kernel[grid](masks, sums, *window, count, **_CONSTANTS, **LAUNCH)
        _finish_kernel[(triton.cdiv(count, FINISH_BLOCK),)](
            areas, boxes, scores, sums, count, height, width, BLOCK=FINISH_BLOCK
        )


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time."""
    kernels = []
    for dtype in (torch.float16, torch.float32):
        constants = {**_CONSTANTS, "stride_x": 1}
        types = {"masks": "*u8", "sums": "*i64", **window_types(dtype)}
        arguments = {name: types.get(name, "i32") for name in _masks_kernel.arg_names if name not in constants}
        name = f"instance_masks_{ELEMENTS[dtype]}"
        kernels.append(KernelVariant(name, _masks_kernel, arguments, constants, **LAUNCH, aligned=("masks", "logits")))
    pointers = {"areas": "*i64", "boxes": "*fp32", "scores": "*fp32", "sums": "*i64"}
    arguments = pointers | {"num_masks": "i32", "height": "i32", "width": "i32"}
    constants = {"BLOCK": FINISH_BLOCK}
    return [*kernels, KernelVariant("instance_finish", _finish_kernel, arguments, constants, aligned=tuple(pointers))]


def goal_calls() -> list[GoalLaunch]:
    """An image of 800x1333 with 100 masks at scale 4, each of which is positive in a quarter of the bands."""
    masks, (rows, columns), (height, width) = 100, (200, 334), (800, 1333)
    logits = torch.empty(1, masks, rows, columns, device="meta")
    with torch.device("meta"):
        packed = torch.empty(1, masks, height, triton.cdiv(width, 8), dtype=torch.uint8)
        areas, boxes, scores = torch.empty(1, masks, dtype=torch.int64), torch.empty(1, masks, 4), torch.empty(1, masks)
    bands = triton.cdiv(height, BAND_H)
    runs = {
        "for top in tl.range(start": bands / triton.cdiv(bands, BANDS),
        "range(first_row, last_row + 1, TAP_H)": 1,
        "range(first_column, last_column + 1, TAP_W)": 3,
        "if any_positive == 0": 0.25,
        "for y in tl.range(top, bottom)": BAND_H,
        "if low != tap_row": 0.3,
        "if low == tap_row + 1": 0.2,
        "if total > 0": 0.5,
    }
    works = [Work("masks", runs, logits.numel() * 4 + packed.numel()), Work("finish")]
    return goal_launches(
        "instances 800x1333 N=100 fp32",
        lambda: instance_masks(logits, (rows, columns), (height, width), packed, areas, boxes, scores),
        works,
    )
