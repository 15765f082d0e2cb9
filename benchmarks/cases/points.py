"""Matching costs and mask losses at points beside the formula in plain PyTorch, which training codes write.

The formula samples full masks and maps by `grid_sample`, sorts candidates by `topk` and takes gradients by autograd. It
is given the masks unpacked, in floating point, and does all layers of an image at once.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.inputs import SCALE, Size, random_predictions, random_targets, relative_error
from benchmarks.cases.mask_loss import agreement, with_gradients
from benchmarks.harness.case import Bound, Case, Work, beside
from maskformer_fast.config import LossConfig
from maskformer_fast.ops import draw_points, mask_loss_at_points, matching_cost_at_points
from maskformer_fast.ops.points import PointDraws, sample_maps
from maskformer_fast.structures import Predictions, Targets, unpack_masks

EAGER = "eager formula"
LAYERS, BATCH, TARGETS, QUERIES, CLASSES, DEPTH = 10, 2, 20, 100, 133, 256
POINTS, SIZE = 12544, (128, 128)

Inputs = tuple[Predictions, Targets, PointDraws, Tensor, Tensor]


def entropies(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropies of logits [N, P] and targets [T, P] -> [N, T]."""
    on, off = F.softplus(-logits), F.softplus(logits)
    return (on @ truth.mT + off @ (1 - truth).mT) / logits.shape[1]


def cost_formula(
    predictions: Predictions, targets: Targets, draws: PointDraws, masks: Tensor, _: Tensor, loss: LossConfig
) -> Tensor:
    costs = []
    for image, points in enumerate(draws.match):
        truth = sample_maps(masks[image][:, None], points.expand(len(masks[image]), -1, -1))[:, 0]
        logits = torch.einsum("lqd,dhw->lqhw", predictions.mask_embeddings[:, image], predictions.pixel_features[image])
        logits = logits.flatten(0, 1)
        values = sample_maps(logits[None], points[None])[0]
        p = values.sigmoid()
        dice = 1 - (2 * p @ truth.mT + 1) / (p.sum(1, keepdim=True) + truth.sum(1) + 1)
        chosen = predictions.class_logits[:, image].flatten(0, 1).softmax(1)[:, targets.labels[image]]
        costs.append(loss.mask_weight * entropies(values, truth) + loss.dice_weight * dice - loss.class_weight * chosen)
    return torch.stack(costs, 1).unflatten(0, (len(predictions.class_logits), -1)).transpose(1, 2)


def loss_formula(
    predictions: Predictions, _: Targets, draws: PointDraws, masks: Tensor, query: Tensor, loss: LossConfig
) -> tuple[Tensor, Tensor]:
    embeddings, pixels = predictions.mask_embeddings, predictions.pixel_features
    layers, _, slots = query.shape
    matched = embeddings.gather(2, query.unsqueeze(-1).expand(-1, -1, -1, embeddings.shape[-1]))
    logits = torch.einsum("lbtd,bdhw->lbthw", matched, pixels).flatten(0, 2).unsqueeze(1)
    candidates, random = (
        points[None, :, None].expand(layers, -1, slots, -1, -1).flatten(0, 2) for points in draws[1:]
    )
    with torch.no_grad():
        nearness = sample_maps(logits, candidates).squeeze(1).abs()
        nearest = nearness.topk(loss.points - random.shape[1], dim=1, largest=False).indices
        points = torch.cat([candidates.gather(1, nearest.unsqueeze(2).expand(-1, -1, 2)), random], 1)
        truth = sample_maps(masks.flatten(0, 1).repeat(layers, 1, 1)[:, None], points).squeeze(1)
    values = sample_maps(logits, points).squeeze(1)
    mask = F.binary_cross_entropy_with_logits(values, truth, reduction="none").mean(1)
    p = values.sigmoid()
    dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
    return mask.view(layers, -1).sum(1), dice.view(layers, -1).sum(1)


def setup(
    device: torch.device, gradients: bool, layers: int = LAYERS, batch: int = BATCH, count: int = TARGETS,
    size: Size = SIZE, depth: int = DEPTH, points: int = POINTS,
) -> Work:  # fmt: skip
    """Losses with gradients of given pairs, or else matching costs."""
    loss = LossConfig(2.0, 5.0, 5.0, mask_loss="bce", padding="include", points=points)

    def draw(seed: int) -> Inputs:
        torch.manual_seed(seed)
        predictions = random_predictions(layers, batch, QUERIES, CLASSES, depth, size, device=device)
        targets = random_targets(batch, count, CLASSES, predictions.input_size, device=device)
        query = torch.rand(layers, batch, QUERIES, device=device).argsort(-1)[..., :count]
        for tensor in (predictions.mask_embeddings, predictions.pixel_features):
            tensor.requires_grad_(gradients)
        masks = unpack_masks(targets.masks, targets.input_size[1]).float()
        return predictions, targets, draw_points(loss, range(seed, seed + batch), device), masks, query

    def our_loss(predictions: Predictions, targets: Targets, draws: PointDraws, _: Tensor, query: Tensor) -> object:
        return with_gradients(predictions, mask_loss_at_points(predictions, targets, query, draws, loss))

    def other_loss(predictions: Predictions, *rest: object) -> object:
        return with_gradients(predictions, loss_formula(predictions, *rest, loss))  # type: ignore[arg-type]

    def our_cost(predictions: Predictions, targets: Targets, draws: PointDraws, *_: Tensor) -> Tensor:
        return matching_cost_at_points(predictions, targets, draws.match, loss)

    if gradients:
        return Work(our_loss, {EAGER: other_loss}, draw, agreement, {EAGER: 0.99})
    return Work(our_cost, {EAGER: partial(cost_formula, loss=loss)}, draw,
                lambda ours, theirs: 1 - relative_error(ours, theirs), {EAGER: 1 - 1e-4})  # fmt: skip


def bound(gradients: bool, rate: str) -> Bound:
    """Embeddings, masks and points read once, results or gradients written; products with the pixels or the points."""
    pixels = SIZE[0] * SIZE[1]
    masks = BATCH * TARGETS * SCALE**2 * pixels / 8
    floats = BATCH * DEPTH * pixels + LAYERS * BATCH * QUERIES * DEPTH
    if gradients:
        return Bound(8.0 * floats + masks, 3 * 2.0 * LAYERS * BATCH * TARGETS * DEPTH * pixels, rate)
    rows = LAYERS * BATCH * QUERIES
    return Bound(4.0 * (floats + rows * TARGETS) + masks, 2.0 * rows * POINTS * (DEPTH + 2 * TARGETS), rate)


def cases(device: str) -> list[Case]:
    sizes = f"{LAYERS} layers, B={BATCH}, {TARGETS} targets, {POINTS} points, 128x128"
    rate = "fp32" if device == "cpu" else "tf32"
    return [
        *beside(f"matching cost at points, {sizes}", {EAGER: None}, partial(setup, gradients=False),
                bound=bound(False, rate), rank=1),
        *beside(f"mask loss at points forward + backward, {sizes}", {EAGER: None}, partial(setup, gradients=True),
                bound=bound(True, rate), rank=1),
    ]  # fmt: skip
