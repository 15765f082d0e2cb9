"""Matching on the CPU: batched assignment beside SciPy in a loop and, where it is installed, torch-linear-assignment;
cost and assignment beside Hugging Face's matcher.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.bounds import Bound
from benchmarks.harness import Case, Operation, Sides
from maskformer_fast.config import LossConfig
from maskformer_fast.ops import linear_sum_assignment
from maskformer_fast.ops.assignment import linear_sum_assignment_eager
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.matching_cost import matching_cost_from_logits
from maskformer_fast.structures import Predictions, Targets, pack_masks
from maskformer_fast.training.matcher import match

LAYERS, BATCH, QUERIES, TARGETS, CLASSES, DEPTH = 6, 16, 100, 20, 150, 256
MASK_SIZE, INPUT_SIZE = (128, 128), (512, 512)
TORCH_ASSIGNMENT = "torch-linear-assignment"
SHAPES = {(100, 20): (16, 256), (100, 100): (16,), (300, 300): (4,), (1000, 1000): (1,)}  # rows, columns: batches


def cases() -> list[Case]:
    rows = []
    for (queries, targets), batches in SHAPES.items():
        small = (queries, targets) == (100, 20)
        for batch in batches:
            for kind in ("uniform", "matcher-like", "integer ties"):
                for threads in (1, 2) if small else (1,):
                    name = f"assignment {batch} x {queries}x{targets}, {kind}, {threads} thread{'s' * (threads > 1)}"
                    setup = partial(assignment, kind, (batch, queries, targets))
                    goal = 3.0 if not small else 4.0 if threads == 1 else 7.0
                    # costs read, the query of each target written
                    bound = Bound(4.0 * batch * queries * targets + 8.0 * batch * targets)
                    rows.append(Case(name, "SciPy in a loop", goal, setup, threads=threads, bound=bound, memory=False))
    rows.append(Case(f"assignment {BATCH} x 100x20, matcher-like, vs {TORCH_ASSIGNMENT}", TORCH_ASSIGNMENT, None,
                     partial(beside_torch_assignment, (BATCH, 100, 20)), memory=False))
    size = f"{LAYERS} layers, batch {BATCH}, Q={QUERIES}, {TARGETS} targets, 128x128"
    rows.append(Case(f"matching cost and assignment, {size}, from mask logits", "Hugging Face's matcher", 4.0,
                     from_logits, bound=cost_bound(True)))
    rows.append(Case(f"matching cost and assignment, {size}, from embeddings",
                     "einsum and Hugging Face's matcher, a layer at a time", 4.0, from_embeddings,
                     bound=cost_bound(False)))
    return rows


def cost_bound(from_logits: bool) -> Bound:
    """Logits or embeddings and packed targets read, the assignment written; three products with the targets, and masks
    of embeddings.
    """
    masks = LAYERS * BATCH * QUERIES * MASK_SIZE[0] * MASK_SIZE[1]
    embeddings = LAYERS * BATCH * QUERIES * DEPTH + BATCH * DEPTH * MASK_SIZE[0] * MASK_SIZE[1]
    floats = LAYERS * BATCH * QUERIES * (CLASSES + 1) + (masks if from_logits else embeddings)
    packed = BATCH * TARGETS * INPUT_SIZE[0] * INPUT_SIZE[1] / 8
    operations = 2.0 * masks * (3 * TARGETS + (0 if from_logits else DEPTH))
    return Bound(4 * floats + packed + 8 * LAYERS * BATCH * TARGETS, operations, "fp32")


def costs(kind: str, shape: tuple[int, int, int]) -> Tensor:
    """Float32 costs [batch, queries, targets]."""
    rng = np.random.default_rng(0)
    if kind == "uniform":
        return torch.from_numpy(rng.random(shape, dtype=np.float32))
    if kind == "integer ties":
        return torch.from_numpy(rng.integers(0, 20, shape).astype(np.float32))
    # Like a matcher's: each target resembles some query, and queries have a level of their own.
    batch, queries, targets = shape
    query = rng.normal(size=(batch, queries, 16)).astype(np.float32)
    alike = np.take_along_axis(query, rng.integers(0, queries, (batch, targets, 1)), 1)
    target = 0.7 * alike + 0.7 * rng.normal(size=alike.shape).astype(np.float32)
    level = 2 * rng.random((batch, queries, 1), dtype=np.float32)
    return torch.from_numpy(level - query @ target.transpose(0, 2, 1) / 4).contiguous()


def assignment(kind: str, shape: tuple[int, int, int]) -> tuple[Operation, Operation]:
    cost = costs(kind, shape)
    ours, theirs = (
        solve(cost).clamp(min=0).unsqueeze(1) for solve in (linear_sum_assignment, linear_sum_assignment_eager)
    )
    total, expected = (cost.double().gather(1, rows).sum((1, 2)) for rows in (ours, theirs))
    if min(shape[1:]) == shape[2] and not torch.allclose(total, expected, rtol=1e-9):
        raise RuntimeError("the assignments differ in cost")
    from scipy.optimize import linear_sum_assignment as solve_one

    problems = list(cost.numpy())
    return lambda: linear_sum_assignment(cost), lambda: [solve_one(problem) for problem in problems]


def beside_torch_assignment(shape: tuple[int, int, int]) -> Sides:
    from torch_linear_assignment import batch_linear_assignment

    cost = costs("matcher-like", shape)

    def check(ours: Tensor, theirs: Tensor) -> None:
        totals = [cost.double().gather(1, rows.long().unsqueeze(1)).sum((1, 2)) for rows in (ours, theirs)]
        if not torch.allclose(*totals, rtol=1e-9):
            raise RuntimeError("the assignments differ in cost")

    # it assigns a column to each row
    return Sides(lambda: linear_sum_assignment(cost), lambda: batch_linear_assignment(cost.mT.contiguous()), check)


def batch_of_targets() -> tuple[Targets, list[Tensor], list[Tensor]]:
    """Targets that tile the image like a panoptic map's, for us and, as float masks and labels, for the peer."""
    ids = torch.randint(TARGETS, (BATCH, 8, 8)).repeat_interleave(64, 1).repeat_interleave(64, 2)
    masks = ids.unsqueeze(1) == torch.arange(TARGETS)[:, None, None]
    labels = torch.randint(CLASSES, (BATCH, TARGETS))
    valid = torch.tensor([INPUT_SIZE] * BATCH)
    targets = Targets(labels, torch.full((BATCH,), TARGETS), pack_masks(masks), valid, INPUT_SIZE)
    return targets, [mask.float() for mask in masks], list(labels)


def from_logits() -> tuple[Operation, Operation]:
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher

    targets, masks, labels = batch_of_targets()
    class_logits = torch.randn(LAYERS, BATCH, QUERIES, CLASSES + 1)
    mask_logits = 2 * torch.randn(LAYERS, BATCH, QUERIES, *MASK_SIZE)
    peer = MaskFormerHungarianMatcher(1.0, 20.0, 1.0)
    loss = LossConfig()

    def ours() -> Tensor:
        cost = matching_cost_from_logits(class_logits, mask_logits, targets, loss)
        return linear_sum_assignment(cost, targets.counts.expand(LAYERS, BATCH))

    def theirs() -> list[object]:
        return [peer(m, c, masks, labels) for m, c in zip(mask_logits, class_logits, strict=True)]

    return ours, theirs


def from_embeddings() -> tuple[Operation, Operation]:
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher

    targets, masks, labels = batch_of_targets()
    predictions = Predictions(
        torch.randn(LAYERS, BATCH, QUERIES, CLASSES + 1),
        torch.randn(LAYERS, BATCH, QUERIES, DEPTH) / 8,
        torch.randn(BATCH, DEPTH, *MASK_SIZE),
        targets.valid_sizes,
        INPUT_SIZE,
    )
    peer = MaskFormerHungarianMatcher(1.0, 20.0, 1.0)
    loss = LossConfig()

    def theirs() -> list[object]:
        layers = range(LAYERS)
        return [peer(layer_mask_logits(predictions, k), predictions.class_logits[k], masks, labels) for k in layers]

    return lambda: match(predictions, targets, loss), theirs
