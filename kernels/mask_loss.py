"""Focal (or binary cross-entropy) and dice sums of matched pairs at full resolution, and their gradient.

A pair is a map of low-resolution logits and a target, one bit a pixel. Values of full resolution exist only in
registers. Programs process the map's rows from top to bottom: each row is interpolated along x once, and the few rows
of pixels between two rows of the map take their logits from both.

- `mask_sums_forward` reduces the pixels of a band to four sums; a second reduction adds up the bands.
- `mask_sums_backward` gathers: a program computes a tile of cells of the map. Slopes of pixels are added to the row
  above and the row below by their shares, in registers, then the rows are multiplied by the transpose of the
  interpolation along x. Only pixels at the border of two tiles are processed twice.

Each number is summed in a fixed order, so results are the same in every run. Pixels have exactly the coordinates of
``F.interpolate(align_corners=False)``, computed as fractions of integers. Sums are in float32, with a relative error of
at most 2e-5. A NaN logit makes the sums of its pair NaN if a counted pixel reads it, and the gradient NaN in at least
the cells that share such a pixel with it; an infinite logit may have the same effect. Other pairs are not affected.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.activations import LOG2_E, logistic
from maskformer_fast.kernels.mask_loss_taps import (
    cell_weights,
    first_reader,
    next_reader,
    pixel_taps,
    reader_after,
    row_shares,
)
from maskformer_fast.kernels.products import leading_bits
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

PIXELS = 128
"""Columns of pixels that the forward pass processes at once. Not measured on a GPU, like all constants without a
reason."""
BACKWARD_PIXELS = 64
"""Columns of pixels that the backward pass processes at once: with 128, half as many programs fit the registers."""
ROWS = 4
"""Rows of pixels processed at once: as many as are between two rows of a map at scale 4."""
CELLS = 16
"""Rows of a map that a program processes, and most columns of a program of the backward pass: the least that matrix
products support. At scale 4 a program has 15 columns, which `BACKWARD_PIXELS` pixels read."""
LAUNCH = {"num_warps": 2, "num_stages": 1}
"""Options of every launch, 4 to 8 pixels a thread: no target spills."""

_SIZES = ["map_height", "map_width", "height", "width", "cells", "tiles_y", "tiles_x"]
"""Arguments that are not specialised: a separate kernel for a size of 1 would be compiled without need."""


@triton.jit
def _counted_part(valid_sizes, row, height, width):
    """Ends of the counted rows and columns of a pair with this target; 0 for a pair without a target."""
    bottom = tl.where(row >= 0, height, 0)
    right = width
    if valid_sizes is not None:
        valid_height = tl.load(valid_sizes + 2 * row, mask=row >= 0, other=0)
        valid_width = tl.load(valid_sizes + 2 * row + 1, mask=row >= 0, other=0)
        bottom = tl.minimum(tl.maximum(valid_height, 0), bottom).to(tl.int32)
        right = tl.minimum(tl.maximum(valid_width, 0), right).to(tl.int32)
    return bottom, right


@triton.jit
def _line(logits, cell, map_height, map_width, low, share):
    """Interpolate a row of the map along x; after the last row it is the last -> [1, pixels]."""
    line = logits + tl.minimum(cell, map_height - 1).to(tl.int64) * map_width
    high = tl.minimum(low + 1, map_width - 1)
    before, after = tl.load(line + low[None, :]), tl.load(line + high[None, :])
    return (1.0 - share)[None, :] * before + share[None, :] * after


@triton.jit
def _scores_of_pixels(
    above, change,  # [1, pixels]: logits at a row of cells, and how much larger they are at the next
    share,  # [rows], of the next row
    target, y, x, end, right, pitch, mask_weight, other_weight, gamma, POWER: tl.constexpr,
):  # fmt: skip
    """Truth, probabilities of the wrong and the right class, cross-entropy and its weight, of pixels y, x.

    A pixel that is not counted, from row end or column right on, is off and wrong with probability 0.
    """
    counted = (y < end)[:, None] & (x < right)[None, :]
    byte = tl.load(target + y.to(tl.int64)[:, None] * pitch + (x >> 3)[None, :], mask=counted, other=0).to(tl.int32)
    truth = ((byte >> (x & 7)[None, :]) & 1) != 0
    logit = above + share[:, None] * change
    # One formula for both classes of pixel: the probability of the wrong class is sigmoid(z), the cross-entropy
    # softplus(z). At z = -inf both are zero, and so is every gradient: this excludes a pixel from the loss.
    z = tl.where(counted, tl.where(truth, -logit, logit), float("-inf"))
    small, likely, unlikely = logistic(z)
    wrong = tl.where(z >= 0, likely, unlikely)
    weight = tl.where(truth, mask_weight, other_weight)
    if POWER == 1:
        weight *= wrong
    elif POWER == 2:
        weight *= wrong * wrong
    elif POWER != 0:  # wrong = exp(-softplus(-z))
        weight *= tl.exp2((tl.maximum(-z, 0.0) + small) * -LOG2_E * gamma)
    return truth, wrong, tl.where(z >= 0, unlikely, likely), tl.maximum(z, 0.0) + small, weight


@triton.jit(do_not_specialize=_SIZES)
def _mask_sums_kernel(
    sums,  # [P, tiles, 4], zeros
    logits,  # [P, h, w]
    masks,  # [N, H, ceil(W/8)]
    rows,  # [P] int64
    valid_sizes,  # [N, 2] int64, or None
    map_height, map_width, height, width, tiles_y, tiles_x, mask_weight, other_weight, gamma,
    POWER: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pair = (program // (tiles_y * tiles_x)).to(tl.int64)
    first = program // tiles_x % tiles_y * CELLS
    left = program % tiles_x * PIXELS
    row = tl.load(rows + pair)
    bottom, right = _counted_part(valid_sizes, row, height, width)
    begin = first_reader(first, map_height, height)
    if (begin < bottom) & (left < right):
        x = left + tl.arange(0, PIXELS)
        low, share_x = pixel_taps(x, map_width, width)
        maps = logits + pair * map_height * map_width
        pitch = (width + 7) // 8
        target = masks + row * height * pitch
        focal = tl.zeros((1, PIXELS), tl.float32)
        overlap = tl.zeros((1, PIXELS), tl.float32)
        total = tl.zeros((1, PIXELS), tl.float32)
        area = tl.zeros((1, PIXELS), tl.float32)
        below = _line(maps, first, map_height, map_width, low, share_x)
        step = 1.0 / (2 * height).to(tl.float32)
        reader, rest = reader_after(first, map_height, height)
        for cell in range(first, tl.minimum(first + CELLS, map_height)):
            above = below
            below = _line(maps, cell + 1, map_height, map_width, low, share_x)
            change = below - above
            following = tl.where(cell + 1 < map_height, reader, height)
            reader, rest = next_reader(reader, rest, map_height, height)
            end = tl.minimum(following, bottom)
            for top in range(begin, end, ROWS):
                y = top + tl.arange(0, ROWS)
                truth, wrong, correct, entropy, weight = _scores_of_pixels(
                    above, change, row_shares(y, cell, map_height, height, step), target, y, x, end, right, pitch,
                    mask_weight, other_weight, gamma, POWER,
                )  # fmt: skip
                focal += tl.sum(entropy * weight, 0, keep_dims=True)
                overlap += tl.sum(tl.where(truth, correct, 0.0), 0, keep_dims=True)
                total += tl.sum(tl.where(truth, correct, wrong), 0, keep_dims=True)
                area += tl.sum(truth.to(tl.float32), 0, keep_dims=True)
            begin = following
        place = sums + program.to(tl.int64) * 4
        tl.store(place, tl.sum(focal))
        tl.store(place + 1, tl.sum(overlap))
        tl.store(place + 2, tl.sum(total))
        tl.store(place + 3, tl.sum(area))


@triton.jit(do_not_specialize=_SIZES)
def _mask_sums_backward_kernel(
    result,  # [P, h, w]
    gradient,  # [P, 4]
    logits,  # [P, h, w]
    masks,  # [N, H, ceil(W/8)]
    rows,  # [P] int64
    valid_sizes,  # [N, 2] int64, or None
    map_height, map_width, height, width,
    cells,  # columns of a program, at most CELLS
    tiles_y, tiles_x, mask_weight, other_weight, gamma,
    POWER: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pair = (program // (tiles_y * tiles_x)).to(tl.int64)
    first_y = program // tiles_x % tiles_y * CELLS
    first_x = program % tiles_x * cells
    cell_y = first_y + tl.arange(0, CELLS)
    cell_x = first_x + tl.arange(0, CELLS)
    row = tl.load(rows + pair)
    bottom, right = _counted_part(valid_sizes, row, height, width)
    for_entropy = tl.load(gradient + pair * 4)
    for_overlap = tl.load(gradient + pair * 4 + 1)
    for_total = tl.load(gradient + pair * 4 + 2)  # the area has none
    maps = logits + pair * map_height * map_width
    pitch = (width + 7) // 8
    target = masks + row * height * pitch
    # pixels that read one of the cells lie after the cell before the first
    before = tl.maximum(first_y - 1, 0)
    top = first_reader(before, map_height, height)
    first_pixel = first_reader(first_x - 1, map_width, width)
    end_pixel = tl.minimum(first_reader(first_x + cells, map_width, width), right)
    step = 1.0 / (2 * height).to(tl.float32)
    values = tl.zeros((CELLS, CELLS), tl.float32)
    for left in range(first_pixel, tl.where(top < bottom, end_pixel, 0), PIXELS):
        x = left + tl.arange(0, PIXELS)
        low, share_x = pixel_taps(x, map_width, width)
        lines = tl.zeros((CELLS, PIXELS), tl.float32)
        rest = tl.zeros((1, PIXELS), tl.float32)  # slopes that the cells before add to the row of cells after them
        begin = top
        below = _line(maps, before, map_height, map_width, low, share_x)
        reader, remainder = reader_after(before, map_height, height)
        for cell in range(before, tl.minimum(first_y + CELLS, map_height)):
            above = below
            below = _line(maps, cell + 1, map_height, map_width, low, share_x)
            rise = below - above
            following = tl.where(cell + 1 < map_height, reader, height)
            reader, remainder = next_reader(reader, remainder, map_height, height)
            end = tl.minimum(following, bottom)
            line = rest
            rest = tl.zeros((1, PIXELS), tl.float32)
            for start in range(begin, end, ROWS):
                y = start + tl.arange(0, ROWS)
                share = row_shares(y, cell, map_height, height, step)
                truth, wrong, correct, entropy, weight = _scores_of_pixels(
                    above, rise, share, target, y, x, end, right, pitch, mask_weight, other_weight, gamma, POWER
                )
                change = tl.where(truth, for_total + for_overlap, for_total) * (wrong * correct)
                if POWER != 0:
                    wrong += gamma * entropy * correct
                slope = for_entropy * weight * wrong
                slope = tl.where(truth, -slope, slope) + change
                line += tl.sum((1.0 - share)[:, None] * slope, 0, keep_dims=True)
                rest += tl.sum(share[:, None] * slope, 0, keep_dims=True)
            if cell == map_height - 1:  # there is none after it
                line += rest
            lines = tl.where((cell_y == cell)[:, None], line, lines)
            begin = following
        weights = cell_weights(x, cell_x, map_width, width)
        high_lines, high_weights = leading_bits(lines), leading_bits(weights)
        values = tl.dot(lines - high_lines, high_weights, values, input_precision="tf32")
        values = tl.dot(high_lines, weights - high_weights, values, input_precision="tf32")
        values = tl.dot(high_lines, high_weights, values, input_precision="tf32")
    own = (cell_y < map_height)[:, None] & ((cell_x < first_x + cells) & (cell_x < map_width))[None, :]
    place = result + pair * map_height * map_width + cell_y.to(tl.int64)[:, None] * map_width + cell_x[None, :]
    tl.store(place, values, mask=own)


def mask_sums_forward(
    logits: Tensor,  # [P, h, w] float32
    masks: Tensor,  # [N, H, ceil(W/8)] uint8, packed
    rows: Tensor,  # [P] int64, the pair's target, below N, -1 for none
    valid_sizes: Tensor | None,  # [N, 2] int64, None counts every pixel
    width: int,  # W
    focal: tuple[float, float, float],  # weight of mask pixels, weight of other pixels, exponent
) -> Tensor:
    """Compute the sums from which the losses of each pair follow -> [P, 4] float32.

    Over the counted pixels of the upsampled logits x of a pair, with p = sigmoid(x) and truth t: the weighted focal
    loss, p t, p, and t, each summed. Zeros for a pair without a target, whatever its logits.

    Raises ValueError for other dtypes and shapes, and where map size times output size along one axis reaches 2^30.
    """
    _check(logits, masks, rows, valid_sizes, width)
    pairs, *cells = logits.shape
    size = (masks.shape[1], width)
    tiles = (triton.cdiv(cells[0], CELLS), triton.cdiv(width, PIXELS))
    sums = logits.new_zeros(pairs, tiles[0] * tiles[1], 4)
    if sums.numel() and logits.numel() and size[0]:
        with torch.cuda.device_of(logits):
            _mask_sums_kernel[(pairs * tiles[0] * tiles[1],)](
                sums, *_contiguous(logits, masks, rows, valid_sizes), *cells, *size, *tiles, *focal,
                POWER=_power(focal[2]), PIXELS=PIXELS, ROWS=ROWS, CELLS=CELLS, **LAUNCH,
            )  # fmt: skip
    return sums.sum(1)


def mask_sums_backward(
    gradient: Tensor,  # [P, 4] float32, by the result of `mask_sums_forward`
    logits: Tensor,  # [P, h, w] float32
    masks: Tensor,  # [N, H, ceil(W/8)] uint8, packed
    rows: Tensor,  # [P] int64, the pair's target, below N, -1 for none
    valid_sizes: Tensor | None,  # [N, 2] int64, None counts every pixel
    width: int,  # W
    focal: tuple[float, float, float],  # weight of mask pixels, weight of other pixels, exponent
) -> Tensor:
    """Compute the gradient of the logits -> [P, h, w] float32. Errors are those of `mask_sums_forward`."""
    _check(logits, masks, rows, valid_sizes, width)
    if gradient.shape != (len(logits), 4) or gradient.dtype != torch.float32:
        raise ValueError(f"gradient: expected [{len(logits)}, 4] float32, got {_described(gradient)}")
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    size = (masks.shape[1], width)
    if result.numel() == 0 or 0 in size:
        return result.zero_()
    cells = cells_of_program(logits.shape[2], width)
    tiles = (triton.cdiv(logits.shape[1], CELLS), triton.cdiv(logits.shape[2], cells))
    with torch.cuda.device_of(logits):
        _mask_sums_backward_kernel[(len(logits) * tiles[0] * tiles[1],)](
            result, gradient.contiguous(), *_contiguous(logits, masks, rows, valid_sizes),
            *logits.shape[1:], *size, cells, *tiles, *focal,
            POWER=_power(focal[2]), PIXELS=BACKWARD_PIXELS, ROWS=ROWS, CELLS=CELLS, **LAUNCH,
        )  # fmt: skip
    return result


@functools.lru_cache(maxsize=4096)
def cells_of_program(size: int, out: int) -> int:
    """Number of columns of a program for which the pixels that read them fill blocks of pixels best."""

    def cells_a_block(cells: int) -> float:
        return cells / triton.cdiv((cells + 1) * out, BACKWARD_PIXELS * size)

    return max(range(CELLS, 0, -1), key=cells_a_block)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _power(gamma: float) -> int:
    """Exponent that needs no exponential function, or -1."""
    return int(gamma) if gamma in (0.0, 1.0, 2.0) else -1


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check(logits: Tensor, masks: Tensor, rows: Tensor, valid_sizes: Tensor | None, width: int) -> None:
    """Raise ValueError for arguments that would be read out of bounds or wrongly."""
    if logits.dim() != 3 or logits.dtype != torch.float32:
        raise ValueError(f"logits: expected [P, h, w] float32, got {_described(logits)}")
    if masks.dim() != 3 or masks.shape[2] != (width + 7) // 8 or masks.dtype != torch.uint8:
        raise ValueError(f"masks: expected [N, H, {(width + 7) // 8}] uint8, got {_described(masks)}")
    if rows.shape != logits.shape[:1] or rows.dtype != torch.int64:
        raise ValueError(f"rows: expected [{len(logits)}] int64, got {_described(rows)}")
    if valid_sizes is not None and (valid_sizes.shape != (len(masks), 2) or valid_sizes.dtype != torch.int64):
        raise ValueError(f"valid_sizes: expected [{len(masks)}, 2] int64, got {_described(valid_sizes)}")
    for size, out in zip(logits.shape[1:], (masks.shape[1], width), strict=True):
        if (size + PIXELS) * (out + PIXELS) >= 1 << 30:
            raise ValueError(f"sides of maps and output: expected a product below 2^30, got {size} times {out}")


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: the paper's exponent, and any, which takes the most registers.

    The other exponents, and kernels without padding, have the same code without some instructions.
    """
    return [
        mask_loss_variant(kernel, power)
        for kernel in (_mask_sums_kernel, _mask_sums_backward_kernel)
        for power in (2, -1)
    ]


def mask_loss_variant(kernel: triton.JITFunction, power: int) -> KernelVariant:
    """Specialisation of a kernel with valid sizes; ``power`` is a result of `_power`."""
    backward = kernel is _mask_sums_backward_kernel
    pixels = BACKWARD_PIXELS if backward else PIXELS
    constants = {"POWER": power, "PIXELS": pixels, "ROWS": ROWS, "CELLS": CELLS}
    types = dict.fromkeys(("sums", "result", "gradient", "logits"), "*fp32")
    types |= {"masks": "*u8", "rows": "*i64", "valid_sizes": "*i64"}
    aligned = tuple(name for name in types if name in kernel.arg_names)
    types |= dict.fromkeys(("mask_weight", "other_weight", "gamma"), "fp32")
    arguments = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    name = f"mask_sums{'_backward' * backward}_gamma_{'any' if power < 0 else power}"
    return KernelVariant(name, kernel, arguments, constants, **LAUNCH, aligned=aligned)


def goal_calls() -> list[GoalLaunch]:
    """Three layers of 5 images with 20 pairs each, 512x512 pixels from maps of 128x128, forward and backward."""
    pairs, targets, cells, size = 300, 100, 128, 512

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    masks, rows = empty(targets, size, size // 8, dtype=torch.uint8), empty(pairs, dtype=torch.int64)
    logits, gradient = empty(pairs, cells, cells), empty(pairs, 4)
    rest = (logits, masks, rows, empty(targets, 2, dtype=torch.int64), size, (0.25, 0.75, 2.0))
    row_blocks = (cells + 1) / cells  # the first row of cells has a half more rows of pixels
    forward = {"for cell in range(first": CELLS, "for top in range(begin, end": row_blocks}
    backward = {
        "for left in range(first_pixel": 1,
        "for cell in range(before": CELLS + 1 - CELLS / cells,
        "for start in range(begin, end": row_blocks,
    }
    read = logits.numel() * 4 + masks.numel()
    name = "mask loss P=300 128x128 -> 512x512"
    return [
        *goal_launches(name, lambda: mask_sums_forward(*rest), [Work("forward", forward, read)]),
        *goal_launches(
            name,
            lambda: mask_sums_backward(gradient, *rest),
            [Work("backward", backward, read + logits.numel() * 4)],
        ),
    ]
