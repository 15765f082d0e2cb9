"""Mask and dice losses of matched pairs with their gradients, beside the formula by autograd, eager and compiled.

The formula is what training codes write: logits of the matched queries upsampled to full size, focal loss and dice
against the full masks. It is given the masks unpacked. On a GPU only; on the CPU the losses are measured with the
criterion.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.inputs import KERNEL_RATE, SCALE, Size, compiled, random_predictions, random_targets
from benchmarks.harness.case import Bound, Case, Work, beside
from maskformer_fast.config import LossConfig
from maskformer_fast.ops import mask_loss
from maskformer_fast.structures import Predictions, Targets, unpack_masks

EAGER, COMPILED = "eager formula", "torch.compile of the formula"
LAYERS, BATCH, TARGETS, QUERIES, CLASSES, DEPTH = 3, 5, 20, 100, 150, 256  # 300 pairs
SIZE = (128, 128)

Inputs = tuple[Predictions, Targets, Tensor, Tensor]


def formula(
    embeddings: Tensor,  # [L, B, Q, D]
    pixels: Tensor,  # [B, D, h, w]
    query: Tensor,  # [L, B, T] int64
    truth: Tensor,  # [B, T, H, W] bool
    loss: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Losses summed over pairs -> [L], [L]."""
    embeddings, pixels = embeddings.float(), pixels.float()
    matched = embeddings.gather(2, query.unsqueeze(-1).expand(-1, -1, -1, embeddings.shape[-1]))
    logits = torch.einsum("lbtd,bdhw->lbthw", matched, pixels)
    logits = F.interpolate(logits.flatten(0, 1), truth.shape[2:], mode="bilinear", align_corners=False)
    logits = logits.view(*query.shape, -1)
    target = truth.flatten(2).to(logits.dtype).expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    right = probability * target + (1 - probability) * (1 - target)
    weight = loss.focal_alpha * target + (1 - loss.focal_alpha) * (1 - target)
    focal = (weight * (1 - right) ** loss.focal_gamma * entropy).mean(-1)
    dice = 1 - (2 * (probability * target).sum(-1) + 1) / (probability.sum(-1) + target.sum(-1) + 1)
    return focal.sum((1, 2)), dice.sum((1, 2))


def setup(
    device: torch.device, dtype: torch.dtype, layers: int = LAYERS, batch: int = BATCH, count: int = TARGETS,
    size: Size = SIZE, depth: int = DEPTH,
) -> Work:  # fmt: skip
    loss = LossConfig()

    def draw(seed: int) -> Inputs:
        torch.manual_seed(seed)
        predictions = random_predictions(layers, batch, QUERIES, CLASSES, depth, size, dtype, device)
        targets = random_targets(batch, count, CLASSES, predictions.input_size, device=device)
        query = torch.rand(layers, batch, QUERIES, device=device).argsort(-1)[..., :count]
        for tensor in (predictions.mask_embeddings, predictions.pixel_features):
            tensor.requires_grad_()
        return predictions, targets, query, unpack_masks(targets.masks, targets.input_size[1])

    def ours(predictions: Predictions, targets: Targets, query: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return with_gradients(predictions, mask_loss(predictions, targets, query, loss))

    def by_autograd(
        losses: Callable[..., tuple[Tensor, Tensor]], predictions: Predictions, _: Targets, query: Tensor, truth: Tensor
    ) -> tuple[Tensor, ...]:
        result = losses(predictions.mask_embeddings, predictions.pixel_features, query, truth, loss)
        return with_gradients(predictions, result)

    peers = {EAGER: partial(by_autograd, formula), COMPILED: partial(by_autograd, compiled(formula))}
    return Work(ours, peers, draw, agreement, dict.fromkeys(peers, 0.99))


def with_gradients(predictions: Predictions, losses: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Losses, and the gradients of their weighted sum by both embeddings."""
    mask, dice = losses
    inputs = (predictions.mask_embeddings, predictions.pixel_features)
    return mask.detach(), dice.detach(), *torch.autograd.grad(20 * mask.sum() + dice.sum(), inputs)


def agreement(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """1 less the largest relative error, in the norm, of a loss or gradient."""
    errors = [((a - b).double().norm() / b.double().norm()).item() for a, b in zip(ours, theirs, strict=True)]
    return 1 - max(errors)


def bound(dtype: torch.dtype) -> Bound:
    """Embeddings read and their gradients written; the products with the pixels, one forward and two backward."""
    pixels = SIZE[0] * SIZE[1]
    floats = 2 * (BATCH * DEPTH * pixels + LAYERS * BATCH * QUERIES * DEPTH)
    masks = BATCH * TARGETS * SCALE**2 * pixels / 8
    products = 3 * 2.0 * LAYERS * BATCH * TARGETS * DEPTH * pixels
    return Bound(floats * dtype.itemsize + masks, products, KERNEL_RATE[dtype])


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return []
    height, width = (SCALE * side for side in SIZE)
    name = f"mask loss forward + backward, {LAYERS * BATCH * TARGETS} pairs at {height}x{width}"
    single, half = (partial(setup, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    return [
        *beside(f"{name}, fp32", {EAGER: 5.0, COMPILED: 2.5}, single, memory_goal=1 / 10, bound=bound(torch.float32)),
        *beside(f"{name}, bf16", {EAGER: None}, half, bound=bound(torch.bfloat16), rank=1),
    ]
