"""Deformable attention of Mask2Former's pixel decoder beside transformers' function, with and without gradients.

transformers' function takes weights and locations in 0..1. Softmax and locations, which ours computes too, are made
before it is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.inputs import relative_error
from benchmarks.harness.case import Bound, Case, Work
from maskformer_fast.ops import deformable_attention

HUGGINGFACE = "transformers, multi_scale_deformable_attention"
LEVELS = ((64, 64), (32, 32), (16, 16))
HEADS, DIM, POINTS = 8, 32, 4
LEAST = {torch.float32: 1 - 1e-5, torch.bfloat16: 0.9, torch.float16: 0.98}
"""1 less the largest difference over the largest value, at least. Theirs rounds locations in half precision."""

Levels = tuple[tuple[int, int], ...]


def setup(
    device: torch.device, dtype: torch.dtype, gradients: bool, levels: Levels = LEVELS, batch: int = 1
) -> Work:
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    cells = sum(height * width for height, width in levels)
    sides = torch.tensor([[width, height] for height, width in levels], device=device)[:, None]

    def draw(seed: int) -> tuple[Tensor, ...]:
        """Value, reference points, offsets, logits, locations, weights; offsets are of a few pixels."""
        torch.manual_seed(seed)
        value = torch.randn(batch, cells, HEADS, DIM, device=device).to(dtype)
        centres = torch.cat([_centres(height, width, device) for height, width in levels])
        points = centres[:, None].expand(batch, cells, len(levels), 2).contiguous()
        offsets = 2 * torch.randn(batch, cells, HEADS, len(levels), POINTS, 2, device=device)
        logits = torch.randn(batch, cells, HEADS, len(levels), POINTS, device=device)
        locations = points[:, :, None, :, None] + offsets / sides
        weights = logits.flatten(3).softmax(-1).view(logits.shape)
        tensors = (value, points, *(x.to(dtype) for x in (offsets, logits, locations, weights)))
        return tuple(x.requires_grad_(gradients and x is not points) for x in tensors)

    def ours(value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return run(lambda: deformable_attention(value, levels, points, offsets, logits), (value, offsets, logits))

    def theirs(value: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        locations, weights = rest[-2:]
        call = partial(multi_scale_deformable_attention, value, levels, locations, weights)
        return run(call, (value, locations, weights))

    def run(call: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Result, and with gradients the one by the value, which both have."""
        with torch.set_grad_enabled(gradients):
            result = call()
            if not gradients:
                return (result,)
            return result.detach(), torch.autograd.grad(result, inputs, torch.ones_like(result))[0]

    def agreement(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> float:
        return 1 - max(relative_error(*pair) for pair in zip(ours, peer, strict=True))

    return Work(ours, {HUGGINGFACE: theirs}, draw, agreement, {HUGGINGFACE: LEAST[dtype]})


def _centres(height: int, width: int, device: torch.device) -> Tensor:
    """Centres of the cells of a level -> [height * width, 2] x, y in 0..1."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1).to(device)


def _bound(dtype: torch.dtype, batch: int, gradients: bool) -> Bound:
    """Value, offsets, logits and result once; with gradients, all of these and the upstream gradient again."""
    queries = batch * sum(height * width for height, width in LEVELS)
    samples = queries * HEADS * len(LEVELS) * POINTS
    numbers = 2 * queries * HEADS * DIM + 3 * samples
    return Bound(dtype.itemsize * numbers * (3 if gradients else 1))


def cases(device: str) -> list[Case]:
    dtypes = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    if device == "cuda":
        dtypes[torch.float16] = "float16"
    batch = 1 if device == "cpu" else 8
    return [
        Case(f"deformable attention 512x512{', forward and backward' * gradients}, B={batch}, {name}", HUGGINGFACE,
             (6.0 if gradients else 10.0) if dtype == torch.float32 else None,
             partial(setup, dtype=dtype, gradients=gradients, batch=batch),
             memory_goal=1 / 20 if device == "cpu" and dtype == torch.float32 and not gradients else None,
             rank=0 if dtype == torch.float32 else 2, bound=_bound(dtype, batch, gradients))
        for gradients in (False, True) for dtype, name in dtypes.items()
    ]  # fmt: skip
