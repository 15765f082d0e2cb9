"""Mask losses of the matched pairs at points (Mask2Former, section 3.3.2; PointRend, Kirillov et al., CVPR 2020).

Most of a pair's points are the candidates whose logit is nearest to 0, the others are random. In plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
from maskformer_fast.ops.mask_loss import at_least_float32, focal_parameters
from maskformer_fast.ops.points import PointDraws, sample_maps, sample_packed_masks, within_valid
from maskformer_fast.structures import Predictions, Targets


def mask_loss_at_points(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    query: Tensor,  # [L, B, T] int64, the query of each target, -1 for none
    draws: PointDraws,
    loss: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Mask and dice losses at points, summed over the matched pairs -> [L], [L] float32 or float64.

    The losses are those of `mask_loss`, with sums and means over ``loss.points`` points: ``loss.importance`` of them
    are the candidates of least |logit|, which change with the prediction, the others ``draws.random``. Logits and
    targets are sampled bilinearly, with zeros outside. With ``loss.padding == "exclude"`` all points are moved into the
    image. Gradients go to the embeddings; those of unmatched queries are zero. On CUDA the gradient of the sampling
    adds in no fixed order (``torch.use_deterministic_algorithms`` refuses it).

    Raises:
        ValueError: a shape that does not fit, or predictions and targets not of one padded input size.
    """
    check(targets.input_size == predictions.input_size, "targets.input_size",
          f"that of the predictions {predictions.input_size}", targets.input_size)
    layers, batch, slots = query.shape
    with torch.autocast(query.device.type, enabled=False):
        embeddings, pixels = (at_least_float32(e) for e in (predictions.mask_embeddings, predictions.pixel_embeddings))
        index = query.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, embeddings.shape[-1])
        matched = embeddings.gather(2, index).transpose(0, 1).flatten(1, 2)  # [B, L*T, D]
        logits = torch.bmm(matched, pixels.flatten(2)).unflatten(2, pixels.shape[2:])  # [B, L*T, h, w]
        points = _chosen_points(logits.detach(), targets, draws.to(logits.dtype), loss, layers)  # [B*L*T, P, 2]
        x = sample_maps(logits.flatten(0, 1).unsqueeze(1), points).squeeze(1)  # [B*L*T, P]
        target = torch.arange(batch * slots, device=query.device).view(batch, 1, slots).expand(-1, layers, -1)
        with torch.no_grad():
            truth = torch.cat([
                sample_packed_masks(targets.masks.flatten(0, 1)[rows], targets.input_size[1], chunk)
                for rows, chunk in zip(target.flatten().split(_CHUNK), points.split(_CHUNK), strict=True)
            ])  # fmt: skip
        on_weight, off_weight, gamma = focal_parameters(loss)
        probability = x.sigmoid()
        on, off = on_weight * F.softplus(-x), off_weight * F.softplus(x)
        if gamma != 0.0:
            on, off = on * (1 - probability) ** gamma, off * probability**gamma
        mask = (truth * on + (1 - truth) * off).mean(1)
        dice = 1 - (2 * (probability * truth).sum(1) + 1) / (probability.sum(1) + truth.sum(1) + 1)
        is_pair = (query.transpose(0, 1) >= 0).flatten()
        losses = torch.stack([mask, dice]).where(is_pair, 0).view(2, batch, layers, slots).sum((1, 3))
    return losses[0], losses[1]


_CHUNK = 64
"""Pairs whose packed targets are sampled together, which bounds the copies of them."""


@torch.no_grad()
def _chosen_points(
    logits: Tensor,  # [B, L*T, h, w]
    targets: Targets,
    draws: PointDraws,
    loss: LossConfig,
    layers: int,
) -> Tensor:
    """Points of each pair, in the order of the logits -> [B*L*T, P, 2]."""
    batch, pairs = logits.shape[:2]
    candidates, random = (within_valid(points, targets, loss) for points in draws[1:])
    is_shared = candidates.dim() == 3
    if not is_shared:
        expected = (layers, batch, pairs // max(layers, 1))
        check(candidates.shape[:3] == expected, "draws.candidates", f"shape {[*expected, 'M', 2]}",
              tuple(candidates.shape))
        candidates, random = (points.transpose(0, 1).flatten(0, 2) for points in (candidates, random))
    uncertain = loss.points - random.shape[-2]
    if is_shared:
        nearness = sample_maps(logits, candidates).abs()  # [B, L*T, M]
        nearest = nearness.topk(uncertain, dim=2, largest=False).indices.flatten(1)
        chosen = candidates.gather(1, nearest.unsqueeze(2).expand(-1, -1, 2)).unflatten(1, (pairs, uncertain))
        chosen = torch.cat([chosen, random.unsqueeze(1).expand(-1, pairs, -1, -1)], dim=2)
        return chosen.flatten(0, 1)
    nearness = sample_maps(logits.flatten(0, 1).unsqueeze(1), candidates).squeeze(1).abs()  # [B*L*T, M]
    nearest = nearness.topk(uncertain, dim=1, largest=False).indices
    return torch.cat([candidates.gather(1, nearest.unsqueeze(2).expand(-1, -1, 2)), random], dim=1)
