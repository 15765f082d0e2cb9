"""Matching on a GPU: batched assignment beside SciPy with its copies, and the costs beside plain PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.cpu_matching import costs
from benchmarks.gpu_harness import OURS, Bound, Case, Peer, Work
from maskformer_fast.config import LossConfig
from maskformer_fast.ops import linear_sum_assignment, matching_cost
from maskformer_fast.ops.assignment import linear_sum_assignment_eager
from maskformer_fast.ops.matching_cost import matching_cost_eager, matching_cost_from_logits
from maskformer_fast.structures import Predictions, Targets, pack_masks

SCIPY, TORCH_ASSIGNMENT = "SciPy with the copies", "torch-linear-assignment"
EAGER = "eager, a layer at a time"
LAYERS, BATCH, QUERIES, TARGETS, CLASSES, DEPTH = 6, 16, 100, 20, 150, 256
SIZE, SCALE = (128, 128), 4
KERNEL_RATE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32"}


def assignment_setup(device: torch.device, kind: str, shape: tuple[int, int, int]) -> Work:
    """Costs [batch, rows, columns] of one kind of `cpu_matching`."""
    base = costs(kind, shape)

    def draw(seed: int) -> tuple[Tensor]:
        # other problems each time, and none of another difficulty: rolled along the batch and the rows
        return (base.roll((seed, seed), (0, 1)).to(device),)

    def torch_assignment(cost: Tensor) -> Tensor:
        from torch_linear_assignment import batch_linear_assignment

        # it assigns a column to each row
        return batch_linear_assignment(cost.mT.contiguous())

    def same_cost(ours: Tensor, theirs: Tensor) -> float:
        """1 where every problem has the same total; which of equal optima is chosen may differ."""
        if (ours.shape, theirs.shape) != (shape[::2], shape[::2]) or min(ours.min(), theirs.min()) < 0:
            return 0.0
        (cost,) = draw(0)
        totals = [cost.double().gather(1, rows.long().unsqueeze(1)).sum((1, 2)) for rows in (ours, theirs)]
        return (totals[0] - totals[1]).abs().le(1e-6 * totals[1].abs().clamp(min=1)).float().mean().item()

    sides = {OURS: linear_sum_assignment, SCIPY: linear_sum_assignment_eager, TORCH_ASSIGNMENT: torch_assignment}
    return Work(draw, sides, same_cost, 1.0)


def random_targets(device: torch.device, batch: int, slots: int, classes: int, input_size: tuple[int, int]) -> Targets:
    """Targets that tile the image like a panoptic map's, in cells of an eighth of its sides."""
    ids = torch.randint(slots, (batch, 8, 8), device=device)
    ids = ids.repeat_interleave(input_size[0] // 8, 1).repeat_interleave(input_size[1] // 8, 2)
    return Targets(
        torch.randint(classes, (batch, slots), device=device),
        torch.full((batch,), slots, device=device),
        pack_masks(ids.unsqueeze(1) == torch.arange(slots, device=device)[:, None, None]),
        torch.tensor([input_size] * batch, device=device),
        input_size,
    )


def random_predictions(
    device: torch.device, layers: int, batch: int, queries: int, classes: int, depth: int, size: tuple[int, int],
    dtype: torch.dtype,
) -> Predictions:  # fmt: skip
    shapes = ((layers, batch, queries, classes + 1), (layers, batch, queries, depth), (batch, depth, *size))
    logits, embeddings, pixels = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    input_size = (SCALE * size[0], SCALE * size[1])
    return Predictions(logits, embeddings / 8, pixels, torch.tensor([input_size] * batch, device=device), input_size)


def cost_setup(
    device: torch.device, dtype: torch.dtype, layers: int = LAYERS, batch: int = BATCH, queries: int = QUERIES,
    slots: int = TARGETS, size: tuple[int, int] = SIZE, depth: int = DEPTH,
) -> Work:  # fmt: skip
    loss = LossConfig()

    def draw(seed: int) -> tuple[Predictions, Targets]:
        torch.manual_seed(seed)
        predictions = random_predictions(device, layers, batch, queries, CLASSES, depth, size, dtype)
        return predictions, random_targets(device, batch, slots, CLASSES, predictions.input_size)

    def ours(predictions: Predictions, targets: Targets) -> Tensor:
        return matching_cost(predictions, targets, loss)

    def eager(predictions: Predictions, targets: Targets) -> Tensor:
        return matching_cost_eager(predictions, targets, loss)

    return Work(draw, {OURS: ours, EAGER: eager}, partial(close, tolerance=2e-2), 0.999)


def logits_cost_setup(
    device: torch.device, layers: int = LAYERS, batch: int = BATCH, queries: int = QUERIES, slots: int = TARGETS,
    size: tuple[int, int] = SIZE,
) -> Work:  # fmt: skip
    loss = LossConfig()

    def draw(seed: int) -> tuple[Tensor, Tensor, Targets]:
        torch.manual_seed(seed)
        shapes = ((layers, batch, queries, CLASSES + 1), (layers, batch, queries, *size))
        classes, masks = (torch.randn(shape, device=device) for shape in shapes)
        return classes, 2 * masks, random_targets(device, batch, slots, CLASSES, (SCALE * size[0], SCALE * size[1]))

    return Work(draw, {OURS: lambda classes, masks, targets: matching_cost_from_logits(classes, masks, targets, loss)})


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """Share of the values that are within `tolerance` of each other, relative to 1 at least."""
    return (ours - theirs).abs().le(tolerance * theirs.abs().clamp(min=1)).float().mean().item()


def cost_bound(dtype: torch.dtype, from_logits: bool = False) -> Bound:
    """Logits of every pixel from embeddings, and three products of them with the targets."""
    pixels, input_pixels = SIZE[0] * SIZE[1], SCALE**2 * SIZE[0] * SIZE[1]
    masks = LAYERS * BATCH * QUERIES * pixels
    features = BATCH * DEPTH * pixels + LAYERS * BATCH * QUERIES * DEPTH
    floats = LAYERS * BATCH * QUERIES * (CLASSES + 1) + (masks if from_logits else features)
    written = 4 * LAYERS * BATCH * QUERIES * TARGETS
    operations = 2.0 * masks * (3 * TARGETS + (0 if from_logits else DEPTH))
    return Bound(floats * dtype.itemsize + BATCH * TARGETS * input_pixels / 8 + written, operations, KERNEL_RATE[dtype])


def cases() -> list[Case]:
    rows = []
    sizes = (((96, 100, 20), 0), ((96, 100, 100), 1), ((16, 300, 300), 1))
    for shape, rank in sizes:
        for kind in ("matcher-like", "uniform", "integer ties"):
            goal = shape == (96, 100, 20) and kind == "matcher-like"
            peers = (Peer(SCIPY, 10.0 if goal else None, graph=False), Peer(TORCH_ASSIGNMENT, graph=False))
            count, queries, targets = shape
            rows.append(Case(
                f"assignment {count} x {queries}x{targets}, {kind}",
                partial(assignment_setup, kind=kind, shape=shape),
                peers if goal else peers[:1],
                Bound(4.0 * count * queries * targets + 8.0 * count * targets),
                max_us=60.0 if goal else None,
                rank=rank if kind == "matcher-like" else 2,
            ))  # fmt: skip
    size = f"{LAYERS} layers, batch {BATCH}, Q={QUERIES}, {TARGETS} targets, {SIZE[0]}x{SIZE[1]}"
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        goal = dtype != torch.bfloat16
        rows.append(Case(
            f"matching cost, {size}, {name}",
            partial(cost_setup, dtype=dtype),
            (Peer(EAGER, 5.0, 10.0) if goal else Peer(EAGER),),
            cost_bound(dtype),
            rank=0 if goal else 2,
        ))  # fmt: skip
    name = f"matching cost, {size}, fp32, from mask logits"
    rows.append(Case(name, logits_cost_setup, (), cost_bound(torch.float32, True), rank=2))
    return rows
