"""Semantic inference on the CPU: ours beside the official formula in eager PyTorch and Hugging Face's function.

Three kinds of predictions, all made from a seed:

- ``random``: normal mask and class logits. Nothing can be pruned.
- ``peaky``: as trained networks give. 20 queries are sure of a class (about 0.95), the others of "no object" (0.999);
  every mask is an ellipse of 2 to 8 % of the image, logits -10 to 10 with a soft edge and a little smooth noise.
- ``medium-hard``: the same masks flattened under much noise, live classes at 0.6 to 0.9, and 0.1 to 0.4 of each other
  query's probability spread over the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bounds import Bound
from benchmarks.harness import Case, Sides
from maskformer_fast.ops import semantic_inference
from maskformer_fast.ops.semantic import SemanticMap

QUERIES = 100
LIVE = 20
OFFICIAL = "official formula, eager PyTorch"
HUGGINGFACE = "transformers"
Size = tuple[int, int]


def random_logits(classes: int, size: Size) -> tuple[Tensor, Tensor]:
    return torch.randn(1, QUERIES, *size), torch.randn(1, QUERIES, classes + 1)


def peaky_logits(classes: int, size: Size) -> tuple[Tensor, Tensor]:
    y, x = (torch.linspace(-1, 1, n) for n in size)
    center = torch.rand(QUERIES, 2, 1, 1) * 2 - 1
    area = 4 * (0.02 + 0.06 * torch.rand(QUERIES, 1, 1))
    aspect = torch.exp(torch.empty(QUERIES, 1, 1).uniform_(-0.7, 0.7))
    radius = ((y[:, None] - center[:, 0]) ** 2 * aspect + (x - center[:, 1]) ** 2 / aspect) / (area / torch.pi)
    masks = 9.5 * torch.tanh(1.5 * (1 - radius.sqrt())) + 0.5 * smooth_noise(size)
    logits = torch.randn(QUERIES, classes + 1)
    chosen = torch.full((QUERIES,), classes)
    chosen[:LIVE] = torch.randint(classes, (LIVE,))
    odds = torch.full((QUERIES,), 999.0)
    odds[:LIVE] = 20.0
    logits[torch.arange(QUERIES), chosen] = logits.logsumexp(1) + odds.log()
    return masks[None], logits[None]


def medium_logits(classes: int, size: Size) -> tuple[Tensor, Tensor]:
    masks, _ = peaky_logits(classes, size)
    masks = 0.6 * masks + 1.5 * smooth_noise(size)
    logits = torch.randn(QUERIES, classes + 1)
    logits[torch.arange(LIVE), torch.randint(classes, (LIVE,))] += 6
    logits[LIVE:, classes] += 6 + 3 * torch.rand(QUERIES - LIVE)
    return masks.contiguous(), logits[None]


def smooth_noise(size: Size) -> Tensor:
    """[queries, h, w], normal at every eighth pixel and bilinear between."""
    coarse = torch.randn(1, QUERIES, *(max(1, n // 8) for n in size))
    return F.interpolate(coarse, size=size, mode="bilinear")[0]


@torch.no_grad()
def official(mask_logits: Tensor, class_logits: Tensor, size: Size) -> Tensor:
    """Upsample the mask logits, sigmoid, product with the class probabilities, argmax."""
    masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", class_logits.softmax(-1)[..., :-1], masks).argmax(1)


def huggingface(mask_logits: Tensor, class_logits: Tensor, size: Size) -> Callable[[], object]:
    from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil
    from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput

    processor = MaskFormerImageProcessorPil()
    outputs = MaskFormerForInstanceSegmentationOutput(
        class_queries_logits=class_logits, masks_queries_logits=mask_logits
    )
    return partial(processor.post_process_semantic_segmentation, outputs, target_sizes=[size] * len(mask_logits))


def setup(logits: Callable[[int, Size], tuple[Tensor, Tensor]], classes: int, size: Size, peer: str) -> Sides:
    masks, class_logits = logits(classes, size)
    output = (4 * size[0], 4 * size[1])
    ours = partial(semantic_inference, masks, class_logits, size, output)
    if peer == OFFICIAL:
        return Sides(ours, partial(official, masks, class_logits, output), check_labels)
    return Sides(ours, huggingface(masks, class_logits, output))


def check_labels(ours: SemanticMap, theirs: Tensor) -> None:
    # the official resampling computes in another order, which moves labels whose scores all but tie
    if (ours.labels != theirs).float().mean() > 1e-3:
        raise RuntimeError("ours and the official formula disagree")


def bound(classes: int, size: Size, dense: bool) -> Bound:
    """Logits read, labels written; where nothing can be pruned also the product of classes and masks."""
    pixels = size[0] * size[1]
    written = 16 * pixels * (1 if classes <= 255 else 2)
    products = 2.0 * QUERIES * classes * 16 * pixels if dense else 0.0
    return Bound(4 * QUERIES * (pixels + classes + 1) + written, products, "fp32")


def cases() -> list[Case]:
    small, large = (128, 128), (256, 512)
    goals = [
        # kind, low-resolution size, classes, goal beside the official formula, beside Hugging Face's function
        (random_logits, "random", small, 19, 4.5, 1.2),
        (random_logits, "random", small, 150, 4.5, 2.5),
        (random_logits, "random", small, 847, 4.5, 3.0),
        (peaky_logits, "peaky", small, 19, 40.0, 10.0),
        (peaky_logits, "peaky", small, 150, 40.0, 15.0),
        (peaky_logits, "peaky", small, 847, 40.0, 15.0),
        (medium_logits, "medium-hard", small, 19, 12.0, 4.0),
        (medium_logits, "medium-hard", small, 150, 12.0, 4.0),
        (medium_logits, "medium-hard", small, 847, 12.0, 4.0),
        (peaky_logits, "peaky", large, 19, 25.0, 8.0),
        (peaky_logits, "peaky", large, 150, 25.0, 15.0),
    ]
    return [
        Case(
            name=f"semantic {size[0]}x{size[1]} -> {4 * size[0]}x{4 * size[1]}, K={classes}, {kind}, vs {short}",
            peer=peer,
            goal=goal,
            setup=partial(setup, logits, classes, size, peer),
            bound=bound(classes, size, kind == "random"),
        )
        for logits, kind, size, classes, *by_peer in goals
        for peer, short, goal in zip((OFFICIAL, HUGGINGFACE), ("official", "Hugging Face"), by_peer, strict=True)
    ]
