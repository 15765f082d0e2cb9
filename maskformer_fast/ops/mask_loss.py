"""Mask losses of the matched pairs at the resolution of the padded input (paper section 3.3, equation 2; appendix A).

The operator `mask_sums` upsamples a pair's low-resolution logits, compares them with its packed target and reduces them
to four sums, from which the losses are computed. The backward pass upsamples again. In C++ on the CPU both keep only
rows of pixels in memory, in Triton on CUDA devices nothing of full resolution. The eager twins are plain PyTorch, also
serve float64, and work on a few pairs at a time, so that no tensor of full resolution outlives its chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.registration import register_gradient, register_operator
from maskformer_fast.structures import Predictions, Targets, unpack_masks

CPU_CHUNK = 1 << 17
"""Pixels that the eager twins work on at a time on a CPU: temporaries stay within the cache."""
GPU_CHUNK = 1 << 26
"""Pixels that the eager twins work on at a time on a GPU: temporaries stay within a few hundred MB each."""


def focal_parameters(loss: LossConfig) -> tuple[float, float, float]:
    """Weight of mask pixels, weight of other pixels, exponent; binary cross-entropy is focal loss with 1, 1, 0."""
    if loss.mask_loss == "bce":
        return 1.0, 1.0, 0.0
    return loss.focal_alpha, 1.0 - loss.focal_alpha, loss.focal_gamma


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inside(
    valid_sizes: Tensor,  # [..., 2] int64: height, width
    rows: Tensor,  # [h] int64, row of the padded input
    columns: Tensor,  # [w] int64
) -> Tensor:
    """Tell which pixels of the padded input belong to the image and not to its padding -> [..., h, w] bool."""
    height, width = valid_sizes[..., 0, None], valid_sizes[..., 1, None]
    return (rows < height).unsqueeze(-1) & (columns < width).unsqueeze(-2)


def _upsampling(
    size: int,
    out: int,
    like: Tensor,
) -> Tensor:
    """Matrix that interpolates ``size`` samples to ``out`` linearly (``align_corners=False``) -> [size, out]."""
    unit = torch.eye(size, device=like.device, dtype=like.dtype)
    return F.interpolate(unit[None], out, mode="linear", align_corners=False)[0]


def _scores_of_pixels(
    logits: Tensor,  # [p, h, w] float
    target: Tensor,  # [p, H, W] bool
    counted: Tensor | None,  # [p, H, W] bool, None counts every pixel
    focal: tuple[float, float, float],
) -> tuple[Tensor, ...]:
    """Truth, sign, probability of the wrong class, weight in the loss and cross-entropy of each pixel, [p, H, W] each.

    The sign is -1 where the target is on, else +1. A pixel that is not counted is off and wrong with probability 0.
    """
    mask_weight, other_weight, gamma = focal
    x = F.interpolate(logits[None], target.shape[1:], mode="bilinear", align_corners=False)[0]
    if counted is not None:
        target = target & counted
    truth = target.to(x.dtype)
    # One formula for both classes of pixel: the probability of the wrong class is sigmoid(z), the cross-entropy
    # softplus(z). At z = -inf both are zero, and so is every gradient: this excludes a pixel from the loss.
    sign = torch.rsub(truth, 1, alpha=2)
    z = x.mul_(sign)
    if counted is not None:
        z = z.masked_fill_(~counted, -torch.inf)
    wrong = z.sigmoid()
    weight = torch.rsub(truth, other_weight, alpha=other_weight - mask_weight)
    if gamma != 0.0:
        weight = weight.mul_(wrong**gamma)
    return truth, sign, wrong, weight, F.softplus(z)


class MaskPairs(NamedTuple):
    """Arguments of `mask_sums`: P pairs of low-resolution logits and a target."""

    logits: Tensor  # [P, h, w] float32/64
    masks: Tensor  # [N, H, ceil(W/8)] uint8, packed
    rows: Tensor  # [P] int64, the pair's target, -1 for none
    valid_sizes: Tensor | None  # [N, 2] int64, None counts every pixel
    width: int  # W
    focal: tuple[float, float, float]  # weight of mask pixels, weight of other pixels, exponent

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Pairs that are worked on together, their targets and their counted pixels, both [p, H, W] bool."""
        height, device = self.masks.shape[1], self.logits.device
        y, x = (torch.arange(n, device=device) for n in (height, self.width))
        step = max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // max(1, height * self.width))
        for start in range(0, len(self.rows), step):
            chunk = slice(start, start + step)
            row = self.rows[chunk].clamp(min=0)
            counted = None if self.valid_sizes is None else inside(self.valid_sizes[row], y, x)
            yield chunk, unpack_masks(self.masks[row], self.width), counted


class MaskPairsBackward(NamedTuple):
    """Arguments of `mask_sums_backward`."""

    gradient: Tensor  # [P, 4], of the result of `mask_sums`
    pairs: MaskPairs

    @staticmethod
    def of(gradient: Tensor, *pairs: Any) -> MaskPairsBackward:
        """Make them of the operator's arguments."""
        return MaskPairsBackward(gradient, MaskPairs(*pairs))


class _ExtensionArguments:
    """Arguments as the extension takes them; keeps the tensors alive while their addresses are in use."""

    def __init__(self, pairs: MaskPairs) -> None:
        self.tensors = [None if tensor is None else tensor.contiguous() for tensor in pairs[:4]]
        (count, height, width), (targets, input_height) = pairs.logits.shape, pairs.masks.shape[:2]
        fields = (
            ("logits", "float32", (count, height, width)),
            ("masks", "uint8", (targets, input_height, (pairs.width + 7) // 8)),
            ("rows", "int64", (count,)),
            ("valid_sizes", "int64", (targets, 2)),
        )
        addresses = [address_of(tensor, *field) for tensor, field in zip(self.tensors, fields, strict=True)]
        self.values = (addresses, (count, height, width, targets, input_height, pairs.width), pairs.focal)


def _check(pairs: MaskPairs) -> None:
    """Raise ``ValueError`` for a shape or type that does not fit."""
    check(pairs.logits.dim() == 3, "logits", "shape [P, h, w]", tuple(pairs.logits.shape))
    check(pairs.masks.dim() == 3, "masks", "shape [N, H, ceil(W/8)]", tuple(pairs.masks.shape))
    check(pairs.rows.dim() == 1, "rows", "shape [P]", tuple(pairs.rows.shape))
    check(len(pairs.focal) == 3, "focal", "three numbers", pairs.focal)
    count, (targets, input_height) = len(pairs.rows), pairs.masks.shape[:2]
    dtype = torch.float64 if pairs.logits.dtype == torch.float64 else torch.float32
    _check_tensor(pairs.logits, "logits", dtype, (count, *pairs.logits.shape[1:]))
    _check_tensor(pairs.rows, "rows", torch.int64, (count,))
    _check_tensor(pairs.masks, "masks", torch.uint8, (targets, input_height, (pairs.width + 7) // 8))
    if pairs.valid_sizes is not None:
        _check_tensor(pairs.valid_sizes, "valid_sizes", torch.int64, (targets, 2))


def _check_backward(arguments: MaskPairsBackward) -> None:
    _check(arguments.pairs)
    _check_tensor(arguments.gradient, "gradient", arguments.pairs.logits.dtype, (len(arguments.pairs.rows), 4))


def _check_tensor(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(tensor.dtype == dtype and tensor.shape == shape, name, f"{dtype} {shape}",
          f"{tensor.dtype} {tuple(tensor.shape)}")


def _mask_sums_cpu(pairs: MaskPairs) -> Tensor:
    if pairs.logits.dtype == torch.float64:
        return mask_sums_eager(pairs)
    arguments = _ExtensionArguments(pairs)
    sums = _mask_sums_fake(pairs)
    address = address_of(sums, "sums", "float32", (len(pairs.rows), 4))
    load_extension().mask_sums(*arguments.values, address, torch.get_num_threads())
    return sums


def _mask_sums_cuda(pairs: MaskPairs) -> Tensor:
    if pairs.logits.dtype == torch.float64:
        return mask_sums_eager(pairs)
    result: Tensor = load_kernels("mask_loss").mask_sums_forward(*pairs)
    return result


def _mask_sums_fake(pairs: MaskPairs) -> Tensor:
    return pairs.logits.new_empty(pairs.rows.shape[0], 4)


def _mask_sums_backward_cpu(arguments: MaskPairsBackward) -> Tensor:
    gradient, pairs = arguments
    if pairs.logits.dtype == torch.float64:
        return mask_sums_backward_eager(arguments)
    inputs = _ExtensionArguments(pairs)
    gradient = gradient.contiguous()
    result = torch.empty_like(pairs.logits, memory_format=torch.contiguous_format)
    load_extension().mask_sums_backward(
        address_of(gradient, "gradient", "float32", (len(pairs.rows), 4)), *inputs.values,
        address_of(result, "result", "float32", pairs.logits.shape), torch.get_num_threads(),
    )
    return result


def _mask_sums_backward_cuda(arguments: MaskPairsBackward) -> Tensor:
    if arguments.pairs.logits.dtype == torch.float64:
        return mask_sums_backward_eager(arguments)
    result: Tensor = load_kernels("mask_loss").mask_sums_backward(arguments.gradient, *arguments.pairs)
    return result


def _mask_sums_backward_fake(arguments: MaskPairsBackward) -> Tensor:
    logits = arguments.pairs.logits
    return logits.new_empty(logits.shape)


_PAIRS = "Tensor logits, Tensor masks, Tensor rows, Tensor? valid_sizes, SymInt width, float[] focal"
_mask_sums = register_operator(
    f"mask_sums({_PAIRS}) -> Tensor",
    MaskPairs,
    check=_check,
    cpu=_mask_sums_cpu,
    cuda=_mask_sums_cuda,
    fake=_mask_sums_fake,
)
_mask_sums_backward = register_operator(
    f"mask_sums_backward(Tensor gradient, {_PAIRS}) -> Tensor",
    MaskPairsBackward.of,
    check=_check_backward,
    cpu=_mask_sums_backward_cpu,
    cuda=_mask_sums_backward_cuda,
    fake=_mask_sums_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, masks, rows, valid_sizes, ctx.width, ctx.focal = inputs
    ctx.save_for_backward(logits, masks, rows, valid_sizes)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _mask_sums_backward(gradient, *ctx.saved_tensors, ctx.width, ctx.focal), None, None, None, None, None


register_gradient("mask_sums", _differentiate, _setup_context)


def mask_loss(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    query: Tensor,  # [L, B, T] int64, the query of each target, -1 for none
    loss: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Focal (or binary cross-entropy) and dice losses, summed over the matched pairs -> [L], [L] float32 or float64.

    Logits are upsampled bilinearly (``align_corners=False``) to ``predictions.input_size``. A pair's mask loss is the
    mean over pixels; its dice loss is ``1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)``. With ``loss.padding ==
    "exclude"`` only the pixels (y, x) with ``y < valid height`` and ``x < valid width`` are in these sums and means.
    The losses are neither weighted nor divided by the number of masks. Embeddings of unmatched queries get zero
    gradients. Half precision is computed in float32, also under autocast. Source: paper section 3.3, official
    behaviour.

    Float32 on the CPU runs over ``torch.get_num_threads()`` threads; the sums of a pair are the same for any number of
    threads, and no mask of full resolution is in memory. Where a counted pixel's upsampled logit is NaN or infinite,
    the losses of its layer are NaN, and so is the gradient of the cells that the pixel reads; other pairs are not
    affected.

    Raises:
        ValueError: predictions and targets are not of one padded input size; or targets are not of the types
            and shapes given in `Targets`.
        ImportError: the extension is not built.
    """
    check(targets.input_size == predictions.input_size, "targets.input_size",
          f"that of the predictions {predictions.input_size}", targets.input_size)
    layers, batch, slots = query.shape
    height, width = targets.input_size
    expected = (batch, slots, height, (width + 7) // 8)
    check(targets.masks.shape == expected, "targets.masks", f"shape {expected}", tuple(targets.masks.shape))
    with torch.autocast(query.device.type, enabled=False):
        embeddings, pixels = (at_least_float32(e) for e in (predictions.mask_embeddings, predictions.pixel_embeddings))
        index = query.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, embeddings.shape[-1])
        matched = embeddings.gather(2, index).transpose(0, 1).flatten(1, 2)  # [B, L*T, D]
        logits = torch.bmm(matched, pixels.flatten(2)).view(batch * layers * slots, *pixels.shape[2:])
        order = query.transpose(0, 1)  # [B, L, T], as the logits
        target = torch.arange(batch * slots, device=query.device).view(batch, 1, slots)
        valid_sizes = targets.valid_sizes if loss.padding == "exclude" else None
        sums = _mask_sums(
            logits, targets.masks.flatten(0, 1), target.where(order >= 0, -1).flatten(),
            None if valid_sizes is None else valid_sizes.repeat_interleave(slots, 0),
            targets.input_size[1], list(focal_parameters(loss)),
        )  # fmt: skip
        entropy, overlap, total, area = sums.view(batch, layers, slots, 4).unbind(3)
        dice = 1 - (2 * overlap + 1) / (total + area + 1)  # 0 for a pair without a target
        mask = entropy / _counted_pixels(valid_sizes, targets.input_size)
    return mask.sum((0, 2)), dice.sum((0, 2))


def _counted_pixels(
    valid_sizes: Tensor | None,  # [B, 2] int64
    input_size: tuple[int, int],
) -> Tensor | int:
    """Pixels of each image that are in the mean, at least 1 -> [B, 1, 1] int64, or one number for all images."""
    height, width = input_size
    if valid_sizes is None:
        return height * width
    inner = valid_sizes[:, 0].clamp(0, height) * valid_sizes[:, 1].clamp(0, width)
    return inner.clamp(min=1)[:, None, None]


def mask_sums_eager(pairs: MaskPairs) -> Tensor:
    """Sums from which the losses of each pair are computed, in plain PyTorch -> [P, 4].

    Over the counted pixels of the upsampled logits x of a pair, with p = sigmoid(x) and truth t: the weighted focal
    loss, p t, p, and t, each summed. Zeros for a pair without a target (row -1), whatever its logits. In C++ the first
    three are NaN where an upsampled logit is NaN or infinite.
    """
    sums = _mask_sums_fake(pairs)
    for chunk, target, counted in pairs.chunks():
        truth, _, wrong, weight, entropy = _scores_of_pixels(pairs.logits[chunk], target, counted, pairs.focal)
        area = truth.sum((1, 2))
        missed = (wrong * truth).sum((1, 2))
        overlap = area - missed
        total = overlap + wrong.sum((1, 2)) - missed
        sums[chunk] = torch.stack([entropy.mul_(weight).sum((1, 2)), overlap, total, area], 1)
    return sums.where((pairs.rows >= 0).unsqueeze(1), 0)


def mask_sums_backward_eager(arguments: MaskPairsBackward) -> Tensor:
    """Gradient of `mask_sums` by its logits, in plain PyTorch -> [P, h, w]."""
    gradient, pairs = arguments
    logits, height, gamma = pairs.logits, pairs.masks.shape[1], pairs.focal[2]
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows, columns = _upsampling(logits.shape[1], height, logits), _upsampling(logits.shape[2], pairs.width, logits)
    upstream = gradient[:, :, None, None]  # the area has none
    for chunk, target, counted in pairs.chunks():
        truth, sign, wrong, weight, entropy = _scores_of_pixels(logits[chunk], target, counted, pairs.focal)
        right = 1 - wrong
        change = torch.addcmul(upstream[chunk, 2], truth, upstream[chunk, 1]).mul_(wrong).mul_(right)  # p (1 - p)
        if gamma != 0.0:
            wrong = wrong.addcmul_(entropy, right, value=gamma)
        slope = wrong.mul_(weight).mul_(sign).mul_(upstream[chunk, 0])
        # The transpose of the interpolation as two matrix products: faster than torch's kernel, and deterministic.
        result[chunk] = rows @ (slope.add_(change) @ columns.T)
    return result.where((pairs.rows >= 0)[:, None, None], 0)
