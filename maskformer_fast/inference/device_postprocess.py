"""The part of post-processing that a device does: from predictions to tensors whose shapes no value decides.

`inference.postprocess` describes the steps, and `inference.device_parts` reads the results. Each function here takes
the final decoder layer of a batch. On a GPU the functions read nothing back, and copy nothing from the host but flags,
once: a CUDA graph can record them. The exception is the panoptic order ``official``, which reads the number of masks,
as masks of full size are many bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference.device_parts import PanopticMaps, RankedInstances, SemanticMaps, Size
from maskformer_fast.inference_config import PanopticOrder, PanopticRule, SemanticOrder
from maskformer_fast.ops.mask_product import mask_product
from maskformer_fast.ops.segments import instance_inference, panoptic_inference
from maskformer_fast.ops.semantic import (
    label_dtype,
    pixel_semantic_inference,
    pixel_semantic_scores,
    semantic_inference,
)
from maskformer_fast.ops.semantic import semantic_scores as query_semantic_scores
from maskformer_fast.ops.semantic_pruned import semantic_labels
from maskformer_fast.structures import PixelPredictions, Predictions


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


def in_one_precision(predictions: Predictions | PixelPredictions) -> Predictions | PixelPredictions:
    """On a GPU, all factors of the mask logits in the mask embeddings' dtype; else the predictions.

    Autocast leaves the features of a norm in float32. Where several tasks follow, they are converted once.
    """
    if isinstance(predictions, PixelPredictions) or not _on_gpu(predictions.mask_embeddings):
        return predictions
    dtype, projection = predictions.mask_embeddings.dtype, predictions.projection
    if projection is not None:
        projection = projection._replace(weight=projection.weight.to(dtype), bias=projection.bias.to(dtype))
    return predictions._replace(pixel_features=predictions.pixel_features.to(dtype), projection=projection)


@torch.no_grad()
def semantic_maps(
    predictions: Predictions | PixelPredictions,
    output_sizes: Sequence[Size],
    with_scores: bool = False,
    order: SemanticOrder = "direct",
) -> SemanticMaps:
    """Labels and, if asked for, the winners' scores; arguments and errors are those of `postprocess.semantic`."""
    _check_order(predictions, order)
    labels: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}
    values: Tensor | None
    for group in _groups(predictions, output_sizes):
        if isinstance(predictions, Predictions) and order in ("official", "huggingface"):
            values, best = _resized_scores(predictions, group, order).max(1)
            best = best.to(label_dtype(predictions.class_logits.shape[-1] - 1))
        elif isinstance(predictions, Predictions) and not with_scores and _prunes(predictions, order):
            embeddings, features = _factors(predictions, group, None)
            classes, extent = group.take(predictions.class_logits[-1]), group.extent(features, predictions.input_size)
            best = semantic_labels(classes, embeddings, features, predictions.projection, extent, group.output_size)
            values = None
        else:
            maps, extent = _window(_maps(predictions, group), predictions.input_size, group, order != "direct")
            if isinstance(predictions, PixelPredictions):
                best, values = pixel_semantic_inference(maps, extent, group.output_size, with_scores)
            else:
                classes = group.take(predictions.class_logits[-1])
                best, values, _ = semantic_inference(maps, classes, extent, group.output_size, with_scores)
        labels.update(zip(group.images, best, strict=True))
        if with_scores and values is not None:
            scores.update(zip(group.images, values, strict=True))
    return SemanticMaps(_in_order(labels), _in_order(scores) if with_scores else None)


@torch.no_grad()
def semantic_score_maps(
    predictions: Predictions | PixelPredictions,
    output_sizes: Sequence[Size],
    order: SemanticOrder = "direct",
) -> list[Tensor]:
    """Scores of every class at every pixel, as `postprocess.semantic_scores` gives them."""
    _check_order(predictions, order)
    maps_of: dict[int, Tensor] = {}
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
        maps_of.update(zip(group.images, scores, strict=True))
    return _in_order(maps_of)


@torch.no_grad()
def panoptic_maps(
    predictions: Predictions,
    output_sizes: Sequence[Size],
    is_thing: Sequence[bool],
    object_mask_threshold: float,
    overlap_threshold: float,
    order: PanopticOrder = "direct",
    rule: PanopticRule = "maskformer",
) -> PanopticMaps:
    """Id maps and the queries' rows; arguments and errors are those of `postprocess.panoptic`."""
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

    id_maps: dict[int, Tensor] = {}
    tables: dict[int, Tensor] = {}
    for group in _groups(predictions, output_sizes):
        logits = _mask_logits(predictions, group, slots)
        logits, extent = _window(logits, predictions.input_size, group, order == "official")
        group_scores, group_categories = group.take(scores), group.take(categories)
        segments = panoptic_inference(
            logits, group_scores, group_categories, things, extent, group.output_size, overlap_threshold, rule
        )
        columns = [segments.ids, group_categories, segments.areas, group_scores]
        table = torch.stack([column.to(torch.float64) for column in columns], -1)
        id_maps.update(zip(group.images, segments.id_map, strict=True))
        tables.update(zip(group.images, table, strict=True))
    flags = tuple(map(bool, is_thing))
    return PanopticMaps(_in_order(id_maps), flags, _stacked(tables, scores, (slots.shape[1], 4)))


@torch.no_grad()
def ranked_instances(
    predictions: Predictions,
    output_sizes: Sequence[Size],
    is_thing: Sequence[bool],
    top_k: int,
) -> RankedInstances:
    """Candidates, best first; arguments and errors are those of `postprocess.instances`."""
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

    masks: dict[int, Tensor] = {}
    boxes: dict[int, Tensor] = {}
    factors: dict[int, Tensor] = {}
    for group in _groups(predictions, output_sizes):
        logits = _mask_logits(predictions, group, slots)
        found = instance_inference(logits, group.extent(logits, predictions.input_size), group.output_size)
        for parts, rows in ((masks, found.masks), (boxes, found.boxes), (factors, found.scores)):
            parts.update(zip(group.images, rows, strict=True))
    mask_scores = _stacked(factors, best, (slots.shape[1],)).gather(1, slot_of_pair)
    scores = (best * mask_scores).masked_fill(mask_scores == 0, -1.0)  # 0: an empty mask; others have 0.5 or more
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return RankedInstances(
        labels=labels.gather(1, order),
        scores=scores,
        slots=slot_of_pair.gather(1, order),
        masks=_in_order(masks),
        boxes=_in_order(boxes),
        sizes=tuple((int(height), int(width)) for height, width in output_sizes),
        numbers=(scores >= 0).sum(1, dtype=torch.float64),
    )


def _in_order(rows: dict[int, Tensor]) -> list[Tensor]:
    """Values of a dictionary with the images' indices as keys, image by image."""
    return [rows[image] for image in range(len(rows))]


def _stacked(rows: dict[int, Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Stack rows of a shape image by image -> [B, ...]; `like` gives the kind of the result without images."""
    return torch.stack(_in_order(rows)) if rows else like.new_empty(0, *shape)


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
    """Low-resolution maps of the last layer, mask logits of all queries or class logits -> [b, N, h, w].

    On a GPU the logits of a pixel are adjacent in memory where possible, as semantic inference reads them.
    """
    if isinstance(predictions, PixelPredictions):
        return group.take(predictions.logits[-1])
    return _mask_logits(predictions, group, None, queries_innermost=_on_gpu(predictions.class_logits))


def _prunes(predictions: Predictions, order: SemanticOrder) -> bool:
    """Whether labels need not take all masks (`semantic_labels`): not on a GPU, where the host would wait."""
    return order == "direct" and not _on_gpu(predictions.class_logits)


def _mask_logits(
    predictions: Predictions,
    group: _Group,
    slots: Tensor | None,  # [B, N] int64, the queries wanted; None for all
    queries_innermost: bool = False,
) -> Tensor:
    """Mask logits of the last layer for a group's images -> [b, N, h, w] in the precision of `_factors`."""
    embeddings, features = _factors(predictions, group, slots)
    with torch.autocast(features.device.type, enabled=False):
        return mask_product(embeddings, features, predictions.projection, queries_innermost)


def _factors(predictions: Predictions, group: _Group, slots: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of a group's mask logits: mask embeddings [b, N, D] and pixel features [b, C, h, w].

    They are float32, on a GPU of the dtype of `in_one_precision`.
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


@functools.cache
def _on_device(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that is kept: the host waits for the device when it copies one there, and CUDA graphs read it later."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _check_queries(predictions: object, wanted: str) -> None:
    if isinstance(predictions, PixelPredictions):
        raise TypeError(f"predictions: expected Predictions, got PixelPredictions: per-pixel models give no {wanted}")


def _check_order(predictions: Predictions | PixelPredictions, order: SemanticOrder) -> None:
    queries = isinstance(predictions, Predictions)
    check_choice("order", order, ("direct", "official", *(("official_panoptic", "huggingface") if queries else ())))
