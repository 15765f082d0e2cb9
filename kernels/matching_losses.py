"""Parts of a matching cost: losses of mask logits, their products with the bits of targets, class probabilities."""

from __future__ import annotations

import triton
import triton.language as tl

from maskformer_fast.kernels.activations import LN_2, LOG2_E, quick_log2
from maskformer_fast.kernels.products import product

SCALE = tl.constexpr(32768.0)
"""Factor of probabilities, so that small ones are within the range of float16."""
_SCALE_LOG2 = tl.constexpr(15.0)
_ONE_FP16 = tl.constexpr(0x3C00)
"""Bits of 1."""
_ONE_BF16 = tl.constexpr(0x3F80)


@triton.jit
def pixel_losses(x, on_weight, off_weight, gamma, EXPONENT: tl.constexpr):
    """Probability times `SCALE`, loss where the target is off, and by how much it exceeds that where it is on.

    EXPONENT is that of the focal loss where it is 0 or 2, and -1 for any other. The probability keeps its relative
    precision, losses have an absolute error of about 2^-22 of their weight. A logit of NaN or infinity makes the loss
    or its rise NaN or infinite.
    """
    minus = x * -LOG2_E  # softplus below is divided by ln 2
    if EXPONENT == 2:
        # softplus(-x) is the logarithm of 1 + exp(-x), and -x where the exponential would overflow
        on = tl.maximum(quick_log2(1.0 + tl.exp2(tl.minimum(minus, 126.0))), minus)
        off = on - minus  # without correct digits where x is far below 0, but there its weight is exp(2 x)
        scaled = tl.exp2(-on + _SCALE_LOG2)
        rest = 1.0 - scaled * (1.0 / SCALE)
        off *= scaled * (off_weight * LN_2 / (SCALE * SCALE)) * scaled
        return scaled, off, rest * rest * on * (on_weight * LN_2) - off
    small = quick_log2(1.0 + tl.exp2(-tl.abs(minus)))
    on = tl.maximum(minus, 0.0) + small
    off = tl.maximum(-minus, 0.0) + small
    scaled = tl.exp2(-on + _SCALE_LOG2)
    if EXPONENT == -1:  # sigmoid(x) = exp(-softplus(-x))
        power = tl.exp2(on * -gamma)
        on *= tl.exp2(off * -gamma)
        off *= power
    off *= off_weight * LN_2
    return scaled, off, on * (on_weight * LN_2) - off


@triton.jit
def times_truth(values, truth):
    """Multiply ``values`` [rows, pixels] float32, at most 65504, by bits ``truth`` [pixels, TARGETS], in 22 bits."""
    ones = (truth * _ONE_FP16).to(tl.int16).to(tl.float16, bitcast=True)
    high = values.to(tl.float16)
    # a product of its own for each tile, which is then added to the others': tensor cores round sums towards zero
    total = tl.dot(high, ones)
    return tl.dot((values - high.to(tl.float32)).to(tl.float16), ones, total)


@triton.jit
def any_times_truth(values, truth):
    """Multiply ``values`` of any magnitude, in 24 bits: as sums of three bfloat16, the first two cut off."""
    ones = (truth * _ONE_BF16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    bits = values.to(tl.int32, bitcast=True)
    total = product((bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), ones)
    values -= (bits & -65536).to(tl.float32, bitcast=True)
    bits = values.to(tl.int32, bitcast=True)
    total += product((bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), ones)
    values -= (bits & -65536).to(tl.float32, bitcast=True)
    return total + product(values.to(tl.bfloat16), ones)


@triton.jit
def class_probability(source, stride, label, num_columns, CLASSES: tl.constexpr):
    """softmax of the logits at ``source`` [rows], at ``label`` [TARGETS] -> [rows, TARGETS]; NaN for no such label."""
    column = tl.arange(0, CLASSES)
    peak = tl.full((source.shape[0],), float("-inf"), tl.float32)
    for start in tl.range(0, num_columns, CLASSES):
        here = (start + column < num_columns)[None, :]
        values = tl.load(source[:, None] + (start + column)[None, :] * stride, mask=here, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(values.to(tl.float32), 1))
    total = tl.zeros((source.shape[0],), tl.float32)
    for start in tl.range(0, num_columns, CLASSES):
        here = (start + column < num_columns)[None, :]
        values = tl.load(source[:, None] + (start + column)[None, :] * stride, mask=here, other=float("-inf"))
        total += tl.sum(tl.exp(values.to(tl.float32) - peak[:, None]), 1)  # NaN where a logit is NaN or +inf
    exists = (label >= 0) & (label < num_columns)
    chosen = tl.load(source[:, None] + label[None, :] * stride, mask=exists[None, :], other=float("nan"))
    return tl.exp(chosen.to(tl.float32) - peak[:, None]) / total[:, None]
