"""Instances of heads that give a score for each query and class: RF-DETR-Seg, D-FINE-seg, MaskDINO and the like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.core.results import InstanceResult
from maskformer_fast.ops.segments import check_logits, instance_inference


@torch.no_grad()
def instances_from_scores(
    scores: Tensor,  # [B, Q, C] floating
    mask_logits: Tensor,  # [B, Q, h, w] floating
    output_sizes: Sequence[tuple[int, int]],
    top_k: int,
    *,
    threshold: float = 0.0,
    mask_bias: float | Tensor = 0.0,
    mask_score: bool = False,
    boxes: Tensor | None = None,  # [B, Q, 4] floating
) -> list[InstanceResult[Tensor]]:
    """Best pairs of query and class of each image, best first, with masks (logit + bias > 0 at the output's size).

    A mask is resized and packed once, however many classes its query has among the best, and nothing of full size is
    stored in floating point. `InstanceResult.to_coco` gives the masks as run lengths.

    Args:
        scores: of any kind that orders the pairs, such as the sigmoid of class logits. Of equal scores the first query,
            then the first class, comes first.
        mask_logits: maps that are masks where they are above -bias; probabilities with a bias of -0.5, for example.
        output_sizes: height and width of each image's masks.
        top_k: pairs of an image that are kept before the threshold.
        threshold: least final score of an instance.
        mask_bias: added to all mask logits; a number or a tensor of one value.
        mask_score: multiply scores by the mean mask probability in the mask, as MaskDINO and Mask2Former do, and
            order by the product. An empty mask then has score 0.
        boxes: boxes that the network predicts, in pixels of the output: x0, y0, x1, y1; without them those of the
            masks, zeros for an empty mask.

    Raises:
        ValueError: shapes that do not fit, `top_k` below 1.
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    check(scores.ndim == 3 and scores.shape[2] > 0, "scores", "[B, Q, C] with classes", tuple(scores.shape))
    fits = mask_logits.ndim == 4 and mask_logits.shape[:2] == scores.shape[:2]
    check(fits, "mask_logits", f"{list(scores.shape[:2])} and height, width", tuple(mask_logits.shape))
    check(len(output_sizes) == len(scores), "output_sizes", f"{len(scores)} sizes", len(output_sizes))
    check(top_k > 0, "top_k", "> 0", top_k)
    shape = (*scores.shape[:2], 4)
    check(boxes is None or boxes.shape == shape, "boxes", f"{list(shape)}", None if boxes is None else boxes.shape)
    # a stable sort in place of top-k: of equal scores, which half precision has many of, the first pair comes first
    ordered = scores.to(torch.float32).flatten(1).sort(dim=1, descending=True, stable=True)
    best, pairs = ordered.values[:, :top_k], ordered.indices[:, :top_k]
    results = []
    for image, (height, width) in enumerate(output_sizes):
        kept = best[image] >= threshold if not mask_score else torch.ones_like(best[image], dtype=torch.bool)
        values, chosen = best[image][kept], pairs[image][kept]
        queries, slots = (chosen // scores.shape[2]).unique(return_inverse=True)
        logits = mask_logits[image : image + 1, queries]
        if isinstance(mask_bias, Tensor) or mask_bias != 0.0:
            logits = logits + mask_bias
        extent, size = (float(logits.shape[2]), float(logits.shape[3])), (int(height), int(width))
        check_logits(logits, extent, size)
        masks = instance_inference(logits, extent, size)
        labels = chosen % scores.shape[2]
        if mask_score:
            values, order = (values * masks.scores[0, slots]).sort(descending=True, stable=True)
            order = order[values >= threshold]
            values, slots, labels = values[values >= threshold], slots[order], labels[order]
        places = masks.boxes[0, slots] if boxes is None else boxes[image, queries[slots]].to(torch.float32)
        results.append(InstanceResult(labels, values, masks.masks[0].index_select(0, slots), places, size))
    return results
