"""Pictures of bands as pictures to look at."""

from __future__ import annotations

import numpy as np

from maskformer_fast.core.image_resize import is_rgb

_PERCENTILES = 2, 98  # of a band's values, which become 0 and 255
_MOST_VALUES = 1 << 20  # pixels that the percentiles are taken of


def as_display(
    image: np.ndarray,  # [H, W, C] of any numbers
) -> np.ndarray:
    """A picture to look at -> uint8 [H, W, 3]: RGB of 8 bits as it is, else the first three bands, each stretched.

    A band's 2nd to 98th percentile becomes 0 to 255. One or two bands are shown as grey, by the first.
    """
    if is_rgb(image):
        return image
    bands = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    if bands.size == 0:
        return bands.astype(np.uint8)
    step = -(-bands.shape[0] * bands.shape[1] // _MOST_VALUES)
    low, high = np.percentile(bands.reshape(-1, 3)[::step], _PERCENTILES, axis=0)
    scaled = (bands - low) / np.maximum(high - low, 1e-9) * 255
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
