"""Cost of giving a target to a query, for every decoder layer, image, query and target (paper section 3.3).

In C++ on the CPU and in Triton on CUDA (kernels/matching_cost.py): a tile of mask logits is multiplied out of the
embeddings, compared with the packed targets and forgotten, so the masks of a layer never exist. The eager twin, which
also serves float64, holds those of one layer at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.mask_loss import focal_parameters, inside
from maskformer_fast.structures import Predictions, Targets


class _Inputs(NamedTuple):
    """Arguments of the operator. Its floats are all float32 or all float64, but on CUDA float32 class logits may come
    with embeddings and pixels of one half precision."""

    class_logits: Tensor  # [L, B, Q, K+1]
    embeddings: Tensor  # [L, B, Q, D], or where pixels is None the mask logits [L, B, Q, h, w]
    pixels: Tensor | None  # [B, D, h, w]
    labels: Tensor  # [B, T] int64
    counts: Tensor  # [B] int64
    masks: Tensor  # [B, T, H, ceil(W/8)] uint8, packed
    valid_sizes: Tensor | None  # [B, 2] int64; None counts padding too
    input_size: list[int]  # H, W
    weights: list[float]  # class, mask, dice
    focal: list[float]  # weight of mask pixels, of the others, exponent

    @property
    def out_size(self) -> torch.Size:
        return (self.embeddings if self.pixels is None else self.pixels).shape[-2:]


_library = torch.library.Library("maskformer_fast", "FRAGMENT")
_library.define(
    "matching_cost(Tensor class_logits, Tensor embeddings, Tensor? pixels, Tensor labels, Tensor counts, Tensor masks, "
    "Tensor? valid_sizes, int[] input_size, float[] weights, float[] focal) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _matching_cost_cpu(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments)
    class_logits, pixels = inputs.class_logits.contiguous(), inputs.pixels
    if class_logits.dtype == torch.float64:
        return _matching_cost_torch(*arguments)
    layers, batch, queries, classes = class_logits.shape
    slots = inputs.labels.shape[1]
    cost = class_logits.new_empty(layers, batch, queries, slots)
    depth, strides = (0, (0, 0, 0, 0)) if pixels is None else (pixels.shape[1], pixels.stride())
    # held by a name while their addresses are in use
    embeddings, labels, counts, masks = (t.contiguous() for t in (inputs.embeddings, *inputs[3:6]))
    valid_sizes = None if inputs.valid_sizes is None else inputs.valid_sizes.contiguous()
    load_extension().matching_cost(
        class_logits.data_ptr(),
        embeddings.data_ptr(),
        0 if pixels is None else pixels.data_ptr(),
        strides,
        labels.data_ptr(),
        counts.data_ptr(),
        masks.data_ptr(),
        0 if valid_sizes is None else valid_sizes.data_ptr(),
        (layers, batch, queries, classes, depth, *inputs.out_size, slots, *inputs.input_size),
        inputs.weights,
        inputs.focal,
        cost.data_ptr(),
        torch.get_num_threads(),
    )
    return cost


def _matching_cost_cuda(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments)
    if inputs.class_logits.dtype == torch.float64:
        return _matching_cost_torch(*arguments)
    cost = _matching_cost_fake(*arguments)
    load_kernels("matching_cost").matching_cost_forward(*inputs, cost)
    return cost


def _nearest(out: int, size: int, device: torch.device) -> Tensor:
    """Pixel (of ``size``) that each of ``out`` samples of ``F.interpolate(mode="nearest")`` reads -> int64 [out]."""
    # float32, like torch's own: exact integer arithmetic would choose another pixel where the scale rounds down.
    index = torch.arange(out, device=device, dtype=torch.float32) * (size / out)
    return index.long().clamp(max=size - 1)


def _matching_cost_torch(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments)
    masks, dtype = inputs.masks, inputs.class_logits.dtype
    rows, columns = (
        _nearest(out, size, masks.device) for out, size in zip(inputs.out_size, inputs.input_size, strict=True)
    )
    with torch.autocast(masks.device.type, enabled=False):
        sampled = masks[:, :, rows][..., columns // 8] >> (columns % 8).to(torch.uint8) & 1  # [B, T, h, w]
        counted = None
        if inputs.valid_sizes is not None:
            inner = inside(inputs.valid_sizes, rows, columns)  # [B, h, w]
            sampled = sampled * inner.unsqueeze(1)
            counted = inner.flatten(1).unsqueeze(2).to(dtype)  # [B, h*w, 1]
        truth = sampled.flatten(2).transpose(1, 2).to(dtype)  # [B, h*w, T]
        layers, batch, queries = inputs.class_logits.shape[:3]
        cost = inputs.class_logits.new_empty(layers, batch, queries, inputs.labels.shape[1])
        for layer in range(layers):  # one at a time: all masks of one layer exist at once, not those of every layer
            logits = inputs.embeddings[layer].to(dtype).flatten(2)
            if inputs.pixels is not None:
                logits = torch.bmm(logits, inputs.pixels.to(dtype).flatten(2))
            cost[layer] = _layer_cost(inputs, layer, logits, truth, counted)
        present = torch.arange(inputs.labels.shape[1], device=masks.device) < inputs.counts.unsqueeze(1)
        return cost.where(present.unsqueeze(1), 0)


def _layer_cost(
    inputs: _Inputs,
    layer: int,
    logits: Tensor,  # [B, Q, n]
    truth: Tensor,  # [B, n, T]
    counted: Tensor | None,  # [B, n, 1], None counts every pixel
) -> Tensor:  # [B, Q, T]
    on_weight, off_weight, gamma = inputs.focal
    probability = logits.sigmoid()
    # Loss of each pixel where the target is off, and what being on adds to it: a matrix product does the rest.
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
    index = inputs.labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
    chosen = inputs.class_logits[layer].softmax(-1).gather(2, index)
    class_weight, mask_weight, dice_weight = inputs.weights
    return mask_weight * mask + dice_weight * dice - class_weight * chosen


def _matching_cost_fake(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments)
    return inputs.class_logits.new_empty(*inputs.class_logits.shape[:3], inputs.labels.shape[1])


_library.impl("matching_cost", _matching_cost_cpu, "CPU")
_library.impl("matching_cost", _matching_cost_cuda, "CUDA")
torch.library.register_fake("maskformer_fast::matching_cost", _matching_cost_fake, lib=_library)


def _inputs(
    floats: dict[str, Tensor],  # class logits, then mask embeddings and pixel embeddings or else mask logits, by name
    targets: Targets,
    loss: LossConfig,
) -> _Inputs:
    """Check the arguments (the extension sees addresses only) and bring the floats to one type."""
    (class_name, class_logits), (name, embeddings), *rest = floats.items()
    check(class_logits.dim() == 4, class_name, "shape [L, B, Q, K+1]", tuple(class_logits.shape))
    layers, batch, queries = class_logits.shape[:3]
    wanted, dims = ("h, w", 5) if not rest else ("D", 4)
    check(embeddings.dim() == dims and embeddings.shape[:3] == class_logits.shape[:3], name,
          f"shape [{layers}, {batch}, {queries}, {wanted}] as of {class_name}", tuple(embeddings.shape))
    for pixel_name, pixels in rest:
        check(pixels.dim() == 4 and pixels.shape[:2] == (batch, embeddings.shape[3]), pixel_name,
              f"shape [{batch}, {embeddings.shape[3]}, h, w] as of {name}", tuple(pixels.shape))
    slots, (height, width) = targets.labels.shape[-1], targets.input_size
    shapes = {"labels": (batch, slots), "counts": (batch,), "masks": (batch, slots, height, (width + 7) // 8),
              "valid_sizes": (batch, 2)}
    for field, shape in shapes.items():
        tensor, dtype = getattr(targets, field), torch.uint8 if field == "masks" else torch.int64
        check(tensor.shape == shape and tensor.dtype == dtype, f"targets.{field}", f"{dtype} {shape}",
              f"{tensor.dtype} {tuple(tensor.shape)}")
        check(tensor.device == class_logits.device, f"targets.{field}", f"on {class_logits.device} as {class_name}",
              tensor.device)
    dtype = torch.float32
    for float_name, tensor in floats.items():
        check(tensor.is_floating_point(), float_name, "a floating-point type", tensor.dtype)
        check(tensor.device == class_logits.device, float_name, f"on {class_logits.device} as {class_name}",
              tensor.device)
        dtype = torch.promote_types(dtype, tensor.dtype)
    maps = [embeddings, *(pixels for _, pixels in rest)]
    kernel = class_logits.is_cuda and dtype == torch.float32
    if not kernel or any(tensor.dtype != embeddings.dtype for tensor in maps):
        maps = [tensor.to(dtype) for tensor in maps]
    return _Inputs(
        class_logits.detach().to(dtype),
        maps[0].detach(),
        maps[1].detach() if rest else None,
        targets.labels,
        targets.counts,
        targets.masks,
        targets.valid_sizes if loss.padding == "exclude" else None,
        [height, width],
        [loss.class_weight, loss.mask_weight, loss.dice_weight],
        list(focal_parameters(loss)),
    )


def _prediction_inputs(predictions: Predictions, targets: Targets, loss: LossConfig) -> _Inputs:
    check(targets.input_size == predictions.input_size, "targets.input_size",
          f"that of the predictions {predictions.input_size}", targets.input_size)
    names = ("class_logits", "mask_embeddings", "pixel_embeddings")
    return _inputs({f"predictions.{name}": getattr(predictions, name) for name in names}, targets, loss)


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

    A query whose mask logits hold NaN or an infinity, or whose class logits hold NaN or +inf, has no finite cost in its
    layer and image; the costs of the others are not touched. An image without targets has no costs to be broken.

    Half precision is computed in float32, also under autocast; there is no gradient. Float32 on the CPU runs over
    ``torch.get_num_threads()`` threads, holds no masks, and gives the same costs for any number of threads. On CUDA a
    Triton kernel holds no masks either, reads nothing back to the host and gives the same costs in every run; it takes
    embeddings in half precision as they are, and products of them are exact. Float64 predictions take
    `matching_cost_eager`.

    Raises:
        ValueError: a shape, type or device that does not fit, predictions and targets not of one padded input size;
            on the CPU also a count or label out of range (on CUDA such a label costs NaN).
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    return torch.ops.maskformer_fast.matching_cost(*_prediction_inputs(predictions, targets, loss))


def matching_cost_from_logits(
    class_logits: Tensor,  # [L, B, Q, K+1] any float dtype
    mask_logits: Tensor,  # [L, B, Q, h, w] any float dtype
    targets: Targets,
    loss: LossConfig,
) -> Tensor:
    """`matching_cost` of predictions whose mask logits are at hand, multiplied out -> [L, B, Q, T]."""
    inputs = _inputs({"class_logits": class_logits, "mask_logits": mask_logits}, targets, loss)
    return torch.ops.maskformer_fast.matching_cost(*inputs)


def matching_cost_eager(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    loss: LossConfig,
) -> Tensor:
    """`matching_cost` in plain PyTorch: oracle of the tests, and what runs in float64.

    A class logit of +inf or a label out of range do what ``softmax`` and ``gather`` do with them.
    """
    return _matching_cost_torch(*_prediction_inputs(predictions, targets, loss))
