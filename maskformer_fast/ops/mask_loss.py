"""Mask losses of the matched pairs at the resolution of the padded input (paper section 3.3, equation 2; appendix A).

A pair's low-resolution logits are upsampled, compared with its packed target and reduced to two numbers a few
pairs at a time; the gradient of both with respect to the low-resolution logits is found in the same pass. So no
tensor of full resolution outlives its chunk, in the forward or in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from maskformer_fast.config import LossConfig, check
from maskformer_fast.structures import Predictions, Targets, unpack_masks

# Pixels worked on at a time: temporaries stay within the cache on a CPU, within a few hundred MB each on a GPU.
CPU_CHUNK = 1 << 17
GPU_CHUNK = 1 << 26


def focal_parameters(loss: LossConfig) -> tuple[float, float, float]:
    """Weight of mask pixels, weight of the others, exponent; binary cross-entropy is focal loss with 1, 1, 0."""
    if loss.mask_loss == "bce":
        return 1.0, 1.0, 0.0
    return loss.focal_alpha, 1.0 - loss.focal_alpha, loss.focal_gamma


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inside(
    valid_sizes: Tensor,  # [..., 2] int64: height, width
    rows: Tensor,  # [h] int64, row of the padded input
    columns: Tensor,  # [w] int64
) -> Tensor:
    """Which of these pixels of the padded input belong to the image and not to its padding -> bool [..., h, w]."""
    height, width = valid_sizes[..., 0, None], valid_sizes[..., 1, None]
    return (rows < height).unsqueeze(-1) & (columns < width).unsqueeze(-2)


def _upsampling(
    size: int,
    out: int,
    like: Tensor,
) -> Tensor:
    """Linear interpolation of ``size`` samples to ``out`` (``align_corners=False``) as a matrix -> [size, out]."""
    unit = torch.eye(size, device=like.device, dtype=like.dtype)
    return F.interpolate(unit[None], out, mode="linear", align_corners=False)[0]


def _pair_losses(
    logits: Tensor,  # [p, h, w] float
    target: Tensor,  # [p, H, W] bool
    counted: Tensor | None,  # [p, H, W] bool, None counts every pixel
    focal: tuple[float, float, float],
    upsampling: tuple[Tensor, Tensor] | None,  # [h, H] and [w, W], None for no gradients
) -> tuple[Tensor, ...]:
    """Mask loss [p], dice loss [p] and, with ``upsampling``, the gradient of each by ``logits``, [p, h, w] each."""
    mask_weight, other_weight, gamma = focal
    x = F.interpolate(logits[None], target.shape[1:], mode="bilinear", align_corners=False)[0]
    pixels = x.new_full((len(x),), target[0].numel())
    if counted is not None:
        target = target & counted
        pixels = counted.sum((1, 2)).clamp(min=1).to(x.dtype)
    truth = target.to(x.dtype)
    # One formula for both kinds of pixel: the probability given to the wrong side is sigmoid(z), the cross-entropy
    # softplus(z). At z = -inf both are zero, and so is every gradient: that takes a pixel out of the loss.
    sign = torch.rsub(truth, 1, alpha=2)
    z = x.mul_(sign)
    if counted is not None:
        z = z.masked_fill_(~counted, -torch.inf)
    wrong = z.sigmoid()
    weight = torch.rsub(truth, other_weight, alpha=other_weight - mask_weight)
    if gamma != 0.0:
        weight = weight.mul_(wrong**gamma)
    entropy = F.softplus(z).mul_(weight)
    mask = entropy.sum((1, 2)) / pixels

    area = truth.sum((1, 2))
    missed = (wrong * truth).sum((1, 2))
    overlap = 2 * (area - missed) + 1
    union = 2 * (area - missed) + wrong.sum((1, 2)) + 1
    dice = 1 - overlap / union
    if upsampling is None:
        return mask, dice

    def downsample(gradient: Tensor) -> Tensor:
        # The transpose of the interpolation as two matrix products: faster than torch's kernel, and deterministic.
        return upsampling[0] @ (gradient @ upsampling[1].T)

    right = 1 - wrong
    slope = weight.mul_(wrong)
    if gamma != 0.0:
        slope = slope.addcmul_(entropy, right, value=gamma)
    dice_slope = torch.addcmul((overlap / union**2)[:, None, None], truth, (-2 / union)[:, None, None])
    return (
        mask,
        dice,
        downsample(slope.mul_(sign)) / pixels[:, None, None],
        downsample(dice_slope.mul_(wrong).mul_(right)),
    )


class MaskLossFunction(torch.autograd.Function):
    """Losses of P pairs of logits and packed targets; gradient for the logits, once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [P, h, w] float32/64
        masks: Tensor,  # [N, H, ceil(W/8)] uint8, packed
        rows: Tensor,  # [P] int64, target of each pair
        valid_sizes: Tensor | None,  # [N, 2] int64, None counts every pixel
        width: int,
        focal: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor]:
        height = masks.shape[1]
        y, x = (torch.arange(n, device=logits.device) for n in (height, width))
        mask, dice = logits.new_zeros(len(rows)), logits.new_zeros(len(rows))
        gradients: list[Tensor] = []
        upsampling = None
        if ctx.needs_input_grad[0]:
            gradients = [torch.empty_like(logits), torch.empty_like(logits)]
            upsampling = (_upsampling(logits.shape[1], height, logits), _upsampling(logits.shape[2], width, logits))
        step = max(1, (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // (height * width))
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            row = rows[chunk]
            counted = None if valid_sizes is None else inside(valid_sizes[row], y, x)
            target = unpack_masks(masks[row], width)
            mask[chunk], dice[chunk], *parts = _pair_losses(logits[chunk], target, counted, focal, upsampling)
            for gradient, part in zip(gradients, parts, strict=False):
                gradient[chunk] = part
        ctx.save_for_backward(*gradients)
        return mask, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        mask_gradient, dice_gradient = ctx.saved_tensors
        mask, dice = (g[:, None, None] for g in upstream)
        return mask * mask_gradient + dice * dice_gradient, None, None, None, None, None


def mask_loss(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    query: Tensor,  # [L, B, T] int64, the query of each target, -1 for none
    loss: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Focal (or binary cross-entropy) and dice losses, summed over the matched pairs -> [L], [L] float32 or float64.

    Logits are upsampled bilinearly (``align_corners=False``) to ``predictions.input_size``. A pair's mask loss is the
    mean over pixels; its dice loss is ``1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)``. With ``loss.padding ==
    "exclude"`` only the pixels (y, x) with ``y < valid height`` and ``x < valid width`` are in these sums and means.
    Nothing is weighted or divided by the number of masks here. Embeddings of unmatched queries get zero gradients.
    Half precision is computed in float32, also under autocast. Source: paper section 3.3, official behaviour.

    Raises:
        ValueError: predictions and targets are not of one padded input size.
    """
    check(targets.input_size == predictions.input_size, "targets.input_size",
          f"that of the predictions {predictions.input_size}", targets.input_size)
    layers, batch, slots = query.shape
    with torch.autocast(query.device.type, enabled=False):
        embeddings, pixels = (at_least_float32(e) for e in (predictions.mask_embeddings, predictions.pixel_embeddings))
        index = query.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, embeddings.shape[-1])
        matched = embeddings.gather(2, index).transpose(0, 1).flatten(1, 2)  # [B, L*T, D]
        logits = torch.bmm(matched, pixels.flatten(2)).unflatten(2, pixels.shape[2:])  # [B, L*T, h, w]
        logits = logits.unflatten(1, (layers, slots)).transpose(0, 1).flatten(0, 2)  # [L*B*T, h, w]

        assigned = query.flatten() >= 0
        layer = torch.arange(layers, device=query.device).repeat_interleave(batch * slots)
        rows = torch.arange(batch * slots, device=query.device).repeat(layers)
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            # Leaving pairs out needs their number on the host: free here, a synchronisation on a GPU.
            kept = assigned.nonzero().squeeze(1)
            logits, layer, rows, assigned = logits[kept], layer[kept], rows[kept], assigned[kept]
        valid_sizes = targets.valid_sizes.repeat_interleave(slots, 0) if loss.padding == "exclude" else None
        pairs = MaskLossFunction.apply(
            logits, targets.masks.flatten(0, 1), rows, valid_sizes, targets.input_size[1], focal_parameters(loss)
        )
        mask, dice = (
            logits.new_zeros(layers).index_add(0, layer, torch.where(assigned, pair, 0.0)) for pair in pairs
        )
    return mask, dice
