"""Parts of matrix products in float32 on tensor cores."""

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
def leading_bits(values):
    """The 11 leading bits of float32, which tensor cores take.

    Three products of these and of the rests hold 22 bits, in half the instructions of Triton's "tf32x3", which keeps
    infinities where these give NaN.
    """
    return (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
