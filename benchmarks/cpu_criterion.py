"""The criterion on the CPU, forward and backward, beside the official formula in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bounds import Bound
from benchmarks.harness import Case, Sides
from maskformer_fast.config import LossConfig
from maskformer_fast.structures import Predictions, Targets, pack_masks
from maskformer_fast.training.criterion import Criterion

QUERIES, CLASSES, DEPTH = 100, 150, 256
COUNTS = range(7, 23)  # targets of each of 16 images, 14.5 on average
MASK_SIZE, INPUT_SIZE = (128, 128), (512, 512)
NO_OBJECT_WEIGHT, ALPHA, GAMMA = 0.1, 0.25, 2.0
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 1.0, 20.0, 1.0


def cases() -> list[Case]:
    peer = "official formula in eager PyTorch"
    # A layer of the peer at a time, gradients added up: all six at once take six times one layer's memory. Two images,
    # as it takes half a minute for 16.
    settings = ((1, COUNTS, "1 layer", peer), (6, (COUNTS[3], COUNTS[-4]), "6 layers", f"{peer}, a layer at a time"))
    return [
        Case(
            f"criterion, {text}, batch {len(counts)} at 512x512, Q={QUERIES}, {counts[0]} to {counts[-1]} targets",
            theirs, 6.0, partial(criterion, layers, counts), bound=bound(layers, counts),
        )
        for layers, counts, text, theirs in settings
    ]  # fmt: skip


def bound(layers: int, counts: Sequence[int]) -> Bound:
    """Predictions and packed targets read, gradients written; the masks of all queries for the costs, and with the
    gradients three products for those of the matched ones.
    """
    batch, pixels, found = len(counts), MASK_SIZE[0] * MASK_SIZE[1], sum(counts)
    floats = batch * (layers * QUERIES * (CLASSES + 1 + DEPTH) + DEPTH * pixels)
    packed = found * INPUT_SIZE[0] * INPUT_SIZE[1] / 8
    return Bound(8 * floats + packed, 2.0 * layers * DEPTH * pixels * (batch * QUERIES + 3 * found), "fp32")


def criterion(layers: int, counts: Sequence[int]) -> Sides:
    """Both give the loss and its gradients by class logits, mask embeddings and pixel embeddings."""
    slots, batch = max(counts), len(counts)
    ids = torch.stack([torch.randint(count, (8, 8)) for count in counts])
    ids = ids.repeat_interleave(INPUT_SIZE[0] // 8, 1).repeat_interleave(INPUT_SIZE[1] // 8, 2)
    masks = ids.unsqueeze(1) == torch.arange(slots)[:, None, None]  # tile the image, as a panoptic map's do
    labels = torch.randint(CLASSES, (batch, slots)) * (torch.arange(slots) < torch.tensor(counts)[:, None])
    valid_sizes = torch.tensor([INPUT_SIZE] * batch)
    targets = Targets(labels, torch.tensor(counts), pack_masks(masks), valid_sizes, INPUT_SIZE)
    truth = [(labels[b, :n], masks[b, :n].clone()) for b, n in enumerate(counts)]
    del masks
    leaves = (
        torch.randn(layers, batch, QUERIES, CLASSES + 1).requires_grad_(),
        (torch.randn(layers, batch, QUERIES, DEPTH) / 8).requires_grad_(),
        torch.randn(batch, DEPTH, *MASK_SIZE).requires_grad_(),
    )
    ours = Criterion(CLASSES, LossConfig(CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT, no_object_weight=NO_OBJECT_WEIGHT))

    def fused() -> tuple[Tensor, ...]:
        loss = ours(Predictions(*leaves, valid_sizes, INPUT_SIZE), targets).total
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    def official() -> tuple[Tensor, ...]:
        total, gradients = torch.zeros(()), [torch.zeros_like(leaf) for leaf in leaves]
        for layer in range(layers):
            logits, embeddings, pixels = leaves[0][layer], leaves[1][layer], leaves[2]
            loss = official_loss(logits, torch.einsum("bqd,bdhw->bqhw", embeddings, pixels), truth)
            total += loss.detach()
            for gradient, own in zip(gradients, torch.autograd.grad(loss, (logits, embeddings, pixels)), strict=True):
                (gradient if gradient.shape == own.shape else gradient[layer]).add_(own)
        return (total, *gradients)

    return Sides(fused, official, check_results)


def check_results(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for name, got, expected in zip(("loss", "logits", "embeddings", "pixels"), ours, theirs, strict=True):
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise RuntimeError(f"{name}: ours and the peer's differ")


def official_loss(
    class_logits: Tensor,  # [B, Q, K+1]
    mask_logits: Tensor,  # [B, Q, h, w]
    truth: list[tuple[Tensor, Tensor]],  # labels [T] and masks [T, H, W] bool of each image
) -> Tensor:
    """The paper's loss of one layer as its formulas read: masks as floats, at full size where losses are taken."""
    chosen = [match(logits, masks, *own) for logits, masks, own in zip(class_logits, mask_logits, truth, strict=True)]
    classes = torch.full(class_logits.shape[:2], CLASSES)
    for image, (queries, order) in enumerate(chosen):
        classes[image, queries] = truth[image][0][order]
    weights = torch.ones(CLASSES + 1)
    weights[-1] = NO_OBJECT_WEIGHT
    class_loss = F.cross_entropy(class_logits.transpose(1, 2), classes, weights)
    source = torch.cat([masks[queries] for masks, (queries, _) in zip(mask_logits, chosen, strict=True)])
    target = torch.cat([own[1][order] for own, (_, order) in zip(truth, chosen, strict=True)]).float().flatten(1)
    source = F.interpolate(source.unsqueeze(1), INPUT_SIZE, mode="bilinear", align_corners=False).flatten(1)
    probability = source.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(source, target, reduction="none")
    agreement = probability * target + (1 - probability) * (1 - target)
    focal = (ALPHA * target + (1 - ALPHA) * (1 - target)) * entropy * (1 - agreement) ** GAMMA
    dice = 1 - (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    number = len(target)
    return CLASS_WEIGHT * class_loss + (MASK_WEIGHT * focal.mean(1).sum() + DICE_WEIGHT * dice.sum()) / number


@torch.no_grad()
def match(
    class_logits: Tensor,  # [Q, K+1]
    mask_logits: Tensor,  # [Q, h, w]
    labels: Tensor,  # [T]
    masks: Tensor,  # [T, H, W] bool
) -> tuple[Tensor, Tensor]:
    """Queries and the targets that they get, of one image."""
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
