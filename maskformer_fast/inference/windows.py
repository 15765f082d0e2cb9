"""Semantic inference by overlapping square windows of a resized image, as EoMT's official code does it.

The image is resized so that its shorter side is a window's. Windows lie evenly along the longer side, as few as cover
it. Their class scores, not their logits, are averaged where they overlap, and then resized to the image's own size
(`ops.resized_semantic.windowed_semantic_inference`). A padded window's padding is not cropped: sides that the network
does not divide are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.inference.device_parts import Size
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.resized_semantic import windowed_semantic_inference
from maskformer_fast.ops.semantic import label_dtype
from maskformer_fast.structures import PixelPredictions, Predictions


def window_origins(height: int, width: int) -> tuple[list[Size], int]:
    """First row and column of each window of a resized image, and their side."""
    side, longer = min(height, width), max(height, width)
    count = -(-longer // side)
    overlap = (count * side - longer) / max(1, count - 1)
    starts = [int(number * (side - overlap)) for number in range(count)]
    return [(start, 0) if height > width else (0, start) for start in starts], side


def window_labels(
    predictions: Predictions | PixelPredictions,  # of all windows, as a batch
    origins: Sequence[Size],
    grid: Size,
    output_size: Size,
) -> Tensor:
    """Class of every pixel of an image from predictions for its windows -> [H, W] uint8 or int16.

    Args:
        origins: as of `window_origins`.
        grid: height and width of the resized image.
        output_size: height and width of the image.

    Raises:
        TypeError: predictions of a per-pixel model.
        ValueError: the network pads windows of this size.
    """
    if isinstance(predictions, PixelPredictions):
        raise TypeError("test.windows: expected a network that predicts masks, got a per-pixel model")
    side = min(grid)
    fits = tuple(predictions.input_size) == (side, side)
    check(fits, "test.short_edge", "with windows, a multiple of the network's size_divisibility", side)
    probabilities = predictions.class_logits[-1].float().softmax(-1)[..., :-1]
    logits = layer_mask_logits(predictions).float()
    labels = windowed_semantic_inference(logits, probabilities, origins, (side, side), grid, output_size)
    return labels.to(label_dtype(probabilities.shape[-1]))
