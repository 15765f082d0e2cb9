"""Outputs of a segmentation model: peaky as of a trained one, or noise."""

from __future__ import annotations

from types import SimpleNamespace

import torch


def model_outputs(
    peaky: bool,
    images: int = 1,
    queries: int = 50,
    classes: int = 40,
    size: tuple[int, int] = (32, 43),
    live: int = 12,
    seed: int = 0,
) -> SimpleNamespace:
    """Class logits [B, Q, K+1] and mask logits [B, Q, h, w] under transformers' names.

    Peaky: `live` queries have a class of probability near 1 and a round mask with a soft, noisy edge; the others are
    no objects.
    """
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(images, queries, classes + 1, generator=generator)
    mask_logits = torch.randn(images, queries, *size, generator=generator)
    if peaky:
        order = torch.rand(images, queries, generator=generator).argsort(1)[:, :live]
        class_logits[..., -1] += 12
        index = torch.arange(images)[:, None]
        class_logits[index, order, -1] -= 16
        best = torch.randint(classes, (images, live), generator=generator)
        class_logits[index, order, best] += 2 + 8 * torch.rand(images, live, generator=generator)
        y, x = torch.meshgrid(*(torch.linspace(0, 1, side) for side in size), indexing="ij")
        place = torch.rand(images, queries, 3, 1, 1, generator=generator)
        distance = ((y - place[:, :, 0]) ** 2 + (x - place[:, :, 1]) ** 2).sqrt()
        mask_logits = ((0.1 + 0.3 * place[:, :, 2] - distance) * 40).clamp(-12, 12) + 0.3 * mask_logits
    return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits, patch_offsets=None)
