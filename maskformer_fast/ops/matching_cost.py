"""Cost of giving a target to a query, for every decoder layer, image, query and target (paper section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig, check
from maskformer_fast.ops.mask_loss import at_least_float32, focal_parameters, inside
from maskformer_fast.structures import Predictions, Targets


def _nearest(out: int, size: int, device: torch.device) -> Tensor:
    """Pixel (of ``size``) that each of ``out`` samples of ``F.interpolate(mode="nearest")`` reads -> int64 [out]."""
    # float32, like torch's own: exact integer arithmetic would choose another pixel where the scale rounds down.
    index = torch.arange(out, device=device, dtype=torch.float32) * (size / out)
    return index.long().clamp(max=size - 1)


def matching_cost(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    loss: LossConfig,
) -> Tensor:
    """Weighted class, mask and dice cost of every pair -> [L, B, Q, T] float32 (float64 for float64 predictions).

    Class cost is minus the probability of the target's class. Mask cost is the focal loss (or binary
    cross-entropy) between the query's mask and the target, mean over pixels; dice cost is ``1 - (2 sum(p t) + 1) /
    (sum(p) + sum(t) + 1)``. Both are taken at the resolution of the mask logits, on targets sampled there with
    nearest neighbours. With ``loss.padding == "exclude"`` only the samples whose source pixel lies inside the image's
    valid size are in these sums and means. Columns beyond ``targets.counts`` are meaningless, but finite where
    the predictions are. Half precision is computed in float32, also under autocast; there is no gradient.

    Raises:
        ValueError: predictions and targets are not of one padded input size.
    """
    check(targets.input_size == predictions.input_size, "targets.input_size",
          f"that of the predictions {predictions.input_size}", targets.input_size)
    pixels = at_least_float32(predictions.pixel_embeddings)
    rows, columns = (
        _nearest(out, size, pixels.device)
        for out, size in zip(pixels.shape[2:], targets.input_size, strict=True)
    )
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        sampled = targets.masks[:, :, rows][..., columns // 8] >> (columns % 8).to(torch.uint8) & 1  # [B, T, h, w]
        counted = None
        if loss.padding == "exclude":
            counted = inside(targets.valid_sizes, rows, columns)  # [B, h, w]
            sampled = sampled * counted.unsqueeze(1)
            counted = counted.flatten(1).unsqueeze(2).to(pixels.dtype)  # [B, h*w, 1]
        truth = sampled.flatten(2).transpose(1, 2).to(pixels.dtype)  # [B, h*w, T]
        pixels = pixels.flatten(2)
        # One layer at a time: all masks of one layer exist at once, not those of every layer.
        return torch.stack([
            _layer_cost(logits, embeddings, pixels, targets.labels, truth, counted, loss)
            for logits, embeddings in zip(predictions.class_logits, predictions.mask_embeddings, strict=True)
        ])


def _layer_cost(
    class_logits: Tensor,  # [B, Q, K+1]
    mask_embeddings: Tensor,  # [B, Q, D]
    pixels: Tensor,  # [B, D, n]
    labels: Tensor,  # [B, T]
    truth: Tensor,  # [B, n, T]
    counted: Tensor | None,  # [B, n, 1], None counts every pixel
    loss: LossConfig,
) -> Tensor:  # [B, Q, T]
    mask_weight, other_weight, gamma = focal_parameters(loss)
    logits = torch.bmm(mask_embeddings.to(pixels.dtype), pixels)  # [B, Q, n]
    probability = logits.sigmoid()
    # Loss of each pixel where the target is off, and what being on adds to it: a matrix product does the rest.
    off = F.softplus(logits)
    if gamma == 0.0:
        rise = (mask_weight - other_weight) * off - mask_weight * logits
        off = other_weight * off
    else:
        rise = mask_weight * (1 - probability) ** gamma * (off - logits)
        off = other_weight * probability**gamma * off
        rise -= off

    def total(values: Tensor) -> Tensor:
        return values.sum(2, keepdim=True) if counted is None else torch.bmm(values, counted)

    samples = truth.shape[1] if counted is None else counted.sum(1, keepdim=True).clamp(min=1)
    mask = (total(off) + torch.bmm(rise, truth)) / samples
    overlap = torch.bmm(probability, truth)
    dice = 1 - (2 * overlap + 1) / (total(probability) + truth.sum(1, keepdim=True) + 1)
    index = labels.unsqueeze(1).expand(-1, class_logits.shape[1], -1)
    chosen = at_least_float32(class_logits).softmax(-1).gather(2, index)
    return loss.mask_weight * mask + loss.dice_weight * dice - loss.class_weight * chosen
