"""Panoptic and instance inference: segments from the masks of the kept queries (paper section 3.4).

Each operator is one pass over pixels, on the CPU in C++ (csrc/segments/), on CUDA in Triton (kernels/segments_*.py);
bounds settle most tiles. The eager twins are plain PyTorch by tiles of rows, with no loop over queries and no transfer
to the host: oracle of the tests and baseline of the benchmarks. No function has a gradient.

Logits should be finite. The operators treat NaN as -1e30 (no mask covers it), values beyond +-1e30, also infinities, as
+-1e30, and a negative or NaN score as 0. In the eager twins NaN spreads to the pixels around it.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference_config import PanopticRule
from maskformer_fast.ops.registration import register_operator
from maskformer_fast.ops.resample import check_geometry, resample_rows, row_tiles, without_float64
from maskformer_fast.structures import pack_masks


class PanopticSegments(NamedTuple):
    """Result of `panoptic_inference`."""

    id_map: Tensor  # [B, H, W] int32, VOID where no segment is
    ids: Tensor  # [B, N] int32: segment of the query's pixels, VOID if the query was dropped
    areas: Tensor  # [B, N] int64: pixels of the query's segment; of a dropped query those it would have had


class InstanceMasks(NamedTuple):
    """Result of `instance_inference`."""

    masks: Tensor  # [B, N, H, ceil(W/8)] uint8, packed
    areas: Tensor  # [B, N] int64
    boxes: Tensor  # [B, N, 4] float32: x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask
    scores: Tensor  # [B, N] float32: mean sigmoid over the mask's pixels, 0 for an empty mask


class _PanopticArguments(NamedTuple):
    mask_logits: Tensor  # [B, N, h, w] floating
    scores: Tensor  # [B, N] floating
    categories: Tensor  # [B, N] int64
    is_thing: Tensor  # [K] bool
    extent: tuple[float, float]
    output_size: tuple[int, int]
    overlap_threshold: float
    rule: PanopticRule


def _panoptic_inference_cpu(arguments: _PanopticArguments) -> tuple[Tensor, Tensor, Tensor]:
    logits = _with_adjacent_columns(arguments.mask_logits)
    scores, categories, is_thing = _contiguous_queries(arguments)
    id_map, ids, areas = _panoptic_inference_fake(arguments)
    queries = logits.shape[:2]
    load_extension().panoptic_inference(
        *_window_values(logits, arguments.extent, arguments.output_size),
        address_of(scores, "scores", "float32", queries),
        address_of(categories, "categories", "int64", queries),
        address_of(is_thing, "is_thing", "bool", (len(is_thing),)),
        len(is_thing),
        arguments.overlap_threshold,
        arguments.rule,
        address_of(id_map, "id_map", "int32", (len(logits), *arguments.output_size)),
        address_of(ids, "ids", "int32", queries),
        address_of(areas, "areas", "int64", queries),
        torch.get_num_threads(),
    )
    return id_map, ids, areas


def _panoptic_inference_cuda(arguments: _PanopticArguments) -> tuple[Tensor, Tensor, Tensor]:
    kernels = load_kernels("segments_panoptic")
    if arguments.mask_logits.shape[1] > kernels.MAX_QUERIES:
        return panoptic_inference_eager(*arguments)
    results = _panoptic_inference_fake(arguments)
    kernels.panoptic_segments(
        without_float64(arguments.mask_logits),
        *_contiguous_queries(arguments),
        arguments.extent,
        arguments.overlap_threshold,
        arguments.rule,
        *results,
    )
    return results


def _panoptic_inference_fake(arguments: _PanopticArguments) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries = arguments.mask_logits.shape[:2]
    id_map = arguments.mask_logits.new_empty((batch, *arguments.output_size), dtype=torch.int32)
    return id_map, id_map.new_empty((batch, queries)), id_map.new_empty((batch, queries), dtype=torch.int64)


_WINDOW = "float[2] extent, SymInt[2] output_size"
_panoptic_inference = register_operator(
    f"panoptic_inference(Tensor mask_logits, Tensor scores, Tensor categories, Tensor is_thing, {_WINDOW}, "
    "float overlap_threshold, str rule) -> (Tensor, Tensor, Tensor)",
    _PanopticArguments,
    check=lambda arguments: _check_panoptic(*arguments[:6], arguments.rule),
    cpu=_panoptic_inference_cpu,
    cuda=_panoptic_inference_cuda,
    fake=_panoptic_inference_fake,
)


def _contiguous_queries(arguments: _PanopticArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in float32, categories and flags of things, as the backends take them."""
    scores = arguments.scores.to(torch.float32).contiguous()
    return scores, arguments.categories.contiguous(), arguments.is_thing.contiguous()


@torch.no_grad()
def panoptic_inference(
    mask_logits: Tensor,  # [B, N, h, w] floating
    scores: Tensor,  # [B, N] floating
    categories: Tensor,  # [B, N] int64, VOID for a query that takes no part
    is_thing: Tensor,  # [K] bool
    extent: tuple[float, float],
    output_size: tuple[int, int],
    overlap_threshold: float,
    rule: PanopticRule = "maskformer",
) -> PanopticSegments:
    """Non-overlapping segments: each pixel goes to one query, and queries that keep too little are dropped.

    With M = sigmoid(mask logits resampled to the output, `resample`): query q wins the pixels where
    ``scores[q] * M[q]`` is largest (the first of equals), and owns those of its mask. By `rule`:

    - ``maskformer``, the official MaskFormer: q owns M[q] >= 0.5. The segment is all that q won; it stays if q won and
      owns at least a pixel each, and won / owned pixels >= `overlap_threshold`.
    - ``mask2former``, the official Mask2Former: as before, but the segment is what q won and owns, and must not be
      empty. The ratio still counts all that was won.
    - ``huggingface``, transformers' image processors: the segment is all that q won, but q owns only
      ``scores[q] * M[q]`` >= 0.5, and the ratio must be above the threshold, not equal to it. Its segment numbers are
      not followed: they start again from a merged segment's, so that two segments can share one.

    ``maskformer`` is the default because the published weights of this model were measured with it and it leaves the
    fewest pixels void.

    Pixels of no segment are void. Segments are numbered from 1 in the order of queries. Stuff joins the segment of its
    class if there is one already.

    On CUDA: Triton kernels for up to 256 queries, `panoptic_inference_eager` for more.

    Args:
        extent: height and width of the images in mask pixels, common to the batch.
        output_size: height H and width W of the result.

    Raises:
        ValueError: shapes that do not fit, an unknown rule, or a category for which `is_thing` has no flag (on CUDA,
            where a check would wait for the device, such a category counts as a thing's).
        TypeError: `categories` not int64 or `is_thing` not bool.
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    return PanopticSegments(
        *_panoptic_inference(mask_logits, scores, categories, is_thing, extent, output_size, overlap_threshold, rule)
    )


def _check_panoptic(
    mask_logits: Tensor,
    scores: Tensor,
    categories: Tensor,
    is_thing: Tensor,
    extent: tuple[float, float],
    output_size: tuple[int, int],
    rule: PanopticRule,
) -> None:
    check_choice("rule", rule, get_args(PanopticRule))
    check_logits(mask_logits, extent, output_size)
    for name, value in (("scores", scores), ("categories", categories)):
        check(value.shape == mask_logits.shape[:2], name, f"{list(mask_logits.shape[:2])}", list(value.shape))
    for name, value, dtype in (("categories", categories, torch.int64), ("is_thing", is_thing, torch.bool)):
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    check(is_thing.ndim == 1, "is_thing", "[K]", list(is_thing.shape))


def _segment_ids(
    categories: Tensor,  # [B, N] int64
    kept: Tensor,  # [B, N] bool
    is_thing: Tensor,  # [K] bool
) -> Tensor:
    """Number the kept queries from 1, stuff of one class alike -> [B, N] int32, VOID elsewhere."""
    stuff = kept & ~is_thing[categories.clamp(min=0)]
    same = (categories[:, :, None] == categories[:, None, :]) & stuff[:, :, None] & stuff[:, None, :]
    own = torch.arange(categories.shape[1], device=categories.device).expand_as(categories)
    first = torch.where(stuff, same.to(torch.int8).argmax(-1), own)  # argmax of 0s and 1s: the first 1
    number = (kept & (first == own)).cumsum(-1)
    return torch.where(kept, number.gather(-1, first), VOID).to(torch.int32)


@torch.no_grad()
def panoptic_inference_eager(
    mask_logits: Tensor,  # [B, N, h, w] floating
    scores: Tensor,  # [B, N] floating
    categories: Tensor,  # [B, N] int64
    is_thing: Tensor,  # [K] bool
    extent: tuple[float, float],
    output_size: tuple[int, int],
    overlap_threshold: float,
    rule: PanopticRule = "maskformer",
) -> PanopticSegments:
    """`panoptic_inference` in plain PyTorch."""
    _check_panoptic(mask_logits, scores, categories, is_thing, extent, output_size, rule)
    batch, num_queries = scores.shape
    device = mask_logits.device
    id_map = torch.full((batch, *output_size), VOID, dtype=torch.int32, device=device)
    won = torch.zeros((batch, num_queries), dtype=torch.int64, device=device)
    owned, areas = torch.zeros_like(won), torch.zeros_like(won)
    if num_queries == 0:
        return PanopticSegments(id_map, won.to(torch.int32), won)
    absent = (categories < 0)[:, :, None, None]
    scores = scores.to(torch.float32)[:, :, None, None]
    for image in range(batch):
        for rows in row_tiles(output_size, 3 * num_queries, device):
            masks = resample_rows(mask_logits[image], extent, output_size, rows).sigmoid_()
            values = masks * scores[image]
            own = (values if rule == "huggingface" else masks) >= 0.5
            winner = values.masked_fill_(absent[image], -1.0).max(0).indices
            inside = torch.ones_like(winner)
            if rule == "mask2former":
                inside = own.gather(0, winner[None])[0].to(torch.int64)
            owned[image] += own.sum((1, 2))
            won[image].scatter_add_(0, winner.flatten(), torch.ones_like(winner).flatten())
            areas[image].scatter_add_(0, winner.flatten(), inside.flatten())
            id_map[image, rows] = torch.where(inside > 0, winner, num_queries).to(torch.int32)
    won.masked_fill_(categories < 0, 0)  # where no query is present, the maximum is at the first
    areas.masked_fill_(categories < 0, 0)
    ratio = won.to(torch.float64) / owned  # in double, so that a ratio equal to the threshold is equal
    enough = ratio > overlap_threshold if rule == "huggingface" else ratio >= overlap_threshold
    ids = _segment_ids(categories, (areas > 0) & (owned > 0) & enough, is_thing)
    table = F.pad(ids, (0, 1), value=VOID)
    for image in range(batch):
        id_map[image] = table[image].index_select(0, id_map[image].flatten()).view(output_size)
    return PanopticSegments(id_map, ids, areas)


class _InstanceArguments(NamedTuple):
    mask_logits: Tensor  # [B, N, h, w] floating
    extent: tuple[float, float]
    output_size: tuple[int, int]


def _instance_inference_cpu(arguments: _InstanceArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = _with_adjacent_columns(arguments.mask_logits)
    masks, areas, boxes, scores = _instance_inference_fake(arguments)
    queries, (height, width) = logits.shape[:2], arguments.output_size
    load_extension().instance_inference(
        *_window_values(logits, arguments.extent, arguments.output_size),
        address_of(masks, "masks", "uint8", (*queries, height, (width + 7) // 8)),
        address_of(areas, "areas", "int64", queries),
        address_of(boxes, "boxes", "float32", (*queries, 4)),
        address_of(scores, "scores", "float32", queries),
        torch.get_num_threads(),
    )
    return masks, areas, boxes, scores


def _instance_inference_cuda(arguments: _InstanceArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = load_kernels("segments_instances")
    results = _instance_inference_fake(arguments)
    kernels.instance_masks(
        without_float64(arguments.mask_logits), arguments.extent, arguments.output_size, *results
    )
    return results


def _instance_inference_fake(arguments: _InstanceArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, queries), (height, width) = arguments.mask_logits.shape[:2], arguments.output_size
    masks = arguments.mask_logits.new_empty((batch, queries, height, (width + 7) // 8), dtype=torch.uint8)
    areas = masks.new_empty((batch, queries), dtype=torch.int64)
    scores = masks.new_empty((batch, queries), dtype=torch.float32)
    return masks, areas, scores.new_empty((batch, queries, 4)), scores


_instance_inference = register_operator(
    f"instance_inference(Tensor mask_logits, {_WINDOW}) -> (Tensor, Tensor, Tensor, Tensor)",
    _InstanceArguments,
    check=lambda arguments: check_logits(*arguments),
    cpu=_instance_inference_cpu,
    cuda=_instance_inference_cuda,
    fake=_instance_inference_fake,
)


@torch.no_grad()
def instance_inference(
    mask_logits: Tensor,  # [B, N, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> InstanceMasks:
    """Binary masks (logit > 0 after resampling to the output, `resample`), packed, with area, box and mask score.

    The mask score is ``sum(sigmoid * mask) / (area + 1e-6)``, as in Mask2Former and Hugging Face's MaskFormer, but at
    the output's resolution, which is that of the mask.

    Args:
        extent: height and width of the images in mask pixels, common to the batch.
        output_size: height H and width W of the result.

    Raises:
        ValueError: shapes that do not fit.
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    return InstanceMasks(*_instance_inference(mask_logits, extent, output_size))


@torch.no_grad()
def instance_inference_eager(
    mask_logits: Tensor,  # [B, N, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> InstanceMasks:
    """`instance_inference` in plain PyTorch."""
    check_logits(mask_logits, extent, output_size)
    batch, num_queries = mask_logits.shape[:2]
    height, width = output_size
    device = mask_logits.device
    masks = torch.empty((batch, num_queries, height, (width + 7) // 8), dtype=torch.uint8, device=device)
    areas = torch.zeros((batch, num_queries), dtype=torch.int64, device=device)
    sums = torch.zeros((batch, num_queries), dtype=torch.float64, device=device)
    rows_hit = torch.zeros((batch, num_queries, height), dtype=torch.bool, device=device)
    columns_hit = torch.zeros((batch, num_queries, width), dtype=torch.bool, device=device)
    for image in range(batch):
        for rows in row_tiles(output_size, 4 * num_queries, device):
            logits = resample_rows(mask_logits[image], extent, output_size, rows)
            mask = logits > 0
            masks[image, :, rows] = pack_masks(mask)
            areas[image] += mask.sum((1, 2))
            sums[image] += (logits.sigmoid_() * mask).sum((1, 2))
            rows_hit[image, :, rows] = mask.any(2)
            columns_hit[image] |= mask.any(1)
    scores = (sums / (areas + 1e-6)).to(torch.float32)
    x0, x1 = _span(columns_hit)
    y0, y1 = _span(rows_hit)
    boxes = torch.stack([x0, y0, x1, y1], -1) * (areas > 0)[..., None]
    return InstanceMasks(masks, areas, boxes.to(torch.float32), scores)


def _span(
    hit: Tensor,  # [B, N, S] bool
) -> tuple[Tensor, Tensor]:
    """Index of the first True and one past the last -> two [B, N] int64; undefined where there is none."""
    flags = hit.to(torch.int8)
    return flags.argmax(-1), hit.shape[-1] - flags.flip(-1).argmax(-1)


def check_logits(mask_logits: Tensor, extent: tuple[float, float], output_size: tuple[int, int]) -> None:
    """Raise ``ValueError`` for mask logits of another rank and for what `check_geometry` refuses."""
    check(mask_logits.ndim == 4, "mask_logits", "[B, N, h, w]", tuple(mask_logits.shape))
    check_geometry(mask_logits, extent, output_size)


def _with_adjacent_columns(mask_logits: Tensor) -> Tensor:
    """Convert to float32 rows without gaps; copies only where needed."""
    logits = mask_logits.to(torch.float32)
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _window_values(logits: Tensor, extent: tuple[float, float], output_size: tuple[int, int]) -> tuple[object, ...]:
    """Logits and the window that the output covers, as the extension takes them."""
    address = address_of(logits, "mask_logits", "float32", logits.shape, any_strides=True)
    return address, tuple(logits.shape), logits.stride()[:3], extent, output_size
