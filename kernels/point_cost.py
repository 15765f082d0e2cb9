"""Matching cost at points (Mask2Former, section 3.3.2), with no array [Q, T, P] or [Q, P] in memory.

Two kernels, without atomics: the same inputs give the same costs to the last bit.

1. `_sums_kernel` processes a chunk of an image's points and a block of a layer's queries and of targets: logits, from
   memory or sampled from maps, their probabilities and losses, and the products of these with the targets at the
   points.
2. `_cost_kernel` adds the chunks' sums, divides, and adds the class cost.

Products are of two parts with 11 leading bits each, on tensor cores; all sums are in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.matching_losses import SCALE, class_probability, pixel_losses
from maskformer_fast.kernels.points import kernel_variant, map_values
from maskformer_fast.kernels.products import leading_bits
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

ROWS = 16
"""Queries of a program: with 32 some targets spill registers."""
TARGETS = 32
"""Targets of a program; for images with more, logits are read once for each block of targets."""
POINTS = 16
"""Points of a tile."""
LAUNCH = {"num_warps": 4, "num_stages": 1}
PROGRAMS = 1024
"""Number of programs up to which points are split into chunks: a few for each multiprocessor. Not measured on a GPU."""
COST_ROWS = 16
"""Queries of a program of `_cost_kernel`."""
CLASSES = 64
"""Classes of which `_cost_kernel` takes the softmax at once."""
_ELEMENTS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_SIZES = ["batch", "queries", "slots", "columns", "count", "shared", "chunks", "chunk_points", "height", "width",
          "row_blocks", "target_blocks"]  # fmt: skip
"""Arguments that are not specialised: a separate kernel for a size of 1 would be compiled without need."""


@triton.jit
def _times_truth(values, truth):
    """Product of ``values`` [rows, points] and ``truth`` [points, targets], both float32, in 22 bits."""
    high, high_truth = leading_bits(values), leading_bits(truth)
    total = tl.dot(values - high, high_truth, input_precision="tf32")
    total = tl.dot(high, truth - high_truth, total, input_precision="tf32")
    return tl.dot(high, high_truth, total, input_precision="tf32")


@triton.jit(do_not_specialize=_SIZES)
def _sums_kernel(
    sums,  # [L * B, target blocks, chunks, row blocks, 2, ROWS, TARGETS] float32: mask loss, overlap
    totals,  # [L * B, target blocks, chunks, row blocks, ROWS] float32: sums of probabilities
    areas,  # [L * B, target blocks, chunks, row blocks, TARGETS] float32: sums of targets
    logits,  # [L, B, Q, h, w], or [L, B, Q, P] at the points
    points,  # [G, B, P, 2] float32, None: logits are at the points
    truth,  # [G, B, T, P] float32
    batch, queries, slots, count, shared, chunks, chunk_points, height, width, row_blocks, target_blocks,
    on_weight, off_weight, gamma,
    EXPONENT: tl.constexpr, ROWS: tl.constexpr, TARGETS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rest = program // (row_blocks * chunks)
    chunk = program // row_blocks % chunks
    image = (rest // target_blocks).to(tl.int64)  # of all layers
    group = tl.where(shared == 1, image % batch, image)
    row = tl.minimum(program % row_blocks * ROWS + tl.arange(0, ROWS), queries - 1)
    column = rest % target_blocks * TARGETS + tl.arange(0, TARGETS)
    source = logits + (image * queries + row) * height * width
    truth += (group * slots + column)[None, :] * count
    off_sum = tl.zeros((ROWS,), tl.float32)
    probability_sum = tl.zeros((ROWS,), tl.float32)
    area = tl.zeros((TARGETS,), tl.float32)
    rise_sum = tl.zeros((ROWS, TARGETS), tl.float32)
    overlap = tl.zeros((ROWS, TARGETS), tl.float32)
    end = tl.minimum((chunk + 1) * chunk_points, count)
    for start in tl.range(chunk * chunk_points, end, POINTS):
        point = start + tl.arange(0, POINTS)
        here = point < end
        if points is None:
            x = tl.load(source[:, None] + point[None, :], mask=here[None, :], other=0.0).to(tl.float32)
        else:
            places = points + (group * count + point) * 2
            x = map_values(source[:, None], places[None, :], here[None, :], height, width)
        t = tl.load(truth + point[:, None], mask=here[:, None] & (column < slots)[None, :], other=0.0)
        scaled, off, rise = pixel_losses(x, on_weight, off_weight, gamma, EXPONENT)
        probability = scaled * (1.0 / SCALE)
        off_sum += tl.sum(tl.where(here[None, :], off, 0.0), 1)
        probability_sum += tl.sum(tl.where(here[None, :], probability, 0.0), 1)
        area += tl.sum(t, 0)
        rise_sum += _times_truth(rise, t)
        overlap += _times_truth(probability, t)
    program = program.to(tl.int64)
    place = tl.arange(0, ROWS)[:, None] * TARGETS + tl.arange(0, TARGETS)[None, :]
    sums += program * (2 * ROWS * TARGETS) + place
    tl.store(sums, off_sum[:, None] + rise_sum)
    tl.store(sums + ROWS * TARGETS, overlap)
    tl.store(totals + program * ROWS + tl.arange(0, ROWS), probability_sum)
    tl.store(areas + program * TARGETS + tl.arange(0, TARGETS), area)


@triton.jit(do_not_specialize=_SIZES)
def _cost_kernel(
    cost,  # [L, B, Q, T] float32
    sums, totals, areas,  # see the other kernel
    class_logits,  # [L, B, Q, K+1] float32
    labels,  # [B, T] int64
    counts,  # [B] int64
    batch, queries, slots, columns, count, chunks, row_blocks, target_blocks, class_weight, mask_weight, dice_weight,
    SUM_ROWS: tl.constexpr, ROWS: tl.constexpr, TARGETS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(queries, ROWS)
    rest = tl.program_id(0) // parts
    image = (rest // target_blocks).to(tl.int64)  # of all layers
    row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, TARGETS)
    target = rest % target_blocks * TARGETS + bit
    exists = target < slots
    place = (rest.to(tl.int64) * chunks * row_blocks + row // SUM_ROWS) * SUM_ROWS + row % SUM_ROWS
    areas += (rest.to(tl.int64) * chunks * row_blocks) * TARGETS + bit
    source = sums + (place // SUM_ROWS * (2 * SUM_ROWS) + place % SUM_ROWS)[:, None] * TARGETS + bit[None, :]
    totals += place
    mask = tl.zeros((ROWS, TARGETS), tl.float32)
    overlap = tl.zeros((ROWS, TARGETS), tl.float32)
    probability = tl.zeros((ROWS,), tl.float32)
    area = tl.zeros((TARGETS,), tl.float32)
    for _ in tl.range(chunks):  # rows past the last exist in the last block of sums
        mask += tl.load(source)
        overlap += tl.load(source + SUM_ROWS * TARGETS)
        probability += tl.load(totals)
        area += tl.load(areas)
        source += row_blocks * (2 * SUM_ROWS * TARGETS)
        totals += row_blocks * SUM_ROWS
        areas += row_blocks * TARGETS
    dice = 1.0 - (2.0 * overlap + 1.0) / (probability[:, None] + area[None, :] + 1.0)
    label = tl.load(labels + image % batch * slots + target, mask=exists, other=0)
    logits = class_logits + (image * queries + tl.minimum(row, queries - 1)) * columns
    chosen = class_probability(logits, 1, label, columns, CLASSES)
    value = mask_weight * mask / count + dice_weight * dice - class_weight * chosen
    value = tl.where((target < tl.load(counts + image % batch))[None, :], value, 0.0)
    inside = (row < queries)[:, None] & exists[None, :]
    tl.store(cost + (image * queries + row)[:, None] * slots + target[None, :], value, mask=inside)


def point_cost_forward(
    class_logits: Tensor,  # [L, B, Q, K+1] float32, contiguous like all others
    logits: Tensor,  # [L, B, Q, h, w], or [L, B, Q, P] at the points; float16, bfloat16 or float32
    points: Tensor | None,  # [G, B, P, 2] float32, G = 1 or L; None: logits are at the points
    truth: Tensor,  # [G, B, T, P] float32
    labels: Tensor,  # [B, T] int64
    counts: Tensor,  # [B] int64
    weights: tuple[float, float, float],  # class, mask, dice
    focal: tuple[float, float, float],  # weight of mask points, weight of other points, exponent
) -> Tensor:
    """Costs that ``point_cost_eager`` defines -> [L, B, Q, T] float32.

    A label out of range costs NaN. The chunks of the sums depend on the number of images, layers and queries, and so do
    the last bits of the costs.

    Raises ValueError for other dtypes.
    """
    if logits.dtype not in _ELEMENTS:
        raise ValueError(f"logits: expected float16, bfloat16 or float32, got {logits.dtype}")
    layers, batch, queries, columns = class_logits.shape
    shared, _, slots, count = truth.shape
    cost = class_logits.new_empty(layers, batch, queries, slots)
    if cost.numel() == 0:
        return cost
    height, width = (1, count) if points is None else logits.shape[3:]
    row_blocks, target_blocks = triton.cdiv(queries, ROWS), triton.cdiv(slots, TARGETS)
    chunks, chunk_points = _chunking(layers * batch * row_blocks * target_blocks, count)
    programs = layers * batch * target_blocks * chunks * row_blocks
    sums, totals = cost.new_empty(programs, 2, ROWS, TARGETS), cost.new_empty(programs, ROWS)
    areas = cost.new_empty(programs, TARGETS)
    with torch.cuda.device_of(cost):
        _sums_kernel[(programs,)](
            sums, totals, areas, logits, points, truth, batch, queries, slots, count, shared, chunks, chunk_points,
            height, width, row_blocks, target_blocks, *focal, **_constants(focal[2]), **LAUNCH,
        )  # fmt: skip
        _cost_kernel[(layers * batch * target_blocks * triton.cdiv(queries, COST_ROWS),)](
            cost, sums, totals, areas, class_logits, labels, counts, batch, queries, slots, columns, count, chunks,
            row_blocks, target_blocks, *weights,
            SUM_ROWS=ROWS, ROWS=COST_ROWS, TARGETS=TARGETS, CLASSES=CLASSES, **LAUNCH,
        )  # fmt: skip
    return cost


def _chunking(blocks: int, count: int) -> tuple[int, int]:
    """Number of chunks of an image's points, and points of each."""
    tiles = triton.cdiv(count, POINTS)
    chunk_tiles = triton.cdiv(tiles, triton.cdiv(PROGRAMS, blocks))
    return triton.cdiv(tiles, chunk_tiles), chunk_tiles * POINTS


def _constants(gamma: float) -> dict[str, int]:
    exponent = int(gamma) if gamma in (0.0, 2.0) else -1
    return {"EXPONENT": exponent, "ROWS": ROWS, "TARGETS": TARGETS, "POINTS": POINTS}


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: cross-entropy, which Mask2Former has, and any exponent."""
    types = dict.fromkeys(("cost", "sums", "totals", "areas", "class_logits", "points", "truth"), "*fp32")
    types |= dict.fromkeys(("on_weight", "off_weight", "gamma", "class_weight", "mask_weight", "dice_weight"), "fp32")
    types |= {"labels": "*i64", "counts": "*i64"}
    found = []
    for form in ("sampled", "maps"):
        for element in _ELEMENTS.values():
            for gamma, word in ((0.0, "0"), (1.5, "any")):
                constants: dict[str, Any] = _constants(gamma) | ({"points": None} if form == "sampled" else {})
                name = f"point_cost_sums_{form}_{element}_gamma_{word}"
                found.append(kernel_variant(name, _sums_kernel, types | {"logits": f"*{element}"}, constants, LAUNCH))
    sizes = {"SUM_ROWS": ROWS, "ROWS": COST_ROWS, "TARGETS": TARGETS, "CLASSES": CLASSES}
    return [*found, kernel_variant("point_cost", _cost_kernel, types, sizes, LAUNCH)]


def goal_calls() -> list[GoalLaunch]:
    """A layer of 16 images with 100 queries and 20 targets at 12,544 points."""
    images, queries, slots, count = 16, 100, 20, 12544
    with torch.device("meta"):
        class_logits, logits = torch.empty(1, images, queries, 134), torch.empty(1, images, queries, count)
        truth = torch.empty(1, images, slots, count)
        labels, counts = torch.empty(images, slots, dtype=torch.int64), torch.empty(images, dtype=torch.int64)
    chunks, chunk_points = _chunking(images * triton.cdiv(queries, ROWS), count)
    products = 2 * 3 * images * queries * slots * count
    works = [
        Work("sums", {"chunk_points, end, POINTS)": chunk_points // POINTS}, 4 * (logits.numel() + truth.numel()),
             products),
        Work("cost", {"range(chunks)": chunks, "range(0, num_columns, CLASSES)": triton.cdiv(134, CLASSES)}),
    ]  # fmt: skip
    launcher = functools.partial(
        point_cost_forward, class_logits, logits, None, truth, labels, counts, (2.0, 5.0, 5.0), (1.0, 1.0, 0.0)
    )
    return goal_launches("matching cost at points L=1 B=16 Q=100 T=20 P=12544", launcher, works)
