"""Semantic labels from masks that are not computed yet: all masks, or on the CPU only those that can matter; exact.

`semantic_labels` chooses. `pruned_semantic_inference` leaves queries out: class probabilities P are known before any
mask. Queries with low class probabilities are dropped, and at most ``R = max_c sum_q P[q, c]`` over the dropped q is
missing from any class's score, as a mask is at most 1. So where the winner among the kept queries leads by more than R,
it is also the winner among all. The few other pixels are computed again with all queries, whose logits are computed at
the taps of these pixels only: a gather and a matrix product with the folded kernel.

With the peaky predictions of a trained network 20 of 100 masks and 3 % of the taps are computed. Where pruning would
save little, `pruned_semantic_inference` returns None and all masks are computed. Where too few pixels are proven, which
a sample of the map's cells shows at little cost, the other masks are added to those that are there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskformer_fast.ops.mask_product import mask_product
from maskformer_fast.ops.resample import CPU_TILE_BYTES, VALUE_LIMIT
from maskformer_fast.ops.semantic import semantic_inference
from maskformer_fast.structures import Projection

MAX_MISSING = 0.02
"""Largest R: a larger one leaves too many pixels unproven."""
MAX_KEPT = 0.5
"""Largest share of the queries that is kept: the masks of more queries cost about as much as all masks."""
MAX_PIXELS = 1.0
"""Most output pixels per value of the dropped masks: with more, the margins take more memory than these masks."""
MAX_TAPS = 0.1
"""Largest share of the taps that is computed again: at about 0.25 gathering takes as long as a convolution of all."""
SAMPLE = 4
"""Every so many rows and columns of the map are looked at first."""
TAPS_OF_CELL = 3
"""Taps of pixels that are not proven, over cells that are not: such pixels are at edges, with taps at both sides."""
ROUNDING = 1e-4
"""Bound of a margin's error in float32."""


@torch.no_grad()
def semantic_labels(
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    mask_embeddings: Tensor,  # [B, Q, D] float32, on CUDA also float16 or bfloat16
    pixel_features: Tensor,  # [B, D, h, w] of the same dtype, or [B, C, h, w] with a projection
    projection: Projection | None,
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> Tensor:
    """Labels of `semantic_inference` for mask logits given by their factors (see `mask_product`) -> [B, H, W].

    On the CPU each image's masks are pruned where that pays (`pruned_semantic_inference`). Other devices compute all
    masks, because pruning reads counts back to the host; there the logits of a pixel lie together in memory, as the
    kernel reads them. ``extent``, ``output_size``, the labels' dtype and the errors
    are those of `semantic_inference`.
    """
    with torch.autocast(pixel_features.device.type, enabled=False):
        on_cpu = pixel_features.device.type == "cpu"
        if projection is None or not on_cpu:
            masks = mask_product(mask_embeddings, pixel_features, projection, queries_innermost=not on_cpu)
            return semantic_inference(masks, class_logits, extent, output_size).labels
        images = []
        for embeddings, features, classes in zip(
            mask_embeddings.split(1), pixel_features.split(1), class_logits.split(1), strict=True
        ):
            labels = pruned_semantic_inference(
                embeddings[0], features, projection, classes[0], extent, output_size
            )
            if labels is None:
                masks = mask_product(embeddings, features, projection)
                labels = semantic_inference(masks, classes, extent, output_size).labels[0]
            images.append(labels)
        return torch.stack(images)


@torch.no_grad()
def pruned_semantic_inference(
    embeddings: Tensor,  # [Q, D] float32
    features: Tensor,  # [1, C, h, w] float32
    projection: Projection,
    class_logits: Tensor,  # [Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> Tensor | None:
    """Labels of one image as in `semantic_inference` -> [H, W], or None where pruning does not pay, before any mask.

    Reads counts back from the device, so it is meant for the CPU. Labels equal those of all queries wherever the
    winner's score leads by more than rounding. ``extent``, ``output_size``, the labels' dtype and the errors are those
    of `semantic_inference`.
    """
    probabilities = class_logits.to(torch.float32).softmax(-1)[:, :-1]
    order = probabilities.max(1).values.argsort()
    missing = probabilities[order].cumsum(0).max(1).values  # nondecreasing; with NaN a query is never dropped
    dropped = int((missing <= MAX_MISSING).sum())
    if not 0 < len(order) - dropped <= MAX_KEPT * len(order):
        return None
    if output_size[0] * output_size[1] > MAX_PIXELS * dropped * features[0, 0].numel():
        return None
    kept, order = order[dropped:], order.roll(-dropped)  # kept first
    masks = mask_product(embeddings[kept][None], features, projection)
    bound = float(missing[dropped - 1]) + ROUNDING
    labels = None
    if TAPS_OF_CELL * _share_unproven(masks, class_logits[kept], extent, bound) <= MAX_TAPS:
        labels = _proven_labels(
            masks, embeddings, features, projection, class_logits, probabilities, order, extent, output_size, bound
        )
    if labels is None:
        rest = mask_product(embeddings[order[len(kept) :]][None], features, projection)
        masks = torch.cat([masks, rest], 1)
        labels = semantic_inference(masks, class_logits[order][None], extent, output_size).labels[0]
    return labels


def _share_unproven(
    masks: Tensor,  # [1, Q, h, w], of the kept queries
    class_logits: Tensor,  # [Q, K+1]
    extent: tuple[float, float],
    bound: float,
) -> float:
    """Share of the cells of a sample of the map whose winner leads by no more than ``bound``."""
    height, width = (math.ceil(side) for side in extent)
    sample = masks[:, :, :height:SAMPLE, :width:SAMPLE].contiguous()
    size = (sample.shape[2], sample.shape[3])
    margins = semantic_inference(sample, class_logits[None], size, size, with_margins=True).margins
    assert margins is not None
    return 1 - (margins > bound).float().mean().item()  # NaN is not proven


def _proven_labels(
    masks: Tensor,  # [1, kept, h, w]
    embeddings: Tensor,  # [Q, D]
    features: Tensor,  # [1, C, h, w]
    projection: Projection,
    class_logits: Tensor,  # [Q, K+1]
    probabilities: Tensor,  # [Q, K]
    order: Tensor,  # [Q], the kept queries first
    extent: tuple[float, float],
    output_size: tuple[int, int],
    bound: float,
) -> Tensor | None:
    """Labels by the kept queries where these lead by more than ``bound``, else by all; None: too few are proven."""
    kept, dropped = order[: masks.shape[1]], order[masks.shape[1] :]
    labels, _, margins = semantic_inference(masks, class_logits[kept][None], extent, output_size, with_margins=True)
    assert margins is not None
    unproven = (~(margins.flatten() > bound)).nonzero().squeeze(1)  # also where NaN
    if len(unproven) > MAX_TAPS * margins.numel():
        return None
    taps, weights = _bilinear_taps(unproven, masks.shape[2:], extent, output_size)
    cells, places = taps.unique(return_inverse=True)
    if len(cells) > MAX_TAPS * masks[0, 0].numel():
        return None

    labels = labels.flatten()
    rest = _logits_at(cells, features[0], projection.fold(embeddings[dropped]))
    logits = torch.cat([masks[0].flatten(1).T[cells], rest], 1).clamp_(-VALUE_LIMIT, VALUE_LIMIT)  # [cells, Q]
    chances = probabilities[order]
    tile = max(1, CPU_TILE_BYTES // (4 * (4 * len(order) + chances.shape[1])))  # pixels
    for pixels, corners, weight in zip(unproven.split(tile), places.split(tile), weights.split(tile), strict=True):
        values = torch.bmm(weight[:, None], logits[corners]).squeeze(1)
        labels[pixels] = (values.sigmoid() @ chances).argmax(1).to(labels.dtype)
    return labels.view(output_size)


def _bilinear_taps(
    pixels: Tensor,  # [n] int64, of the flat output
    size: tuple[int, ...],  # h, w
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Taps of output pixels as in `resample` -> cells of the flat map [n, 4] int64, weights [n, 4] float32."""
    ends, weights = [], []
    for index, source, part, target in zip(
        (pixels // output_size[1], pixels % output_size[1]), size, extent, output_size, strict=True
    ):
        place = ((index.to(torch.float64) + 0.5) * (part / target) - 0.5).clamp(0, source - 1)
        low = place.floor().long()
        ends.append(torch.stack([low, (low + 1).clamp(max=source - 1)], 1))
        weights.append(torch.stack([1 - (place - low), place - low], 1))
    cells = ends[0][:, :, None] * size[1] + ends[1][:, None]
    return cells.flatten(1), (weights[0][:, :, None] * weights[1][:, None]).flatten(1).to(torch.float32)


def _logits_at(
    cells: Tensor,  # [n] int64, of the flat map
    features: Tensor,  # [C, h, w]
    folded: Projection,  # weight [N, C, k, k]
) -> Tensor:
    """Output of the convolution at the given cells -> [n, N]."""
    height, width = features.shape[1:]
    size = folded.weight.shape[-1]
    around = torch.arange(size, device=cells.device) - size // 2
    rows, columns = (cells // width)[:, None] + around, (cells % width)[:, None] + around  # [n, k]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    wanted = torch.where(inside, rows[:, :, None] * width + columns[:, None], height * width)  # beyond all: zeros
    needed, places = wanted.flatten(1).unique(return_inverse=True)
    values = features.flatten(1).index_select(1, needed.clamp(max=height * width - 1)).T.contiguous()
    values[needed == height * width] = 0.0
    weight = folded.weight.flatten(2).permute(2, 1, 0).contiguous()  # [k*k, C, N]
    result = folded.bias.expand(len(cells), -1).clone()
    for place, tap in zip(places.unbind(1), weight.unbind(), strict=True):
        result.addmm_(values[place], tap)
    return result
