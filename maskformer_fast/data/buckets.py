"""A small set of shapes for training batches, so that a compiled network meets each once and compiles no more.

Where every image is cropped there is one size already. Otherwise each side of a batch is padded to the next of a few
levels, which follow from the recipe, and targets to a power of two.
"""

from __future__ import annotations

import math

from maskformer_fast.config import AugmentConfig

LEAST_TARGETS = 8


def bucket_side(side: int, augment: AugmentConfig, divisor: int) -> int:
    """The size that a side of a batch is padded to, at least ``side``, a multiple of ``divisor``.

    After a short-edge resize: the largest short edge, the largest long one or their geometric mean. Other recipes do
    not say how large an image can be: powers of two and one and a half times these.
    """
    if augment.scale_mode == "short_edge":
        low, high = max(augment.short_edge), max(augment.max_size, *augment.short_edge)
        levels = (low, math.isqrt(low * high), high)
        level = next((level for level in levels if level >= side), side)
    else:
        power = 1 << max(0, side - 1).bit_length()
        level = power * 3 // 4 if power * 3 // 4 >= side else power
    return -(-level // max(1, divisor)) * max(1, divisor)


def bucket_targets(count: int) -> int:
    """The number of targets that an image's are padded to: a power of two."""
    return max(LEAST_TARGETS, 1 << max(0, count - 1).bit_length())
