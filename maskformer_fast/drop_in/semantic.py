"""Semantic results of transformers' processors: class scores at a grid, resized to the target."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.drop_in.outputs import Size
from maskformer_fast.ops.resized_semantic import grid_scores, grid_semantic_inference


def class_probabilities(
    class_logits: Tensor,  # [..., K+1] floating
) -> Tensor:
    """Softmax less the column of "no object" -> [..., K] float32."""
    return class_logits.to(torch.float32).softmax(-1)[..., :-1]


@torch.no_grad()
def semantic_maps(
    class_logits: Tensor,  # [B, Q, K+1] floating
    mask_logits: Tensor,  # [B, Q, h, w] floating
    grid: Size,
    windows: list[Size],
    output_sizes: list[Size],
    with_scores: bool,
) -> list[Any]:
    """Labels [H, W] int64 of each image; with scores transformers' objects that have both.

    Args:
        grid: size to which mask logits are resized before their sigmoid.
        windows: part of the grid that each output covers.
    """
    probabilities = class_probabilities(class_logits)
    if mask_logits.shape[1] == 0:  # all scores are 0, as of a query without a class
        mask_logits, probabilities = (F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1)) for x in (mask_logits, probabilities))
    if not with_scores:
        return [
            grid_semantic_inference(masks, classes, grid, window, size)
            for masks, classes, window, size in zip(mask_logits, probabilities, windows, output_sizes, strict=True)
        ]
    return [
        scored_map(grid_scores(masks, classes, grid, window), size)
        for masks, classes, window, size in zip(mask_logits, probabilities, windows, output_sizes, strict=True)
    ]


def scored_map(
    scores: Tensor,  # [K, h, w] float32
    size: Size,
) -> Any:
    """Resized scores [K, H, W] and their labels [H, W], as transformers' SemanticSegmentationPostProcessorOutput."""
    from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

    resized = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
    return SemanticSegmentationPostProcessorOutput(
        data={"segmentation": resized.argmax(0), "segmentation_scores": resized}
    )
