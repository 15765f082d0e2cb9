"""Panoptic and instance results of one image, 160x240 mask logits to 640x960, against the official formula and
Hugging Face's functions.

"From predictions" is what users call: `postprocess` on mask and pixel embeddings of 256 channels, ours computing the
masks of the wanted queries only; the peers begin with the product that gives them all 100 masks. "From mask logits"
leaves the product out on both sides, and `postprocess` with it: what it does beside is written out here. The official
code has no instance inference, and for 100 instances both sides need the same product, of more time than all the rest
of ours, so that row is from mask logits only.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bounds import Bound
from benchmarks.harness import Case, Operation
from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference import postprocess
from maskformer_fast.ops import instance_inference, panoptic_inference
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.rle import encode_packed_masks
from maskformer_fast.structures import Predictions

Size = tuple[int, int]

QUERIES, KEPT, CHANNELS = 100, 25, 256
THINGS, STUFF = 80, 53  # COCO's
LOW, HIGH = (160, 240), (640, 960)
IS_THING = [True] * THINGS + [False] * STUFF
OBJECT_THRESHOLD, OVERLAP_THRESHOLD = 0.8, 0.8


def smooth_fields(count: int, cells: Size, generator: torch.Generator, low: Size = LOW) -> Tensor:
    """Random fields of about unit size that vary over some 1 / cells of the map -> [count, h, w]."""
    coarse = torch.randn(1, count, *cells, generator=generator)
    return F.interpolate(coarse, low, mode="bicubic", align_corners=False)[0]


def as_predictions(classes: Tensor, masks: Tensor, generator: torch.Generator, high: Size = HIGH) -> Predictions:
    """Predictions whose class logits [Q, K+1] and mask logits [Q, h, w] are the given ones."""
    basis = torch.linalg.qr(torch.randn(CHANNELS, QUERIES, generator=generator)).Q  # orthonormal columns
    pixels = torch.einsum("dq,qhw->dhw", basis, masks)[None]
    return Predictions(classes[None, None], basis.T[None, None].contiguous(), pixels, torch.tensor([high]), high)


def panoptic_predictions(kept: int = KEPT, low: Size = LOW, high: Size = HIGH) -> Predictions:
    """Some confident queries that share the image among them; the others repeat parts of it and are no objects."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(QUERIES, THINGS + STUFF + 1, generator=generator)
    objects = torch.randperm(QUERIES, generator=generator)[:kept]
    classes[:, -1] += 9
    classes[objects, torch.randint(0, THINGS + STUFF, (kept,), generator=generator)] += 20
    fields = smooth_fields(kept, (6, 9), generator, low)
    best = fields.topk(2, 0).values
    lead = fields - torch.where(fields == best[0], best[1], best[0])  # above 0 where a query is ahead of all others
    owner = torch.randint(0, kept, (QUERIES,), generator=generator)
    owner[objects] = torch.arange(kept)
    masks = (8 * lead[owner]).clamp(-8, 8) + 0.3 * smooth_fields(QUERIES, (40, 60), generator, low)
    return as_predictions(classes, masks, generator, high)


def instance_predictions() -> Predictions:
    """100 blobs of all sizes, which overlap, each sure of its class."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(QUERIES, THINGS + 1, generator=generator)
    classes[torch.arange(QUERIES), torch.randint(0, THINGS, (QUERIES,), generator=generator)] += 12
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in LOW), indexing="ij")
    center = torch.rand(QUERIES, 2, 1, 1, generator=generator) * torch.tensor(LOW)[:, None, None]
    radius = 3 * 20 ** torch.rand(QUERIES, 2, 1, 1, generator=generator)  # 3 to 60 map pixels
    distance = torch.hypot((y - center[:, 0]) / radius[:, 0], (x - center[:, 1]) / radius[:, 1])
    masks = (8 * (1 - distance)).clamp(-8, 8) + 0.5 * smooth_fields(QUERIES, (40, 60), generator)
    return as_predictions(classes, masks, generator)


def kept_queries(classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of class logits [Q, K+1]: scores and categories of the kept queries, and which they are."""
    scores, categories = classes.softmax(-1).max(-1)
    kept = ((categories < classes.shape[-1] - 1) & (scores > OBJECT_THRESHOLD)).nonzero().flatten()
    return scores[kept], categories[kept], kept


def our_panoptic(classes: Tensor, masks: Tensor) -> object:
    """From mask logits [Q, h, w], by the operator."""
    scores, categories, kept = kept_queries(classes)
    return panoptic_inference(
        masks[kept][None], scores[None], categories[None], torch.tensor(IS_THING), LOW, HIGH, OVERLAP_THRESHOLD
    )


def our_instances(classes: Tensor, masks: Tensor) -> object:
    """From mask logits [Q, h, w], by the operator: the best pairs of query and class, best first, as run lengths."""
    probabilities = classes.softmax(-1)[:, :-1]
    best, pairs = probabilities.flatten().topk(QUERIES)
    queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
    used, slots = queries.unique(return_inverse=True)
    found = instance_inference(masks[None] if len(used) == len(masks) else masks[used][None], LOW, HIGH)
    scores, order = (best * found.scores[0, slots]).sort(descending=True)
    rles = encode_packed_masks(found.masks[0].numpy(), HIGH[1])
    return labels[order], scores, [rles[slot] for slot in slots[order].tolist()]


def official_panoptic(classes: Tensor, masks: Tensor, high: Size = HIGH) -> tuple[Tensor, list[tuple[int, int]]]:
    """The paper's inference as its code does it: everything at full size, then query after query."""
    masks = F.interpolate(masks[None], size=high, mode="bilinear", align_corners=False)[0].sigmoid()
    scores, categories, kept = kept_queries(classes)
    masks = masks[kept]
    winner = (scores[:, None, None] * masks).argmax(0)
    id_map = torch.full(high, VOID, dtype=torch.int32, device=masks.device)
    segments: list[tuple[int, int]] = []
    stuff: dict[int, int] = {}
    for query, category in enumerate(categories.tolist()):
        won = winner == query
        area, own_area = won.sum().item(), (masks[query] >= 0.5).sum().item()
        if area == 0 or own_area == 0 or area / own_area < OVERLAP_THRESHOLD:
            continue
        if category in stuff:
            id_map[won] = stuff[category]
            continue
        segments.append((len(segments) + 1, category))
        id_map[won] = len(segments)
        if not IS_THING[category]:
            stuff[category] = len(segments)
    return id_map, segments


def huggingface_outputs(classes: Tensor, masks: Tensor) -> SimpleNamespace:
    return SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])


def panoptic(from_logits: bool, peer: str) -> tuple[Operation, Operation]:
    """Ours and one peer, "official" or "huggingface"."""
    predictions = panoptic_predictions()
    classes, logits = predictions.class_logits[-1, 0], layer_mask_logits(predictions)[0]

    def ours() -> object:
        if from_logits:
            return our_panoptic(classes, logits)
        return postprocess.panoptic(predictions, [HIGH], IS_THING, OBJECT_THRESHOLD, OVERLAP_THRESHOLD)

    processor = huggingface_processor() if peer == "huggingface" else None

    def theirs() -> object:
        masks = logits if from_logits else layer_mask_logits(predictions)[0]
        if processor is None:
            return official_panoptic(classes, masks)
        return processor.post_process_panoptic_segmentation(
            huggingface_outputs(classes, masks), OBJECT_THRESHOLD, overlap_mask_area_threshold=OVERLAP_THRESHOLD,
            label_ids_to_fuse=set(range(THINGS, THINGS + STUFF)), target_sizes=[HIGH],
        )  # fmt: skip

    return ours, theirs


def instance() -> tuple[Operation, Operation]:
    """Ours, with run lengths of each of 100 masks, and Hugging Face's, with those of the map they are painted on."""
    predictions = instance_predictions()
    classes, logits = predictions.class_logits[-1, 0], layer_mask_logits(predictions)[0]
    processor = huggingface_processor()

    def theirs() -> object:
        return processor.post_process_instance_segmentation(
            huggingface_outputs(classes, logits), threshold=0.0, target_sizes=[HIGH], return_coco_annotation=True
        )

    return lambda: our_instances(classes, logits), theirs


def panoptic_bound(from_logits: bool) -> Bound:
    """The kept queries' masks, or pixel embeddings read, and the map written; the product for these masks."""
    low, high = LOW[0] * LOW[1], HIGH[0] * HIGH[1]
    if from_logits:
        return Bound(4 * (KEPT * low + high))
    return Bound(4 * (CHANNELS * (low + KEPT) + high), 2.0 * KEPT * CHANNELS * low, "fp32")


def huggingface_processor() -> Any:
    import transformers  # comes with the extra `test`

    transformers.logging.set_verbosity_error()
    return transformers.MaskFormerImageProcessor()


def cases() -> list[Case]:
    """Rows of the table."""
    rows = []
    for peer, text, goal in (("official", "eager official formula", 25.0), ("huggingface", "Hugging Face", 8.0)):
        for from_logits, source in ((False, "predictions"), (True, "mask logits")):
            name = f"panoptic 160x240 -> 640x960 from {source}, {KEPT} of {QUERIES} queries kept ({peer})"
            rows.append(Case(name, text, goal, partial(panoptic, from_logits, peer), bound=panoptic_bound(from_logits)))
    name = f"instance 160x240 -> 640x960 from mask logits, {QUERIES} results as RLE"
    masks = Bound(QUERIES * (4 * LOW[0] * LOW[1] + HIGH[0] * HIGH[1] / 8))
    rows.append(Case(name, "Hugging Face", 10.0, instance, bound=masks))
    return rows
