"""Mask logits from the pixel decoder's last features: embeddings folded into its last convolution, against the usual
order of the products, which convolves to all embedding channels and multiplies by all queries.

512x512 images, features [1, 256, 128, 128]. The usual order takes 19.3 GFLOP for the convolution and 0.8 for the
product, 100 folded queries 7.7, 25 queries 1.9: at equal efficiency, ratios of 2.6 and 10.4 are the limit.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Operation
from maskformer_fast.projection import Projection, mask_product

DIM, SIZE, QUERIES = 256, 128, 100


def setup(wanted: int) -> tuple[Operation, Operation]:
    """Masks of the ``wanted`` first queries; the peer's of all of them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, DIM, SIZE, SIZE, generator=generator).relu_()
    weight = torch.randn(DIM, DIM, 3, 3, generator=generator) / (9 * DIM) ** 0.5
    bias = torch.randn(DIM, generator=generator)
    embeddings = torch.randn(1, QUERIES, DIM, generator=generator)

    def ours() -> object:
        return mask_product(embeddings[:, :wanted], features, Projection(weight, bias))

    def theirs() -> object:
        return torch.einsum("bqd,bdhw->bqhw", embeddings, F.conv2d(features, weight, bias, padding=1))

    return ours, theirs


def cases() -> list[Case]:
    """Rows of the table."""
    peer = "convolution to 256 channels, then the product"
    return [
        Case(f"mask logits 512x512, {name}", peer, goal, lambda wanted=wanted: setup(wanted))  # type: ignore[misc]
        for name, wanted, goal in (("semantic Q=100", 100, 2.0), ("panoptic 25 of 100", 25, 4.0))
    ]
