"""Resize of camera or decoder frames into the padded network input, equal to Pillow's bit for bit, in one kernel.

Pillow's antialiased bilinear resize (``Image.resize(..., BILINEAR)``) filters rows, rounds to 8 bits, then filters
columns, with coefficients of 22 binary places: integer arithmetic from end to end, so every backend can agree.

A program computes a tile of the output, one column a lane. It reads the source rows of the tile once, from top to
bottom: for each row it computes the tile's part of the horizontal pass, rounds it to 8 bits, and adds it to the tile's
rows whose filter reaches it. So the intermediate image is in registers, a row at a time. Only the few source rows where
the filters of neighbouring tiles overlap are filtered twice.

Strides describe the layout: interleaved or planar source, with or without alpha, rows padded to any pitch; blue first
is a negative stride of the channels. Where Pillow filters the columns first (`columns_first`), the same kernel runs
with rows and columns exchanged in source and output. It then reads across rows, which is slower, for tall images only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.resize_table import PRECISION_BITS, resize_table
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

BLOCK_H = 8
"""Rows of a tile."""
BLOCK_W = 32
"""Columns of a tile."""
NUM_WARPS = 1  # one column a lane: shared memory is not needed
NUM_STAGES = 1
_SHIFT = tl.constexpr(PRECISION_BITS)
_HALF = tl.constexpr(1 << (PRECISION_BITS - 1))
_SIZES = (
    "height", "width", "image_stride", "pitch", "pixel_stride", "channel_stride", "out_height", "out_width",
    "x_taps", "y_taps", "canvas_height", "canvas_width", "out_pitch", "out_pixel_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, "image", "out"])  # every frame size runs the same binary
def _resize_kernel(
    image,  # uint8, first byte of the red channel; the rest by the strides below, in bytes
    out,  # [N, 3, canvas], contiguous, by the strides below; uint8 without levels, else of their type
    x_table,  # int32 [1 + x_taps, out_width], of resize_table
    y_table,  # int32 [1 + y_taps, out_height]
    levels,  # None, or [3, 256]: the output for every 8-bit value of each channel
    height,
    width,
    image_stride,
    pitch,
    pixel_stride,
    channel_stride,
    out_height,
    out_width,
    x_taps,
    y_taps,
    canvas_height,
    canvas_width,
    out_pitch,
    out_pixel_stride,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    left = tl.program_id(0) * BLOCK_W
    top = tl.program_id(1) * BLOCK_H
    index = tl.program_id(2).to(tl.int64)
    x = left + tl.arange(0, BLOCK_W)[None, :]
    y = top + tl.arange(0, BLOCK_H)[:, None]
    in_x = x < out_width
    in_y = y < out_height
    x_first = tl.load(x_table + x, mask=in_x, other=0)
    y_first = tl.load(y_table + y, mask=in_y, other=0)

    # source rows of the tile; none for a tile of padding only
    row_begin = tl.load(y_table + tl.minimum(top, out_height - 1))
    row_end = tl.load(y_table + tl.minimum(top + BLOCK_H, out_height) - 1) + y_taps
    row_end = tl.where((top < out_height) & (left < out_width), tl.minimum(row_end, height), row_begin)

    # addresses only ever advance; those of masked lanes may leave the image
    line = image + index * image_stride + row_begin.to(tl.int64) * pitch + x_first.to(tl.int64) * pixel_stride
    plane = channel_stride.to(tl.int64)
    y_place = (1 + row_begin - y_first) * out_height + y
    acc0 = tl.full((BLOCK_H, BLOCK_W), _HALF, tl.int32)
    acc1 = tl.full((BLOCK_H, BLOCK_W), _HALF, tl.int32)
    acc2 = tl.full((BLOCK_H, BLOCK_W), _HALF, tl.int32)
    for row in range(row_begin, row_end):
        row0 = tl.full((1, BLOCK_W), _HALF, tl.int32)
        row1 = tl.full((1, BLOCK_W), _HALF, tl.int32)
        row2 = tl.full((1, BLOCK_W), _HALF, tl.int32)
        pixel = line
        x_place = out_width + x
        for tap in range(x_taps):
            inside = in_x & (x_first + tap < width)
            weight = tl.load(x_table + x_place, mask=inside, other=0)
            row0 += weight * tl.load(pixel, mask=inside, other=0).to(tl.int32)
            row1 += weight * tl.load(pixel + plane, mask=inside, other=0).to(tl.int32)
            row2 += weight * tl.load(pixel + 2 * plane, mask=inside, other=0).to(tl.int32)
            pixel += pixel_stride
            x_place += out_width
        tap_y = row - y_first
        reached = in_y & (tap_y >= 0) & (tap_y < y_taps)
        weight_y = tl.load(y_table + y_place, mask=reached, other=0)
        # rounded coefficients can add up to a little more than one
        acc0 += weight_y * tl.minimum(row0 >> _SHIFT, 255)
        acc1 += weight_y * tl.minimum(row1 >> _SHIFT, 255)
        acc2 += weight_y * tl.minimum(row2 >> _SHIFT, 255)
        line += pitch
        y_place += out_height

    area = canvas_height.to(tl.int64) * canvas_width
    place = out + index * 3 * area + y.to(tl.int64) * out_pitch + x.to(tl.int64) * out_pixel_stride
    valid = in_x & in_y
    on_canvas = (x < canvas_width) & (y < canvas_height)
    for channel in tl.static_range(3):
        acc = acc0 if channel == 0 else (acc1 if channel == 1 else acc2)
        value = tl.minimum(acc >> _SHIFT, 255)
        if levels is not None:
            value = tl.load(levels + channel * 256 + value)
        value = tl.where(valid, value, 0)
        tl.store(place + channel * area, value.to(out.dtype.element_ty), mask=on_canvas)


@functools.lru_cache(maxsize=256)  # a table costs the host more than the kernel costs the device
def _device_table(size: int, out_size: int, device: torch.device) -> Tensor:
    return torch.from_numpy(resize_table(size, out_size)).to(device)


def resize_forward(
    images: Tensor,  # [N, H, W, C] uint8, C >= 3, any strides
    size: tuple[int, int],  # height, width after the resize
    out: Tensor,  # [N, 3, canvas height, canvas width] contiguous; uint8, or of the type of levels
    columns_first: bool,
    bgr: bool = False,
    levels: Tensor | None = None,  # [3, 256]
) -> None:
    """Resize images of one size into the top left of their canvases as planar RGB, zero elsewhere.

    ``columns_first`` is the order of the passes; `resize_table.columns_first` gives that of Pillow 13. ``levels`` maps
    the 8-bit result: for a network without normalisation it is ``(v - mean) / std`` of every channel and value, in
    float16 or float32. Channels after the third (alpha) are left out.

    The host makes tables of coefficients. They stay on the device for the 256 pairs of sizes used last, so the first
    call with a size copies to the device: run it once before a CUDA graph captures it. The caller checks the arguments.
    """
    image_stride, *strides, channel_stride = images.stride()
    shape, canvas, out_strides = images.shape[1:3], out.shape[2:], out.stride()[2:]
    y, x = (1, 0) if columns_first else (0, 1)
    y_table, x_table = (_device_table(shape[axis], size[axis], images.device) for axis in (y, x))
    grid = (triton.cdiv(canvas[x], BLOCK_W), triton.cdiv(canvas[y], BLOCK_H), len(images))
    _resize_kernel[grid](
        images[..., 2:] if bgr else images,
        out,
        x_table,
        y_table,
        levels,
        shape[y],
        shape[x],
        image_stride,
        strides[y],
        strides[x],
        -channel_stride if bgr else channel_stride,
        size[y],
        size[x],
        x_table.shape[0] - 1,
        y_table.shape[0] - 1,
        canvas[y],
        canvas[x],
        out_strides[y],
        out_strides[x],
        BLOCK_H=BLOCK_H,
        BLOCK_W=BLOCK_W,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: 8 bits for our networks, floats for networks without normalisation."""
    strides = ("image_stride", "pitch", "pixel_stride", "channel_stride")
    sizes = {name: "i64" if name in strides else "i32" for name in _SIZES}
    blocks = {"BLOCK_H": BLOCK_H, "BLOCK_W": BLOCK_W}
    kernels = []
    for dtype in ("u8", "fp16", "fp32"):
        pointers = {"image": "*u8", "out": f"*{dtype}", "x_table": "*i32", "y_table": "*i32", "levels": f"*{dtype}"}
        constants: dict[str, Any] = dict(blocks)
        if dtype == "u8":
            del pointers["levels"]
            constants["levels"] = None
        kernels.append(
            KernelVariant(f"resize_{dtype}", _resize_kernel, pointers | sizes, constants, NUM_WARPS, NUM_STAGES)
        )
    return kernels


def goal_calls() -> list[GoalLaunch]:
    """A frame of 1080x1920 to 512x910 in a batch of 512x928, as bytes and in float16."""
    return [*_goal_call(torch.uint8), *_goal_call(torch.float16)]


def _goal_call(dtype: torch.dtype) -> list[GoalLaunch]:
    (height, width), size, canvas = (1080, 1920), (512, 910), (512, 928)
    frames = torch.empty(1, height, width, 3, dtype=torch.uint8, device="meta")
    out = torch.empty(1, 3, *canvas, dtype=dtype, device="meta")
    levels = None if dtype == torch.uint8 else torch.empty(3, 256, dtype=dtype, device="meta")
    table = resize_table(height, size[0])
    taps = len(table) - 1
    tops = range(0, size[0], BLOCK_H)
    rows = sum(table[0, min(top + BLOCK_H, size[0]) - 1] + taps - table[0, top] for top in tops) / len(tops)
    runs = {
        "for row in range(row_begin, row_end)": rows,
        "for tap in range(x_taps)": len(resize_table(width, size[1])) - 1,
    }
    works = [Work("resize", runs, frames.numel() + out.numel() * dtype.itemsize)]
    name = f"resize 1080x1920 -> 512x910 {str(dtype).removeprefix('torch.')}"
    return goal_launches(name, lambda: resize_forward(frames, size, out, False, levels=levels), works)
