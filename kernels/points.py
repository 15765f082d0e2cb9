"""Masks at points (Mask2Former, Cheng et al., CVPR 2022, section 3.3.2), and how maps are read at points.

A program reads one mask at a block of points: for each the four pixels around it, as bits where the mask is packed.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

BLOCK = 512
"""Points of a program, 4 a thread. Not measured on a GPU."""
LAUNCH = {"num_warps": 4, "num_stages": 1}
_ELEMENTS = {torch.float32: "fp32", torch.bool: "u8", torch.uint8: "u8"}
_SIZES = ["blocks", "count", "height", "width", "extent_y", "extent_x"]
"""Arguments that are not specialised: a separate kernel for a size of 1 would be compiled without need."""


@triton.jit
def located(points, live, height, width, extent_y, extent_x):
    """Cells before points [N], x and y in 0..1 of an extent -> inside, column, line, shares of the next ones.

    A point is inside if one of the four cells around it may be. A coordinate that is not finite is outside.
    """
    x = tl.load(points, mask=live, other=-1.0) * extent_x - 0.5
    y = tl.load(points + 1, mask=live, other=-1.0) * extent_y - 0.5
    inside = live & (x > -1.0) & (x < width) & (y > -1.0) & (y < height)  # false for NaN
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    column, line = tl.floor(x), tl.floor(y)
    return inside, column.to(tl.int32), line.to(tl.int32), x - column, y - line


@triton.jit
def corner(inside, column, line, right, low, height, width, CORNER: tl.constexpr):
    """One of the four cells around located points -> whether the map has it, its column, line and share."""
    x, y = column + CORNER % 2, line + CORNER // 2
    share = (right if CORNER % 2 else 1.0 - right) * (low if CORNER // 2 else 1.0 - low)
    return inside & (x >= 0) & (x < width) & (y >= 0) & (y < height), x, y, share


@triton.jit
def map_values(maps, points, live, height, width):
    """Sample a map [h, w] bilinearly at points, with zeros outside -> float32."""
    inside, column, line, right, low = located(points, live, height, width, height, width)
    values = tl.zeros(column.shape, tl.float32)
    for number in tl.static_range(4):
        there, x, y, share = corner(inside, column, line, right, low, height, width, number)
        values += share * tl.load(maps + y * width + x, mask=there, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=_SIZES)
def _sample_masks_kernel(
    result,  # [N, P] float32
    masks,  # [M, H, W] float32 or bytes, or [M, H, ceil(W/8)], packed
    rows,  # [N] int64
    points,  # [G, P, 2] float32
    groups,  # [N] int64
    blocks, count, height, width, extent_y, extent_x,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) // blocks).to(tl.int64)
    point = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + number)
    group = tl.maximum(tl.load(groups + number), 0)
    live = (point < count) & (row >= 0)
    inside, column, line, right, low = located(
        points + (group * count + point) * 2, live, height, width, extent_y, extent_x
    )
    pitch = (width + 7) // 8 if PACKED else width
    masks += row * height * pitch
    values = tl.zeros((BLOCK,), tl.float32)
    for which in tl.static_range(4):
        there, x, y, share = corner(inside, column, line, right, low, height, width, which)
        if PACKED:
            byte = tl.load(masks + y * pitch + (x >> 3), mask=there, other=0).to(tl.int32)
            values += share * ((byte >> (x & 7)) & 1).to(tl.float32)
        else:
            values += share * tl.load(masks + y * pitch + x, mask=there, other=0).to(tl.float32)
    tl.store(result + number * count + point, values, mask=point < count)


def sample_masks_forward(
    masks: Tensor,  # [M, H, W] float32 or bool, or [M, H, ceil(W/8)] uint8, packed; contiguous like all others
    width: int,  # W
    rows: Tensor,  # [N] int64, the mask of each result, -1 for zeros
    points: Tensor,  # [G, P, 2] float32
    groups: Tensor,  # [N] int64, the points of each result
    extent: tuple[int, int],  # height and width of which points are parts
) -> Tensor:
    """Sample masks at points -> [N, P] float32. Raises ValueError for other dtypes of masks."""
    if masks.dtype not in _ELEMENTS:
        raise ValueError(f"masks: expected float32, bool or uint8, got {masks.dtype}")
    count = points.shape[1]
    result = points.new_empty(len(rows), count)
    if masks.numel() == 0:
        return result.zero_()
    if result.numel() == 0:
        return result
    packed = masks.dtype == torch.uint8
    blocks = triton.cdiv(count, BLOCK)
    with torch.cuda.device_of(result):
        _sample_masks_kernel[(len(rows) * blocks,)](
            result, masks.view(torch.uint8) if masks.dtype == torch.bool else masks, rows, points, groups,
            blocks, count, masks.shape[1], width, *extent, PACKED=packed, BLOCK=BLOCK, **LAUNCH,
        )  # fmt: skip
    return result


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time."""
    return [_variant("packed", "u8", True), _variant("bool", "u8", False), _variant("fp32", "fp32", False)]


def _variant(form: str, element: str, packed: bool) -> KernelVariant:
    types = {"result": "*fp32", "masks": f"*{element}", "rows": "*i64", "points": "*fp32", "groups": "*i64"}
    constants = {"PACKED": packed, "BLOCK": BLOCK}
    return kernel_variant(f"sample_masks_{form}", _sample_masks_kernel, types, constants, LAUNCH)


def kernel_variant(
    name: str,
    kernel: triton.JITFunction,
    types: dict[str, str],  # of arguments that are not i32
    constants: dict[str, int],
    launch: dict[str, int],
) -> KernelVariant:
    """Specialisation of a kernel for aligned pointers."""
    arguments = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    pointers = tuple(argument for argument, kind in arguments.items() if kind.startswith("*"))
    return KernelVariant(name, kernel, arguments, dict(constants), **launch, aligned=pointers)


def goal_calls() -> list[GoalLaunch]:
    """Targets of ten layers of two images of 512x512 with 20 targets, 12,544 points of each."""
    pairs, count = 400, 12544
    with torch.device("meta"):
        masks, rows = torch.empty(40, 512, 64, dtype=torch.uint8), torch.empty(pairs, dtype=torch.int64)
        points = torch.empty(pairs, count, 2)
    launcher = functools.partial(sample_masks_forward, masks, 512, rows, points, rows, (512, 512))
    work = Work("sample", {}, masks.numel() + 4 * (points.numel() + pairs * count))
    return goal_launches("masks at points L=10 B=2 T=20 P=12544", launcher, [work])
