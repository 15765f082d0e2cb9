"""Outputs of Hugging Face's models, sizes, and the run lengths of segment maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from maskformer_fast.core.checks import check, check_choice

Exact = Literal["huggingface", "official"]
"""Whose results: transformers' processor, or the code that the network was published with."""
Size = tuple[int, int]
STRIDE = 4
"""Pixels of the padded input for each mask logit, along each axis, in MaskFormer, Mask2Former and OneFormer."""


def read_logits(outputs: Any) -> tuple[Tensor, Tensor]:
    """Class logits [B, Q, K+1] and mask logits [B, Q, h, w] of a model's outputs, without gradients."""
    classes, masks = outputs.class_queries_logits.detach(), outputs.masks_queries_logits.detach()
    check(classes.ndim == 3 and classes.shape[2] > 1, "class_queries_logits", "[B, Q, K+1]", tuple(classes.shape))
    fits = masks.ndim == 4 and masks.shape[:2] == classes.shape[:2]
    check(fits, "masks_queries_logits", f"{list(classes.shape[:2])} and height, width", tuple(masks.shape))
    return classes, masks


def image_sizes(
    name: str,
    sizes: Sequence[Sequence[int]] | Tensor | None,
    images: int,
    default: Size,
) -> list[Size]:
    """Check one size an image, the default where there are none."""
    if sizes is None:
        return [default] * images
    check(len(sizes) == images, name, f"as many sizes as images, {images}", len(sizes))
    pairs = [tuple(int(side) for side in size) for size in sizes]
    for pair in pairs:
        check(len(pair) == 2 and min(pair) > 0, name, "heights and widths of at least 1", pair)
    return [(pair[0], pair[1]) for pair in pairs]


def check_exact(exact: str, input_sizes: object) -> None:
    """Check whose results are wanted; sizes within the padded input serve the official order only."""
    check_choice("exact", exact, ("huggingface", "official"))
    check(input_sizes is None or exact == "official", "input_sizes", 'None unless exact is "official"', input_sizes)


def padded_input(masks: Tensor) -> Size:
    """Size of the padded input that the mask logits belong to."""
    return masks.shape[-2] * STRIDE, masks.shape[-1] * STRIDE


def segment_map_runs(
    segmentation: Tensor,  # [H, W]
) -> list[Tensor]:
    """Run lengths of each value of a map, in ascending order of values -> starts from 1 and lengths in turn, [2 runs].

    Runs go along the rows and over their ends. The format is transformers' own, not COCO's.
    """
    flat = segmentation.flatten()
    starts = torch.cat([flat.new_zeros(1, dtype=torch.int64), (flat[1:] != flat[:-1]).nonzero()[:, 0] + 1])
    lengths = torch.diff(starts, append=starts.new_tensor([len(flat)]))
    values, order = flat[starts].sort(stable=True)
    runs = torch.stack([starts[order] + 1, lengths[order]], 1).flatten()
    counts = values.unique_consecutive(return_counts=True)[1]
    return list(runs.split((2 * counts).tolist()))
