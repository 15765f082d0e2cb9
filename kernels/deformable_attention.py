"""Multi-scale deformable attention of Deformable DETR, and its gradient.

A program computes a block of queries of one image and head: the softmax of their logits, and, point by point, a
location and the four cells around it, whose rows of channels are added to sums in registers. Locations, weights and
samples are never in memory.

The backward pass computes all of this again. It adds to the gradient by the value with float32 atomics, as many queries
read one cell: in no fixed order, so that two runs differ by rounding. A caller that needs equal runs takes the eager
twin, which PyTorch runs in a fixed order with `torch.use_deterministic_algorithms`. All other gradients belong to one
program each. For a value in half precision the sums are in a float32 tensor of its size, which is rounded at the end.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.activations import LOG2_E
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

TILE = 512
"""Bytes of a program's block of queries and channels, 16 a thread: values in the forward pass, one load for each
corner; float32 sums in the backward pass, which needs twice the registers. Not measured on a GPU."""
SUMS = torch.float32.itemsize
"""Bytes of a number of the backward pass's block."""
LAUNCH = {"num_warps": 1, "num_stages": 1}
"""Options of every launch. Within one warp, no barrier is needed where a number of a query meets its channels."""
_SIZES = ["cells", "heads", "queries", "levels", "points"]
"""Arguments that are not specialised: a separate kernel for a size of 1 would be compiled without need. Only of ``dim``
the compiler must know whether it is a multiple of 16, to load rows of channels by 16 bytes."""
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _weights(logits, place, live, samples, SAMPLES: tl.constexpr):
    """Softmax of the logits of queries -> [queries, SAMPLES], its largest logit and inverse sum [queries]."""
    sample = tl.arange(0, SAMPLES)
    there = live[:, None] & (sample < samples)[None, :]
    values = tl.load(logits + place[:, None] + sample[None, :], mask=there, other=float("-inf")).to(tl.float32)
    largest = tl.max(values, 1)
    powers = tl.exp2((values - largest[:, None]) * LOG2_E)
    inverse = 1.0 / tl.sum(powers, 1)
    return powers * inverse[:, None], largest, inverse


@triton.jit
def _located(x, size):
    """Whether places along an axis are inside, the cell before them and the distance from it."""
    inside = (x > -1.0) & (x < size)  # false for NaN
    x = tl.where(inside, x, 0.0)
    low = tl.floor(x)
    return inside, low.to(tl.int32), x - low


@triton.jit(do_not_specialize=_SIZES)
def _deformable_attention_kernel(
    result,  # [B, Q, heads, D]
    value,  # [B, S, heads, D]
    level_sizes,  # [levels, 2] int32
    reference_points,  # [B, Q, levels, 2] float32
    offsets,  # [B, Q, heads, levels, points, 2]
    logits,  # [B, Q, heads, levels, points]
    cells, heads, dim, queries, levels, points,
    SAMPLES: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DIM)
    live, used = query < queries, channel < dim
    row = query * heads + head
    place = row * (levels * points)
    logits += image * queries * heads * (levels * points)
    offsets += image * queries * heads * (levels * points) * 2
    reference_points += image * queries * levels * 2
    _, largest, inverse = _weights(logits, place, live, levels * points, SAMPLES)
    source = value + (image * cells * heads + head) * dim + channel[None, :]
    pitch = heads * dim
    sums = tl.zeros((BLOCK, DIM), tl.float32)
    first = 0
    for level in range(levels):
        height, width = tl.load(level_sizes + 2 * level), tl.load(level_sizes + 2 * level + 1)
        base = reference_points + (query * levels + level) * 2
        base_x = tl.load(base, mask=live, other=0.0) * width - 0.5
        base_y = tl.load(base + 1, mask=live, other=0.0) * height - 0.5
        for point in range(points):
            own = place + level * points + point
            logit = tl.load(logits + own, mask=live, other=0.0).to(tl.float32)
            weight = tl.exp2((logit - largest) * LOG2_E) * inverse
            x = base_x + tl.load(offsets + 2 * own, mask=live, other=0.0).to(tl.float32)
            y = base_y + tl.load(offsets + 2 * own + 1, mask=live, other=0.0).to(tl.float32)
            inside_x, left, right_share = _located(x, width)
            inside_y, top, low_share = _located(y, height)
            inside = live & inside_x & inside_y
            for corner in tl.static_range(4):
                column, line = left + corner % 2, top + corner // 2
                there = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
                cell = first + line * width + column
                numbers = tl.load(source + cell[:, None] * pitch, mask=there[:, None] & used[None, :], other=0.0)
                share = (right_share if corner % 2 else 1.0 - right_share) * (
                    low_share if corner // 2 else 1.0 - low_share
                )
                sums += (weight * share)[:, None] * numbers.to(tl.float32)
        first += height * width
    target = result + image * queries * heads * dim + row[:, None] * dim + channel[None, :]
    tl.store(target, sums.to(result.dtype.element_ty), mask=live[:, None] & used[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _deformable_attention_backward_kernel(
    by_value,  # [B, S, heads, D] float32, zeros
    by_offset,  # [B, Q, heads, levels, points, 2]
    by_logit,  # [B, Q, heads, levels, points]
    gradient,  # [B, Q, heads, D]
    value,  # [B, S, heads, D]
    level_sizes,  # [levels, 2] int32
    reference_points,  # [B, Q, levels, 2] float32
    offsets,  # [B, Q, heads, levels, points, 2]
    logits,  # [B, Q, heads, levels, points]
    cells, heads, dim, queries, levels, points,
    SAMPLES: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DIM)
    live, used = query < queries, channel < dim
    row = query * heads + head
    place = row * (levels * points)
    logits += image * queries * heads * (levels * points)
    offsets += image * queries * heads * (levels * points) * 2
    reference_points += image * queries * levels * 2
    weights, largest, inverse = _weights(logits, place, live, levels * points, SAMPLES)
    gradient += image * queries * heads * dim
    by_logit += image * queries * heads * (levels * points)
    by_offset += image * queries * heads * (levels * points) * 2
    own_rows = row[:, None] * dim + channel[None, :]
    upstream = tl.load(gradient + own_rows, mask=live[:, None] & used[None, :], other=0.0).to(tl.float32)
    value += (image * cells * heads + head) * dim
    by_value += (image * cells * heads + head) * dim
    pitch = heads * dim
    sample = tl.arange(0, SAMPLES)
    by_weights = tl.zeros((BLOCK, SAMPLES), tl.float32)
    first = 0
    for level in range(levels):
        height, width = tl.load(level_sizes + 2 * level), tl.load(level_sizes + 2 * level + 1)
        base = reference_points + (query * levels + level) * 2
        base_x = tl.load(base, mask=live, other=0.0) * width - 0.5
        base_y = tl.load(base + 1, mask=live, other=0.0) * height - 0.5
        for point in range(points):
            own = place + level * points + point
            logit = tl.load(logits + own, mask=live, other=0.0).to(tl.float32)
            weight = tl.exp2((logit - largest) * LOG2_E) * inverse
            x = base_x + tl.load(offsets + 2 * own, mask=live, other=0.0).to(tl.float32)
            y = base_y + tl.load(offsets + 2 * own + 1, mask=live, other=0.0).to(tl.float32)
            inside_x, left, right_share = _located(x, width)
            inside_y, top, low_share = _located(y, height)
            inside = live & inside_x & inside_y
            by_x = tl.zeros((BLOCK,), tl.float32)
            by_y = tl.zeros((BLOCK,), tl.float32)
            by_weight = tl.zeros((BLOCK,), tl.float32)
            for corner in tl.static_range(4):
                column, line = left + corner % 2, top + corner // 2
                there = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
                cell = (first + line * width + column)[:, None] * pitch + channel[None, :]
                reached = there[:, None] & used[None, :]
                numbers = tl.load(value + cell, mask=reached, other=0.0).to(tl.float32)
                x_share = right_share if corner % 2 else 1.0 - right_share
                y_share = low_share if corner // 2 else 1.0 - low_share
                part = (weight * x_share * y_share)[:, None] * upstream
                tl.atomic_add(by_value + cell, part, mask=reached, sem="relaxed")
                product = tl.sum(numbers * upstream, 1)
                by_weight += product * x_share * y_share
                by_x += product * (y_share if corner % 2 else -y_share)
                by_y += product * (x_share if corner // 2 else -x_share)
            by_weights = tl.where((sample == level * points + point)[None, :], by_weight[:, None], by_weights)
            by_x, by_y = tl.where(inside, weight * by_x, 0.0), tl.where(inside, weight * by_y, 0.0)
            tl.store(by_offset + 2 * own, by_x.to(by_offset.dtype.element_ty), mask=live)
            tl.store(by_offset + 2 * own + 1, by_y.to(by_offset.dtype.element_ty), mask=live)
        first += height * width
    slopes = weights * (by_weights - tl.sum(weights * by_weights, 1)[:, None])
    there = live[:, None] & (sample < levels * points)[None, :]
    tl.store(by_logit + place[:, None] + sample[None, :], slopes.to(by_logit.dtype.element_ty), mask=there)


@functools.lru_cache(maxsize=256)
def _level_table(level_sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Heights and widths on the device -> [levels * 2] int32; kept, as each level's size comes again in every layer."""
    return torch.tensor(level_sizes, dtype=torch.int32, device=device)


def _check(value: Tensor, offsets: Tensor) -> None:
    """Raise ValueError for arguments that would be read wrongly; `maskformer_fast.ops` checks the shapes."""
    if value.dtype not in _TYPES:
        raise ValueError(f"value: expected float16, bfloat16 or float32, got {value.dtype}")
    (_, queries, heads, *_), dim = offsets.shape, value.shape[3]
    for name, numbers in (("value", value[0].numel()), ("offsets", offsets[0].numel()),
                          ("result", queries * heads * dim)):  # fmt: skip
        if numbers >= 1 << 31:
            raise ValueError(f"{name}: expected fewer than 2^31 numbers of an image, got {numbers}")


def _constants(dim: int, samples: int, itemsize: int) -> dict[str, int]:
    """Compile-time constants, with ``itemsize`` the bytes of a number of the block."""
    padded = max(16, triton.next_power_of_2(dim))
    block = max(2, TILE // (itemsize * padded))
    return {"SAMPLES": triton.next_power_of_2(samples), "DIM": padded, "BLOCK": block}


def deformable_attention_forward(
    value: Tensor,  # [B, S, heads, D] float16, bfloat16 or float32, contiguous like all others
    level_sizes: tuple[int, ...],  # height and width of each level in turn
    reference_points: Tensor,  # [B, Q, levels, 2] float32
    offsets: Tensor,  # [B, Q, heads, levels, points, 2] dtype of value
    logits: Tensor,  # [B, Q, heads, levels, points] dtype of value
) -> Tensor:
    """Attend -> [B, Q, heads * D] in the dtype of ``value``.

    Raises ValueError for other dtypes, and for images whose value has 2^31 numbers.
    """
    (batch, cells, heads, dim), (queries, levels, points) = value.shape, (logits.shape[1], *logits.shape[3:])
    result = value.new_empty(batch, queries, heads * dim)
    if result.numel() == 0:
        return result
    _check(value, offsets)
    constants = _constants(dim, levels * points, value.dtype.itemsize)
    with torch.cuda.device_of(value):
        _deformable_attention_kernel[(triton.cdiv(queries, constants["BLOCK"]), batch * heads)](
            result, value, _level_table(level_sizes, value.device), reference_points, offsets, logits,
            cells, heads, dim, queries, levels, points, **constants, **LAUNCH,
        )  # fmt: skip
    return result


def deformable_attention_backward(
    gradient: Tensor,  # [B, Q, heads * D] dtype of value
    value: Tensor,
    level_sizes: tuple[int, ...],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients by value, offsets and logits, in their shapes and dtypes.

    Arguments and errors are those of `deformable_attention_forward`. The first is not the same in every run.
    """
    (batch, cells, heads, dim), (queries, levels, points) = value.shape, (logits.shape[1], *logits.shape[3:])
    by_value = torch.zeros_like(value, dtype=torch.float32)
    by_offset, by_logit = torch.zeros_like(offsets), torch.zeros_like(logits)
    if gradient.numel():
        _check(value, offsets)
        constants = _constants(dim, levels * points, SUMS)
        with torch.cuda.device_of(value):
            _deformable_attention_backward_kernel[(triton.cdiv(queries, constants["BLOCK"]), batch * heads)](
                by_value, by_offset, by_logit, gradient, value, _level_table(level_sizes, value.device),
                reference_points, offsets, logits, cells, heads, dim, queries, levels, points, **constants, **LAUNCH,
            )  # fmt: skip
    return by_value.to(value.dtype), by_offset, by_logit


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: heads of 32 channels, three levels of four points."""
    return [
        deformable_attention_variant(kernel, dtype)
        for kernel in (_deformable_attention_kernel, _deformable_attention_backward_kernel)
        for dtype in _TYPES
    ]


def deformable_attention_variant(kernel: triton.JITFunction, dtype: torch.dtype) -> KernelVariant:
    """Specialisation of a kernel for heads of 32 channels and up to 16 points."""
    backward = kernel is _deformable_attention_backward_kernel
    constants = _constants(32, 12, SUMS if backward else dtype.itemsize)
    types = dict.fromkeys(("result", "by_offset", "by_logit", "gradient", "value", "offsets", "logits"),
                          f"*{_TYPES[dtype]}")  # fmt: skip
    types |= {"by_value": "*fp32", "level_sizes": "*i32", "reference_points": "*fp32"}
    arguments = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = (*(name for name in types if name in kernel.arg_names), "dim")
    name = f"deformable_attention{'_backward' * backward}_{_TYPES[dtype]}"
    return KernelVariant(name, kernel, arguments, constants, **LAUNCH, aligned=aligned)


def goal_calls() -> list[GoalLaunch]:
    """Mask2Former's pixel decoder at 512x512: three levels, 8 heads of 32 channels, 4 points; also 8 images."""
    sizes, heads, dim, points = (16, 16, 32, 32, 64, 64), 8, 32, 4
    levels, cells = len(sizes) // 2, sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))

    def launches(dtype: torch.dtype, batch: int) -> list[GoalLaunch]:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        value = empty(batch, cells, heads, dim)
        points_of = empty(batch, cells, levels, 2, dtype=torch.float32)
        offsets, logits = empty(batch, cells, heads, levels, points, 2), empty(batch, cells, heads, levels, points)
        arguments = (value, sizes, points_of, offsets, logits)
        gradient = empty(batch, cells, heads * dim)
        size = dtype.itemsize
        read = size * (value.numel() + 3 * logits.numel()) + 4 * points_of.numel()
        runs = {"for level in range(levels)": levels, "for point in range(points)": points}
        written = size * 3 * logits.numel() + 4 * value.numel()
        name = f"deformable attention 512x512 B={batch} {_TYPES[dtype]}"
        return [
            *goal_launches(name, lambda: deformable_attention_forward(*arguments),
                           [Work("forward", runs, read + size * gradient.numel())]),
            *goal_launches(name, lambda: deformable_attention_backward(gradient, *arguments),
                           [Work("backward", runs, read + size * gradient.numel() + written)]),
        ]  # fmt: skip

    return [*launches(torch.float32, 1), *launches(torch.float16, 1), *launches(torch.bfloat16, 8)]
