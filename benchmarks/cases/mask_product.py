"""Mask logits from the pixel decoder's last features: embeddings folded into its last convolution, against the usual
order of the products, which convolves to all embedding channels and multiplies by all queries.

512x512 images, features [1, 256, 128, 128]. The usual order takes 19.3 GFLOP for the convolution and 0.8 for the
product, 100 folded queries 7.7, 25 queries 1.9: at equal efficiency, ratios of 2.6 and 10.4 are the limit.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases.inputs import relative_error, share_equal
from benchmarks.harness.case import Bound, Case, Work
from maskformer_fast.ops.mask_product import mask_product
from maskformer_fast.ops.semantic import semantic_inference
from maskformer_fast.ops.semantic_pruned import pruned_semantic_inference
from maskformer_fast.structures import Projection

DIM, SIZE, QUERIES, LIVE, CLASSES = 256, 128, 100, 20, 150
USUAL = "convolution to 256 channels, then the product"
USUAL_LABELS = f"{USUAL}, our labels"


def usual_masks(embeddings: Tensor, features: Tensor, projection: Projection) -> Tensor:
    """Masks of all queries in the usual order -> [1, Q, h, w]."""
    pixels = F.conv2d(features, projection.weight, projection.bias, padding=1)
    return torch.einsum("bqd,bdhw->bqhw", embeddings, pixels)


def masks_setup(device: torch.device, wanted: int, size: int = SIZE) -> Work:
    """Masks of the ``wanted`` first queries; the peer's of all of them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, DIM, size, size, generator=generator).relu_()
    weight = torch.randn(DIM, DIM, 3, 3, generator=generator) / (9 * DIM) ** 0.5
    projection = Projection(weight, torch.randn(DIM, generator=generator))
    embeddings = torch.randn(1, QUERIES, DIM, generator=generator)

    def agreement(ours: Tensor, theirs: Tensor) -> float:
        return 1 - relative_error(ours, theirs[:, :wanted])

    return Work(
        lambda: mask_product(embeddings[:, :wanted], features, projection),
        {USUAL: lambda: usual_masks(embeddings, features, projection)},
        agreement=agreement, least={USUAL: 1 - 1e-3},
    )  # fmt: skip


def labels_setup(device: torch.device, size: int = SIZE) -> Work:
    """Labels of peaky predictions: 20 queries with a class each cut the image into pieces."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, QUERIES, 8, 8, generator=generator)
    fields = 2 * F.interpolate(coarse, size=(size, size), mode="bicubic")[0]
    first, second = fields[:LIVE].topk(2, dim=0).values
    lead = fields[:LIVE] - torch.where(fields[:LIVE] == first, second, first)  # above 0 inside a query's piece
    masks = torch.cat([(12 * lead).clamp(-9, 9), fields[LIVE:] - 3])
    class_logits = torch.randn(QUERIES, CLASSES + 1, generator=generator)
    class_logits[range(LIVE), torch.randint(CLASSES, (LIVE,), generator=generator)] += 10
    class_logits[LIVE:, -1] += 11

    # Embeddings, kernel and features of full size whose product is these masks.
    features = torch.randn(1, DIM, size, size, generator=generator)
    features[0, :QUERIES] = masks
    weight = torch.zeros(DIM, DIM, 3, 3)
    weight[range(DIM), range(DIM), 1, 1] = 1
    projection, embeddings = Projection(weight, torch.zeros(DIM)), torch.eye(QUERIES, DIM)
    window = ((float(size), float(size)), (4 * size, 4 * size))

    def ours() -> Tensor:
        labels = pruned_semantic_inference(embeddings, features, projection, class_logits, *window)
        assert labels is not None, "predictions as these are pruned"
        return labels

    def theirs() -> Tensor:
        masks = usual_masks(embeddings[None], features, projection)
        return semantic_inference(masks, class_logits[None], *window).labels[0]

    return Work(ours, {USUAL_LABELS: theirs}, agreement=share_equal, least={USUAL_LABELS: 1.0})


def bound(masks: int, labels: int = 0) -> Bound:
    """Features, weight and embeddings read, so many masks or labels written; the folding, the convolution."""
    pixels, weight = SIZE * SIZE, 9 * DIM * DIM
    floats = DIM * pixels + weight + masks * DIM + (0 if labels else masks * pixels)
    return Bound(4 * floats + labels, 2.0 * masks * (weight + 9 * DIM * pixels))


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    return [
        Case("mask logits 512x512, semantic Q=100", USUAL, 2.0, partial(masks_setup, wanted=QUERIES),
             bound=bound(QUERIES)),
        Case("mask logits 512x512, panoptic 25 of 100", USUAL, 4.0, partial(masks_setup, wanted=25), bound=bound(25)),
        Case("mask logits and labels 512x512, semantic K=150, peaky", USUAL_LABELS, 2.5, labels_setup,
             bound=bound(LIVE, 16 * SIZE * SIZE)),
    ]  # fmt: skip
