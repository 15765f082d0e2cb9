"""Padding of training batches to a few sizes, because `torch.compile` compiles the network once for each size.

Recipes that crop give batches of one size already. Otherwise the height and the width of a batch are each padded to the
next of a few levels, which follow from the recipe, and the number of targets is padded to a power of two.
"""

from __future__ import annotations

import math

from maskformer_fast.config import AugmentConfig

LEAST_TARGETS = 8
"""Smallest number of targets to which a batch is padded."""


def bucket_side(side: int, augment: AugmentConfig, divisor: int) -> int:
    """Return the height or width, in pixels, to which a batch of that height or width is padded.

    The result is at least ``side`` and a multiple of ``divisor``. After a short-edge resize the levels are the largest
    short edge, the largest long edge, and their geometric mean. Other recipes do not bound an image's size: their
    levels are the powers of two and 1.5 times these.
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
    """Return the number of target slots for ``count`` targets: a power of two, at least `LEAST_TARGETS`."""
    return max(LEAST_TARGETS, 1 << max(0, count - 1).bit_length())
