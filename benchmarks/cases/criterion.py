"""The criterion on the CPU, forward and backward, beside the official formula in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases.inputs import SCALE, Size, share_close
from benchmarks.harness.case import Bound, Case, Work
from maskformer_fast.config import LossConfig
from maskformer_fast.structures import Predictions, Targets, pack_masks
from maskformer_fast.training.criterion import Criterion

QUERIES, CLASSES, DEPTH = 100, 150, 256
COUNTS = range(7, 23)  # targets of each of 16 images, 14.5 on average
SIZE = (128, 128)
NO_OBJECT_WEIGHT, ALPHA, GAMMA = 0.1, 0.25, 2.0
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 1.0, 20.0, 1.0
OFFICIAL = "official formula in eager PyTorch"
OFFICIAL_BY_LAYER = f"{OFFICIAL}, a layer at a time"


def setup(
    device: torch.device, layers: int, counts: Sequence[int], queries: int = QUERIES, depth: int = DEPTH,
    size: Size = SIZE,
) -> Work:  # fmt: skip
    """Loss and gradients by class logits, mask embeddings and pixel embeddings, of `layers` decoder layers."""
    batch, input_size = len(counts), (SCALE * size[0], SCALE * size[1])
    ids = torch.stack([torch.randint(count, (8, 8)) for count in counts])
    ids = ids.repeat_interleave(input_size[0] // 8, 1).repeat_interleave(input_size[1] // 8, 2)
    masks = ids.unsqueeze(1) == torch.arange(max(counts))[:, None, None]  # tile the image, as a panoptic map's do
    labels = torch.randint(CLASSES, (batch, max(counts))) * (torch.arange(max(counts)) < torch.tensor(counts)[:, None])
    valid_sizes = torch.tensor([input_size] * batch)
    targets = Targets(labels, torch.tensor(counts), pack_masks(masks), valid_sizes, input_size)
    truth = [(labels[b, :n], masks[b, :n].clone()) for b, n in enumerate(counts)]
    del masks
    leaves = (
        torch.randn(layers, batch, queries, CLASSES + 1).requires_grad_(),
        (torch.randn(layers, batch, queries, depth) / 8).requires_grad_(),
        torch.randn(batch, depth, *size).requires_grad_(),
    )
    loss = LossConfig(CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT, no_object_weight=NO_OBJECT_WEIGHT)
    criterion = Criterion(CLASSES, loss)

    def ours() -> tuple[Tensor, ...]:
        loss = criterion(Predictions(*leaves, valid_sizes, input_size), targets).total
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    def official() -> tuple[Tensor, ...]:
        """Take a layer at a time and add up the gradients: all six at once take six times one layer's memory."""
        total, gradients = torch.zeros(()), [torch.zeros_like(leaf) for leaf in leaves]
        for layer in range(layers):
            logits, embeddings, pixels = leaves[0][layer], leaves[1][layer], leaves[2]
            loss = official_loss(logits, torch.einsum("bqd,bdhw->bqhw", embeddings, pixels), truth, input_size)
            total += loss.detach()
            parts = torch.autograd.grad(loss, (logits, embeddings, pixels))
            for gradient, part in zip(gradients, parts, strict=True):
                (gradient if gradient.shape == part.shape else gradient[layer]).add_(part)
        return (total, *gradients)

    peers = {OFFICIAL: official, OFFICIAL_BY_LAYER: official}
    return Work(ours, peers, agreement=agreement, least=dict.fromkeys(peers, 1.0))


def agreement(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Least share of a result's values that differ by no more than 1e-3 of the value and of the largest."""
    return min(
        share_close(value, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        for value, expected in zip(ours, theirs, strict=True)
    )


def official_loss(
    class_logits: Tensor,  # [B, Q, K+1]
    mask_logits: Tensor,  # [B, Q, h, w]
    truth: list[tuple[Tensor, Tensor]],  # labels [T] and masks [T, H, W] bool of each image
    input_size: Size,
) -> Tensor:
    """The paper's loss of one layer, formula by formula: masks are floats, at full size where losses are taken."""
    chosen = [match(logits, masks, *true) for logits, masks, true in zip(class_logits, mask_logits, truth, strict=True)]
    classes = torch.full(class_logits.shape[:2], CLASSES)
    for image, (queries, order) in enumerate(chosen):
        classes[image, queries] = truth[image][0][order]
    weights = torch.ones(CLASSES + 1)
    weights[-1] = NO_OBJECT_WEIGHT
    class_loss = F.cross_entropy(class_logits.transpose(1, 2), classes, weights)
    source = torch.cat([masks[queries] for masks, (queries, _) in zip(mask_logits, chosen, strict=True)])
    target = torch.cat([masks[order] for (_, masks), (_, order) in zip(truth, chosen, strict=True)]).float().flatten(1)
    source = F.interpolate(source.unsqueeze(1), input_size, mode="bilinear", align_corners=False).flatten(1)
    probability = source.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(source, target, reduction="none")
    right = probability * target + (1 - probability) * (1 - target)
    focal = (ALPHA * target + (1 - ALPHA) * (1 - target)) * entropy * (1 - right) ** GAMMA
    dice = 1 - (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    return CLASS_WEIGHT * class_loss + (MASK_WEIGHT * focal.mean(1).sum() + DICE_WEIGHT * dice.sum()) / len(target)


@torch.no_grad()
def match(
    class_logits: Tensor,  # [Q, K+1]
    mask_logits: Tensor,  # [Q, h, w]
    labels: Tensor,  # [T]
    masks: Tensor,  # [T, H, W] bool
) -> tuple[Tensor, Tensor]:
    """Queries of one image, and the targets that they are matched to."""
    target = F.interpolate(masks[:, None].float(), mask_logits.shape[1:], mode="nearest").flatten(1)
    logits = mask_logits.flatten(1)
    probability = logits.sigmoid()
    on = ALPHA * (1 - probability) ** GAMMA * F.softplus(-logits)
    off = (1 - ALPHA) * probability**GAMMA * F.softplus(logits)
    focal = (on @ target.T + off @ (1 - target).T) / target.shape[1]
    dice = 1 - (2 * probability @ target.T + 1) / (probability.sum(1, keepdim=True) + target.sum(1) + 1)
    cost = MASK_WEIGHT * focal + DICE_WEIGHT * dice - CLASS_WEIGHT * class_logits.softmax(-1)[:, labels]
    queries, order = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(order)


def bound(layers: int, counts: Sequence[int]) -> Bound:
    """Predictions and packed targets read, gradients written; the masks of all queries for the costs, and with the
    gradients three products for those of the matched ones.
    """
    batch, pixels, matched = len(counts), SIZE[0] * SIZE[1], sum(counts)
    floats = batch * (layers * QUERIES * (CLASSES + 1 + DEPTH) + DEPTH * pixels)
    packed = matched * SCALE**2 * pixels / 8
    return Bound(8 * floats + packed, 2.0 * layers * DEPTH * pixels * (batch * QUERIES + 3 * matched))


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    # Six layers of two images, as the peer takes half a minute for 16.
    settings = ((1, COUNTS, "1 layer", OFFICIAL), (6, (COUNTS[3], COUNTS[-4]), "6 layers", OFFICIAL_BY_LAYER))
    return [
        Case(
            f"criterion, {text}, batch {len(counts)} at 512x512, Q={QUERIES}, {counts[0]} to {counts[-1]} targets",
            peer, 6.0, partial(setup, layers=layers, counts=counts), bound=bound(layers, counts),
        )
        for layers, counts, text, peer in settings
    ]  # fmt: skip
