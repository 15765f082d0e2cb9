"""Compressed COCO run lengths of masks, written on the device directly from mask logits: no mask is stored.

COCO's runs go down the columns, so a mask is a list of the places x * H + y at which the value changes along them, and
the end, H * W. Four launches, with sums of their counts between them (`torch.cumsum`):

- `_changes_kernel`, a block of columns of one mask a program, goes down the rows and counts each column's changes. A
tile
  whose taps are all positive, or all not positive, has no changes; few tiles are computed pixel by pixel.
- `_changes_kernel` again, with the first slot of each column, writes the places.
- `_bytes_kernel`, a mask a program, counts the characters of its runs.
- `_bytes_kernel` again, with the first byte of each mask, writes them.

A run's characters are those of pycocotools: from the fourth run on its difference to the run before the last, in groups
of 5 bits, lowest first, until the rest is the sign; bit 32 is set where more follow, and 48 is added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.segments_taps import (
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

TILE_H, TILE_W = 16, 32
"""Rows processed together, and columns of a program. Not measured on a GPU."""
TAP_H, TAP_W = 8, 16
"""Taps read together: those of a tile at scale 4."""
RUN_BLOCK = 256
"""Runs that are encoded together; most masks have one or a few thousand. Not measured on a GPU."""
MAX_RUN_BYTES = 7
"""Most characters of a run: groups of 5 bits in 32 bits and a sign."""
CHANGES_LAUNCH = {"num_warps": 4, "num_stages": 2}
BYTES_LAUNCH = {"num_warps": 1, "num_stages": 2}
_CONSTANTS = {"TILE_H": TILE_H, "TILE_W": TILE_W, "TAP_H": TAP_H, "TAP_W": TAP_W}
_MAX_RUN_BYTES = tl.constexpr(MAX_RUN_BYTES)


@triton.jit(do_not_specialize=[*WINDOW, "blocks", "capacity"], do_not_specialize_on_alignment=STRIDES)
def _changes_kernel(
    changes,  # [masks, W]: written, int32; with WRITE read, int64, as sums up to and with each column, over all masks
    places,  # [capacity] int32, written with WRITE: mask after mask, changes and the end
    logits, stride_b, stride_q, stride_y, stride_x, num_queries, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, blocks, capacity,
    WRITE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
):  # fmt: skip
    index = (tl.program_id(0) // blocks).to(tl.int64)
    left = tl.program_id(0) % blocks * TILE_W
    source = logits + index // num_queries * stride_b + index % num_queries * stride_q
    x = left + tl.arange(0, TILE_W)
    in_width = x < width
    columns = pixel_taps(x, scale_x, rest_x, map_width, stride_x)
    column_taps = tap_range(left, tl.minimum(left + TILE_W, width) - 1, scale_x, rest_x, map_width)
    # the pixel before a column's first is the last of the column to its left
    columns_before = pixel_taps(x - 1, scale_x, rest_x, map_width, stride_x)
    last_row = pixel_taps(height - 1 + tl.zeros((1,), tl.int32), scale_y, rest_y, map_height, stride_y)
    before_first = (interpolate(source, last_row, columns_before) > 0.0) & (x > 0)[None, :]

    target = changes + index * width + x
    count = tl.zeros((TILE_W,), tl.int32)
    slot = tl.zeros((TILE_W,), tl.int64)
    if WRITE:
        slot = tl.load(target - 1, mask=in_width & (index + x > 0), other=0) + index  # one end for each mask before
    for top in tl.range(0, height, TILE_H):
        row_taps = tap_range(tl.maximum(top - 1, 0), tl.minimum(top + TILE_H, height) - 1, scale_y, rest_y, map_height)
        least, most = tap_bounds(source, row_taps, column_taps, stride_y, stride_x, TAP_H, TAP_W)
        # Interpolation rounds: between small and huge positive taps it may reach 0, between others it does not.
        settled = (most <= 0.0) | (least > 1e-6 * most)
        if (top == 0) | (settled == 0):
            y = top + tl.arange(0, TILE_H)
            here = interpolate(source, pixel_taps(y, scale_y, rest_y, map_height, stride_y), columns) > 0.0
            above = interpolate(source, pixel_taps(y - 1, scale_y, rest_y, map_height, stride_y), columns) > 0.0
            before = tl.where((y == 0)[:, None], before_first, above)
            change = ((here != before) & (y < height)[:, None] & in_width[None, :]).to(tl.int32)
            if WRITE:
                place = slot[None, :] + (count[None, :] + tl.cumsum(change, 0) - 1)
                tl.store(places + place, x[None, :] * height + y[:, None], mask=(change > 0) & (place < capacity))
            count += tl.sum(change, 0)
    if WRITE:
        end = slot + count
        tl.store(places + end, height * width + tl.zeros((TILE_W,), tl.int32), mask=(x == width - 1) & (end < capacity))
    else:
        tl.store(target, count, mask=in_width)


@triton.jit
def _encoded(places, first, run, inside, capacity):
    """Encode some of a mask's runs -> numbers that stand for them, characters of each."""
    # places of the run's end and of the three before it; before the first run is place 0
    place = places + first + run
    inside = inside & (first + run < capacity)
    end = tl.load(place, mask=inside, other=0)
    start = tl.load(place - 1, mask=inside & (run > 0), other=0)
    older_end = tl.load(place - 2, mask=inside & (run > 2), other=0)
    older_start = tl.load(place - 3, mask=inside & (run > 2), other=0)
    value = (end - start) - (older_end - older_start)
    size = value ^ (value >> 31)  # without the sign
    length = inside.to(tl.int32)
    for group in tl.static_range(1, _MAX_RUN_BYTES):
        length += (size >> (5 * group - 1) > 0).to(tl.int32)
    return value, length


@triton.jit(do_not_specialize=["width", "capacity"])
def _bytes_kernel(
    lengths,  # [masks] int64: bytes of each mask, written; with WRITE read, as sums with all masks before
    data,  # [capacity] uint8, written with WRITE
    places,  # [capacity] int32
    changes,  # [masks, W] int64, sums up to and with each column, over all masks
    width, capacity,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    before = tl.load(changes + index * width - 1, mask=index > 0, other=0)
    first = before + index
    count = (tl.load(changes + (index + 1) * width - 1) - before + 1).to(tl.int32)  # of runs
    total = tl.zeros((), tl.int64)
    if WRITE:
        total += tl.load(lengths + index - 1, mask=index > 0, other=0)
    for start in tl.range(0, count, BLOCK):
        run = start + tl.arange(0, BLOCK)
        value, length = _encoded(places, first, run, run < count, capacity)
        if WRITE:
            room = tl.minimum(tl.maximum(capacity - total, 0), BLOCK * _MAX_RUN_BYTES).to(tl.int32)
            place = tl.cumsum(length, 0) - length
            for group in tl.static_range(_MAX_RUN_BYTES):
                more = tl.where(group + 1 < length, 80, 48)
                character = ((value >> (5 * group)) & 31) + more
                mask = (group < length) & (place + group < room)
                tl.store(data + total + (place + group), character.to(tl.uint8), mask=mask)
        total += tl.sum(length)
    if not WRITE:
        tl.store(lengths + index, total)


def encode_masks(
    mask_logits: Tensor,  # [B, N, h, w] float16, bfloat16 or float32, any strides
    extent: tuple[float, float],
    output_size: tuple[int, int],
    data: Tensor,  # [capacity] uint8, written
    starts: Tensor,  # [B * N + 1] int64, written
) -> None:
    """Write compressed COCO run lengths of masks (logit > 0): those of mask i are data[starts[i]:starts[i+1]].

    They fit if starts[-1] is at most the capacity. If not, starts[-1] is a sufficient capacity, and all other results
    are invalid. Bytes after the last one are not written. NaN logits count as -1e30, values beyond ±1e30 as ±1e30.
    Raises ValueError for other dtypes and for outputs of 2^31 pixels.
    """
    height, width = output_size
    if height * width >= 1 << 31:
        raise ValueError(f"output_size: expected fewer than 2^31 pixels, got {height} x {width}")
    window = window_arguments(mask_logits, extent, output_size)
    count, capacity = len(starts) - 1, len(data)
    if count == 0:
        starts.zero_()
        return
    blocks = triton.cdiv(width, TILE_W)
    with torch.cuda.device_of(data):
        changes = data.new_empty((count, width), dtype=torch.int32)
        places = data.new_empty(capacity, dtype=torch.int32)  # each run has a byte at least
        grid = (count * blocks,)
        _changes_kernel[grid](changes, places, *window, blocks, capacity, WRITE=False, **_CONSTANTS, **CHANGES_LAUNCH)
        sums = changes.view(-1).cumsum(0)
        _changes_kernel[grid](sums, places, *window, blocks, capacity, WRITE=True, **_CONSTANTS, **CHANGES_LAUNCH)
        lengths = starts.new_empty(count)
        source = (data, places, sums, width, capacity)
        _bytes_kernel[(count,)](lengths, *source, WRITE=False, BLOCK=RUN_BLOCK, **BYTES_LAUNCH)
        ends = lengths.cumsum(0)
        _bytes_kernel[(count,)](ends, *source, WRITE=True, BLOCK=RUN_BLOCK, **BYTES_LAUNCH)
        starts.copy_(F.pad(ends, (1, 0)))
        runs = sums[-1] + count
        starts[-1] = torch.where(runs > capacity, runs * MAX_RUN_BYTES, starts[-1])


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time."""
    kernels = []
    for write, sums in ((False, "*i32"), (True, "*i64")):
        suffix = "write" if write else "count"
        constants = {"WRITE": write, **_CONSTANTS, "stride_x": 1}
        types = {"changes": sums, "places": "*i32", **window_types(torch.float32)}
        arguments = {name: types.get(name, "i32") for name in _changes_kernel.arg_names if name not in constants}
        name = f"rle_changes_fp32_{suffix}"
        kernels.append(
            KernelVariant(name, _changes_kernel, arguments, constants, **CHANGES_LAUNCH, aligned=("logits",))
        )
        types = {"lengths": "*i64", "data": "*u8", "places": "*i32", "changes": "*i64"}
        types |= {"width": "i32", "capacity": "i32"}
        constants = {"WRITE": write, "BLOCK": RUN_BLOCK}
        kernels.append(KernelVariant(f"rle_bytes_{suffix}", _bytes_kernel, types, constants, **BYTES_LAUNCH))
    return kernels


def goal_calls() -> list[GoalLaunch]:
    """An image of 800x1333 with 100 masks of 1,500 runs."""
    masks, (rows, columns), (height, width), mask_runs = 100, (200, 334), (800, 1333), 1500
    logits = torch.empty(1, masks, rows, columns, device="meta")
    data = torch.empty(8 << 20, dtype=torch.uint8, device="meta")
    starts = torch.empty(masks + 1, dtype=torch.int64, device="meta")
    blocks = triton.cdiv(height, TILE_H)
    runs = {
        "for top in tl.range(0, height, TILE_H)": blocks,
        "range(first_row, last_row + 1, TAP_H)": 1,
        "range(first_column, last_column + 1, TAP_W)": 1,
        "if (top == 0) | (settled == 0)": 0.15,
    }
    encode = {"for start in tl.range(0, count, BLOCK)": triton.cdiv(mask_runs, RUN_BLOCK)}
    walk = logits.numel() * 4
    works = [
        Work("count changes", runs, walk), Work("write changes", runs, walk), Work("count bytes", encode),
        Work("write bytes", encode),
    ]  # fmt: skip
    return goal_launches(
        "rle 800x1333 N=100 fp32", lambda: encode_masks(logits, (rows, columns), (height, width), data, starts), works
    )
