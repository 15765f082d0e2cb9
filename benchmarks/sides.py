"""Operators beside their peers on inputs of any size and device: what curves and pytest-benchmark both measure.

Each function gives operations by name, all of one set of inputs: "ours" and the peers that there are. Inputs are drawn
from torch's global generator, so that seeding it repeats them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cpu_segments, cpu_semantic
from benchmarks.cpu_criterion import official_loss
from benchmarks.harness import Operation
from maskformer_fast.config import LossConfig
from maskformer_fast.ops import panoptic_inference, semantic_inference
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Predictions, Targets, pack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.matcher import match

Size = tuple[int, int]
Operations = dict[str, Operation]

OURS, HUGGINGFACE, OFFICIAL = "ours", "Hugging Face", "official formula, eager PyTorch"
CLASSES, QUERIES, DEPTH, TARGETS = 150, 100, 256, 20
SIDE = 512


def semantic(
    kind: str, classes: int = CLASSES, queries: int = QUERIES, size: Size = (SIDE, SIDE), batch: int = 1,
    device: str = "cpu",
) -> Operations:  # fmt: skip
    """Labels of mask logits at a quarter of `size`; `kind` is that of `semantic_logits`."""
    low = (size[0] // 4, size[1] // 4)
    images = [semantic_logits(kind, classes, queries, low) for _ in range(batch)]
    masks, class_logits = (torch.cat(parts).to(device) for parts in zip(*images, strict=True))
    return {
        OURS: partial(semantic_inference, masks, class_logits, low, size),
        HUGGINGFACE: cpu_semantic.huggingface(masks, class_logits, size),
        OFFICIAL: partial(cpu_semantic.official, masks, class_logits, size),
    }


def semantic_logits(kind: str, classes: int, queries: int, low: Size) -> tuple[Tensor, Tensor]:
    """Mask logits [1, Q, h, w] and class logits [1, Q, K+1] of the generators of `cpu_semantic`, for any number."""
    draw = {"peaky": cpu_semantic.peaky_logits, "random": cpu_semantic.random_logits}[kind]
    parts = []
    for start in range(0, queries, cpu_semantic.QUERIES):  # these give 100 queries, the first fifth of them live
        masks, class_logits = draw(classes, low)
        wanted = min(cpu_semantic.QUERIES, queries - start)
        live = wanted * cpu_semantic.LIVE // cpu_semantic.QUERIES
        chosen = [*range(live), *range(cpu_semantic.LIVE, cpu_semantic.LIVE + wanted - live)]
        parts.append((masks[:, chosen], class_logits[:, chosen]))
    masks, class_logits = (torch.cat(own, 1) for own in zip(*parts, strict=True))
    return masks, class_logits


def panoptic(queries: int = QUERIES, size: Size = (SIDE, SIDE), device: str = "cpu") -> Operations:
    """Segments of one image's mask logits at a quarter of `size`, a quarter of the queries kept."""
    low = (size[0] // 4, size[1] // 4)
    classes, masks = (logits.to(device) for logits in panoptic_logits(queries, low))
    things = torch.tensor(cpu_segments.IS_THING, device=device)

    def ours() -> object:
        scores, categories, kept = cpu_segments.kept_queries(classes)
        return panoptic_inference(
            masks[kept][None], scores[None], categories[None], things, low, size, cpu_segments.OVERLAP_THRESHOLD
        )

    output = cpu_segments.huggingface_outputs(classes, masks)
    theirs = cpu_segments.huggingface_processor().post_process_panoptic_segmentation
    stuff = {k for k, is_thing in enumerate(cpu_segments.IS_THING) if not is_thing}
    return {
        OURS: ours,
        HUGGINGFACE: lambda: theirs(
            output, cpu_segments.OBJECT_THRESHOLD, overlap_mask_area_threshold=cpu_segments.OVERLAP_THRESHOLD,
            label_ids_to_fuse=stuff, target_sizes=[size],
        ),
        OFFICIAL: lambda: cpu_segments.official_panoptic(classes, masks, size),
    }  # fmt: skip


def panoptic_logits(queries: int, low: Size) -> tuple[Tensor, Tensor]:
    """Class logits [Q, K+1] and mask logits [Q, h, w]: the kept ones share the image, the others repeat parts of it."""
    kept, classes = max(2, queries // 4), len(cpu_segments.IS_THING)
    generator = torch.default_generator
    logits = torch.randn(queries, classes + 1, generator=generator)
    logits[:, -1] += 9
    logits[torch.arange(kept), torch.randint(classes, (kept,), generator=generator)] += 20
    fields = cpu_segments.smooth_fields(kept, (6, 6), generator, low)
    first, second = fields.topk(2, 0).values
    lead = fields - torch.where(fields == first, second, first)  # above 0 where a query is ahead of all others
    owner = torch.cat([torch.arange(kept), torch.randint(kept, (queries - kept,), generator=generator)])
    masks = (8 * lead[owner]).clamp(-8, 8) + 0.3 * cpu_segments.smooth_fields(queries, (32, 32), generator, low)
    return logits, masks


def matching(queries: int = QUERIES, targets: int = TARGETS, batch: int = 2, device: str = "cpu") -> Operations:
    """Cost and assignment of one decoder layer at 512x512, from embeddings; the peer's matcher after the product."""
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher

    predictions, truth, masks = layer(queries, targets, batch, device)
    peer, loss = MaskFormerHungarianMatcher(1.0, 20.0, 1.0), LossConfig()
    floats, labels = [mask.float() for mask in masks], list(truth.labels)
    return {
        OURS: lambda: match(predictions, truth, loss),
        HUGGINGFACE: lambda: peer(layer_mask_logits(predictions), predictions.class_logits[-1], floats, labels),
    }


def criterion(batch: int = 2, device: str = "cpu") -> Operations:
    """Loss of one decoder layer at 512x512 and its gradients; the official formula matches on the CPU alone."""
    predictions, targets, masks = layer(QUERIES, TARGETS, batch, device)
    leaves = [tensor.requires_grad_() for tensor in predictions[:3]]
    truth = [(labels, mask) for labels, mask in zip(targets.labels, masks, strict=True)]
    ours = Criterion(CLASSES, LossConfig()).to(device)

    def fused() -> tuple[Tensor, ...]:
        loss = ours(predictions, targets).total
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    def official() -> tuple[Tensor, ...]:
        logits, embeddings, pixels = leaves
        masks = torch.einsum("bqd,bdhw->bqhw", embeddings[-1], pixels)
        loss = official_loss(logits[-1], masks, truth)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return {OURS: fused} if device != "cpu" else {OURS: fused, OFFICIAL: official}


def layer(queries: int, targets: int, batch: int, device: str) -> tuple[Predictions, Targets, Tensor]:
    """Predictions of one decoder layer, targets, and the targets' masks [B, T, H, W] bool, which tile the image."""
    size, low = (SIDE, SIDE), (SIDE // 4, SIDE // 4)
    ids = F.interpolate(torch.randint(targets, (batch, 1, 16, 16)).float(), size)[:, 0].long()
    masks = (ids.unsqueeze(1) == torch.arange(targets)[:, None, None]).to(device)
    labels, valid = torch.randint(CLASSES, (batch, targets)), torch.tensor([size] * batch, device=device)
    counts = torch.full((batch,), targets, device=device)
    predictions = Predictions(
        torch.randn(1, batch, queries, CLASSES + 1).to(device), (torch.randn(1, batch, queries, DEPTH) / 8).to(device),
        torch.randn(batch, DEPTH, *low).to(device), valid, size,
    )  # fmt: skip
    return predictions, Targets(labels.to(device), counts, pack_masks(masks), valid, size), masks
