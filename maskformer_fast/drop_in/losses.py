"""Matcher and mask losses of transformers' models, replaced by batched ones with the same results.

`equip_loss` replaces the two slow parts of a model's criterion. The rest of it, auxiliary layers, class loss and
weights, runs as before. Where a model samples points, they are drawn by the same calls in the same order, so that a
seed gives the same points with and without. The host does not wait for the device in either part.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskformer_fast.config import LossConfig
from maskformer_fast.drop_in.swap import restore_methods, swap_methods
from maskformer_fast.ops.assignment import linear_sum_assignment
from maskformer_fast.ops.mask_loss import focal_parameters
from maskformer_fast.ops.matching_cost import matching_cost_from_logits
from maskformer_fast.ops.nearest_masks import nearest_positions
from maskformer_fast.ops.point_cost import point_cost
from maskformer_fast.ops.point_loss import choose_points, losses_of_pairs
from maskformer_fast.ops.points import sample_masks
from maskformer_fast.structures import Targets, pack_masks

Model = TypeVar("Model")
Indices = list[tuple[Tensor, Tensor]]
ROWS_OF_POINTS = 1 << 14
"""Rows by which points are ordered."""
WORST_COST = 1e10
"""Cost in place of one that is not finite: beyond any other, and small enough that sums stay exact."""
FOCAL_LOSS = LossConfig(mask_loss="focal", focal_alpha=0.25, focal_gamma=2.0, padding="include")
"""Mask loss of MaskFormer, which transformers does not let one change."""
POINT_LOSS = LossConfig(mask_loss="bce", padding="include")
"""Mask loss of the models that sample points."""


def equip_loss(model: Model) -> Model:
    """Replace the matcher and the mask losses of a model for training, and return it.

    Args:
        model: MaskFormerForInstanceSegmentation, or Mask2Former-, OneFormer-, Eomt- or
            EomtDinov3ForUniversalSegmentation, or the criterion of one. Target masks
            are 0 or 1. Parameters, buffers and state dicts stay as they are.

    Raises:
        TypeError: no criterion of one of these models.
    """
    criterion = _criterion(unequip_loss(model))
    if criterion_family(criterion) == "MaskFormer":
        matcher, losses = _match_masks, {"loss_masks": _full_mask_losses}
    else:
        matcher, losses = _match_points, {"forward": _losses_of_all_layers, "loss_masks": _point_losses}
    swap_methods(criterion.matcher, {"forward": matcher}, _unchanged, {})
    swap_methods(criterion, losses, equip_loss, {})
    return model


def unequip_loss(model: Model) -> Model:
    """Put a model's own matcher and mask losses back, and return it."""
    criterion = _criterion(model)
    restore_methods(criterion)
    if hasattr(criterion, "matcher"):
        restore_methods(criterion.matcher)
    return model


def criterion_family(criterion: object) -> str:
    """Model that a criterion belongs to, by its class's name."""
    for parent in type(criterion).__mro__:
        if parent.__name__ in ("MaskFormerLoss", "Mask2FormerLoss", "OneFormerLoss", "EomtLoss", "EomtDinov3Loss"):
            return parent.__name__.removesuffix("Loss")
    expected = "a model for segmentation of MaskFormer, Mask2Former, OneFormer or EoMT, or its criterion"
    raise TypeError(f"model: expected {expected}, got {type(criterion).__name__}")


def _criterion(model: Any) -> Any:
    return getattr(model, "criterion", model)


def _unchanged(matcher: Any) -> Any:
    """A copied matcher, which the copy of its criterion equips."""
    return matcher


def _on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers on a device, to which they go without the host waiting."""
    numbers = torch.tensor(values, dtype=torch.int64)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def _assign(
    cost: Tensor,  # [B, Q, T] floating
    counts: Sequence[int],
) -> Indices:
    """Pairs of query and target of each image at the least cost, in the order of queries, as SciPy gives them."""
    cost = cost.to(torch.float32).nan_to_num(nan=WORST_COST, posinf=WORST_COST, neginf=WORST_COST)
    query = linear_sum_assignment(cost.clamp(-WORST_COST, WORST_COST), _on_device(counts, cost.device))
    queries, order = query.where(query >= 0, cost.shape[1]).sort(1)  # those without a query last
    pairs = [min(count, cost.shape[1]) for count in counts]
    return [(queries[image, :count], order[image, :count]) for image, count in enumerate(pairs)]


class _PackedMasks(NamedTuple):
    """Target masks of an image, 8 pixels a byte: small enough for the processor's cache."""

    bits: Tensor  # [T, H, ceil(W/8)] uint8
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.bits.shape[:2], self.width)


Masks = Tensor | _PackedMasks  # [T, H, W] each


def _losses_of_all_layers(self: Any, *arguments: Any, **named: Any) -> dict[str, Tensor]:
    """Compute the losses as the model's own method, with masks that are packed once for all layers."""
    plain = self._plain_class.forward
    bound = inspect.signature(plain).bind(self, *arguments, **named)
    bound.arguments["mask_labels"] = [
        masks if isinstance(masks, _PackedMasks) else _PackedMasks(pack_masks(masks != 0), masks.shape[2])
        for masks in bound.arguments["mask_labels"]
    ]
    losses: dict[str, Tensor] = plain(*bound.args, **bound.kwargs)
    return losses


def _samples(
    masks: Masks,
    rows: Tensor,  # [N] int64, the mask of each result
    points: Tensor,  # [G, P, 2]
    groups: Tensor,  # [N] int64, the points of each result
    extent: tuple[int, int] | None = None,  # size to which the masks count as padded
) -> Tensor:
    """Target masks at points, wherever the masks are -> [N, P] float32 on the device of ``points``."""
    width, values = masks.shape[2], masks.bits if isinstance(masks, _PackedMasks) else masks
    if values is masks and values.dtype not in (torch.float32, torch.bool):
        values = values.to(torch.float32)
    return sample_masks(values.to(points.device), width, rows, points, groups, extent)


def _by_rows(
    points: Tensor,  # [1, P, 2] floating, 0..1
) -> Tensor:
    """Points roughly in the order of rows on the CPU, where a cost is summed over them: masks are read once then."""
    if points.device.type != "cpu":
        return points
    rows = (points[0, :, 1] * ROWS_OF_POINTS).to(torch.int16).numpy()
    return points[:, torch.from_numpy(rows.argsort(kind="stable"))]  # a radix sort


@torch.no_grad()
def _match_points(
    self: Any,
    masks_queries_logits: Tensor,  # [B, Q, h, w]
    class_queries_logits: Tensor,  # [B, Q, K+1]
    mask_labels: Sequence[Masks],
    class_labels: Sequence[Tensor],  # [T] each
) -> Indices:
    """Match at random points, the same for all masks of an image."""
    device, counts = masks_queries_logits.device, [len(labels) for labels in class_labels]
    points = torch.cat([_by_rows(torch.rand(1, self.num_points, 2, device=device)) for _ in counts])
    sampled = [
        _samples(masks, every, points[image : image + 1], every * 0)
        for image, (masks, count) in enumerate(zip(mask_labels, counts, strict=True))
        for every in [torch.arange(count, device=device)]
    ]
    loss = replace(
        POINT_LOSS, class_weight=self.cost_class, mask_weight=self.cost_mask, dice_weight=self.cost_dice
    )
    labels = pad_sequence(list(class_labels), batch_first=True).to(device)
    cost = point_cost(
        class_queries_logits[None], masks_queries_logits[None], points[None],
        pad_sequence(sampled, batch_first=True)[None], labels, _on_device(counts, device), loss,
    )[0]  # fmt: skip
    return _assign(cost, counts)


@torch.no_grad()
def _match_masks(
    self: Any,
    masks_queries_logits: Tensor,  # [B, Q, h, w]
    class_queries_logits: Tensor,  # [B, Q, K+1]
    mask_labels: Sequence[Tensor],  # [T, H, W] each
    class_labels: Sequence[Tensor],  # [T] each
) -> Indices:
    """Match at the mask logits' size, where targets are sampled by nearest neighbours."""
    loss = replace(
        FOCAL_LOSS, class_weight=self.cost_class, mask_weight=self.cost_mask, dice_weight=self.cost_dice
    )
    if len({masks.shape[1:] for masks in mask_labels}) == 1:
        groups = [slice(0, len(mask_labels))]
    else:
        groups = [slice(image, image + 1) for image in range(len(mask_labels))]
    indices: Indices = []
    for group in groups:
        counts = [len(labels) for labels in class_labels[group]]
        cost = matching_cost_from_logits(
            class_queries_logits[group][None],
            masks_queries_logits[group][None],
            _targets(mask_labels[group], class_labels[group], counts, masks_queries_logits.shape[2:]),
            loss,
        )[0]
        indices += _assign(cost, counts)
    return indices


def _targets(
    mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor], counts: Sequence[int], size: Sequence[int]
) -> Targets:
    """Pack the pixels of targets of one size that nearest neighbours read at the mask logits' size."""
    device, (height, width) = mask_labels[0].device, size
    masks = pad_sequence([pack_masks(_nearest(masks, size).to(torch.bool)) for masks in mask_labels], batch_first=True)
    labels = pad_sequence(list(class_labels), batch_first=True).to(device)
    sizes = _on_device([height, width] * len(counts), device).view(-1, 2)
    return Targets(labels, _on_device(counts, device), masks, sizes, (height, width))


def _nearest(masks: Tensor, size: Sequence[int]) -> Tensor:
    """``F.interpolate(masks[None], size)[0]``, by strides where that is possible -> [T, *size]."""
    for side, (source, length) in enumerate(zip(masks.shape[1:], size, strict=True), 1):
        if source % length == 0:
            masks = masks[:, :: source // length] if side == 1 else masks[:, :, :: source // length]
        else:
            masks = masks.index_select(side, nearest_positions(source, length, masks.device))
    return masks


class _MatchedPairs:
    """Mask logits of the matched queries, and the places of their targets among all targets of the batch."""

    def __init__(self, masks_queries_logits: Tensor, mask_labels: Sequence[Tensor], indices: Indices) -> None:
        device = masks_queries_logits.device
        first, images, offsets = 0, [], []
        for image, (labels, (query, _)) in enumerate(zip(mask_labels, indices, strict=True)):
            images += [image] * len(query)
            offsets += [first] * len(query)
            first += len(labels)
        queries = torch.cat([query for query, _ in indices]).to(device)
        self.logits = masks_queries_logits[_on_device(images, device), queries]  # [N, h, w]
        self.targets = torch.cat([target for _, target in indices]).to(device) + _on_device(offsets, device)  # [N]


def _stacked(mask_labels: Sequence[Tensor]) -> Tensor:
    """Targets of all images, padded at the bottom and right to the largest size -> [sum of T, H, W]."""
    height, width = (max(masks.shape[side] for masks in mask_labels) for side in (1, 2))
    return torch.cat([F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1])) for masks in mask_labels])


def _full_mask_losses(
    self: Any,
    masks_queries_logits: Tensor,  # [B, Q, h, w]
    mask_labels: Sequence[Tensor],  # [T, H, W] each
    indices: Indices,
    num_masks: Tensor,
) -> dict[str, Tensor]:
    """Focal and dice loss of the matched masks at the targets' size."""
    pairs = _MatchedPairs(masks_queries_logits, mask_labels, indices)
    if len(pairs.targets) == 0:
        return _no_losses(masks_queries_logits)
    truth = _stacked([masks != 0 for masks in mask_labels])
    with torch.autocast(truth.device.type, enabled=False):
        sums = torch.ops.maskformer_fast.mask_sums(
            pairs.logits.to(torch.float32), pack_masks(truth), pairs.targets, None, truth.shape[2],
            list(focal_parameters(FOCAL_LOSS)),
        )  # fmt: skip
    entropy, overlap, total, area = (sums[:, column] for column in range(4))
    dice = 1 - (2 * overlap + 1) / (total + area + 1)
    pixels = truth.shape[1] * truth.shape[2]
    return {"loss_mask": entropy.sum() / pixels / num_masks, "loss_dice": dice.sum() / num_masks}


def _point_losses(
    self: Any,
    masks_queries_logits: Tensor,  # [B, Q, h, w]
    mask_labels: Sequence[Masks],
    indices: Indices,
    num_masks: Tensor,
) -> dict[str, Tensor]:
    """Cross-entropy and dice loss of the matched masks at points, most of them where the logits are least certain."""
    queries = [query.to(masks_queries_logits.device) for query, _ in indices]
    counts, device = [len(query) for query in queries], masks_queries_logits.device
    if sum(counts) == 0:
        return _no_losses(masks_queries_logits)
    first = range(0, masks_queries_logits.shape[0] * masks_queries_logits.shape[1], masks_queries_logits.shape[1])
    places = torch.cat([query + start for query, start in zip(queries, first, strict=True)])
    logits = masks_queries_logits.flatten(0, 1).index_select(0, places)  # [N, h, w]
    logits = logits if logits.dtype in (torch.bfloat16, torch.float64) else logits.to(torch.float32)
    every = torch.arange(len(places), device=device)
    uncertain = int(self.importance_sample_ratio * self.num_points)
    candidates = torch.rand(len(places), int(self.num_points * self.oversample_ratio), 2, device=device)
    random = torch.rand(len(places), self.num_points - uncertain, 2, device=device)
    points = choose_points(logits, every, candidates, random, uncertain)
    height, width = (max(masks.shape[side] for masks in mask_labels) for side in (1, 2))
    truth = torch.cat([
        _samples(masks, target.to(device), own, every[: len(target)], (height, width))
        for masks, (_, target), own in zip(mask_labels, indices, points.split(counts), strict=True)
    ])  # fmt: skip
    mask, dice = losses_of_pairs(logits, every, points, truth, POINT_LOSS)
    return {"loss_mask": mask.sum() / num_masks, "loss_dice": dice.sum() / num_masks}


def _no_losses(masks_queries_logits: Tensor) -> dict[str, Tensor]:
    return {name: masks_queries_logits.sum() * 0 for name in ("loss_mask", "loss_dice")}
