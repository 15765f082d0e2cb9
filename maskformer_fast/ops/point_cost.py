"""Matching cost at random points of each image (Mask2Former, section 3.3.2; official behaviour), in plain PyTorch.

The pixel embeddings are sampled at the points, so no mask is made: a layer's logits are one matrix product with as many
columns as points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
from maskformer_fast.ops.mask_loss import at_least_float32
from maskformer_fast.ops.matching_cost import arguments_of_predictions, layer_cost
from maskformer_fast.ops.points import sample_maps, sample_packed_masks, within_valid
from maskformer_fast.structures import Predictions, Targets


@torch.no_grad()
def matching_cost_at_points(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    points: Tensor,  # [B, P, 2], or [L, B, P, 2] for other points in each layer
    loss: LossConfig,
) -> Tensor:
    """Weighted class, mask and dice cost of every pair -> [L, B, Q, T] float32 (float64 for float64 predictions).

    The terms are those of `matching_cost`, with sums and means over the points: predictions and targets are sampled
    there bilinearly, with zeros outside. With ``loss.padding == "exclude"`` the points are moved into the image.
    Columns beyond ``targets.counts`` are 0. Half precision is computed in float32.

    Raises:
        ValueError: a shape, type or device that does not fit.
    """
    arguments = arguments_of_predictions(predictions, targets, loss)
    layers, batch = arguments.class_logits.shape[:2]
    fits = points.shape[:-2] in ((batch,), (layers, batch)) and points.shape[-1] == 2 and points.shape[-2] > 0
    check(fits, "points", f"shape [{batch}, P, 2] or [{layers}, {batch}, P, 2]", tuple(points.shape))
    dtype = at_least_float32(arguments.class_logits).dtype
    slots = targets.labels.shape[1]
    with torch.autocast(points.device.type, enabled=False):
        points = within_valid(points.to(dtype), targets, loss)
        pixels = predictions.pixel_embeddings.to(dtype)
        sampled = None
        costs = []
        for layer in range(layers):  # one at a time: only one layer's logits exist at once
            if sampled is None or points.dim() == 4:
                chosen = points[layer] if points.dim() == 4 else points
                sampled = sample_maps(pixels, chosen)  # [B, D, P]
                repeated = chosen.repeat_interleave(slots, 0)
                truth = sample_packed_masks(targets.masks.flatten(0, 1), targets.input_size[1], repeated)
                truth = truth.unflatten(0, (batch, slots)).mT  # [B, P, T]
            logits = torch.bmm(arguments.embeddings[layer].to(dtype), sampled)
            costs.append(layer_cost(arguments, layer, logits, truth, None))
        present = torch.arange(slots, device=points.device) < targets.counts.unsqueeze(1)
        return torch.stack(costs).where(present.unsqueeze(1), 0)
