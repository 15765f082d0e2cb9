"""Cost of giving a target to a query, for every decoder layer, image, query and target (paper section 3.3).

In C++ on the CPU and in Triton on CUDA (kernels/matching_cost.py), a tile of mask logits is computed from the
embeddings, compared with the packed targets and discarded, so the masks of a layer are never in memory together. The
eager twin also serves float64 and keeps the masks of one layer at a time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.mask_loss import focal_parameters, inside
from maskformer_fast.ops.nearest_masks import nearest_positions
from maskformer_fast.ops.registration import register_operator
from maskformer_fast.structures import Predictions, Targets


class _Arguments(NamedTuple):
    """Arguments of the operator.

    Floating-point tensors are all float32 or all float64. On CUDA float32 class logits may also come with embeddings
    and pixels of one half precision.
    """

    class_logits: Tensor  # [L, B, Q, K+1]
    embeddings: Tensor  # [L, B, Q, D]; mask logits [L, B, Q, h, w] where pixels is None
    pixels: Tensor | None  # [B, D, h, w]
    labels: Tensor  # [B, T] int64
    counts: Tensor  # [B] int64
    masks: Tensor  # [B, T, H, ceil(W/8)] uint8, packed
    valid_sizes: Tensor | None  # [B, 2] int64; None counts padding too
    input_size: tuple[int, int]  # H, W
    weights: tuple[float, float, float]  # class, mask, dice
    focal: tuple[float, float, float]  # weight of mask pixels, weight of other pixels, exponent

    @property
    def out_size(self) -> torch.Size:
        """Height and width of the mask logits."""
        return (self.embeddings if self.pixels is None else self.pixels).shape[-2:]


def _matching_cost_cpu(arguments: _Arguments) -> Tensor:
    class_logits, pixels = arguments.class_logits.contiguous(), arguments.pixels
    if class_logits.dtype == torch.float64:
        return _matching_cost_torch(arguments)
    layers, batch, queries, classes = class_logits.shape
    cost = _matching_cost_fake(arguments)
    depth, strides = (0, (0, 0, 0, 0)) if pixels is None else (pixels.shape[1], pixels.stride())
    # names keep the copies alive while their addresses are in use
    embeddings, labels, counts, masks = (tensor.contiguous() for tensor in (arguments.embeddings, *arguments[3:6]))
    valid_sizes = None if arguments.valid_sizes is None else arguments.valid_sizes.contiguous()
    inner = arguments.out_size if pixels is None else (depth,)
    maps, slots, (height, width) = arguments.out_size, labels.shape[1], arguments.input_size
    load_extension().matching_cost(
        address_of(class_logits, "class_logits", "float32", (layers, batch, queries, classes)),
        address_of(embeddings, "embeddings", "float32", (layers, batch, queries, *inner)),
        address_of(pixels, "pixels", "float32", (batch, depth, *maps), any_strides=True),
        strides,
        address_of(labels, "labels", "int64", (batch, slots)),
        address_of(counts, "counts", "int64", (batch,)),
        address_of(masks, "masks", "uint8", (batch, slots, height, (width + 7) // 8)),
        address_of(valid_sizes, "valid_sizes", "int64", (batch, 2)),
        (layers, batch, queries, classes, depth, *maps, slots, height, width),
        arguments.weights,
        arguments.focal,
        address_of(cost, "cost", "float32", (layers, batch, queries, slots)),
        torch.get_num_threads(),
    )
    return cost


def _matching_cost_cuda(arguments: _Arguments) -> Tensor:
    if arguments.class_logits.dtype == torch.float64:
        return _matching_cost_torch(arguments)
    cost = _matching_cost_fake(arguments)
    load_kernels("matching_cost").matching_cost_forward(*arguments, cost)
    return cost


def _matching_cost_fake(arguments: _Arguments) -> Tensor:
    return arguments.class_logits.new_empty(*arguments.class_logits.shape[:3], arguments.labels.shape[1])


def _check(arguments: _Arguments) -> None:
    for name, numbers, count in zip(_Arguments._fields[7:], arguments[7:], (2, 3, 3), strict=True):
        check(len(numbers) == count, name, f"{count} numbers", numbers)
    pixels = {} if arguments.pixels is None else {"pixels": arguments.pixels}
    floats = {"class_logits": arguments.class_logits, "embeddings": arguments.embeddings, **pixels}
    _check_tensors(floats, arguments, arguments.input_size, "")
    class_type, *types = (tensor.dtype for tensor in floats.values())
    allowed = {class_type}
    if arguments.class_logits.is_cuda and class_type == torch.float32:
        allowed |= {torch.float16, torch.bfloat16}
    fits = class_type in (torch.float32, torch.float64) and len(set(types)) == 1 and types[0] in allowed
    check(fits, ", ".join(floats), "all of torch.float32 or all of torch.float64", [class_type, *types])


def _check_tensors(
    floats: dict[str, Tensor],  # class logits, then mask embeddings and pixel embeddings or else mask logits, by name
    targets: Targets | _Arguments,
    input_size: tuple[int, int],
    prefix: str,  # of the targets' names
) -> None:
    """Raise ``ValueError`` for a shape, type or device that does not fit."""
    (class_name, class_logits), (name, embeddings), *rest = floats.items()
    check(class_logits.dim() == 4, class_name, "shape [L, B, Q, K+1]", tuple(class_logits.shape))
    layers, batch, queries = class_logits.shape[:3]
    wanted, dims = ("h, w", 5) if not rest else ("D", 4)
    check(embeddings.dim() == dims and embeddings.shape[:3] == class_logits.shape[:3], name,
          f"shape [{layers}, {batch}, {queries}, {wanted}] as of {class_name}", tuple(embeddings.shape))
    for pixel_name, pixels in rest:
        check(pixels.dim() == 4 and pixels.shape[:2] == (batch, embeddings.shape[3]), pixel_name,
              f"shape [{batch}, {embeddings.shape[3]}, h, w] as of {name}", tuple(pixels.shape))
    slots, (height, width) = targets.labels.shape[-1] if targets.labels.dim() else 0, input_size
    shapes = {"labels": (batch, slots), "counts": (batch,), "masks": (batch, slots, height, (width + 7) // 8),
              "valid_sizes": (batch, 2)}
    for field, shape in shapes.items():
        tensor, dtype = getattr(targets, field), torch.uint8 if field == "masks" else torch.int64
        if tensor is None:  # valid sizes alone may be missing
            continue
        check(tensor.shape == shape and tensor.dtype == dtype, f"{prefix}{field}", f"{dtype} {shape}",
              f"{tensor.dtype} {tuple(tensor.shape)}")
        check(tensor.device == class_logits.device, f"{prefix}{field}", f"on {class_logits.device} as {class_name}",
              tensor.device)
    for float_name, tensor in floats.items():
        check(tensor.is_floating_point(), float_name, "a floating-point type", tensor.dtype)
        check(tensor.device == class_logits.device, float_name, f"on {class_logits.device} as {class_name}",
              tensor.device)


_matching_cost = register_operator(
    "matching_cost(Tensor class_logits, Tensor embeddings, Tensor? pixels, Tensor labels, Tensor counts, Tensor masks, "
    "Tensor? valid_sizes, int[] input_size, float[] weights, float[] focal) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_matching_cost_cpu,
    cuda=_matching_cost_cuda,
    fake=_matching_cost_fake,
)


def _checked_arguments(
    floats: dict[str, Tensor],  # class logits, then mask embeddings and pixel embeddings or else mask logits, by name
    targets: Targets,
    loss: LossConfig,
) -> _Arguments:
    """Check the arguments and bring the floating-point tensors to one type."""
    class_logits, embeddings, *rest = floats.values()
    _check_tensors(floats, targets, targets.input_size, "targets.")
    dtype = torch.float32
    for tensor in floats.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    maps = [embeddings, *rest]
    kernel = class_logits.is_cuda and dtype == torch.float32
    if not kernel or any(tensor.dtype != embeddings.dtype for tensor in maps):
        maps = [tensor.to(dtype) for tensor in maps]
    return _Arguments(
        class_logits.detach().to(dtype),
        maps[0].detach(),
        maps[1].detach() if rest else None,
        targets.labels,
        targets.counts,
        targets.masks,
        targets.valid_sizes if loss.padding == "exclude" else None,
        targets.input_size,
        (loss.class_weight, loss.mask_weight, loss.dice_weight),
        focal_parameters(loss),
    )


def arguments_of_predictions(predictions: Predictions, targets: Targets, loss: LossConfig) -> _Arguments:
    """Check predictions and targets and bring their floating-point tensors to one type."""
    check(targets.input_size == predictions.input_size, "targets.input_size",
          f"that of the predictions {predictions.input_size}", targets.input_size)
    names = ("class_logits", "mask_embeddings", "pixel_embeddings")
    return _checked_arguments({f"predictions.{name}": getattr(predictions, name) for name in names}, targets, loss)


def matching_cost(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    loss: LossConfig,
) -> Tensor:
    """Weighted class, mask and dice cost of every pair -> [L, B, Q, T] float32 (float64 for float64 predictions).

    Class cost is minus the probability of the target's class. Mask cost is the focal loss (or binary
    cross-entropy) between the query's mask and the target, mean over pixels; dice cost is ``1 - (2 sum(p t) + 1) /
    (sum(p) + sum(t) + 1)``. Both are taken at the resolution of the mask logits, on targets sampled there with
    nearest neighbours. With ``loss.padding == "exclude"`` only the samples whose source pixel lies inside the image's
    valid size are in these sums and means. Columns beyond ``targets.counts`` are 0: nothing is computed for them.

    A query whose mask logits contain NaN or an infinity, or whose class logits contain NaN or +inf, has no finite cost
    in its layer and image; other costs are not affected.

    Half precision is computed in float32, also under autocast; there is no gradient. Float32 on the CPU runs over
    ``torch.get_num_threads()`` threads, keeps no masks, and gives the same costs for any number of threads. On CUDA a
    Triton kernel keeps no masks either, reads nothing back to the host and gives the same costs in every run. It takes
    embeddings in half precision as they are; products of them are exact. Float64 predictions take
    `matching_cost_eager`.

    Raises:
        ValueError: a shape, type or device that does not fit, predictions and targets not of one padded input size;
            on the CPU also a count or label out of range (on CUDA such a label costs NaN).
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    return _matching_cost(*arguments_of_predictions(predictions, targets, loss))


def matching_cost_from_logits(
    class_logits: Tensor,  # [L, B, Q, K+1] any float dtype
    mask_logits: Tensor,  # [L, B, Q, h, w] any float dtype
    targets: Targets,
    loss: LossConfig,
) -> Tensor:
    """`matching_cost` of mask logits in place of their factors -> [L, B, Q, T]."""
    floats = {"class_logits": class_logits, "mask_logits": mask_logits}
    return _matching_cost(*_checked_arguments(floats, targets, loss))


def matching_cost_eager(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    loss: LossConfig,
) -> Tensor:
    """`matching_cost` in plain PyTorch: the oracle of the tests, and the implementation for float64.

    A class logit of +inf and a label out of range are treated as ``softmax`` and ``gather`` treat them.
    """
    return _matching_cost_torch(arguments_of_predictions(predictions, targets, loss))


def _matching_cost_torch(arguments: _Arguments) -> Tensor:
    masks, dtype = arguments.masks, arguments.class_logits.dtype
    rows, columns = (
        nearest_positions(size, out, masks.device)
        for out, size in zip(arguments.out_size, arguments.input_size, strict=True)
    )
    with torch.autocast(masks.device.type, enabled=False):
        sampled = masks[:, :, rows][..., columns // 8] >> (columns % 8).to(torch.uint8) & 1  # [B, T, h, w]
        counted = None
        if arguments.valid_sizes is not None:
            inner = inside(arguments.valid_sizes, rows, columns)  # [B, h, w]
            sampled = sampled * inner.unsqueeze(1)
            counted = inner.flatten(1).unsqueeze(2).to(dtype)  # [B, h*w, 1]
        truth = sampled.flatten(2).transpose(1, 2).to(dtype)  # [B, h*w, T]
        layers, batch, queries = arguments.class_logits.shape[:3]
        cost = arguments.class_logits.new_empty(layers, batch, queries, arguments.labels.shape[1])
        for layer in range(layers):  # one at a time: all masks of one layer exist at once, not those of every layer
            logits = arguments.embeddings[layer].to(dtype).flatten(2)
            if arguments.pixels is not None:
                logits = torch.bmm(logits, arguments.pixels.to(dtype).flatten(2))
            cost[layer] = layer_cost(arguments, layer, logits, truth, counted)
        present = torch.arange(arguments.labels.shape[1], device=masks.device) < arguments.counts.unsqueeze(1)
        return cost.where(present.unsqueeze(1), 0)


class CostArguments(Protocol):
    """Arguments from which the cost of a layer follows."""

    @property
    def class_logits(self) -> Tensor: ...  # [L, B, Q, K+1]
    @property
    def labels(self) -> Tensor: ...  # [B, T] int64
    @property
    def weights(self) -> tuple[float, float, float]: ...
    @property
    def focal(self) -> tuple[float, float, float]: ...


def layer_cost(
    arguments: CostArguments,
    layer: int,
    logits: Tensor,  # [B, Q, n]
    truth: Tensor,  # [B, n, T]
    counted: Tensor | None,  # [B, n, 1], None counts every pixel
) -> Tensor:
    """Cost of one layer's pairs, from its logits and the targets at n pixels or points -> [B, Q, T]."""
    on_weight, off_weight, gamma = arguments.focal
    probability = logits.sigmoid()
    # Loss of each pixel where the target is off, and its change where it is on: a matrix product does the rest.
    off = F.softplus(logits)
    if gamma == 0.0:
        rise = (on_weight - off_weight) * off - on_weight * logits
        off = off_weight * off
    else:
        rise = on_weight * (1 - probability) ** gamma * (off - logits)
        off = off_weight * probability**gamma * off
        rise -= off

    def total(values: Tensor) -> Tensor:
        return values.sum(2, keepdim=True) if counted is None else torch.bmm(values, counted)

    samples = truth.shape[1] if counted is None else counted.sum(1, keepdim=True).clamp(min=1)
    mask = (total(off) + torch.bmm(rise, truth)) / samples
    overlap = torch.bmm(probability, truth)
    dice = 1 - (2 * overlap + 1) / (total(probability) + truth.sum(1, keepdim=True) + 1)
    index = arguments.labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
    chosen = arguments.class_logits[layer].softmax(-1).gather(2, index)
    class_weight, mask_weight, dice_weight = arguments.weights
    return mask_weight * mask + dice_weight * dice - class_weight * chosen
