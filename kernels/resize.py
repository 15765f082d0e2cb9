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

from maskformer_fast.kernels.resize_table import PRECISION_BITS, resize_table, shift_inside, tile_table
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

BLOCK_H = 8
"""Rows of a tile."""
BLOCK_W = 32
"""Columns of a tile."""
MAX_TAPS = 12
"""Most taps of a filter along a row whose coefficients are in registers, in a binary for their number."""
NUM_WARPS = 1  # one column a lane: shared memory is not needed
NUM_STAGES = 1
_SHIFT = tl.constexpr(PRECISION_BITS)
_HALF = tl.constexpr(1 << (PRECISION_BITS - 1))
_SIZES = (
    "image_stride", "pitch", "pixel_stride", "channel_stride", "out_height", "out_width",
    "x_taps", "y_sources", "canvas_height", "canvas_width", "out_pitch", "out_pixel_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, "image", "out"])  # every frame size runs one of few binaries
def _resize_kernel(
    image,  # uint8, first byte of the red channel; the rest by the strides below, in bytes
    out,  # [N, 3, canvas], contiguous, by the strides below; uint8 without levels, else of their type
    x_table,  # int32 [1 + x_taps, out_width], of shift_inside
    y_table,  # int32 [tiles, 1 + y_sources, BLOCK_H], of tile_table
    levels,  # None, or [3, 256]: the output for every 8-bit value of each channel
    image_stride,
    pitch,
    pixel_stride,
    channel_stride,
    out_height,
    out_width,
    x_taps,
    y_sources,
    canvas_height,
    canvas_width,
    out_pitch,
    out_pixel_stride,
    TAPS: tl.constexpr,  # x_taps, or 0 for any number
    PIXEL: tl.constexpr,  # pixel_stride, or 0 for any
    CHANNEL: tl.constexpr,  # channel_stride if PIXEL is not 0
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    left = tl.program_id(0) * BLOCK_W
    top = tl.program_id(1) * BLOCK_H
    index = tl.program_id(2).to(tl.int64)
    x = left + tl.arange(0, BLOCK_W)[None, :]
    y = top + tl.arange(0, BLOCK_H)[:, None]
    column = tl.minimum(x, out_width - 1)  # padding has the filters of the last column, and is not stored
    x_first = tl.load(x_table + column)

    # source rows of the tile; none for a tile of padding only
    has_pixels = (top < out_height) & (left < out_width)
    y_weights = y_table + tl.program_id(1).to(tl.int64) * (1 + y_sources) * BLOCK_H
    row_begin = tl.load(y_weights, mask=has_pixels, other=0)
    rows = tl.load(y_weights + 1, mask=has_pixels, other=0)
    y_weights += BLOCK_H + tl.arange(0, BLOCK_H)[:, None]

    step = pixel_stride.to(tl.int64) if PIXEL == 0 else PIXEL
    plane = channel_stride.to(tl.int64) if PIXEL == 0 else CHANNEL
    line = image + index * image_stride + row_begin.to(tl.int64) * pitch + x_first.to(tl.int64) * step
    weights = ()
    for tap in tl.static_range(TAPS):
        weights += (tl.load(x_table + (1 + tap) * out_width + column),)
    acc0 = tl.full((BLOCK_H, BLOCK_W), _HALF, tl.int32)
    acc1 = tl.full((BLOCK_H, BLOCK_W), _HALF, tl.int32)
    acc2 = tl.full((BLOCK_H, BLOCK_W), _HALF, tl.int32)
    for _ in range(rows):
        row0 = tl.full((1, BLOCK_W), _HALF, tl.int32)
        row1 = tl.full((1, BLOCK_W), _HALF, tl.int32)
        row2 = tl.full((1, BLOCK_W), _HALF, tl.int32)
        if TAPS > 0:
            for tap in tl.static_range(TAPS):
                pixel = line + tap * step
                row0 += weights[tap] * tl.load(pixel).to(tl.int32)
                row1 += weights[tap] * tl.load(pixel + plane).to(tl.int32)
                row2 += weights[tap] * tl.load(pixel + 2 * plane).to(tl.int32)
        else:
            pixel = line
            x_place = out_width + column
            for _ in range(x_taps):
                weight = tl.load(x_table + x_place)
                row0 += weight * tl.load(pixel).to(tl.int32)
                row1 += weight * tl.load(pixel + plane).to(tl.int32)
                row2 += weight * tl.load(pixel + 2 * plane).to(tl.int32)
                pixel += step
                x_place += out_width
        weight_y = tl.load(y_weights)
        # rounded coefficients can add up to a little more than one
        acc0 += weight_y * tl.minimum(row0 >> _SHIFT, 255)
        acc1 += weight_y * tl.minimum(row1 >> _SHIFT, 255)
        acc2 += weight_y * tl.minimum(row2 >> _SHIFT, 255)
        line += pitch
        y_weights += BLOCK_H

    area = canvas_height.to(tl.int64) * canvas_width
    place = out + index * 3 * area + y.to(tl.int64) * out_pitch + x.to(tl.int64) * out_pixel_stride
    valid = (x < out_width) & (y < out_height)
    on_canvas = (x < canvas_width) & (y < canvas_height)
    for channel in tl.static_range(3):
        acc = acc0 if channel == 0 else (acc1 if channel == 1 else acc2)
        value = tl.minimum(acc >> _SHIFT, 255)
        if levels is not None:
            value = tl.load(levels + channel * 256 + value)
        value = tl.where(valid, value, 0)
        tl.store(place + channel * area, value.to(out.dtype.element_ty), mask=on_canvas)


@functools.lru_cache(maxsize=256)  # tables cost the host more than the kernel costs the device
def _device_tables(shape: tuple[int, int], size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables of the kernel's x axis and y axis; the sizes are height and width as the kernel sees them."""
    (height, width), (out_height, out_width) = shape, size
    x_table = shift_inside(resize_table(width, out_width), width)
    y_table = tile_table(resize_table(height, out_height), height, BLOCK_H)
    return torch.from_numpy(x_table).to(device), torch.from_numpy(y_table).to(device)


def _constants(x_taps: int, pixel_stride: int, channel_stride: int) -> dict[str, int]:
    """Compile-time constants of a launch: interleaved frames and short filters have binaries of their own."""
    interleaved = pixel_stride in (3, 4) and abs(channel_stride) == 1
    return {
        "TAPS": x_taps if x_taps <= MAX_TAPS else 0,
        "PIXEL": pixel_stride if interleaved else 0,
        "CHANNEL": channel_stride if interleaved else 0,
        "BLOCK_H": BLOCK_H,
        "BLOCK_W": BLOCK_W,
    }


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

    There is a binary for each number of taps along a row, up to `MAX_TAPS`, for frames with pixels of three or of four
    bytes, and for others. The host makes tables of coefficients. They stay on the device for the 256 pairs of sizes
    used last, so the first call with a size copies to the device: run it once before a CUDA graph captures it. The
    caller checks the arguments.
    """
    image_stride, *strides, channel_stride = images.stride()
    shape, canvas, out_strides = images.shape[1:3], out.shape[2:], out.stride()[2:]
    y, x = (1, 0) if columns_first else (0, 1)
    channel_stride = -channel_stride if bgr else channel_stride
    x_table, y_table = _device_tables((shape[y], shape[x]), (size[y], size[x]), images.device)
    grid = (triton.cdiv(canvas[x], BLOCK_W), triton.cdiv(canvas[y], BLOCK_H), len(images))
    _resize_kernel[grid](
        images[..., 2:] if bgr else images,
        out,
        x_table,
        y_table,
        levels,
        image_stride,
        strides[y],
        strides[x],
        channel_stride,
        size[y],
        size[x],
        x_table.shape[0] - 1,
        y_table.shape[1] - 1,
        canvas[y],
        canvas[x],
        out_strides[y],
        out_strides[x],
        **_constants(x_table.shape[0] - 1, strides[x], channel_stride),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: 8 bits for our networks, floats for networks without normalisation.

    Of the constants those of interleaved frames reduced to a half, of the longest filters in registers, and of any.
    """
    strides = ("image_stride", "pitch", "pixel_stride", "channel_stride")
    sizes = {name: "i64" if name in strides else "i32" for name in _SIZES}
    layouts = {"u8": (5, 3), "fp16": (5, 3), "fp32": (5, 3), "u8_longest": (MAX_TAPS, 4), "u8_any": (0, 0)}
    kernels = []
    for name, (taps, pixel) in layouts.items():
        dtype = name.split("_")[0]
        pointers = {"image": "*u8", "out": f"*{dtype}", "x_table": "*i32", "y_table": "*i32", "levels": f"*{dtype}"}
        constants: dict[str, Any] = _constants(taps, pixel, 1)
        if dtype == "u8":
            del pointers["levels"]
            constants["levels"] = None
        types = pointers | sizes
        kernels.append(KernelVariant(f"resize_{name}", _resize_kernel, types, constants, NUM_WARPS, NUM_STAGES))
    return kernels


def goal_calls() -> list[GoalLaunch]:
    """A frame of 1080x1920 to 512x910 in a batch of 512x928, as bytes and in float16."""
    return [*_goal_call(torch.uint8), *_goal_call(torch.float16)]


def _goal_call(dtype: torch.dtype) -> list[GoalLaunch]:
    (height, width), size, canvas = (1080, 1920), (512, 910), (512, 928)
    frames = torch.empty(1, height, width, 3, dtype=torch.uint8, device="meta")
    out = torch.empty(1, 3, *canvas, dtype=dtype, device="meta")
    levels = None if dtype == torch.uint8 else torch.empty(3, 256, dtype=dtype, device="meta")
    table = tile_table(resize_table(height, size[0]), height, BLOCK_H)
    runs = {"for _ in range(rows)": float(table[:, 0, 1].mean())}
    works = [Work("resize", runs, frames.numel() + out.numel() * dtype.itemsize)]
    name = f"resize 1080x1920 -> 512x910 {str(dtype).removeprefix('torch.')}"
    return goal_launches(name, lambda: resize_forward(frames, size, out, False, levels=levels), works)
