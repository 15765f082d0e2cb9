"""Mask and dice losses of 300 matched pairs at 512x512 with their gradients, beside the formula by autograd.

The formula is what training codes write: logits of the matched queries upsampled to full size, focal loss and dice
against the full masks. It is given the masks unpacked. The bound counts the products with the pixel embeddings, one
forward and two backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_harness import OURS, Bound, Case, Peer, Work
from benchmarks.gpu_matching import KERNEL_RATE, random_predictions, random_targets
from maskformer_fast.config import LossConfig
from maskformer_fast.ops import mask_loss
from maskformer_fast.structures import Predictions, Targets, unpack_masks

EAGER, COMPILED = "eager formula", "torch.compile of it"
LAYERS, BATCH, SLOTS, QUERIES, CLASSES, DEPTH = 3, 5, 20, 100, 150, 256  # 300 pairs
SIZE, SCALE = (128, 128), 4

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
    layers, batch, slots = query.shape
    logits = F.interpolate(logits.flatten(0, 1), truth.shape[2:], mode="bilinear", align_corners=False)
    logits = logits.view(layers, batch, slots, -1)
    target = truth.flatten(2).to(logits.dtype).expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    right = probability * target + (1 - probability) * (1 - target)
    weight = loss.focal_alpha * target + (1 - loss.focal_alpha) * (1 - target)
    focal = (weight * (1 - right) ** loss.focal_gamma * entropy).mean(-1)
    dice = 1 - (2 * (probability * target).sum(-1) + 1) / (probability.sum(-1) + target.sum(-1) + 1)
    return focal.sum((1, 2)), dice.sum((1, 2))


def setup(
    device: torch.device, dtype: torch.dtype, layers: int = LAYERS, batch: int = BATCH, slots: int = SLOTS,
    size: tuple[int, int] = SIZE, depth: int = DEPTH,
) -> Work:  # fmt: skip
    loss = LossConfig()

    def draw(seed: int) -> Inputs:
        torch.manual_seed(seed)
        predictions = random_predictions(device, layers, batch, QUERIES, CLASSES, depth, size, dtype)
        targets = random_targets(device, batch, slots, CLASSES, predictions.input_size)
        query = torch.rand(layers, batch, QUERIES, device=device).argsort(-1)[..., :slots]
        for tensor in (predictions.mask_embeddings, predictions.pixel_features):
            tensor.requires_grad_()
        return predictions, targets, query, unpack_masks(targets.masks, targets.input_size[1])

    def ours(predictions: Predictions, targets: Targets, query: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return with_gradients(predictions, mask_loss(predictions, targets, query, loss))

    def by_autograd(losses: Callable[..., tuple[Tensor, Tensor]], *inputs: object) -> tuple[Tensor, ...]:
        predictions, _, query, truth = inputs
        assert isinstance(predictions, Predictions)
        found = losses(predictions.mask_embeddings, predictions.pixel_features, query, truth, loss)
        return with_gradients(predictions, found)

    compiled = torch.compile(formula, dynamic=False)
    sides = {OURS: ours, EAGER: partial(by_autograd, formula), COMPILED: partial(by_autograd, compiled)}
    return Work(draw, sides, agreement)


def with_gradients(predictions: Predictions, losses: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Losses, and the gradients of their weighted sum by both embeddings."""
    mask, dice = losses
    inputs = (predictions.mask_embeddings, predictions.pixel_features)
    return mask.detach(), dice.detach(), *torch.autograd.grad(20 * mask.sum() + dice.sum(), inputs)


def agreement(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """1 less the largest relative error of a loss or gradient as a whole."""
    errors = [((a - b).double().norm() / b.double().norm()).item() for a, b in zip(ours, theirs, strict=True)]
    return 1 - max(errors)


def bound(dtype: torch.dtype) -> Bound:
    pixels = SIZE[0] * SIZE[1]
    floats = 2 * (BATCH * DEPTH * pixels + LAYERS * BATCH * QUERIES * DEPTH)  # read, and the gradients written
    masks = BATCH * SLOTS * SCALE**2 * pixels / 8
    products = 3 * 2.0 * LAYERS * BATCH * SLOTS * DEPTH * pixels
    return Bound(floats * dtype.itemsize + masks, products, KERNEL_RATE[dtype])


def cases() -> list[Case]:
    goals = (Peer(EAGER, 5.0, 10.0), Peer(COMPILED, 2.5, 10.0))
    height, width = (SCALE * side for side in SIZE)
    name = f"mask loss forward + backward, {LAYERS * BATCH * SLOTS} pairs at {height}x{width}"
    return [
        Case(f"{name}, fp32", partial(setup, dtype=torch.float32), goals, bound(torch.float32)),
        Case(f"{name}, bf16", partial(setup, dtype=torch.bfloat16), (Peer(EAGER),), bound(torch.bfloat16), rank=1),
    ]
