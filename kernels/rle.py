"""Compressed COCO run lengths of masks, written on the device directly from mask logits.

COCO's runs go down the columns, so a mask is a list of the places x * H + y at which the value changes along them, and
the end, H * W. Five launches, with sums of their counts between them (`torch.cumsum`):

- `_signs_kernel` writes the masks as bits, 32 rows of a column in a word. A program of one warp walks down some bands
  of 32 rows. A band whose taps are all positive, or all not positive, is settled by them; rows of the others are
  interpolated from two rows of taps, which are interpolated across once for all rows between them.
- `_changes_kernel`, 32 columns of a mask a program, counts the changes in each column's words.
- `_changes_kernel` again, with the first slot of each column, writes their places.
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
    axis_step,
    pixel_place,
    place_range,
    row_logits,
    tap_signs,
    window_arguments,
    window_types,
)
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

BANDS = 4
"""Bands of 32 rows that a program of `_signs_kernel` walks. Not measured on a GPU."""
COLUMNS = 128
"""Columns of such a program. Not measured on a GPU."""
TAP_H, TAP_W = 2, 64
"""Taps read together: at scale 4 a band has 9 or 10 rows of 33 or 34."""
BAND_BLOCK = 8
"""Bands whose changes are counted together. Not measured on a GPU."""
RUN_BLOCK = 256
"""Runs that are encoded together; most masks have one or a few thousand. Not measured on a GPU."""
MAX_RUN_BYTES = 7
"""Most characters of a run: groups of 5 bits in 32 bits and a sign."""
LAUNCH = {"num_warps": 1, "num_stages": 2}

_CONSTANTS = {"BANDS": BANDS, "COLUMNS": COLUMNS, "TAP_H": TAP_H, "TAP_W": TAP_W}
_MAX_RUN_BYTES = tl.constexpr(MAX_RUN_BYTES)


@triton.jit(do_not_specialize=[*WINDOW, "bands"], do_not_specialize_on_alignment=STRIDES)
def _signs_kernel(
    words,  # [masks, bands, W] int32, written: bit i of a band is 1 where the logit of its row i is positive
    logits, stride_b, stride_q, stride_y, stride_x, num_queries, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, bands,
    BANDS: tl.constexpr, COLUMNS: tl.constexpr, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    source = logits + index // num_queries * stride_b + index % num_queries * stride_q
    step_y = axis_step(scale_y, rest_y)
    step_x = axis_step(scale_x, rest_x)
    left = tl.program_id(2) * COLUMNS
    x = left + 32 * tl.arange(0, COLUMNS // 32)[:, None] + tl.arange(0, 32)[None, :]
    low, share_x = pixel_place(x, step_x, map_width)
    before = low * stride_x
    after = tl.minimum(low + 1, map_width - 1) * stride_x
    column_taps = place_range(left, tl.minimum(left + COLUMNS, width) - 1, step_x, map_width)

    first_band = tl.program_id(1) * BANDS
    target = words + (index * bands + first_band) * width + x
    upper = tl.zeros((COLUMNS // 32, 32), tl.float32)
    lower = tl.zeros((COLUMNS // 32, 32), tl.float32)
    tap_row = -2
    for band in tl.range(first_band, tl.minimum(first_band + BANDS, bands)):
        top = band * 32
        bottom = tl.minimum(top + 32, height)
        row_taps = place_range(top, bottom - 1, step_y, map_height)
        tap_count = (row_taps[1] - row_taps[0] + 1) * (column_taps[1] - column_taps[0] + 1)
        all_positive, any_positive = 0, 1
        if tap_count <= 16 * COLUMNS:  # where maps shrink, reading all taps of a band is more work than its pixels
            all_positive, any_positive = tap_signs(source, row_taps, column_taps, stride_y, stride_x, TAP_H, TAP_W)
        word = tl.zeros((COLUMNS // 32, 32), tl.int32) - all_positive // 2  # settled: no bit or all
        if (any_positive > 0) & (all_positive < 2):
            for y in tl.range(top, bottom):
                logit, upper, lower, tap_row = row_logits(
                    source, y, step_y, map_height, stride_y, before, after, share_x, upper, lower, tap_row
                )
                word |= tl.where(logit > 0.0, 1 << (y - top), 0)
        tl.store(target, word, mask=x < width)
        target += width


@triton.jit
def _set_bits(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["capacity", "height", "width", "bands"])
def _changes_kernel(
    changes,  # [masks, W]: written, int32; with WRITE read, int64, as sums up to and with each column, over all masks
    places,  # [capacity] int32, written with WRITE: mask after mask, changes and the end
    words,  # [masks, bands, W] int32 of `_signs_kernel`
    capacity, height, width, bands,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the changes of 32 columns of a mask, or write their places; BLOCK bands at a time."""
    index = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * 32 + tl.arange(0, 32)
    in_width = x < width
    source = words + index * bands * width
    # the pixel before a column's first is the last of the column to its left
    last = tl.load(source + (bands - 1).to(tl.int64) * width + x - 1, mask=in_width & (x > 0), other=0)
    before_first = (last >> (height - 1) % 32) & 1
    target = changes + index * width + x
    count = tl.zeros((32,), tl.int32)
    slot = tl.zeros((32,), tl.int64)
    if WRITE:
        slot = tl.load(target - 1, mask=in_width & (index + x > 0), other=0) + index  # one end for each mask before
    for start in tl.range(0, bands, BLOCK):
        band = start + tl.arange(0, BLOCK)[:, None]
        inside = (band < bands) & in_width[None, :]
        place = source + (band.to(tl.int64) * width + x[None, :])
        word = tl.load(place, mask=inside, other=0)
        above = tl.load(place - width, mask=inside & (band > 0), other=0)
        above = tl.where(band == 0, before_first[None, :], (above >> 31) & 1)
        rows = height - 32 * band  # of the band and below it
        valid = tl.where(rows < 32, (1 << tl.minimum(tl.maximum(rows, 0), 31)) - 1, -1)
        change = (word ^ ((word << 1) | above)) & valid
        number = _set_bits(tl.where(inside, change, 0).to(tl.uint32, bitcast=True))
        if WRITE:
            change = tl.where(inside, change, 0)
            first = slot[None, :] + (count[None, :] + tl.cumsum(number, 0) - number)
            for step in tl.range(0, tl.max(number)):
                lowest = change & (0 - change)
                change ^= lowest
                # of a power of two as float32, the exponent is the bit
                row = (lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                goal = first + step
                tl.store(places + goal, x[None, :] * height + 32 * band + row, mask=(lowest != 0) & (goal < capacity))
        count += tl.sum(number, 0)
    if WRITE:
        end = slot + count
        tl.store(places + end, height * width + tl.zeros((32,), tl.int32), mask=(x == width - 1) & (end < capacity))
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
            for group in tl.range(0, tl.max(length)):  # most runs have 2 characters
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
    bands = triton.cdiv(height, 32)
    with torch.cuda.device_of(data):
        words = data.new_empty((count, bands, width), dtype=torch.int32)
        _signs_kernel[(count, triton.cdiv(bands, BANDS), triton.cdiv(width, COLUMNS))](
            words, *window, bands, **_CONSTANTS, **LAUNCH
        )
        changes = data.new_empty((count, width), dtype=torch.int32)
        places = data.new_empty(capacity, dtype=torch.int32)  # each run has a byte at least
        grid = (count, triton.cdiv(width, 32))
        source = (words, capacity, height, width, bands)
        _changes_kernel[grid](changes, places, *source, WRITE=False, BLOCK=BAND_BLOCK, **LAUNCH)
        sums = changes.view(-1).cumsum(0)
        _changes_kernel[grid](sums, places, *source, WRITE=True, BLOCK=BAND_BLOCK, **LAUNCH)
        lengths = starts.new_empty(count)
        source = (data, places, sums, width, capacity)
        _bytes_kernel[(count,)](lengths, *source, WRITE=False, BLOCK=RUN_BLOCK, **LAUNCH)
        ends = lengths.cumsum(0)
        _bytes_kernel[(count,)](ends, *source, WRITE=True, BLOCK=RUN_BLOCK, **LAUNCH)
        starts.copy_(F.pad(ends, (1, 0)))
        runs = sums[-1] + count
        starts[-1] = torch.where(runs > capacity, runs * MAX_RUN_BYTES, starts[-1])


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time."""
    constants = {**_CONSTANTS, "stride_x": 1}
    types = {"words": "*i32", **window_types(torch.float32)}
    arguments = {name: types.get(name, "i32") for name in _signs_kernel.arg_names if name not in constants}
    kernels = [KernelVariant("rle_signs_fp32", _signs_kernel, arguments, constants, **LAUNCH, aligned=("logits",))]
    sizes = dict.fromkeys(("capacity", "height", "width", "bands"), "i32")
    for write, sums in ((False, "*i32"), (True, "*i64")):
        suffix = "write" if write else "count"
        types = {"changes": sums, "places": "*i32", "words": "*i32"} | sizes
        constants = {"WRITE": write, "BLOCK": BAND_BLOCK}
        kernels.append(KernelVariant(f"rle_changes_{suffix}", _changes_kernel, types, constants, **LAUNCH))
        types = {"lengths": "*i64", "data": "*u8", "places": "*i32", "changes": "*i64"}
        types |= {"width": "i32", "capacity": "i32"}
        constants = {"WRITE": write, "BLOCK": RUN_BLOCK}
        kernels.append(KernelVariant(f"rle_bytes_{suffix}", _bytes_kernel, types, constants, **LAUNCH))
    return kernels


def goal_calls() -> list[GoalLaunch]:
    """An image of 800x1333 with 100 masks of 1,500 runs at scale 4, with outlines in a quarter of the bands."""
    masks, (rows, columns), (height, width), mask_runs = 100, (200, 334), (800, 1333), 1500
    logits = torch.empty(1, masks, rows, columns, device="meta")
    data = torch.empty(8 << 20, dtype=torch.uint8, device="meta")
    starts = torch.empty(masks + 1, dtype=torch.int64, device="meta")
    bands = triton.cdiv(height, 32)
    runs = {
        "for band in tl.range(first_band": bands / triton.cdiv(bands, BANDS),
        "range(first_row, last_row + 1, TAP_H)": 5,
        "range(first_column, last_column + 1, TAP_W)": 1,
        "if (any_positive > 0) & (all_positive < 2)": 0.25,
        "for y in tl.range(top, bottom)": 32,
        "if low != tap_row": 0.28,
        "if low == tap_row + 1": 0.11,
    }
    count = {"for start in tl.range(0, bands, BLOCK)": triton.cdiv(bands, BAND_BLOCK)}
    encode = {"for start in tl.range(0, count, BLOCK)": triton.cdiv(mask_runs, RUN_BLOCK)}
    words = 4 * masks * bands * width
    works = [
        Work("signs", runs, logits.numel() * 4 + words), Work("count changes", count, words),
        Work("write changes", {**count, "for step in tl.range(0, tl.max(number))": 1.5}, words),
        Work("count bytes", encode), Work("write bytes", {**encode, "for group in tl.range(0, tl.max(length))": 3}),
    ]  # fmt: skip
    return goal_launches(
        "rle 800x1333 N=100 fp32", lambda: encode_masks(logits, (rows, columns), (height, width), data, starts), works
    )
