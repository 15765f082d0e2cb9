"""Panoptic and instance results of one image beside the official formula and Hugging Face's functions.

"From predictions" is what users call: `postprocess` on mask and pixel embeddings of 256 channels, ours computing the
masks of the wanted queries only; the peers begin with the product that gives them all 100 masks. "From mask logits"
leaves the product out of both implementations, and `postprocess` with it: what it does beside is written out here.
"From the kept queries" gives both just the queries that take part: the operator alone.
"""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases.inputs import Size
from benchmarks.harness.case import Bound, Case, Operation, Work, beside
from maskformer_fast.core.metadata import VOID
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

QUERIES, CHANNELS = 100, 256
THINGS, STUFF = 80, 53  # COCO's
LOW, HIGH = (160, 240), (640, 960)
CUDA_LOW, CUDA_HIGH = (200, 334), (800, 1333)
KEPT, CUDA_KEPT = 25, 30
IS_THING = [True] * THINGS + [False] * STUFF
OBJECT_THRESHOLD, OVERLAP_THRESHOLD = 0.8, 0.8
OFFICIAL, HUGGINGFACE, TWIN = "eager official formula", "Hugging Face", "our eager twin"
LEAST_EQUAL = {OFFICIAL: 0.9, HUGGINGFACE: 0.9, TWIN: 0.9}
"""Least share of pixels in matching segments. Hugging Face counts a query's own pixels by another rule, so a segment
may stay that the official formula drops."""


def smooth_fields(count: int, cells: Size, generator: torch.Generator, low: Size) -> Tensor:
    """Random fields of about unit size that vary over some 1 / cells of the map -> [count, h, w]."""
    coarse = torch.randn(1, count, *cells, generator=generator)
    return F.interpolate(coarse, low, mode="bicubic", align_corners=False)[0]


def panoptic_logits(kept: int, queries: int, low: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Class logits [Q, K+1] and mask logits [Q, h, w].

    The kept queries are confident and share the image among them; the others repeat parts of it and are no objects.
    """
    classes = torch.randn(queries, THINGS + STUFF + 1, generator=generator)
    objects = torch.randperm(queries, generator=generator)[:kept]
    classes[:, -1] += 9
    classes[objects, torch.randint(0, THINGS + STUFF, (kept,), generator=generator)] += 20
    fields = smooth_fields(kept, (6, 9), generator, low)
    best = fields.topk(2, 0).values
    lead = fields - torch.where(fields == best[0], best[1], best[0])  # above 0 where a query is ahead of all others
    owner = torch.randint(0, kept, (queries,), generator=generator)
    owner[objects] = torch.arange(kept)
    return classes, (8 * lead[owner]).clamp(-8, 8) + 0.3 * smooth_fields(queries, (40, 60), generator, low)


def as_predictions(classes: Tensor, masks: Tensor, generator: torch.Generator, high: Size) -> Predictions:
    """Predictions whose class logits [Q, K+1] and mask logits [Q, h, w] are the given ones."""
    basis = torch.linalg.qr(torch.randn(CHANNELS, QUERIES, generator=generator)).Q  # orthonormal columns
    pixels = torch.einsum("dq,qhw->dhw", basis, masks)[None]
    return Predictions(classes[None, None], basis.T[None, None].contiguous(), pixels, torch.tensor([high]), high)


def panoptic_predictions(kept: int, low: Size, high: Size, device: torch.device) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    result = as_predictions(*panoptic_logits(kept, QUERIES, low, generator), generator, high)
    fields = ("class_logits", "mask_embeddings", "pixel_features")  # valid sizes stay on the host, as of `Predictor`
    return result._replace(**{name: getattr(result, name).to(device) for name in fields})


def rolled(predictions: Predictions, seed: int) -> Predictions:
    """Shift the scene to the right, which gives another as hard."""
    return predictions._replace(pixel_features=predictions.pixel_features.roll(31 * seed, -1))


def logits_of(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Class logits [Q, K+1] and mask logits [Q, h, w] of the last layer and the only image."""
    return predictions.class_logits[-1, 0], layer_mask_logits(predictions)[0]


def kept_queries(classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and categories of the queries that class logits [Q, K+1] keep, and which they are."""
    scores, categories = classes.softmax(-1).max(-1)
    kept = ((categories < classes.shape[-1] - 1) & (scores > OBJECT_THRESHOLD)).nonzero().flatten()
    return scores[kept], categories[kept], kept


def official(classes: Tensor, masks: Tensor, high: Size) -> Tensor:
    """The paper's inference as its code does it, at full size and query after query -> segment ids [H, W]."""
    masks = F.interpolate(masks[None], size=high, mode="bilinear", align_corners=False)[0].sigmoid()
    scores, categories, kept = kept_queries(classes)
    masks = masks[kept]
    winner = (scores[:, None, None] * masks).argmax(0)
    id_map = torch.full(high, VOID, dtype=torch.int32, device=masks.device)
    count = 0
    stuff: dict[int, int] = {}
    for query, category in enumerate(categories.tolist()):
        won = winner == query
        area, own_area = won.sum().item(), (masks[query] >= 0.5).sum().item()
        if area == 0 or own_area == 0 or area / own_area < OVERLAP_THRESHOLD:
            continue
        if category in stuff:
            id_map[won] = stuff[category]
            continue
        count += 1
        id_map[won] = count
        if not IS_THING[category]:
            stuff[category] = count
    return id_map


@cache
def huggingface_processor() -> Any:
    import transformers  # comes with the extra `test`

    transformers.logging.set_verbosity_error()
    return transformers.MaskFormerImageProcessor()


def huggingface_outputs(classes: Tensor, masks: Tensor) -> SimpleNamespace:
    return SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])


def huggingface(classes: Tensor, masks: Tensor, high: Size) -> Tensor:
    (result,) = huggingface_processor().post_process_panoptic_segmentation(
        huggingface_outputs(classes, masks), OBJECT_THRESHOLD, overlap_mask_area_threshold=OVERLAP_THRESHOLD,
        label_ids_to_fuse=set(range(THINGS, THINGS + STUFF)), target_sizes=[high],
    )  # fmt: skip
    segments: Tensor = result["segmentation"]
    return segments


def same_segments(ours: object, theirs: object) -> float:
    """Share of the pixels in matching segments: each of theirs with that of ours it overlaps most, void with void."""
    a, b = (id_map(result).clamp(min=0).long() for result in (ours, theirs))
    count = int(max(a.max(), b.max())) + 1
    together = torch.bincount((a * count + b).flatten(), minlength=count * count).view(count, count)
    matched = together[0, 0] + together[1:, 1:].max(0).values.sum()  # each of theirs with one of ours
    return (matched / a.numel()).item()


def id_map(result: object) -> Tensor:
    """Segment ids [H, W] of any implementation's result, 0 or less where no segment is."""
    if isinstance(result, PanopticSegments):
        return result.id_map[0]
    if isinstance(result, list) and isinstance(result[0], PanopticResult):
        return torch.as_tensor(result[0].id_map)
    assert isinstance(result, Tensor)
    return result


def predictions_setup(device: torch.device, kept: int = KEPT, low: Size = LOW, high: Size = HIGH) -> Work:
    base = panoptic_predictions(kept, low, high, device)

    def ours(predictions: Predictions) -> object:
        return postprocess.panoptic(predictions, [high], IS_THING, OBJECT_THRESHOLD, OVERLAP_THRESHOLD)

    peers = {
        OFFICIAL: lambda predictions: official(*logits_of(predictions), high),
        HUGGINGFACE: lambda predictions: huggingface(*logits_of(predictions), high),
    }
    return Work(ours, peers, lambda seed: (rolled(base, seed),), same_segments, LEAST_EQUAL)


def logits_setup(
    device: torch.device, kept: int = KEPT, queries: int = QUERIES, low: Size = LOW, high: Size = HIGH
) -> Work:
    """Segments of the mask logits of all queries, by the operator; a call chooses which queries to keep."""
    scene = panoptic_logits(kept, queries, low, torch.Generator().manual_seed(0))
    things = torch.tensor(IS_THING, device=device)

    def ours(classes: Tensor, masks: Tensor) -> object:
        scores, categories, kept = kept_queries(classes)
        return panoptic_inference(
            masks[kept][None], scores[None], categories[None], things, low, high, OVERLAP_THRESHOLD
        )

    peers = {OFFICIAL: partial(official, high=high), HUGGINGFACE: partial(huggingface, high=high)}
    return Work(ours, peers, lambda seed: tuple(logits.to(device) for logits in scene), same_segments, LEAST_EQUAL)


def kept_setup(device: torch.device, kept: int = CUDA_KEPT, low: Size = CUDA_LOW, high: Size = CUDA_HIGH) -> Work:
    """Segments of the mask logits of the kept queries, by the operator."""
    predictions = panoptic_predictions(kept, low, high, device)
    classes = predictions.class_logits[-1, 0]
    scores, categories, indices = kept_queries(classes)
    things = torch.tensor(IS_THING, device=device)

    def draw(seed: int) -> tuple[Tensor, ...]:
        return classes[indices], logits_of(rolled(predictions, seed))[1][indices], scores[None], categories[None]

    def by(operator: Any, _: Tensor, masks: Tensor, scores: Tensor, categories: Tensor) -> PanopticSegments:
        result: PanopticSegments = operator(masks[None], scores, categories, things, low, high, OVERLAP_THRESHOLD)
        return result

    peers: dict[str, Operation] = {
        OFFICIAL: lambda classes, masks, *_: official(classes, masks, high),
        HUGGINGFACE: lambda classes, masks, *_: huggingface(classes, masks, high),
        TWIN: partial(by, panoptic_inference_eager),
    }
    return Work(partial(by, panoptic_inference), peers, draw, same_segments, LEAST_EQUAL)


def instances_setup(device: torch.device, low: Size = CUDA_LOW, high: Size = CUDA_HIGH) -> Work:
    """Packed masks of all 100 queries with boxes, areas and scores."""
    predictions = panoptic_predictions(CUDA_KEPT, low, high, device)

    def agreement(ours: InstanceMasks, theirs: InstanceMasks) -> float:
        return (ours.masks == theirs.masks).float().mean().item()

    peers = {TWIN: lambda masks: instance_inference_eager(masks, low, high)}
    return Work(
        lambda masks: instance_inference(masks, low, high), peers,
        lambda seed: (layer_mask_logits(rolled(predictions, seed)),), agreement, {TWIN: 0.999},
    )  # fmt: skip


def bound(kept: int, low: Size, high: Size, product: bool, rate: str = "fp32") -> Bound:
    """The map written; the kept queries' masks read, or pixel embeddings, and the product for these masks."""
    small, large = low[0] * low[1], high[0] * high[1]
    if not product:
        return Bound(4.0 * (kept * small + large))
    return Bound(4.0 * (CHANNELS * (small + kept) + large), 2.0 * kept * CHANNELS * small, rate)


def cases(device: str) -> list[Case]:
    return cpu_cases() if device == "cpu" else cuda_cases()


def cpu_cases() -> list[Case]:
    rows = []
    for peer, short, goal in ((OFFICIAL, "official", 25.0), (HUGGINGFACE, "huggingface", 8.0)):
        for make, source in ((predictions_setup, "predictions"), (logits_setup, "mask logits")):
            name = f"panoptic 160x240 -> 640x960 from {source}, {KEPT} of {QUERIES} queries kept ({short})"
            least_work = bound(KEPT, LOW, HIGH, make is predictions_setup)
            rows.append(Case(name, peer, goal, make, bound=least_work))
    return rows


def cuda_cases() -> list[Case]:
    size = f"{CUDA_LOW[0]}x{CUDA_LOW[1]} -> {CUDA_HIGH[0]}x{CUDA_HIGH[1]}"
    low, high = CUDA_LOW[0] * CUDA_LOW[1], CUDA_HIGH[0] * CUDA_HIGH[1]
    goals = {OFFICIAL: 20.0, HUGGINGFACE: 20.0}
    from_kept = f"panoptic {size} from the kept queries, {CUDA_KEPT}"
    least_work = bound(CUDA_KEPT, CUDA_LOW, CUDA_HIGH, False)
    return [
        *beside(from_kept, goals, kept_setup, bound=least_work, peer_captured=False),
        *beside(from_kept, {TWIN: None}, kept_setup, bound=least_work, rank=2),
        *beside(
            f"panoptic {size} from predictions, {CUDA_KEPT} of {QUERIES} kept", goals,
            partial(predictions_setup, kept=CUDA_KEPT, low=CUDA_LOW, high=CUDA_HIGH),
            bound=bound(CUDA_KEPT, CUDA_LOW, CUDA_HIGH, True, "tf32"), captured=False, peer_captured=False,
        ),
        *beside(f"instance {size}, {QUERIES} queries", {TWIN: None}, instances_setup,
                bound=Bound(4.0 * QUERIES * low + QUERIES * high / 8), rank=1),
    ]  # fmt: skip
