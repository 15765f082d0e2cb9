"""Images for networks that are not trained."""

from __future__ import annotations

import numpy as np


def photo(seed: int = 0, height: int = 60, width: int = 84, block: int = 12) -> np.ndarray:
    """Blocks of random colours, so that masks have shapes -> uint8 [height, width, 3]."""
    shape = -(-height // block), -(-width // block), 3
    colors = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.kron(colors, np.ones((block, block, 1), np.uint8))[:height, :width]
