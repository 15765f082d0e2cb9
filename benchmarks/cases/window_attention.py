"""Attention in the windows of Swin-T's first stage at 512x512, for inference on the CPU, beside PyTorch's."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.cases.inputs import relative_error
from benchmarks.harness.case import Bound, Case, Work
from maskformer_fast.modeling.swin import from_windows, padding, shifted_window_mask, to_windows
from maskformer_fast.ops.window_attention import pack_window_bias, window_attention

SIDE, HEADS, DIM, WINDOW = 128, 3, 32, 7
PYTORCH = "torch, windows copied, scaled_dot_product_attention"
LEAST = {torch.float32: 1 - 1e-5, torch.bfloat16: 1 - 2e-2}
"""1 less the largest difference over the largest value, at least."""


def setup(device: torch.device, dtype: torch.dtype, side: int = SIDE) -> Work:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, side, side, 3 * HEADS * DIM, generator=generator).to(dtype)
    outside = torch.zeros(3 * HEADS * DIM, dtype=dtype)
    bias = torch.randn(HEADS, WINDOW**2, WINDOW**2, generator=generator)
    packed, shift, rest = pack_window_bias(bias), WINDOW // 2, padding(side, WINDOW)
    mask = (bias + shifted_window_mask(qkv, WINDOW)[:, None]).to(dtype)  # as Swin makes it once for all its blocks

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        rolled = F.pad(qkv, (0, 0, 0, rest, 0, rest)).roll((-shift, -shift), dims=(1, 2))
        windows = to_windows(rolled, WINDOW)[0].unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*windows, attn_mask=mask).transpose(1, 2).flatten(2)[None]
        size = side + rest
        return from_windows(attended, WINDOW, size, size).roll((shift, shift), dims=(1, 2))[:, :side, :side]

    return Work(
        lambda: window_attention(qkv, outside, packed, WINDOW, shift), {PYTORCH: theirs},
        agreement=lambda ours, peer: 1 - relative_error(ours, peer), least={PYTORCH: LEAST[dtype]},
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    tokens = (SIDE + padding(SIDE, WINDOW)) ** 2
    numbers, operations = 4 * HEADS * DIM * SIDE**2, 4.0 * tokens * WINDOW**2 * HEADS * DIM
    return [
        Case(f"window attention {SIDE}x{SIDE}, {HEADS} heads of {DIM}, {name}", PYTORCH, None,
             partial(setup, dtype=dtype), rank=2, bound=Bound(dtype.itemsize * numbers, operations, "fp32"))
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"))
    ]  # fmt: skip
