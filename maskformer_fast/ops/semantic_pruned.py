"""Semantic inference that computes the masks of those queries alone whose classes can matter; exact.

Class probabilities P are known before any mask. Queries of little class mass are dropped, and at most
``R = max_c sum_q P[q, c]`` over the dropped q is missing from any class's score, as a mask is at most 1. So where the
winner among the kept queries leads by more than R it is the winner of all. The few other pixels are done again with all
queries, whose logits are computed at the taps of these pixels: a gather and a matrix product with the folded kernel.

With the peaky predictions of a trained network this leaves 20 of 100 masks and 3 % of the taps. Where it would save
little, or too little is proven, the answer is None: the caller computes all masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskformer_fast.ops.mask_product import mask_product
from maskformer_fast.ops.resample import CPU_TILE_BYTES, VALUE_LIMIT
from maskformer_fast.ops.semantic import semantic_inference
from maskformer_fast.structures import Projection

MAX_MISSING = 0.02
"""R may be as large: more of it leaves too many pixels unproven."""
MAX_KEPT = 0.5
"""Share of the queries that may be kept: masks of more cost about as much as all."""
MAX_PIXELS = 1.0
"""Output pixels for each value of the masks left out: with more, the margins take more memory than these masks."""
MAX_TAPS = 0.1
"""Share of the taps that may be done again: gathering them takes as long as a convolution of all at about 0.25."""
ROUNDING = 1e-4
"""More than the error of a margin in float32."""


@torch.no_grad()
def pruned_semantic_inference(
    embeddings: Tensor,  # [Q, D] float32
    features: Tensor,  # [1, C, h, w] float32
    projection: Projection,
    class_logits: Tensor,  # [Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> Tensor | None:
    """Labels of one image, as `semantic_inference` defines them, or None where pruning does not pay -> [H, W].

    Reads from the device whether it pays, so it is meant for the CPU. Labels are those of all queries wherever the
    winner's score leads by more than rounding. ``extent``, ``output_size`` and the labels' dtype are those of
    `semantic_inference`, as are the errors.
    """
    probabilities = class_logits.to(torch.float32).softmax(-1)[:, :-1]
    order = probabilities.max(1).values.argsort()
    missing = probabilities[order].cumsum(0).max(1).values  # nondecreasing; NaN is never small enough to drop
    dropped = int((missing <= MAX_MISSING).sum())
    if not 0 < len(order) - dropped <= MAX_KEPT * len(order):
        return None
    if output_size[0] * output_size[1] > MAX_PIXELS * dropped * features[0, 0].numel():
        return None
    kept, order = order[dropped:], order.roll(-dropped)  # kept first
    masks = mask_product(embeddings[kept][None], features, projection)
    found = semantic_inference(masks, class_logits[kept][None], extent, output_size, with_margins=True)
    assert found.margins is not None
    unproven = (~(found.margins.flatten() > missing[dropped - 1] + ROUNDING)).nonzero().squeeze(1)  # with NaN
    if len(unproven) > MAX_TAPS * len(found.margins.flatten()):
        return None
    taps, weights = _bilinear_taps(unproven, masks.shape[2:], extent, output_size)
    cells, places = taps.unique(return_inverse=True)
    if len(cells) > MAX_TAPS * masks[0, 0].numel():
        return None

    labels = found.labels.flatten()
    rest = _logits_at(cells, features[0], projection.fold(embeddings[order[len(kept) :]]))
    logits = torch.cat([masks[0].flatten(1).T[cells], rest], 1).clamp_(-VALUE_LIMIT, VALUE_LIMIT)  # [cells, Q]
    chances = probabilities[order]
    tile = max(1, CPU_TILE_BYTES // (4 * (4 * len(order) + chances.shape[1])))  # pixels
    for some, corner, weight in zip(unproven.split(tile), places.split(tile), weights.split(tile), strict=True):
        pixels = torch.bmm(weight[:, None], logits[corner]).squeeze(1)
        labels[some] = (pixels.sigmoid() @ chances).argmax(1).to(labels.dtype)
    return labels.view(output_size)


def _bilinear_taps(
    pixels: Tensor,  # [n] int64, of the flat output
    size: tuple[int, ...],  # h, w
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Where output pixels read the maps (`resample`) -> cells of the flat map [n, 4] int64, weights [n, 4] float32."""
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
    """The convolution's output at some cells -> [n, N]."""
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
