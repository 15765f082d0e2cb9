"""Semantic inference beside the official formula, eager and compiled, and Hugging Face's function.

Three kinds of predictions, all made from a seed:

- ``random``: normal mask and class logits. Nothing can be pruned.
- ``peaky``: as trained networks give. A fifth of the queries is sure of a class (about 0.95), the others of "no object"
  (0.999); every mask is an ellipse of 2 to 8 % of the image, logits -10 to 10 with a soft edge and a little smooth
  noise.
- ``medium-hard``: the same masks flattened under much noise, live classes at 0.6 to 0.9, and 0.1 to 0.4 of each other
  query's probability spread over the classes.

On a GPU ours reads mask logits with queries innermost, as the matrix product that makes them can write them; the peers
read the same values as planes, which is what their network writes, and a row of ours ("planes") does so too. Other rows
there measure the product with pixel embeddings inside the kernel beside a matrix product before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.inputs import SCALE, Size, compiled, share_equal
from benchmarks.harness.case import Bound, Case, Operation, Work, beside
from maskformer_fast.ops import semantic_inference
from maskformer_fast.ops.semantic import label_dtype, semantic_inference_eager

QUERIES, LIVE, DEPTH = 100, 20, 256
OFFICIAL, HUGGINGFACE = "official formula, eager PyTorch", "transformers"
COMPILED, TWIN = "torch.compile of the formula", "our eager twin, float32"
PRODUCT_FIRST, CHOSEN = "matrix product first", "chosen"
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
LEAST_EQUAL = {torch.float16: 0.95, torch.bfloat16: 0.85, torch.float32: 0.999}
"""Least share of equal labels: the formula rounds scores to its dtype, and many classes are close to the best."""


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


KINDS = {"random": random_logits, "peaky": peaky_logits, "medium-hard": medium_logits}


def semantic_logits(kind: str, classes: int, queries: int, batch: int, size: Size) -> tuple[Tensor, Tensor]:
    """Mask logits [B, Q, h, w] and class logits [B, Q, K+1] of any number of queries, a fifth of them live."""
    images = []
    for _ in range(batch):
        parts = []
        for start in range(0, queries, QUERIES):  # the generators give 100 queries, the first 20 of them live
            masks, class_logits = KINDS[kind](classes, size)
            wanted = min(QUERIES, queries - start)
            live = wanted * LIVE // QUERIES
            chosen = [*range(live), *range(LIVE, LIVE + wanted - live)]
            parts.append((masks[:, chosen], class_logits[:, chosen]))
        images.append([torch.cat(own, 1) for own in zip(*parts, strict=True)])
    masks, class_logits = (torch.cat(own) for own in zip(*images, strict=True))
    return masks, class_logits


@torch.no_grad()
def official(mask_logits: Tensor, class_logits: Tensor, size: Size) -> Tensor:
    """Upsample the mask logits, sigmoid, product with the class probabilities, argmax."""
    masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", class_logits.softmax(-1)[..., :-1], masks).argmax(1)


@cache
def huggingface_processor() -> Any:
    from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

    return MaskFormerImageProcessorPil()


def huggingface(mask_logits: Tensor, class_logits: Tensor, size: Size) -> object:
    from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput

    outputs = MaskFormerForInstanceSegmentationOutput(
        class_queries_logits=class_logits, masks_queries_logits=mask_logits
    )
    return huggingface_processor().post_process_semantic_segmentation(outputs, target_sizes=[size] * len(mask_logits))


def queries_innermost(planes: Tensor) -> Tensor:
    return planes.contiguous(memory_format=torch.channels_last)


def setup(
    device: torch.device, kind: str, classes: int, size: Size, queries: int = QUERIES, batch: int = 1,
    dtype: torch.dtype = torch.float32, planes: bool = True,
) -> Work:  # fmt: skip
    """Labels of mask logits of `size`, which ours reads as planes or with queries innermost."""
    output = (SCALE * size[0], SCALE * size[1])

    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        masks, logits = (tensor.to(device, dtype) for tensor in semantic_logits(kind, classes, queries, batch, size))
        return masks if planes else queries_innermost(masks), masks, logits

    def ours(masks: Tensor, _: Tensor, logits: Tensor) -> Tensor:
        return semantic_inference(masks, logits, size, output).labels

    compiled_formula = compiled(partial(official, size=output))
    peers: dict[str, Operation] = {
        OFFICIAL: lambda _, masks, logits: official(masks, logits, output),
        HUGGINGFACE: lambda _, masks, logits: huggingface(masks, logits, output),
        COMPILED: lambda _, masks, logits: compiled_formula(masks, logits),
        TWIN: lambda _, masks, logits: semantic_inference_eager(masks, logits, size, output).labels,
    }
    # Hugging Face resizes scores and not logits, which moves labels along the edges: it is not compared.
    least = dict.fromkeys((OFFICIAL, COMPILED, TWIN), LEAST_EQUAL[dtype])
    return Work(ours, peers, draw, share_equal, least)


def embeddings_setup(
    device: torch.device, batch: int, classes: int, size: Size, scale: int, dtype: torch.dtype,
    queries: int = QUERIES, depth: int = DEPTH,
) -> Work:  # fmt: skip
    """Labels of embeddings: the product with the pixels inside the kernel, before it, or as the kernel chooses."""
    output = (scale * size[0], scale * size[1])

    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        shapes = ((batch, queries, depth), (batch, depth, *size), (batch, queries, classes + 1))
        embeddings, pixels, logits = (torch.randn(shape, device=device) for shape in shapes)
        return embeddings.to(dtype), queries_innermost(pixels.to(dtype) / depth**0.5), logits.to(dtype)

    def labels(fused: bool | None, embeddings: Tensor, pixels: Tensor, logits: Tensor) -> Tensor:
        from maskformer_fast.kernels.semantic_embeddings import (
            semantic_from_embeddings,  # needs Triton, as only CUDA has it
        )

        result = torch.empty(batch, *output, dtype=label_dtype(classes), device=device)
        semantic_from_embeddings(embeddings, pixels, logits, size, result, fused=fused)
        return result

    peers = {PRODUCT_FIRST: partial(labels, False), CHOSEN: partial(labels, None)}
    return Work(partial(labels, True), peers, draw, share_equal, dict.fromkeys(peers, LEAST_EQUAL[dtype]))


def bound(batch: int, classes: int, size: Size, dtype: torch.dtype, dense: bool, rate: str) -> Bound:
    """Logits read, labels written; where nothing can be pruned also the product of classes and masks."""
    pixels = size[0] * size[1]
    read = batch * QUERIES * (pixels + classes + 1) * dtype.itemsize
    written = batch * SCALE**2 * pixels * label_dtype(classes).itemsize
    operations = 2.0 * batch * QUERIES * classes * SCALE**2 * pixels if dense else 0.0
    return Bound(read + written, operations, rate)


def embeddings_bound(batch: int, classes: int, size: Size, scale: int, dtype: torch.dtype) -> Bound:
    """The work of `bound`, and the product with the pixel embeddings, once a low-resolution pixel."""
    low = size[0] * size[1]
    read = batch * (QUERIES * DEPTH + DEPTH * low + QUERIES * (classes + 1)) * dtype.itemsize
    operations = 2.0 * batch * QUERIES * low * (DEPTH + scale**2 * classes)
    return Bound(read + batch * scale**2 * low * label_dtype(classes).itemsize, operations, matrix_unit(dtype))


def matrix_unit(dtype: torch.dtype) -> str:
    """Type in which our kernel multiplies; float32 takes three products of halves."""
    return "fp16" if dtype == torch.float32 else DTYPES[dtype]


def cases(device: str) -> list[Case]:
    return cpu_cases() if device == "cpu" else cuda_cases()


def cpu_cases() -> list[Case]:
    small, large = (128, 128), (256, 512)
    goals = [
        # kind, low-resolution size, classes, goal beside the official formula, beside Hugging Face's function
        ("random", small, 19, 4.5, 1.2),
        ("random", small, 150, 4.5, 2.5),
        ("random", small, 847, 4.5, 3.0),
        ("peaky", small, 19, 40.0, 10.0),
        ("peaky", small, 150, 40.0, 15.0),
        ("peaky", small, 847, 40.0, 15.0),
        ("medium-hard", small, 19, 12.0, 4.0),
        ("medium-hard", small, 150, 12.0, 4.0),
        ("medium-hard", small, 847, 12.0, 4.0),
        ("peaky", large, 19, 25.0, 8.0),
        ("peaky", large, 150, 25.0, 15.0),
    ]
    rows = [
        Case(
            f"semantic {size[0]}x{size[1]} -> {4 * size[0]}x{4 * size[1]}, K={classes}, {kind}, vs {short}",
            peer, goal, partial(setup, kind=kind, classes=classes, size=size),
            bound=bound(1, classes, size, torch.float32, kind == "random", "fp32"),
        )
        for kind, size, classes, *by_peer in goals
        for peer, short, goal in zip((OFFICIAL, HUGGINGFACE), ("official", "Hugging Face"), by_peer, strict=True)
    ]  # fmt: skip
    # the smallest size: what a call costs before it works
    smallest = partial(setup, kind="peaky", classes=2, size=(2, 2), queries=2)
    return [*rows, Case("semantic 2x2 -> 8x8, Q=2, K=2", None, None, smallest, rank=3, memory=False)]


def cuda_cases() -> list[Case]:
    small, large = (128, 128), (256, 512)
    half = torch.float16
    rows = [
        *labels_cases(1, 150, small, {OFFICIAL: 10.0}, max_us=45.0),
        *labels_cases(1, 150, small, {COMPILED: 5.0}),
        *labels_cases(8, 150, small, {OFFICIAL: 10.0}, bound_goal=0.6),
        *labels_cases(8, 150, small, {COMPILED: 5.0}),
        *labels_cases(1, 19, large, {OFFICIAL: None}, rank=1),
        *labels_cases(1, 19, large, {COMPILED: None}, rank=2),
        *labels_cases(1, 150, small, {OFFICIAL: None}, kind="peaky", rank=1),
        *labels_cases(8, 150, small, {OFFICIAL: None}, kind="planes", rank=2),
        *labels_cases(1, 150, small, {OFFICIAL: None}, torch.bfloat16, rank=1),
        *labels_cases(1, 150, small, {OFFICIAL: None, TWIN: None}, torch.float32, rank=2),
    ]
    for classes, size in ((19, small), (847, small), (150, large)):
        rows += labels_cases(1, classes, size, {OFFICIAL: 8.0})
        rows += labels_cases(1, classes, size, {COMPILED: None}, rank=2)
    shapes = (*product((1, 8), (small,), (1, 2, 4)), (1, large, 4), (8, (32, 32), 4), (1, (64, 64), 8))
    for batch, size, scale in shapes:
        output = f"{scale * size[0]}x{scale * size[1]}"
        rows += beside(
            f"semantic from embeddings {size[0]}x{size[1]} -> {output}, K=150, B={batch}, fp16, fused",
            {PRODUCT_FIRST: None, CHOSEN: None},
            partial(embeddings_setup, batch=batch, classes=150, size=size, scale=scale, dtype=half),
            bound=embeddings_bound(batch, 150, size, scale, half), rank=1,
        )  # fmt: skip
    return rows


def labels_cases(
    batch: int, classes: int, size: Size, peers: Mapping[str, float | None], dtype: torch.dtype = torch.float16,
    kind: str = "random", **options: Any,
) -> list[Case]:  # fmt: skip
    """Cases of one size on a GPU; the kind "planes" is random, and ours reads planes."""
    name = f"semantic {size[0]}x{size[1]} -> {SCALE * size[0]}x{SCALE * size[1]}, K={classes}, B={batch}"
    make = partial(setup, kind="random" if kind == "planes" else kind, classes=classes, size=size, batch=batch,
                   dtype=dtype, planes=kind == "planes")  # fmt: skip
    least_work = bound(batch, classes, size, dtype, True, matrix_unit(dtype))
    return beside(f"{name}, {DTYPES[dtype]}, {kind}", peers, make, bound=least_work, **options)
