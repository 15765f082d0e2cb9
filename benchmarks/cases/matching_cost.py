"""Costs of matching queries to targets: on the CPU with the assignment, beside Hugging Face's matcher; on a GPU alone,
beside plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.inputs import KERNEL_RATE, SCALE, Size, random_predictions, random_targets, share_close
from benchmarks.harness.case import Bound, Case, Work, beside
from maskformer_fast.config import LossConfig
from maskformer_fast.ops import linear_sum_assignment, matching_cost
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.matching_cost import matching_cost_eager, matching_cost_from_logits
from maskformer_fast.structures import Predictions, Targets, unpack_masks
from maskformer_fast.training.matcher import match

LAYERS, BATCH, QUERIES, TARGETS, CLASSES, DEPTH = 6, 16, 100, 20, 150, 256
SIZE = (128, 128)
MATCHER = "Hugging Face's matcher"
MATCHER_BY_LAYER = "einsum and Hugging Face's matcher, a layer at a time"
EAGER = "eager, a layer at a time"


def huggingface_matcher() -> Any:
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher

    return MaskFormerHungarianMatcher(1.0, 20.0, 1.0)


def float_masks(targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
    """Targets as the peer takes them: float masks [T, H, W] and labels [T] of each image."""
    return list(unpack_masks(targets.masks, targets.input_size[1]).float()), list(targets.labels)


def matching_from_logits(
    device: torch.device, layers: int = LAYERS, batch: int = BATCH, queries: int = QUERIES, count: int = TARGETS,
    size: Size = SIZE,
) -> Work:  # fmt: skip
    """Cost and assignment from mask logits."""
    loss, input_size = LossConfig(), (SCALE * size[0], SCALE * size[1])
    targets = random_targets(batch, count, CLASSES, input_size, device=device)
    masks, labels = float_masks(targets)
    class_logits = torch.randn(layers, batch, queries, CLASSES + 1).to(device)
    mask_logits = 2 * torch.randn(layers, batch, queries, *size).to(device)

    def ours() -> Tensor:
        cost = matching_cost_from_logits(class_logits, mask_logits, targets, loss)
        return linear_sum_assignment(cost, targets.counts.expand(layers, batch))

    def theirs() -> list[object]:
        matcher = huggingface_matcher()
        return [matcher(m, c, masks, labels) for m, c in zip(mask_logits, class_logits, strict=True)]

    return Work(ours, {MATCHER: theirs})


def matching_from_embeddings(
    device: torch.device, layers: int = LAYERS, batch: int = BATCH, queries: int = QUERIES, count: int = TARGETS,
    size: Size = SIZE, cells: int = 8,
) -> Work:  # fmt: skip
    """Cost and assignment as training does it; the peer multiplies the embeddings out first."""
    loss = LossConfig()
    predictions = random_predictions(layers, batch, queries, CLASSES, DEPTH, size, device=device)
    targets = random_targets(batch, count, CLASSES, predictions.input_size, cells, device)
    masks, labels = float_masks(targets)

    def theirs() -> list[object]:
        matcher = huggingface_matcher()
        return [
            matcher(layer_mask_logits(predictions, layer), predictions.class_logits[layer], masks, labels)
            for layer in range(layers)
        ]

    return Work(lambda: match(predictions, targets, loss), {MATCHER_BY_LAYER: theirs})


def cost_setup(
    device: torch.device, dtype: torch.dtype, layers: int = LAYERS, batch: int = BATCH, queries: int = QUERIES,
    count: int = TARGETS, size: Size = SIZE, depth: int = DEPTH,
) -> Work:  # fmt: skip
    """The costs alone, from embeddings."""
    loss = LossConfig()

    def draw(seed: int) -> tuple[Predictions, Targets]:
        torch.manual_seed(seed)
        predictions = random_predictions(layers, batch, queries, CLASSES, depth, size, dtype, device)
        return predictions, random_targets(batch, count, CLASSES, predictions.input_size, device=device)

    def agreement(ours: Tensor, theirs: Tensor) -> float:
        return share_close(ours / theirs.abs().clamp(min=1), theirs / theirs.abs().clamp(min=1), 0.0, 2e-2)

    return Work(
        lambda predictions, targets: matching_cost(predictions, targets, loss),
        {EAGER: lambda predictions, targets: matching_cost_eager(predictions, targets, loss)},
        draw, agreement, {EAGER: 0.999},
    )  # fmt: skip


def logits_cost_setup(
    device: torch.device, layers: int = LAYERS, batch: int = BATCH, queries: int = QUERIES, count: int = TARGETS,
    size: Size = SIZE,
) -> Work:  # fmt: skip
    """The costs alone, from mask logits; ours without a peer."""
    loss = LossConfig()

    def draw(seed: int) -> tuple[Tensor, Tensor, Targets]:
        torch.manual_seed(seed)
        shapes = ((layers, batch, queries, CLASSES + 1), (layers, batch, queries, *size))
        classes, masks = (torch.randn(shape, device=device) for shape in shapes)
        input_size = (SCALE * size[0], SCALE * size[1])
        return classes, 2 * masks, random_targets(batch, count, CLASSES, input_size, device=device)

    def ours(classes: Tensor, masks: Tensor, targets: Targets) -> Tensor:
        return matching_cost_from_logits(classes, masks, targets, loss)

    return Work(ours, {}, draw)


def bound(dtype: torch.dtype, from_logits: bool, written: float, rate: str) -> Bound:
    """Logits or embeddings and packed targets read; three products with the targets, and masks of embeddings."""
    pixels = SIZE[0] * SIZE[1]
    masks = LAYERS * BATCH * QUERIES * pixels
    embeddings = LAYERS * BATCH * QUERIES * DEPTH + BATCH * DEPTH * pixels
    floats = LAYERS * BATCH * QUERIES * (CLASSES + 1) + (masks if from_logits else embeddings)
    packed = BATCH * TARGETS * SCALE**2 * pixels / 8
    operations = 2.0 * masks * (3 * TARGETS + (0 if from_logits else DEPTH))
    return Bound(floats * dtype.itemsize + packed + written, operations, rate)


def cases(device: str) -> list[Case]:
    return cpu_cases() if device == "cpu" else cuda_cases()


def cpu_cases() -> list[Case]:
    name = f"matching cost and assignment, {LAYERS} layers, batch {BATCH}, Q={QUERIES}, {TARGETS} targets, 128x128"
    assignment = 8.0 * LAYERS * BATCH * TARGETS
    return [
        Case(f"{name}, from mask logits", MATCHER, 4.0, matching_from_logits,
             bound=bound(torch.float32, True, assignment, "fp32")),
        Case(f"{name}, from embeddings", MATCHER_BY_LAYER, 4.0, matching_from_embeddings,
             bound=bound(torch.float32, False, assignment, "fp32")),
    ]  # fmt: skip


def cuda_cases() -> list[Case]:
    name = f"matching cost, {LAYERS} layers, batch {BATCH}, Q={QUERIES}, {TARGETS} targets, {SIZE[0]}x{SIZE[1]}"
    costs = 4.0 * LAYERS * BATCH * QUERIES * TARGETS
    rows = []
    for dtype, short in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        stated = dtype != torch.bfloat16
        rows += beside(
            f"{name}, {short}", {EAGER: 5.0 if stated else None}, partial(cost_setup, dtype=dtype),
            memory_goal=1 / 10 if stated else None, rank=0 if stated else 2,
            bound=bound(dtype, False, costs, KERNEL_RATE[dtype]),
        )  # fmt: skip
    rows.append(Case(f"{name}, fp32, from mask logits", None, None, logits_cost_setup, rank=2,
                     bound=bound(torch.float32, True, costs, KERNEL_RATE[torch.float32])))  # fmt: skip
    return rows
