"""Matrix products in float32 on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(left, right):
    """Matrix product of halves. The interpreter multiplies the bits of bfloat16 as if they were integers."""
    if _INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right)


@triton.jit
def _leading_bits(values):
    """The 11 leading bits of float32, which tensor cores take."""
    return (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def add_product(left, right, total):
    """Add a matrix product to ``total``: of halves exactly, of float32 in 22 bits.

    Unlike Triton's "tf32x3" it turns infinities into NaN, which takes half the instructions.
    """
    if left.dtype == tl.float32:
        left_high, right_high = _leading_bits(left), _leading_bits(right)
        total = tl.dot(left - left_high, right_high, total, input_precision="tf32")
        total = tl.dot(left_high, right - right_high, total, input_precision="tf32")
        return tl.dot(left_high, right_high, total, input_precision="tf32")
    if _INTERPRETED:
        return total + product(left, right)
    return tl.dot(left, right, total)
