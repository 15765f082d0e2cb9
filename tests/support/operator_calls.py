"""Small calls of each operator, for sanitizers and the like: ``python -m tests.support.operator_calls cuda NAME``.

Sizes are ragged, so that the last tile, row and problem of a launch extend beyond every edge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.core.metadata import VOID
from maskformer_fast.ops import (
    deformable_attention,
    draw_points,
    instance_inference,
    instance_rle,
    linear_sum_assignment,
    mask_loss,
    mask_loss_at_points,
    matching_cost,
    matching_cost_at_points,
    panoptic_inference,
    resize_images,
)
from maskformer_fast.ops.matching_cost import matching_cost_from_logits
from maskformer_fast.ops.nearest_masks import nearest_masks
from maskformer_fast.ops.point_cost import point_cost
from maskformer_fast.ops.points import sample_masks
from maskformer_fast.ops.resized_argmax import resized_argmax, resized_winners
from maskformer_fast.ops.semantic import SemanticMap
from maskformer_fast.structures import Predictions, Targets, pack_masks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = ("auto", "dense", "pruned")
"""Ways of `semantic_inference` that only its schema gives a choice of."""


def semantic_by_path(
    mask_logits: Tensor,  # [B, Q, h, w]
    class_logits: Tensor,  # [B, Q, K+1]
    extent: tuple[float, float],
    output_size: tuple[int, int],
    path: str,
    with_values: bool = False,
) -> SemanticMap:
    """`semantic_inference` by one of `PATHS`, with scores and margins or neither."""
    labels, scores, margins = torch.ops.maskformer_fast.semantic_inference(
        mask_logits, class_logits, extent, output_size, with_values, with_values, path
    )
    return SemanticMap(labels, scores if with_values else None, margins if with_values else None)


def semantic(device: str, path: str) -> None:
    for dtype in DTYPES:
        masks = 4 * torch.randn(2, 37, 11, 13, device=device)
        classes = 3 * torch.randn(2, 37, 20, device=device)
        classes[:, 5:, -1] += 9  # most queries are no objects, so that pruning pays
        for view in (masks.to(dtype), masks.to(dtype, memory_format=torch.channels_last)):
            # scores and margins take every score: with them nothing would be pruned
            semantic_by_path(view, classes.to(dtype), (10.5, 13.0), (41, 50), path, with_values=path == "dense")


def semantic_embeddings(device: str) -> None:
    from maskformer_fast.kernels.semantic_embeddings import semantic_from_embeddings

    labels = torch.empty(2, 41, 50, dtype=torch.uint8, device=device)
    for dtype in DTYPES:
        embeddings = torch.randn(2, 37, 19, device=device, dtype=dtype)
        pixels = torch.randn(2, 19, 11, 13, device=device, dtype=dtype)
        for fused in (True, False):
            classes = torch.randn(2, 37, 20, device=device)
            semantic_from_embeddings(embeddings, pixels, classes, (10.5, 13.0), labels, fused=fused)


def panoptic(device: str) -> None:
    masks = 4 * torch.randn(2, 9, 11, 13, device=device)
    scores = torch.rand(2, 9, device=device)
    categories = torch.randint(VOID, 6, (2, 9), device=device)
    things = torch.arange(6, device=device) < 3
    for rule in ("maskformer", "mask2former", "huggingface"):
        panoptic_inference(masks, scores, categories, things, (10.5, 13.0), (41, 50), 0.3, rule)


def instances(device: str) -> None:
    instance_inference(4 * torch.randn(2, 9, 11, 13, device=device), (10.5, 13.0), (41, 50))


def rle(device: str) -> None:
    masks = 4 * torch.randn(2, 9, 11, 13, device=device)
    for capacity in (20000, 301, 0):  # enough, too little for the bytes, too little for the runs
        instance_rle(masks, (10.5, 13.0), (41, 50), capacity)


def nearest(device: str) -> None:
    nearest_masks(torch.randint(256, (3, 11, 2), dtype=torch.uint8, device=device), 13, (41, 50))


def argmax(device: str) -> None:
    for dtype in DTYPES:
        maps = torch.randn(19, 7, 9, device=device, dtype=dtype)
        resized_argmax(maps, (23, 30))
        for scale in (None, torch.rand(19, device=device)):
            resized_winners(maps, torch.zeros(19, device=device), scale, (23, 30))


def batch(device: str, dtype: torch.dtype) -> tuple[Predictions, Targets]:
    """Two layers of two images, of which one has padding and fewer targets."""
    size, input_size = (10, 14), (40, 56)
    valid = torch.tensor([[40, 56], [33, 47]], device=device)
    shapes = ((2, 2, 11, 8), (2, 2, 11, 19), (2, 19, *size))
    floats = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    predictions = Predictions(*floats, valid, input_size)
    masks = pack_masks(torch.rand(2, 5, *input_size, device=device) < 0.4)
    counts = torch.tensor([5, 3], device=device)
    return predictions, Targets(torch.randint(7, (2, 5), device=device), counts, masks, valid, input_size)


def matching(device: str) -> None:
    for dtype in DTYPES:
        predictions, targets = batch(device, dtype)
        for loss in (LossConfig(), LossConfig(mask_loss="bce", padding="include")):
            matching_cost(predictions, targets, loss)
            logits = torch.randn(2, 2, 11, 10, 14, device=device, dtype=dtype)
            matching_cost_from_logits(predictions.class_logits, logits, targets, loss)


def losses(device: str) -> None:
    for dtype in DTYPES:
        predictions, targets = batch(device, dtype)
        inputs = [tensor.requires_grad_() for tensor in (predictions.mask_embeddings, predictions.pixel_features)]
        query = torch.rand(2, 2, 11, device=device).argsort(-1)[..., :5]
        query = query.masked_fill(torch.arange(5, device=device) >= targets.counts[:, None], -1)
        for loss in (LossConfig(), LossConfig(mask_loss="bce", padding="include")):
            mask, dice = mask_loss(predictions, targets, query, loss)
            torch.autograd.grad(mask.sum() + dice.sum(), inputs)


def assignment(device: str) -> None:
    for shape in ((5, 100, 20), (3, 20, 100), (2, 150, 140), (1, 30, 600)):
        costs = torch.rand(shape, device=device)
        counts = torch.randint(shape[-1] + 1, shape[:1], device=device)
        linear_sum_assignment(costs)
        linear_sum_assignment((4 * costs).round().double(), counts)


def resize(device: str) -> None:
    frames = torch.randint(256, (2, 37, 53, 4), dtype=torch.uint8, device=device)
    for size in ((19, 70), (90, 20), (37, 53)):
        resize_images(frames[:, :, 3:], [size, size], 32, bgr=True)


def attention(device: str) -> None:
    sizes = ((5, 7), (3, 2), (1, 1))
    for dtype in DTYPES[:1] if device == "cpu" else DTYPES:
        value = torch.randn(2, 42, 3, 24, device=device, dtype=dtype)
        points = torch.rand(2, 37, 3, 2, device=device)
        offsets = 4 * torch.randn(2, 37, 3, 3, 5, 2, device=device)
        logits = torch.randn(2, 37, 3, 3, 5, device=device)
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (value, offsets, logits)]
        result = deformable_attention(inputs[0], sizes, points, *inputs[1:])
        torch.autograd.grad(result.sum(), inputs)


def at_points(device: str) -> None:
    predictions, targets = batch(device, torch.float32)
    inputs = [tensor.requires_grad_() for tensor in (predictions.mask_embeddings, predictions.pixel_features)]
    query = torch.rand(2, 2, 11, device=device).argsort(-1)[..., :5]
    query = query.masked_fill(torch.arange(5, device=device) >= targets.counts[:, None], -1)
    for loss in (LossConfig(points=1037), LossConfig(mask_loss="bce", padding="include", points=37, importance=0.5)):
        draws = draw_points(loss, [3, 4], device)
        matching_cost_at_points(predictions, targets, draws.match, loss)
        mask, dice = mask_loss_at_points(predictions, targets, query, draws, loss)
        torch.autograd.grad(mask.sum() + dice.sum(), inputs)
        logits = torch.randn(2, 2, 11, 10, 14, device=device)
        truth = torch.rand(1, 2, 5, len(draws.match[0]), device=device)
        point_cost(predictions.class_logits, logits, draws.match[None], truth, targets.labels, targets.counts, loss)
    for masks in (targets.masks[0], targets.masks[0].float(), targets.masks[0] > 7):  # packed, or a byte a pixel
        width, rows = (56 if masks.dtype == torch.uint8 else 7), torch.arange(-1, 5, device=device)
        sample_masks(masks, width, rows, torch.rand(6, 37, 2, device=device) * 1.2 - 0.1, rows.clamp(min=0))


CALLS: dict[str, Callable[[str], None]] = {
    "semantic": lambda device: semantic(device, "dense"),
    "semantic_pruned": lambda device: semantic(device, "pruned"),
    "semantic_embeddings": semantic_embeddings,
    "panoptic": panoptic,
    "instances": instances,
    "rle": rle,
    "nearest_masks": nearest,
    "resized_argmax": argmax,
    "matching_cost": matching,
    "mask_loss": losses,
    "assignment": assignment,
    "points": at_points,
    "deformable_attention": attention,
    "resize": resize,
}


def main(device: str, *names: str) -> None:
    torch.manual_seed(0)
    for name in names:
        CALLS[name](device)
    if device == "cuda":
        torch.cuda.synchronize()
    print("called", *names)


if __name__ == "__main__":
    main(*sys.argv[1:])
