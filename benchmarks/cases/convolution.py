"""3x3 convolution by Winograd's algorithm, for inference on the CPU, beside PyTorch's, which is oneDNN's."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.cases.inputs import relative_error
from benchmarks.harness.case import Bound, Case, Work
from maskformer_fast.ops.convolution import conv3x3_winograd, pack_winograd_weights

CHANNELS, SIZE = 256, 128
PYTORCH = "torch conv2d, channels last"
LEAST = {torch.float32: 1 - 1e-5, torch.bfloat16: 1 - 1e-2}
"""1 less the largest difference over the largest value, at least."""


def setup(device: torch.device, dtype: torch.dtype, channels: int = CHANNELS, size: int = SIZE) -> Work:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, channels, size, size, generator=generator).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    bias = torch.randn(channels, generator=generator)
    packed = pack_winograd_weights(weight)
    low = (weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype))

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        return F.conv2d(images, *low, padding=1)

    return Work(
        lambda: conv3x3_winograd(images, packed, bias, channels), {PYTORCH: theirs},
        agreement=lambda ours, peer: 1 - relative_error(ours, peer), least={PYTORCH: LEAST[dtype]},
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    # the multiplications of the plain sum; Winograd's algorithm takes a quarter of them
    numbers, operations = 2 * CHANNELS * SIZE**2 + 9 * CHANNELS**2, 18.0 * (CHANNELS * SIZE) ** 2
    return [
        Case(f"convolution 3x3, {CHANNELS} to {CHANNELS} channels, {SIZE}x{SIZE}, {name}", PYTORCH, None,
             partial(setup, dtype=dtype), rank=2, bound=Bound(dtype.itemsize * numbers, operations, rate))
        for dtype, name, rate in ((torch.float32, "float32", "fp32"), (torch.bfloat16, "bfloat16", "bf16"))
    ]  # fmt: skip
