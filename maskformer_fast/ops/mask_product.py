"""Mask logits: mask embeddings times pixel embeddings, with the pixel decoder's last convolution in the cheaper order.

The pixel decoder ends in a linear 3x3 convolution ``P = W * x + b`` to D channels, and the logits of a query with
embedding e are ``e . P = (e W) * x + (e . b)``: a convolution of the same input with one output channel a query. For
fewer than about D queries it is cheaper to fold the embeddings into the kernel: D = 256 output channels and a matrix
product become 100 channels for semantic inference, about 25 for panoptic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.ops.convolution import conv3x3_winograd, pack_winograd_weights, suits_winograd
from maskformer_fast.structures import Predictions, Projection


def layer_mask_logits(predictions: Predictions, layer: int = -1) -> Tensor:
    """Mask logits of one decoder layer, by default the final one -> [B, Q, h, w]."""
    return mask_product(predictions.mask_embeddings[layer], predictions.pixel_features, predictions.projection)


def mask_product(
    embeddings: Tensor,  # [B, N, D]
    pixels: Tensor,  # [B, D, h, w], or [B, C, h, w] with a projection
    projection: Projection | None,
    queries_innermost: bool = False,
) -> Tensor:
    """Multiply mask embeddings by pixel embeddings, which may be given by their projection -> [B, N, h, w].

    With `queries_innermost` the logits of a pixel are adjacent in memory where the product can write them so.

    With a projection, the order with fewer multiplications is used; the results are equal but for rounding. Factors of
    different dtypes, as autocast leaves them, are multiplied in the wider one.
    """
    dtype = torch.promote_types(embeddings.dtype, pixels.dtype)
    embeddings, pixels = embeddings.to(dtype), pixels.to(dtype)
    if embeddings.shape[0] * embeddings.shape[1] == 0:
        return pixels.new_empty((*embeddings.shape[:2], *pixels.shape[2:]))
    if projection is None or not _folding_pays(embeddings, pixels, projection):
        embedded = pixels if projection is None else projection.embed(pixels)
        if queries_innermost:
            product = torch.bmm(embedded.flatten(2).mT, embeddings.mT)  # [B, h*w, N]
            return product.mT.unflatten(2, embedded.shape[2:])
        return _multiply(embeddings, embedded.flatten(2)).unflatten(2, embedded.shape[2:])
    if queries_innermost:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    # One convolution an image: a grouped one for the batch takes twice the time in oneDNN.
    masks = [
        _fold_and_convolve(image, rows, projection)
        for image, rows in zip(pixels.split(1), embeddings.unbind(), strict=True)
    ]
    return masks[0] if len(masks) == 1 else torch.cat(masks)


def _multiply(
    rows: Tensor,  # [B, N, C]
    columns: Tensor,  # [B, C, M]
) -> Tensor:
    """`torch.bmm`, which in bfloat16 on a CPU copies transposed columns slowly where the batch is one image."""
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and rows.shape[0] == 1:
        return F.linear(rows[0], columns[0].mT).unsqueeze(0)
    return torch.bmm(rows, columns)


def _folding_pays(embeddings: Tensor, pixels: Tensor, projection: Projection) -> bool:
    """Tell whether folding each image's embeddings takes fewer multiplications than projecting every pixel."""
    queries, dim = embeddings.shape[1:]
    taps, size = projection.weight[0].numel(), pixels.shape[2] * pixels.shape[3]
    return queries * taps * (dim + size) < dim * size * (taps + queries)


def _fold_and_convolve(image: Tensor, embeddings: Tensor, projection: Projection) -> Tensor:
    """Mask logits of one image: [1, C, h, w], [N, D] -> [1, N, h, w]."""
    folded = projection.fold(embeddings)
    if folded.weight.shape[-1] == 1 and image.device.type == "cpu" and not torch.compiler.is_compiling():
        # PyTorch's convolution takes twice the time of a product where the weights are new.
        rows, pixels = folded.weight.flatten(1), image[0].flatten(1)
        if image.is_contiguous():
            masks = torch.addmm(folded.bias.unsqueeze(1), rows, pixels)
        else:  # channels are adjacent, and so are the queries of the result
            masks = F.linear(pixels.mT, rows, folded.bias).mT
        return masks.unflatten(1, image.shape[2:]).unsqueeze(0)
    if suits_winograd(image, folded.weight, folded.bias):
        packed = pack_winograd_weights(folded.weight)
        return conv3x3_winograd(image, packed, folded.bias.float(), len(embeddings))
    return F.conv2d(image, folded.weight, folded.bias, padding=folded.weight.shape[-1] // 2)
