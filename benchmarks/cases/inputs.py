"""Random predictions and targets, which several subjects share, and measures of how close results are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.structures import Predictions, Targets, pack_masks

Size = tuple[int, int]

SCALE = 4
"""Sides of an image over those of its mask logits."""
KERNEL_RATE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32"}
"""The matrix unit that our GPU kernels use, by the dtype of the embeddings."""


def random_masks(batch: int, count: int, size: Size, cells: int = 8, device: torch.device | None = None) -> Tensor:
    """Masks [B, T, H, W] bool that tile each image like a panoptic map's, in cells of a `cells`-th of its sides."""
    ids = torch.randint(count, (batch, cells, cells), device=device)
    ids = ids.repeat_interleave(size[0] // cells, 1).repeat_interleave(size[1] // cells, 2)
    return ids.unsqueeze(1) == torch.arange(count, device=device)[:, None, None]


def random_targets(
    batch: int, count: int, classes: int, size: Size, cells: int = 8, device: torch.device | None = None
) -> Targets:
    """`count` targets an image, with masks of `random_masks`."""
    return Targets(
        torch.randint(classes, (batch, count), device=device),
        torch.full((batch,), count, device=device),
        pack_masks(random_masks(batch, count, size, cells, device)),
        torch.tensor([size] * batch, device=device),
        size,
    )


def random_predictions(
    layers: int, batch: int, queries: int, classes: int, depth: int, size: Size,
    dtype: torch.dtype = torch.float32, device: torch.device | None = None,
) -> Predictions:  # fmt: skip
    """Normal logits and embeddings, whose mask logits are of `size`."""
    shapes = ((layers, batch, queries, classes + 1), (layers, batch, queries, depth), (batch, depth, *size))
    logits, embeddings, pixels = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    input_size = (SCALE * size[0], SCALE * size[1])
    return Predictions(logits, embeddings / 8, pixels, torch.tensor([input_size] * batch, device=device), input_size)


def share_close(ours: Tensor, theirs: Tensor, rtol: float, atol: float = 0.0) -> float:
    """Share of the values with ``|ours - theirs| <= atol + rtol * |theirs|``."""
    return (ours - theirs).abs().le(atol + rtol * theirs.abs()).float().mean().item()


def share_equal(ours: Tensor, theirs: Tensor) -> float:
    """Share of equal labels."""
    return (ours.long() == theirs.long()).float().mean().item()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def as_tensors(value: Any) -> Sequence[Tensor]:
    """One tensor as a sequence; a sequence of tensors as it is."""
    result: Sequence[Tensor] = [value] if isinstance(value, Tensor) else value
    return result


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function by `torch.compile` when it is first called, as loading the compiler takes seconds."""
    compile_once = cache(lambda: torch.compile(function, dynamic=False))
    return lambda *arguments: compile_once()(*arguments)
