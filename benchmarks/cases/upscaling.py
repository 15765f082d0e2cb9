"""The end of EoMT-S's last upscaling block at 512x512 on the CPU, beside PyTorch's, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.inputs import relative_error
from benchmarks.harness.case import Bound, Case, Work
from maskformer_fast.ops.upscaling import upscaling, upscaling_eager

SIDE, CHANNELS, EPSILON = 64, 384, 1e-6
PYTORCH = "torch, operation by operation"


def setup(device: torch.device, gradients: bool, side: int = SIDE) -> Work:
    def draw(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        shapes = ((1, side, side, 4, CHANNELS), (CHANNELS, 1, 3, 3), (CHANNELS,), (CHANNELS,))
        return tuple(torch.randn(shape).requires_grad_(gradients) for shape in shapes)

    def run(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(gradients):
            result = function(*inputs, EPSILON)
            return torch.autograd.grad(result, inputs, result.detach()) if gradients else (result,)

    def agreement(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> float:
        return 1 - max(relative_error(*pair) for pair in zip(ours, peer, strict=True))

    theirs = partial(run, upscaling_eager)
    return Work(partial(run, upscaling), {PYTORCH: theirs}, draw, agreement, {PYTORCH: 1 - 1e-3})


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    traffic = 4 * 4 * SIDE**2 * CHANNELS
    return [
        Case(f"upscaling {SIDE}x{SIDE} -> {2 * SIDE}x{2 * SIDE}, {CHANNELS} channels, {name}", PYTORCH, None,
             partial(setup, gradients=gradients), rank=2, bound=Bound((4 if gradients else 2) * traffic))
        for gradients, name in ((False, "float32"), (True, "gradients"))
    ]  # fmt: skip
