"""Sigmoid and softplus of logits, for losses: small values keep their relative precision."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def logistic(x):
    """Values from which softplus and sigmoid follow -> log(1 + exp(-|x|)), sigmoid(|x|), sigmoid(-|x|).

    softplus(x) is max(x, 0) plus the first value. At infinities the values are 0, 1 and 0; NaN stays NaN.
    """
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    # log(1 + e) / e for e in 0..1: minimax polynomial of relative error 3e-8; the logarithm's is larger where e is
    # small
    small = 5.232694303e-03 * e - 2.950523893e-02
    small = small * e + 7.822595212e-02
    small = small * e - 1.366324582e-01
    small = small * e + 1.910600677e-01
    small = small * e - 2.484298222e-01
    small = small * e + 3.331909681e-01
    small = small * e - 4.999949314e-01
    small = (small * e + 9.999999699e-01) * e
    likely = 1.0 / (1.0 + e)
    return small, likely, e * likely
