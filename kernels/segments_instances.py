"""Instance masks as bits, with area, box and the sum of their scores; of size N*H*W only the bits are written.

A program computes a tile of one query's mask. For most tiles it only stores zeros, because no tap is positive. Sums are
added to one row of integers a mask, by atomics whose order has no effect: sigmoids of a mask's pixels are in [0.5, 1],
so that with 24 fractional bits the sum of scores is also a sum of integers. `_finish_kernel` computes the results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.resample import sigmoid
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

TILE_H, TILE_W = 8, 128
"""Pixels of a program; rows of 16 bytes. Not measured on a GPU."""
TAP_H, TAP_W = 4, 64
"""Taps read together: those of a tile at scale 4."""
FINISH_BLOCK = 128
"""Masks that one program finishes."""
LAUNCH = {"num_warps": 4, "num_stages": 2}
_ONE = tl.constexpr(1 << 24)
"""Value of score 1 in the sums: a tile's sum is a float32 of 24 bits between 0.5 and 2^10, hence an integer here."""
_SUMS = 6
"""Rows of the sums: area, score and the four sides of the box."""
_CONSTANTS = {"TILE_H": TILE_H, "TILE_W": TILE_W, "TAP_H": TAP_H, "TAP_W": TAP_W}


@triton.jit(do_not_specialize=[*WINDOW, "num_masks", "tiles_y", "tiles_x"], do_not_specialize_on_alignment=STRIDES)
def _masks_kernel(
    masks,  # [num_masks, H, ceil(W/8)] uint8
    sums,  # [6, num_masks] int64, zeros: area, score, largest of H - y, W - x, y + 1, x + 1
    logits, stride_b, stride_q, stride_y, stride_x, num_queries, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, num_masks, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = (program // (tiles_y * tiles_x)).to(tl.int64)
    top = program // tiles_x % tiles_y * TILE_H
    left = program % tiles_x * TILE_W
    source = logits + index // num_queries * stride_b + index % num_queries * stride_q
    row_taps = tap_range(top, tl.minimum(top + TILE_H, height) - 1, scale_y, rest_y, map_height)
    column_taps = tap_range(left, tl.minimum(left + TILE_W, width) - 1, scale_x, rest_x, map_width)
    tap_count = (row_taps[1] - row_taps[0] + 1) * (column_taps[1] - column_taps[0] + 1)
    most = 1.0
    if tap_count * 2 <= TILE_H * TILE_W:  # where maps shrink, a tile has more taps than its pixels read
        _, most = tap_bounds(source, row_taps, column_taps, stride_y, stride_x, TAP_H, TAP_W)
    y = top + tl.arange(0, TILE_H)
    x = left + tl.arange(0, TILE_W)
    packed = tl.zeros((TILE_H, TILE_W // 8), tl.int32)
    if most > 0.0:
        rows = pixel_taps(y, scale_y, rest_y, map_height, stride_y)
        columns = pixel_taps(x, scale_x, rest_x, map_width, stride_x)
        logit = interpolate(source, rows, columns)
        mask = (logit > 0.0) & (y < height)[:, None] & (x < width)[None, :]
        bits = tl.reshape(mask.to(tl.int32), (TILE_H, TILE_W // 8, 8))
        packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
        area = tl.sum(mask.to(tl.int32))
        if area > 0:
            score = tl.sum(tl.where(mask, sigmoid(logit), 0.0))
            row, column = y[:, None], x[None, :]
            target = sums + index
            tl.atomic_add(target, area.to(tl.int64), sem="relaxed")
            tl.atomic_add(target + num_masks, (score * _ONE).to(tl.int64), sem="relaxed")
            tl.atomic_max(target + 2 * num_masks, tl.max(tl.where(mask, height - row, 0)).to(tl.int64), sem="relaxed")
            tl.atomic_max(target + 3 * num_masks, tl.max(tl.where(mask, width - column, 0)).to(tl.int64), sem="relaxed")
            tl.atomic_max(target + 4 * num_masks, tl.max(tl.where(mask, row + 1, 0)).to(tl.int64), sem="relaxed")
            tl.atomic_max(target + 5 * num_masks, tl.max(tl.where(mask, column + 1, 0)).to(tl.int64), sem="relaxed")
    row_bytes = (width + 7) // 8
    byte = left // 8 + tl.arange(0, TILE_W // 8)
    place = masks + (index * height + y[:, None]) * row_bytes + byte[None, :]
    tl.store(place, packed.to(tl.uint8), mask=(y < height)[:, None] & (byte < row_bytes)[None, :])


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
    tiles_y, tiles_x = triton.cdiv(height, TILE_H), triton.cdiv(width, TILE_W)
    with torch.cuda.device_of(masks):
        sums = areas.new_zeros((_SUMS, count))
        _masks_kernel[(count * tiles_y * tiles_x,)](
            masks, sums, *window, count, tiles_y, tiles_x, **_CONSTANTS, **LAUNCH
        )
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
    """An image of 800x1333 with 100 masks, each of which is positive in a part of the tiles."""
    masks, (rows, columns), (height, width) = 100, (200, 334), (800, 1333)
    logits = torch.empty(1, masks, rows, columns, device="meta")
    with torch.device("meta"):
        packed = torch.empty(1, masks, height, triton.cdiv(width, 8), dtype=torch.uint8)
        areas, boxes, scores = torch.empty(1, masks, dtype=torch.int64), torch.empty(1, masks, 4), torch.empty(1, masks)
    runs = {
        "range(first_row, last_row + 1, TAP_H)": 1,
        "range(first_column, last_column + 1, TAP_W)": 1,
        "if most > 0.0": 0.25,
        "if area > 0": 0.8,
    }
    works = [Work("masks", runs, logits.numel() * 4 + packed.numel()), Work("finish")]
    return goal_launches(
        "instances 800x1333 N=100 fp32",
        lambda: instance_masks(logits, (rows, columns), (height, width), packed, areas, boxes, scores),
        works,
    )
