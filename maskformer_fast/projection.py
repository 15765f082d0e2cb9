"""Mask logits from embeddings and the input of the convolution that makes pixel embeddings: linear maps in any order.

The pixel decoder ends in a linear 3x3 convolution ``P = W * x + b`` to D channels, and the logits of a query with
embedding e are ``e . P = (e W) * x + (e . b)``: a convolution of the same input with one output channel a query. Where
fewer than about D queries are wanted, folding the embeddings into the kernel is the cheaper order: D = 256 output
channels and a matrix product become 100 channels for semantic inference, about 25 for panoptic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.winograd import conv3x3_winograd, pack_winograd_weights, suits_winograd


class Projection(NamedTuple):
    """A convolution, linear and of unchanged size (odd k, zeros around), not yet applied to its input."""

    weight: Tensor  # [D, C, k, k]
    bias: Tensor  # [D]

    def embed(
        self,
        features: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Apply it, in the precision of the features -> [B, D, h, w]."""
        return _convolve(features, self.weight.to(features.dtype), self.bias.to(features.dtype))

    def fold(
        self,
        embeddings: Tensor,  # [N, D]
    ) -> Projection:
        """The convolution whose output is the embeddings times this one's output: weight [N, C, k, k], bias [N]."""
        weight, bias = self.weight.to(embeddings.dtype), self.bias.to(embeddings.dtype)
        return Projection((embeddings @ weight.flatten(1)).unflatten(1, weight.shape[1:]), embeddings @ bias)


def mask_product(
    embeddings: Tensor,  # [B, N, D]
    pixels: Tensor,  # [B, D, h, w], or [B, C, h, w] with a projection
    projection: Projection | None,
) -> Tensor:
    """Mask logits: embeddings times pixel embeddings, the latter given as such or by their projection -> [B, N, h, w].

    With a projection, the order with fewer multiplications is taken; the results are equal but for rounding. Factors of
    different dtype, as autocast leaves them, are multiplied in the wider one.
    """
    dtype = torch.promote_types(embeddings.dtype, pixels.dtype)
    embeddings, pixels = embeddings.to(dtype), pixels.to(dtype)
    if embeddings.shape[0] * embeddings.shape[1] == 0:
        return pixels.new_empty((*embeddings.shape[:2], *pixels.shape[2:]))
    if projection is None or not _folding_pays(embeddings, pixels, projection):
        embedded = pixels if projection is None else projection.embed(pixels)
        return torch.bmm(embeddings, embedded.flatten(2)).unflatten(2, embedded.shape[2:])
    # One convolution an image: a grouped one for the batch takes twice the time in oneDNN.
    masks = [
        _fold_and_convolve(image, rows, projection)
        for image, rows in zip(pixels.split(1), embeddings.unbind(), strict=True)
    ]
    return masks[0] if len(masks) == 1 else torch.cat(masks)


def _folding_pays(embeddings: Tensor, pixels: Tensor, projection: Projection) -> bool:
    """Fewer multiplications by folding each image's embeddings than by projecting every pixel."""
    queries, dim = embeddings.shape[1:]
    taps, size = projection.weight[0].numel(), pixels.shape[2] * pixels.shape[3]
    return queries * taps * (dim + size) < dim * size * (taps + queries)


def _fold_and_convolve(image: Tensor, embeddings: Tensor, projection: Projection) -> Tensor:
    """Mask logits of one image: [1, C, h, w], [N, D] -> [1, N, h, w]."""
    folded = projection.fold(embeddings)
    if suits_winograd(image, folded.weight, folded.bias):
        packed = pack_winograd_weights(folded.weight)
        return conv3x3_winograd(image, packed, folded.bias.float(), len(embeddings))
    return _convolve(image, folded.weight, folded.bias)


def _convolve(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(pixels, weight, bias, padding=weight.shape[-1] // 2)
