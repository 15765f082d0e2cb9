"""Files of bands for tests."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np


def write_tiff(
    path: Path,
    pixels: np.ndarray,  # [H, W, C]
    nodata: float | None = None,
) -> None:
    """Write a TIFF of any number of bands by rasterio."""
    import rasterio

    height, width, count = pixels.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", height=height, width=width, count=count, dtype=pixels.dtype,
                           nodata=nodata) as file:  # fmt: skip
            file.write(pixels.transpose(2, 0, 1))
