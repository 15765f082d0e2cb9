"""Results of a batch at the wanted sizes, from the network's predictions (paper section 3.4).

Each function takes the final decoder layer of a batch and one output size an image. Images of one geometry (valid size
and output size) are processed together. Predictions may be on any device and of any floating type. Nothing has a
gradient, and results stay on the device except the lists of segments.

On the CPU everything is computed in float32, and masks only of the queries that take part, whose number is read first.
On a GPU mask logits have the precision of the mask embeddings, for which the kernels have faster forms. A task reads
nothing back before its last operator is launched: the numbers of masks depend on shapes only (not in the order
``official``, whose masks of full size are many bytes), and one transfer at the end brings segments, or the numbers of
instances. Valid sizes are best on the host, as `Predictor` leaves them.

**Order of operations.** Published implementations resample at different points, which changes a few percent of the
labels:

- ``direct`` (default): mask logits are resampled from stride 4 to the output size, then sigmoid and classes. There is
  one resampling, and nothing of full size per query or class is in memory. Where the output size is the image's size in
  the network, it is the official result.
- ``official``: the semantic models of the official code upsample logits to the padded input, apply sigmoid and
  classes, crop the padding and resize the scores. Its panoptic models and per-pixel baselines resize the cropped
  logits instead: for semantic results of a panoptic model this is ``official_panoptic``.
- ``huggingface``: sigmoid and classes at stride 4, then the scores are resized; padding is not cropped, so parity holds
  for images that fill the padded input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.config import PanopticOrder, PanopticRule, SemanticOrder
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.metadata import VOID, segments_of_rows
from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.ops.mask_product import mask_product
from maskformer_fast.ops.segments import InstanceMasks, instance_inference, panoptic_inference
from maskformer_fast.ops.semantic import (
    label_dtype,
    pixel_semantic_inference,
    pixel_semantic_scores,
    semantic_inference,
)
from maskformer_fast.ops.semantic import semantic_scores as query_semantic_scores
from maskformer_fast.ops.semantic_pruned import semantic_labels
from maskformer_fast.structures import PixelPredictions, Predictions

Size = tuple[int, int]


class _Group(NamedTuple):
    """Images of a batch with one geometry."""

    images: list[int]
    valid_size: Size
    output_size: Size
    is_full_batch: bool

    def take(self, tensor: Tensor) -> Tensor:
        """Rows of a [B, ...] tensor that belong to the group's images."""
        # not by an index tensor, which would have to go to the device, and the host would wait
        return tensor if self.is_full_batch else torch.stack([tensor[image] for image in self.images])

    def extent(self, maps: Tensor, input_size: Size) -> tuple[float, float]:
        """Part of [..., h, w] maps that the images cover, in map pixels."""
        height, width = (v * m / i for v, m, i in zip(self.valid_size, maps.shape[-2:], input_size, strict=True))
        return height, width


@torch.no_grad()
def semantic(
    predictions: Predictions | PixelPredictions,
    output_sizes: Sequence[Size],
    with_scores: bool = False,
    order: SemanticOrder = "direct",
) -> list[SemanticResult]:
    """Class of every pixel: argmax over classes of the sum over queries of class probability x mask probability.

    Args:
        output_sizes: height, width of each image's result.
        with_scores: also return the winner's score (for per-pixel models its softmax probability).
        order: where resampling happens, see the module; per-pixel models support ``direct`` and ``official``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, number, or value.
    """
    _check_order(predictions, order)
    results: dict[int, SemanticResult] = {}
    scores: Tensor | None
    for group in _groups(predictions, output_sizes):
        if order in ("official", "huggingface") and isinstance(predictions, Predictions):
            scores, labels = _resized_scores(predictions, group, order).max(1)
            labels = labels.to(label_dtype(predictions.class_logits.shape[-1] - 1))
        elif order == "direct" and not with_scores and isinstance(predictions, Predictions):
            embeddings, features = _factors(predictions, group, None)
            classes, extent = group.take(predictions.class_logits[-1]), group.extent(features, predictions.input_size)
            labels = semantic_labels(classes, embeddings, features, predictions.projection, extent, group.output_size)
            scores = None
        else:
            maps, extent = _window(_maps(predictions, group), predictions.input_size, group, order != "direct")
            if isinstance(predictions, PixelPredictions):
                labels, scores = pixel_semantic_inference(maps, extent, group.output_size, with_scores)
            else:
                classes = group.take(predictions.class_logits[-1])
                labels, scores, _ = semantic_inference(maps, classes, extent, group.output_size, with_scores)
        for row, image in enumerate(group.images):
            results[image] = SemanticResult(labels[row], scores[row] if with_scores and scores is not None else None)
    return [results[image] for image in range(len(results))]


@torch.no_grad()
def semantic_scores(
    predictions: Predictions | PixelPredictions,
    output_sizes: Sequence[Size],
    order: SemanticOrder = "direct",
) -> list[Tensor]:
    """Scores of every class at every pixel, one [K, H, W] float32 tensor an image.

    They serve averaging over scales and flips, and evaluation that needs more than labels; `semantic` takes far less
    memory. Mask classification gives sums over queries (0..Q), per-pixel models softmax probabilities. Arguments and
    errors are those of `semantic`.
    """
    _check_order(predictions, order)
    results: dict[int, Tensor] = {}
    for group in _groups(predictions, output_sizes):
        if order in ("official", "huggingface") and isinstance(predictions, Predictions):
            scores = _resized_scores(predictions, group, order)
        else:
            maps, extent = _window(_maps(predictions, group), predictions.input_size, group, order != "direct")
            if isinstance(predictions, PixelPredictions):
                scores = pixel_semantic_scores(maps, extent, group.output_size)
            else:
                classes = group.take(predictions.class_logits[-1])
                scores = query_semantic_scores(maps, classes, extent, group.output_size)
        results.update(zip(group.images, scores, strict=True))
    return [results[image] for image in range(len(results))]


@torch.no_grad()
def panoptic(
    predictions: Predictions,
    output_sizes: Sequence[Size],
    is_thing: Sequence[bool],
    object_mask_threshold: float,
    overlap_threshold: float,
    order: PanopticOrder = "direct",
    rule: PanopticRule = "maskformer",
) -> list[PanopticResult]:
    """Non-overlapping segments (`panoptic_inference`); the default of `rule` is the official MaskFormer's.

    Queries take part whose best class is not "no object" and has a probability above `object_mask_threshold`; only
    their masks are computed. A segment's score is that probability (the highest, where stuff merged).

    Args:
        output_sizes: height, width of each image's result.
        is_thing: one flag a class; stuff segments of one class are merged.
        overlap_threshold: least share of its own mask (sigmoid >= 0.5) that a segment must win.
        order: where resampling happens, see the module.
        rule: implementation whose segments are made of these masks, see `panoptic_inference`.

    Raises:
        TypeError: predictions of a per-pixel model.
        ValueError: an argument of the wrong number or value.
    """
    _check_queries(predictions, "panoptic segments")
    check_choice("order", order, ("direct", "official"))
    for name, value in (("object_mask_threshold", object_mask_threshold), ("overlap_threshold", overlap_threshold)):
        check(0.0 <= value <= 1.0, name, "0..1", value)
    class_logits = predictions.class_logits[-1]
    things = _thing_flags(is_thing, class_logits)
    scores, categories = class_logits.to(torch.float32).softmax(-1).max(-1)
    kept = (categories < len(things)) & (scores > object_mask_threshold)
    categories = categories.masked_fill(~kept, VOID)
    slots = _compact(kept, kept.shape[1] if order == "direct" else None)
    scores, categories = scores.gather(1, slots), categories.gather(1, slots)

    maps: dict[int, Tensor] = {}
    tables: dict[int, Tensor] = {}
    for group in _groups(predictions, output_sizes):
        logits = _mask_logits(predictions, group, slots)
        logits, extent = _window(logits, predictions.input_size, group, order == "official")
        group_scores, group_categories = group.take(scores), group.take(categories)
        segments = panoptic_inference(
            logits, group_scores, group_categories, things, extent, group.output_size, overlap_threshold, rule
        )
        columns = [segments.ids, group_categories, segments.areas, group_scores]
        table = torch.stack([column.to(torch.float64) for column in columns], -1)  # exact: all below 2**53
        for row, image in enumerate(group.images):
            maps[image], tables[image] = segments.id_map[row], table[row]
    if not tables:
        return []
    rows = torch.stack([tables[image] for image in range(len(tables))]).tolist()  # the only transfer of results
    return [PanopticResult(maps[image], segments_of_rows(rows[image], is_thing)) for image in range(len(rows))]


class _RankedInstances(NamedTuple):
    """Candidates of one image, best score first; those with an empty mask have a negative score and are last."""

    masks: InstanceMasks  # of the image's group
    row: int  # of the image in its group
    scores: Tensor  # [P] float32
    order: Tensor  # [P] int64, index of the pair of query and class
    output_size: Size


@torch.no_grad()
def instances(
    predictions: Predictions,
    output_sizes: Sequence[Size],
    is_thing: Sequence[bool],
    top_k: int,
) -> list[InstanceResult]:
    """Scored instances, best first: the `top_k` best pairs of query and thing class, without those of an empty mask.

    A query may give several results of different classes; its mask is computed once. The score is the class
    probability (softmax with "no object") times the mean sigmoid over the mask, as in Mask2Former and Hugging Face. A
    query with NaN among its class logits gives no result.

    Args:
        output_sizes: height, width of each image's result.
        is_thing: one flag a class; stuff classes give no result and take no place among the `top_k`.

    Raises:
        TypeError: predictions of a per-pixel model.
        ValueError: an argument of the wrong number or value.
    """
    _check_queries(predictions, "instances")
    check(top_k > 0, "top_k", "> 0", top_k)
    class_logits = predictions.class_logits[-1]
    things = _thing_classes(is_thing, class_logits)
    probabilities = class_logits.to(torch.float32).softmax(-1).index_select(-1, things).nan_to_num(-1.0)  # NaN last
    best, pairs = probabilities.flatten(1).topk(min(top_k, probabilities.shape[1:].numel()))
    queries, labels = pairs // max(1, len(things)), things[pairs % max(1, len(things))]
    used = torch.zeros(class_logits.shape[:2], dtype=torch.bool, device=best.device).scatter_(1, queries, True)
    slots = _compact(used, min(class_logits.shape[1], best.shape[1]))
    slot_of_pair = (used.cumsum(1) - 1).gather(1, queries)

    ranked: dict[int, _RankedInstances] = {}
    for group in _groups(predictions, output_sizes):
        logits = _mask_logits(predictions, group, slots)
        masks = instance_inference(logits, group.extent(logits, predictions.input_size), group.output_size)
        pair_slots = group.take(slot_of_pair)
        scores = group.take(best) * masks.scores.gather(1, pair_slots)
        scores = scores.masked_fill(masks.areas.gather(1, pair_slots) == 0, -1.0)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        for row, image in enumerate(group.images):
            ranked[image] = _RankedInstances(masks, row, scores[row], order[row], group.output_size)
    if not ranked:
        return []
    counts = torch.stack([(ranked[image].scores >= 0).sum() for image in range(len(ranked))]).tolist()
    return [
        _best_instances(ranked[image], count, labels[image], slot_of_pair[image]) for image, count in enumerate(counts)
    ]


def _best_instances(
    ranked: _RankedInstances,
    count: int,
    labels: Tensor,  # [P] int64, class of each pair
    slot_of_pair: Tensor,  # [P] int64, mask of each pair
) -> InstanceResult:
    chosen = ranked.order[:count]
    slot = slot_of_pair[chosen]
    # index_select copies complete masks: five times faster here than masks[row, slot]
    masks, boxes = (tensor[ranked.row].index_select(0, slot) for tensor in (ranked.masks.masks, ranked.masks.boxes))
    return InstanceResult(labels[chosen], ranked.scores[:count], masks, boxes, ranked.output_size)


def _groups(predictions: Predictions | PixelPredictions, output_sizes: Sequence[Size]) -> Iterator[_Group]:
    """Group the images by geometry; valid sizes that are on the device are read from it."""
    valid_sizes = [(int(height), int(width)) for height, width in predictions.valid_sizes.tolist()]
    check(len(output_sizes) == len(valid_sizes), "output_sizes", f"{len(valid_sizes)} sizes", len(output_sizes))
    images: dict[tuple[Size, Size], list[int]] = {}
    for image, (valid, (height, width)) in enumerate(zip(valid_sizes, output_sizes, strict=True)):
        inside = all(0 < v <= i for v, i in zip(valid, predictions.input_size, strict=True))
        check(inside, "valid_sizes", f"sizes within {predictions.input_size}", valid)
        images.setdefault((valid, (int(height), int(width))), []).append(image)
    for (valid, size), members in images.items():
        yield _Group(members, valid, size, len(images) == 1)


def _maps(predictions: Predictions | PixelPredictions, group: _Group) -> Tensor:
    """Low-resolution maps of the last layer, mask logits of all queries or class logits -> [b, N, h, w]."""
    if isinstance(predictions, PixelPredictions):
        return group.take(predictions.logits[-1])
    return _mask_logits(predictions, group, None)


def _mask_logits(
    predictions: Predictions,
    group: _Group,
    slots: Tensor | None,  # [B, N] int64, the queries wanted; None for all
) -> Tensor:
    """Mask logits of the last layer for a group's images -> [b, N, h, w] in the precision of `_factors`."""
    embeddings, features = _factors(predictions, group, slots)
    with torch.autocast(features.device.type, enabled=False):
        return mask_product(embeddings, features, predictions.projection)


def _factors(predictions: Predictions, group: _Group, slots: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of a group's mask logits: mask embeddings [b, N, D] and pixel features [b, C, h, w].

    They are float32, on a GPU of the mask embeddings' dtype: autocast leaves the features of a norm in float32.
    """
    embeddings = predictions.mask_embeddings[-1]
    dtype = embeddings.dtype if _on_gpu(embeddings) else torch.float32
    if slots is not None:
        embeddings = embeddings.gather(1, slots[..., None].expand(-1, -1, embeddings.shape[-1]))
    return group.take(embeddings).to(dtype), group.take(predictions.pixel_features).to(dtype)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _window(maps: Tensor, input_size: Size, group: _Group, resize_twice: bool) -> tuple[Tensor, tuple[float, float]]:
    """Maps and extent for an operator; with ``resize_twice`` the maps are at the output size already."""
    if not resize_twice:
        return maps, group.extent(maps, input_size)
    return _resize(_crop(_resize(maps.to(torch.float32), input_size), group), group.output_size), group.output_size


def _resized_scores(predictions: Predictions, group: _Group, order: SemanticOrder) -> Tensor:
    """Class scores in the order ``official`` or ``huggingface``, resized last -> [b, K, H, W] float32."""
    masks = _mask_logits(predictions, group, None).to(torch.float32)
    if order == "official":
        masks = _resize(masks, predictions.input_size)
    probabilities = group.take(predictions.class_logits[-1]).to(torch.float32).softmax(-1)[..., :-1]
    with torch.autocast(masks.device.type, enabled=False):
        scores = torch.einsum("bqk,bqhw->bkhw", probabilities, masks.sigmoid())
    return _resize(_crop(scores, group) if order == "official" else scores, group.output_size)


def _resize(maps: Tensor, size: Size) -> Tensor:
    if maps.shape[1] == 0:  # no query takes part, which interpolate refuses
        return maps.new_empty((*maps.shape[:2], *size))
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _crop(maps: Tensor, group: _Group) -> Tensor:
    return maps[..., : group.valid_size[0], : group.valid_size[1]]


def _compact(
    used: Tensor,  # [B, Q] bool
    most: int | None,  # used queries an image can have; None: their number is read
) -> Tensor:
    """Indices of each image's queries, the used ones first and in order -> [B, N] int64.

    On the CPU N is the largest number of used queries of any image, so that no other mask is computed. On a GPU it is
    `most`: to read the number, the host would have to wait for the network.
    """
    if most is None or not _on_gpu(used):
        most = max(used.sum(1).tolist(), default=0)
    return used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]


def _thing_flags(is_thing: Sequence[bool], class_logits: Tensor) -> Tensor:
    """Check the flags and make a tensor of them -> [K] bool on the device of the logits."""
    num_classes = class_logits.shape[-1] - 1
    check(len(is_thing) == num_classes, "is_thing", f"{num_classes} flags", len(is_thing))
    return _on_device(tuple(map(bool, is_thing)), torch.bool, class_logits.device)


def _thing_classes(is_thing: Sequence[bool], class_logits: Tensor) -> Tensor:
    """Check the flags -> int64, the classes of things on the device of the logits."""
    _thing_flags(is_thing, class_logits)
    classes = tuple(number for number, thing in enumerate(is_thing) if thing)
    return _on_device(classes, torch.int64, class_logits.device)


@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that is kept, as the host waits for the device when it copies one there."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _check_queries(predictions: object, wanted: str) -> None:
    if isinstance(predictions, PixelPredictions):
        raise TypeError(f"predictions: expected Predictions, got PixelPredictions: per-pixel models give no {wanted}")


def _check_order(predictions: Predictions | PixelPredictions, order: SemanticOrder) -> None:
    queries = isinstance(predictions, Predictions)
    check_choice("order", order, ("direct", "official", *(("official_panoptic", "huggingface") if queries else ())))
