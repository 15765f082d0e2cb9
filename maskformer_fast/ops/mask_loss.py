"""Mask losses of the matched pairs at the resolution of the padded input (paper section 3.3, equation 2; appendix A).

A pair's low-resolution logits are upsampled, compared with its packed target and reduced to four sums, of which the
losses are made: `mask_sums`. The backward pass upsamples again. In C++ on the CPU both hold no more than rows of
pixels; in Triton on CUDA devices nothing of full resolution is ever in memory. The eager twins, in plain PyTorch, which
also serve float64, work on a few pairs at a time, so that no tensor of full resolution outlives its chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.structures import Predictions, Targets, unpack_masks

# Pixels worked on at a time: temporaries stay within the cache on a CPU, within a few hundred MB each on a GPU.
CPU_CHUNK = 1 << 17
GPU_CHUNK = 1 << 26


def focal_parameters(loss: LossConfig) -> tuple[float, float, float]:
    """Weight of mask pixels, weight of the others, exponent; binary cross-entropy is focal loss with 1, 1, 0."""
    if loss.mask_loss == "bce":
        return 1.0, 1.0, 0.0
    return loss.focal_alpha, 1.0 - loss.focal_alpha, loss.focal_gamma


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inside(
    valid_sizes: Tensor,  # [..., 2] int64: height, width
    rows: Tensor,  # [h] int64, row of the padded input
    columns: Tensor,  # [w] int64
) -> Tensor:
    """Which of these pixels of the padded input belong to the image and not to its padding -> bool [..., h, w]."""
    height, width = valid_sizes[..., 0, None], valid_sizes[..., 1, None]
    return (rows < height).unsqueeze(-1) & (columns < width).unsqueeze(-2)


def _upsampling(
    size: int,
    out: int,
    like: Tensor,
) -> Tensor:
    """Linear interpolation of ``size`` samples to ``out`` (``align_corners=False``) as a matrix -> [size, out]."""
    unit = torch.eye(size, device=like.device, dtype=like.dtype)
    return F.interpolate(unit[None], out, mode="linear", align_corners=False)[0]


def _scores_of_pixels(
    logits: Tensor,  # [p, h, w] float
    target: Tensor,  # [p, H, W] bool
    counted: Tensor | None,  # [p, H, W] bool, None counts every pixel
    focal: tuple[float, float, float],
) -> tuple[Tensor, ...]:
    """At full resolution, [p, H, W] each: truth, +1 or -1 where it is off or on, probability of the wrong side, its
    weight in the loss, cross-entropy. A pixel that is not counted is off, and is wrong with probability 0."""
    mask_weight, other_weight, gamma = focal
    x = F.interpolate(logits[None], target.shape[1:], mode="bilinear", align_corners=False)[0]
    if counted is not None:
        target = target & counted
    truth = target.to(x.dtype)
    # One formula for both kinds of pixel: the probability given to the wrong side is sigmoid(z), the cross-entropy
    # softplus(z). At z = -inf both are zero, and so is every gradient: that takes a pixel out of the loss.
    sign = torch.rsub(truth, 1, alpha=2)
    z = x.mul_(sign)
    if counted is not None:
        z = z.masked_fill_(~counted, -torch.inf)
    wrong = z.sigmoid()
    weight = torch.rsub(truth, other_weight, alpha=other_weight - mask_weight)
    if gamma != 0.0:
        weight = weight.mul_(wrong**gamma)
    return truth, sign, wrong, weight, F.softplus(z)


class _Inputs(NamedTuple):
    """Arguments of the operator, P pairs of low-resolution logits and a target."""

    logits: Tensor  # [P, h, w] float32/64
    masks: Tensor  # [N, H, ceil(W/8)] uint8, packed
    rows: Tensor  # [P] int64, the pair's target, -1 for none
    valid_sizes: Tensor | None  # [N, 2] int64, None counts every pixel
    width: int  # W
    focal: list[float]  # weight of mask pixels, of the others, exponent

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Pairs that are worked on together, their targets and counted pixels, [p, H, W] bool."""
        height, device = self.masks.shape[1], self.logits.device
        y, x = (torch.arange(n, device=device) for n in (height, self.width))
        step = max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // max(1, height * self.width))
        for start in range(0, len(self.rows), step):
            chunk = slice(start, start + step)
            row = self.rows[chunk].clamp(min=0)
            counted = None if self.valid_sizes is None else inside(self.valid_sizes[row], y, x)
            yield chunk, unpack_masks(self.masks[row], self.width), counted


_library = torch.library.Library("maskformer_fast", "FRAGMENT")
_PAIRS = "Tensor logits, Tensor masks, Tensor rows, Tensor? valid_sizes, SymInt width, float[] focal"
_library.define(f"mask_sums({_PAIRS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"mask_sums_backward(Tensor gradient, {_PAIRS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def mask_sums_eager(*arguments: Any) -> Tensor:
    """What the losses of each pair are made of, in plain PyTorch -> [P, 4]; arguments as `_Inputs`.

    Over the counted pixels of the upsampled logits x of a pair, with p = sigmoid(x) and truth t: the weighted focal
    loss, p t, p, and t, each summed. Zeros for a pair without a target (row -1), whatever its logits. In C++ the first
    three are NaN where an upsampled logit is NaN or infinite.
    """
    inputs = _Inputs(*arguments)
    sums = inputs.logits.new_empty(len(inputs.rows), 4)
    for chunk, target, counted in inputs.chunks():
        truth, _, wrong, weight, entropy = _scores_of_pixels(
            inputs.logits[chunk], target, counted, (inputs.focal[0], inputs.focal[1], inputs.focal[2])
        )
        area = truth.sum((1, 2))
        missed = (wrong * truth).sum((1, 2))
        overlap = area - missed
        total = overlap + wrong.sum((1, 2)) - missed
        sums[chunk] = torch.stack([entropy.mul_(weight).sum((1, 2)), overlap, total, area], 1)
    return sums.where((inputs.rows >= 0).unsqueeze(1), 0)


def mask_sums_backward_eager(gradient: Tensor, *arguments: Any) -> Tensor:
    """Gradient by the logits of `mask_sums`, given that by its result, [P, 4] -> [P, h, w]."""
    inputs = _Inputs(*arguments)
    logits, height = inputs.logits, inputs.masks.shape[1]
    mask_weight, other_weight, gamma = inputs.focal
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows, columns = _upsampling(logits.shape[1], height, logits), _upsampling(logits.shape[2], inputs.width, logits)
    upstream = gradient[:, :, None, None]  # the area has none
    for chunk, target, counted in inputs.chunks():
        truth, sign, wrong, weight, entropy = _scores_of_pixels(
            logits[chunk], target, counted, (mask_weight, other_weight, gamma)
        )
        right = 1 - wrong
        change = torch.addcmul(upstream[chunk, 2], truth, upstream[chunk, 1]).mul_(wrong).mul_(right)  # p (1 - p)
        if gamma != 0.0:
            wrong = wrong.addcmul_(entropy, right, value=gamma)
        slope = wrong.mul_(weight).mul_(sign).mul_(upstream[chunk, 0])
        # The transpose of the interpolation as two matrix products: faster than torch's kernel, and deterministic.
        result[chunk] = rows @ (slope.add_(change) @ columns.T)
    return result.where((inputs.rows >= 0)[:, None, None], 0)


class _Addresses:
    """The operator's arguments as the extension takes them; holds the tensors while their addresses are in use.

    Raises ValueError for a shape or type that does not fit, as the extension sees addresses only.
    """

    def __init__(self, inputs: _Inputs) -> None:
        check(inputs.logits.dim() == 3, "logits", "shape [P, h, w]", tuple(inputs.logits.shape))
        check(inputs.masks.dim() == 3, "masks", "shape [N, H, ceil(W/8)]", tuple(inputs.masks.shape))
        pairs, height, width = (len(inputs.rows), *inputs.logits.shape[1:])
        self.check(inputs.logits, "logits", torch.float32, (pairs, height, width))
        targets, input_height = inputs.masks.shape[:2]
        self.check(inputs.rows, "rows", torch.int64, (pairs,))
        self.check(inputs.masks, "masks", torch.uint8, (targets, input_height, (inputs.width + 7) // 8))
        if inputs.valid_sizes is not None:
            self.check(inputs.valid_sizes, "valid_sizes", torch.int64, (targets, 2))
        self.held = [None if t is None else t.contiguous() for t in inputs[:4]]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self.held]
        self.arguments = (addresses, (pairs, height, width, targets, input_height, inputs.width), inputs.focal)

    @staticmethod
    def check(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        check(tensor.dtype == dtype and tensor.shape == shape, name, f"{dtype} {shape}",
              f"{tensor.dtype} {tuple(tensor.shape)}")


def _mask_sums_cpu(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments)
    if inputs.logits.dtype == torch.float64:
        return mask_sums_eager(*arguments)
    given = _Addresses(inputs)
    sums = inputs.logits.new_empty(len(inputs.rows), 4)
    load_extension().mask_sums(*given.arguments, sums.data_ptr(), torch.get_num_threads())
    return sums


def _mask_sums_backward_cpu(gradient: Tensor, *arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments)
    if inputs.logits.dtype == torch.float64:
        return mask_sums_backward_eager(gradient, *arguments)
    given = _Addresses(inputs)
    given.check(gradient, "gradient", torch.float32, (len(inputs.rows), 4))
    upstream = gradient.contiguous()
    result = torch.empty_like(inputs.logits, memory_format=torch.contiguous_format)
    load_extension().mask_sums_backward(
        upstream.data_ptr(), *given.arguments, result.data_ptr(), torch.get_num_threads()
    )
    return result


def _mask_sums_cuda(*arguments: Any) -> Tensor:
    if arguments[0].dtype == torch.float64:
        return mask_sums_eager(*arguments)
    result: Tensor = load_kernels("mask_loss").mask_sums_forward(*arguments)
    return result


def _mask_sums_backward_cuda(gradient: Tensor, *arguments: Any) -> Tensor:
    if arguments[0].dtype == torch.float64:
        return mask_sums_backward_eager(gradient, *arguments)
    result: Tensor = load_kernels("mask_loss").mask_sums_backward(gradient, *arguments)
    return result


def _mask_sums_fake(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments)
    return inputs.logits.new_empty(inputs.rows.shape[0], 4)


def _mask_sums_backward_fake(gradient: Tensor, *arguments: Any) -> Tensor:
    return arguments[0].new_empty(arguments[0].shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, masks, rows, valid_sizes, ctx.width, ctx.focal = inputs
    ctx.save_for_backward(logits, masks, rows, valid_sizes)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (gradient, *ctx.saved_tensors, ctx.width, ctx.focal)
    return torch.ops.maskformer_fast.mask_sums_backward(*arguments), None, None, None, None, None


_library.impl("mask_sums", _mask_sums_cpu, "CPU")
_library.impl("mask_sums", _mask_sums_cuda, "CUDA")
_library.impl("mask_sums_backward", _mask_sums_backward_cpu, "CPU")
_library.impl("mask_sums_backward", _mask_sums_backward_cuda, "CUDA")
torch.library.register_fake("maskformer_fast::mask_sums", _mask_sums_fake, lib=_library)
torch.library.register_fake("maskformer_fast::mask_sums_backward", _mask_sums_backward_fake, lib=_library)
torch.library.register_autograd(
    "maskformer_fast::mask_sums", _differentiate, setup_context=_setup_context, lib=_library
)


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
    Nothing is weighted or divided by the number of masks here. Embeddings of unmatched queries get zero gradients.
    Half precision is computed in float32, also under autocast. Source: paper section 3.3, official behaviour.

    Float32 on the CPU runs over ``torch.get_num_threads()`` threads; the sums of a pair are the same for any number of
    them, and no mask of full resolution exists. Where a counted pixel's upsampled logit is NaN or infinite, the losses
    of its layer are NaN, and so is the gradient by the cells that the pixel reads; other pairs keep theirs.

    Raises:
        ValueError: predictions and targets are not of one padded input size; on the CPU also where targets are not of
            the types and shapes that `Targets` says.
        ImportError: the extension is not built.
    """
    check(targets.input_size == predictions.input_size, "targets.input_size",
          f"that of the predictions {predictions.input_size}", targets.input_size)
    layers, batch, slots = query.shape
    with torch.autocast(query.device.type, enabled=False):
        embeddings, pixels = (at_least_float32(e) for e in (predictions.mask_embeddings, predictions.pixel_embeddings))
        index = query.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, embeddings.shape[-1])
        matched = embeddings.gather(2, index).transpose(0, 1).flatten(1, 2)  # [B, L*T, D]
        logits = torch.bmm(matched, pixels.flatten(2)).view(batch * layers * slots, *pixels.shape[2:])
        order = query.transpose(0, 1)  # [B, L, T], as the logits
        target = torch.arange(batch * slots, device=query.device).view(batch, 1, slots)
        valid_sizes = targets.valid_sizes if loss.padding == "exclude" else None
        sums = torch.ops.maskformer_fast.mask_sums(
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
    """Pixels of each image that are in the mean, at least 1 -> [B, 1, 1] int64, or of any image."""
    height, width = input_size
    if valid_sizes is None:
        return height * width
    inner = valid_sizes[:, 0].clamp(0, height) * valid_sizes[:, 1].clamp(0, width)
    return inner.clamp(min=1)[:, None, None]
