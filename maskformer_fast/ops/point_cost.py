"""Matching cost at random points of each image (Mask2Former, section 3.3.2; official behaviour).

The pixel embeddings are sampled at the points, so no mask is made: a layer's logits are one matrix product with as many
columns as points. In C++ on the CPU (csrc/points) and in Triton on CUDA (kernels/point_cost.py) losses at the points
are summed a chunk at a time, and the sums over targets are products of small matrices. In float64 it is the eager twin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.mask_loss import at_least_float32, focal_parameters
from maskformer_fast.ops.matching_cost import arguments_of_predictions, layer_cost
from maskformer_fast.ops.points import sample_maps, sample_masks, within_valid
from maskformer_fast.ops.registration import register_operator
from maskformer_fast.structures import Predictions, Targets


class _Arguments(NamedTuple):
    """Arguments of the operator. G is 1 where all layers have the same points, else L."""

    class_logits: Tensor  # [L, B, Q, K+1] float32/64
    logits: Tensor  # [L, B, Q, h, w], or [L, B, Q, P] at the points; dtype of the class logits, or half precision
    points: Tensor | None  # [G, B, P, 2] in the dtype of the class logits, None: logits are at the points
    truth: Tensor  # [G, B, T, P] in the dtype of the class logits, the targets at the points
    labels: Tensor  # [B, T] int64
    counts: Tensor  # [B] int64
    weights: tuple[float, float, float]  # class, mask, dice
    focal: tuple[float, float, float]  # weight of mask points, weight of other points, exponent


def _check(arguments: _Arguments) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a shape or type that does not fit."""
    class_logits, logits, points, truth, labels, counts, weights, focal = arguments
    exact = class_logits.dtype
    halves = (torch.bfloat16,) if logits.device.type == "cpu" else (torch.bfloat16, torch.float16)
    allowed = (exact,) if exact == torch.float64 else (torch.float32, *halves)
    if exact not in (torch.float32, torch.float64) or logits.dtype not in allowed:
        expected = f"torch.float32 (logits also {', '.join(map(str, halves))}), or all of torch.float64"
        raise TypeError(f"class_logits, logits: expected {expected}, got {exact}, {logits.dtype}")
    check(class_logits.dim() == 4, "class_logits", "shape [L, B, Q, K+1]", tuple(class_logits.shape))
    layers, batch, queries = class_logits.shape[:3]
    check(truth.dim() == 4 and truth.shape[0] in (1, layers) and truth.shape[1] == batch, "truth",
          f"shape [1 or {layers}, {batch}, T, P]", tuple(truth.shape))
    shared, _, slots, count = truth.shape
    inner = "P" if points is None else "h, w"
    fits = logits.shape[:3] == (layers, batch, queries) and logits.dim() == (4 if points is None else 5)
    check(fits and (points is not None or logits.shape[3] == count), "logits",
          f"shape [{layers}, {batch}, {queries}, {inner}], P = {count}", tuple(logits.shape))
    for name, tensor, shape in (("points", points, (shared, batch, count, 2)), ("truth", truth, truth.shape)):
        if tensor is not None:
            check(tensor.shape == shape and tensor.dtype == exact, name, f"{exact} {tuple(shape)}",
                  f"{tensor.dtype} {tuple(tensor.shape)}")
    for name, tensor, sizes in (("labels", labels, [batch, slots]), ("counts", counts, [batch])):
        check(list(tensor.shape) == sizes and tensor.dtype == torch.int64, name, f"torch.int64 {sizes}",
              f"{tensor.dtype} {list(tensor.shape)}")
    check(len(weights) == 3 and len(focal) == 3, "weights, focal", "three numbers each", [weights, focal])


def _point_cost_fake(arguments: _Arguments) -> Tensor:
    return arguments.class_logits.new_empty(*arguments.class_logits.shape[:3], arguments.labels.shape[1])


def _point_cost_cpu(arguments: _Arguments) -> Tensor:
    if arguments.class_logits.dtype == torch.float64:
        return _point_cost_torch(arguments)
    # the list keeps copies alive while their addresses are in use
    tensors = [None if tensor is None else tensor.contiguous() for tensor in arguments[:6]]
    names = ("class_logits", "logits", "points", "truth", "labels", "counts")
    dtypes = ("float32", dtype_name(arguments.logits), "float32", "float32", "int64", "int64")
    addresses = [
        0 if tensor is None else address_of(tensor, name, dtype, tensor.shape)
        for tensor, name, dtype in zip(tensors, names, dtypes, strict=True)
    ]
    shared, _, slots, count = arguments.truth.shape
    maps = (1, count) if arguments.points is None else arguments.logits.shape[3:]
    cost = _point_cost_fake(arguments)
    load_extension().point_cost(
        dtypes[1], addresses, [*arguments.class_logits.shape, *maps, slots, count, shared], arguments.weights,
        arguments.focal, address_of(cost, "cost", "float32", cost.shape), torch.get_num_threads(),
    )  # fmt: skip
    return cost


def _point_cost_cuda(arguments: _Arguments) -> Tensor:
    if arguments.class_logits.dtype == torch.float64:
        return _point_cost_torch(arguments)
    tensors = (None if tensor is None else tensor.contiguous() for tensor in arguments[:6])
    cost: Tensor = load_kernels("point_cost").point_cost_forward(*tensors, arguments.weights, arguments.focal)
    return cost


def _point_cost_torch(arguments: _Arguments) -> Tensor:
    class_logits, logits, points, truth, labels, counts, _, _ = arguments
    with torch.autocast(logits.device.type, enabled=False):
        costs = []
        for layer in range(len(logits)):  # one at a time: only one layer's values exist at once
            shared = layer if len(truth) > 1 else 0
            values = logits[layer].to(class_logits.dtype)
            values = values if points is None else sample_maps(values, points[shared])
            costs.append(layer_cost(arguments, layer, values, truth[shared].mT, None))
        present = torch.arange(labels.shape[1], device=labels.device) < counts.unsqueeze(1)
        return torch.stack(costs).where(present.unsqueeze(1), 0) if costs else _point_cost_fake(arguments)


_point_cost = register_operator(
    "point_cost(Tensor class_logits, Tensor logits, Tensor? points, Tensor truth, Tensor labels, Tensor counts, "
    "float[] weights, float[] focal) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_point_cost_cpu,
    cuda=_point_cost_cuda,
    fake=_point_cost_fake,
)


def _made_arguments(
    class_logits: Tensor, logits: Tensor, points: Tensor | None, truth: Tensor, labels: Tensor, counts: Tensor,
    loss: LossConfig,
) -> _Arguments:  # fmt: skip
    exact = torch.promote_types(torch.promote_types(class_logits.dtype, logits.dtype), torch.float32)
    if exact == torch.float64 or (logits.dtype == torch.float16 and logits.device.type == "cpu"):
        logits = logits.to(exact)
    points = None if points is None else points.detach().to(exact)
    return _Arguments(
        class_logits.detach().to(exact), logits.detach(), points, truth.detach().to(exact), labels, counts,
        (loss.class_weight, loss.mask_weight, loss.dice_weight), focal_parameters(loss),
    )  # fmt: skip


def point_cost(
    class_logits: Tensor,  # [L, B, Q, K+1] any float dtype
    logits: Tensor,  # [L, B, Q, h, w], or [L, B, Q, P] at the points; any float dtype
    points: Tensor | None,  # [G, B, P, 2], G = 1 or L; None: logits are at the points
    truth: Tensor,  # [G, B, T, P], targets at the points
    labels: Tensor,  # [B, T] int64
    counts: Tensor,  # [B] int64
    loss: LossConfig,  # weights and mask loss
) -> Tensor:
    """Costs of `matching_cost_at_points` from mask logits and sampled targets -> [L, B, Q, T] float32 or float64.

    Raises:
        ValueError: a shape, type or device that does not fit; on the CPU also a count or label out of range
            (on CUDA such a label costs NaN).
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    return _point_cost(*_made_arguments(class_logits, logits, points, truth, labels, counts, loss))


def point_cost_eager(
    class_logits: Tensor, logits: Tensor, points: Tensor | None, truth: Tensor, labels: Tensor, counts: Tensor,
    loss: LossConfig,
) -> Tensor:  # fmt: skip
    """Eager twin of `point_cost`: oracle of the tests, and the implementation for float64."""
    return _point_cost_torch(_made_arguments(class_logits, logits, points, truth, labels, counts, loss))


@torch.no_grad()
def matching_cost_at_points(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    points: Tensor,  # [B, P, 2], or [L, B, P, 2] for other points in each layer
    loss: LossConfig,
) -> Tensor:
    """Weighted class, mask and dice cost of every pair -> [L, B, Q, T] float32 (float64 for float64 predictions).

    The terms are those of `matching_cost`, with sums and means over the points: predictions and targets are sampled
    there bilinearly, with zeros outside. With ``loss.padding == "exclude"`` the points are moved into the image.
    Columns beyond ``targets.counts`` are 0. Half precision is computed in float32. A query whose logits at the points
    contain NaN or an infinity has no finite cost. Costs are the same for any number of threads, and on CUDA in every
    run.

    Raises:
        ValueError: a shape, type or device that does not fit; on the CPU also a count or label out of range
            (on CUDA such a label costs NaN).
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    arguments = arguments_of_predictions(predictions, targets, loss)
    layers, batch = arguments.class_logits.shape[:2]
    fits = points.shape[:-2] in ((batch,), (layers, batch)) and points.shape[-1] == 2 and points.shape[-2] > 0
    check(fits, "points", f"shape [{batch}, P, 2] or [{layers}, {batch}, P, 2]", tuple(points.shape))
    dtype = at_least_float32(arguments.class_logits).dtype
    slots, device = targets.labels.shape[1], points.device
    with torch.autocast(device.type, enabled=False):
        points = within_valid(points.to(dtype), targets, loss)
        pixels = predictions.pixel_embeddings.to(dtype)
        rows = torch.arange(batch * slots, device=device)
        images = rows // max(slots, 1)
        present = rows.view(batch, slots) - images.view(batch, slots) * slots < targets.counts.unsqueeze(1)
        rows = rows.where(present.flatten(), -1)
        masks, width = targets.masks.flatten(0, 1), targets.input_size[1]
        costs = []
        for layer in range(layers):  # one at a time: only one layer's logits exist at once
            if layer == 0 or points.dim() == 4:
                chosen = points[layer] if points.dim() == 4 else points
                sampled = sample_maps(pixels, chosen)  # [B, D, P]
                truth = sample_masks(masks, width, rows, chosen, images).view(1, batch, slots, chosen.shape[1])
            logits = torch.bmm(arguments.embeddings[layer].to(dtype), sampled)
            costs.append(point_cost(
                arguments.class_logits[layer : layer + 1], logits[None], None, truth, targets.labels, targets.counts,
                loss,
            ))  # fmt: skip
        return torch.cat(costs)
