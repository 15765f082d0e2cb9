"""Sigmoid and softplus of logits, for losses: small values keep their relative precision."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def reciprocal(values):
    """1 / values to the last bit, 0 of infinity; one instruction where 1.0 / values takes ten."""
    if _INTERPRETED:
        return 1.0 / values
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def quick_log2(values):
    """Logarithm in one instruction, with an error of 2^-22 or less, or the result's last bit beyond 2."""
    if _INTERPRETED:
        return tl.log2(values)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def logistic(x):
    """Values from which softplus and sigmoid follow -> log(1 + exp(-|x|)), sigmoid(|x|), sigmoid(-|x|).

    softplus(x) is max(x, 0) plus the first value. At infinities the values are 0, 1 and 0; NaN stays NaN.
    """
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    # log(1 + e) / e for e in 0..1: minimax polynomial of relative error 1.3e-6; the logarithm's is larger where e is
    # small
    small = 1.414102145e-02 * e - 6.640179287e-02
    small = small * e + 1.492238666e-01
    small = small * e - 2.350385993e-01
    small = small * e + 3.310944887e-01
    small = small * e - 4.998696563e-01
    small = (small * e + 9.999987315e-01) * e
    likely = reciprocal(1.0 + e)
    return small, likely, e * likely
