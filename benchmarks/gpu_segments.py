"""Panoptic and instance results of an 800x1333 image on a GPU beside the official formula and Hugging Face's function.

"From the kept queries" gives both sides just the 30 queries that take part: the operator alone. "From predictions" is
what users call, `postprocess.panoptic` on embeddings, of whose 100 queries 30 are kept; the peers begin with the
product that gives them all masks. Scenes are those of `cpu_segments`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from benchmarks.cpu_segments import (
    IS_THING,
    OBJECT_THRESHOLD,
    OVERLAP_THRESHOLD,
    THINGS,
    huggingface_outputs,
    huggingface_processor,
    kept_queries,
    official_panoptic,
    panoptic_predictions,
)
from benchmarks.gpu_harness import OURS, Bound, Case, Peer, Work
from maskformer_fast.core.results import PanopticResult
from maskformer_fast.inference import postprocess
from maskformer_fast.ops import instance_inference, panoptic_inference
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.segments import (
    InstanceMasks,
    PanopticSegments,
    instance_inference_eager,
    panoptic_inference_eager,
)
from maskformer_fast.structures import Predictions

OFFICIAL, HUGGINGFACE, TWIN = "official formula", "Hugging Face", "our eager twin"
KEPT, QUERIES = 30, 100
LOW, HIGH = (200, 334), (800, 1333)
Size = tuple[int, int]

processor = cache(huggingface_processor)


def official(classes: Tensor, masks: Tensor, high: Size) -> Tensor:
    return official_panoptic(classes, masks, high)[0]


def huggingface(classes: Tensor, masks: Tensor, high: Size) -> Tensor:
    (result,) = processor().post_process_panoptic_segmentation(
        huggingface_outputs(classes, masks), OBJECT_THRESHOLD, overlap_mask_area_threshold=OVERLAP_THRESHOLD,
        label_ids_to_fuse=set(range(THINGS, len(IS_THING))), target_sizes=[high],
    )  # fmt: skip
    return result["segmentation"]


def id_map(result: object) -> Tensor:
    """[H, W], 0 or less where no segment is."""
    if isinstance(result, PanopticSegments):
        return result.id_map[0]
    if isinstance(result, list) and isinstance(result[0], PanopticResult):
        return result[0].id_map
    assert isinstance(result, Tensor)
    return result


def same_segments(ours: object, theirs: object) -> float:
    """Share of the pixels in matching segments: each of theirs with that of ours it overlaps most, void with void."""
    a, b = (id_map(result).clamp(min=0).long() for result in (ours, theirs))
    count = int(max(a.max(), b.max())) + 1
    together = torch.bincount((a * count + b).flatten(), minlength=count * count).view(count, count)
    matched = together[0, 0] + together[1:, 1:].max(0).values.sum()  # each of theirs with one of ours
    return (matched / a.numel()).item()


def rolled(predictions: Predictions, seed: int) -> Predictions:
    """Another scene as hard: everything further to the right."""
    return predictions._replace(pixel_features=predictions.pixel_features.roll(31 * seed, -1))


def kept_setup(device: torch.device, low: Size = LOW, high: Size = HIGH) -> Work:
    predictions = to_device(panoptic_predictions(KEPT, low, high), device)
    classes = predictions.class_logits[-1, 0]
    scores, categories, kept = kept_queries(classes)
    things = torch.tensor(IS_THING, device=device)

    def draw(seed: int) -> tuple[Tensor, ...]:
        masks = layer_mask_logits(rolled(predictions, seed))[0, kept]
        return classes[kept], masks, scores[None], categories[None]

    def ours(_: Tensor, masks: Tensor, scores: Tensor, categories: Tensor) -> PanopticSegments:
        return panoptic_inference(masks[None], scores, categories, things, low, high, OVERLAP_THRESHOLD)

    def twin(_: Tensor, masks: Tensor, scores: Tensor, categories: Tensor) -> PanopticSegments:
        return panoptic_inference_eager(masks[None], scores, categories, things, low, high, OVERLAP_THRESHOLD)

    sides = {
        OURS: ours,
        OFFICIAL: lambda classes, masks, *_: official(classes, masks, high),
        HUGGINGFACE: lambda classes, masks, *_: huggingface(classes, masks, high),
        TWIN: twin,
    }
    # Hugging Face counts a query's own pixels by another rule, so a segment may stay that the official formula drops.
    return Work(draw, sides, same_segments, 0.9)


def predictions_setup(device: torch.device, low: Size = LOW, high: Size = HIGH) -> Work:
    base = to_device(panoptic_predictions(KEPT, low, high), device)

    def ours(predictions: Predictions) -> list[PanopticResult]:
        return postprocess.panoptic(predictions, [high], IS_THING, OBJECT_THRESHOLD, OVERLAP_THRESHOLD)

    sides = {
        OURS: ours,
        OFFICIAL: lambda predictions: official(
            predictions.class_logits[-1, 0], layer_mask_logits(predictions)[0], high
        ),
        HUGGINGFACE: lambda predictions: huggingface(
            predictions.class_logits[-1, 0], layer_mask_logits(predictions)[0], high
        ),
    }
    return Work(lambda seed: (rolled(base, seed),), sides, same_segments, 0.9)


def instances_setup(device: torch.device, low: Size = LOW, high: Size = HIGH) -> Work:
    """Packed masks of all 100 queries with boxes, areas and scores."""
    predictions = to_device(panoptic_predictions(KEPT, low, high), device)

    def agreement(ours: InstanceMasks, theirs: InstanceMasks) -> float:
        return (ours.masks == theirs.masks).float().mean().item()

    sides = {
        OURS: lambda masks: instance_inference(masks, low, high),
        TWIN: lambda masks: instance_inference_eager(masks, low, high),
    }
    return Work(lambda seed: (layer_mask_logits(rolled(predictions, seed)),), sides, agreement, 0.999)


def to_device(predictions: Predictions, device: torch.device) -> Predictions:
    fields = ("class_logits", "mask_embeddings", "pixel_features", "valid_sizes")
    return predictions._replace(**{name: getattr(predictions, name).to(device) for name in fields})


def cases() -> list[Case]:
    low, high = LOW[0] * LOW[1], HIGH[0] * HIGH[1]
    size = f"{LOW[0]}x{LOW[1]} -> {HIGH[0]}x{HIGH[1]}"
    peers = (Peer(OFFICIAL, 20.0, graph=False), Peer(HUGGINGFACE, 20.0, graph=False))
    return [
        Case(f"panoptic {size} from the kept queries, {KEPT}", kept_setup, (*peers, Peer(TWIN, rank=2)),
             Bound(4.0 * KEPT * low + 4.0 * high)),
        Case(f"panoptic {size} from predictions, {KEPT} of {QUERIES} kept", predictions_setup, peers,
             Bound(4.0 * 256 * low + 4.0 * high, 2.0 * KEPT * 256 * low, "tf32"), graph=False),
        Case(f"instance {size}, {QUERIES} queries", instances_setup, (Peer(TWIN),),
             Bound(4.0 * QUERIES * low + QUERIES * high / 8), rank=1),
    ]  # fmt: skip
