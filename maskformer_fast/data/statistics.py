"""Mean and standard deviation of each band of many pictures, in one pass and float64."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from maskformer_fast.core.checks import check
from maskformer_fast.data.bands import nodata_value, read_picture


class BandStatistics:
    """Mean and deviation of each band, of pictures that are added one by one.

    Sums of squares are taken around the mean of each picture and merged by the formula of Chan, Golub and LeVeque
    (1979), so that no digits are lost in large means.
    """

    def __init__(self, channels: int) -> None:
        check(channels > 0, "channels", "> 0", channels)
        self.count = np.zeros(channels, np.int64)
        """Number of values of each band."""
        self._mean = np.zeros(channels)
        self._squares = np.zeros(channels)  # sums of squared differences from the mean

    def add(
        self,
        image: np.ndarray,  # [H, W, C] of any numbers
        nodata: float | None = None,
    ) -> None:
        """Add a picture; values that are ``nodata`` or not finite do not count.

        Raises:
            ValueError: the picture has another number of bands.
        """
        channels = len(self.count)
        check(image.ndim == 3 and image.shape[2] == channels, "image", f"shape [H, W, {channels}]", image.shape)
        for band in range(channels):
            values = image[..., band].astype(np.float64).ravel()
            keep = np.isfinite(values) if nodata is None else np.isfinite(values) & (values != nodata)
            values = values[keep]
            if values.size:
                mean = values.mean()
                self._merge(band, values.size, mean, float(np.square(values - mean).sum()))

    def merge(self, other: BandStatistics) -> None:
        """Add the pictures of another part, as of another process."""
        for band, count in enumerate(other.count):
            if count:
                self._merge(band, int(count), other._mean[band], other._squares[band])

    def _merge(self, band: int, count: int, mean: float, squares: float) -> None:
        before = int(self.count[band])
        total, difference = before + count, mean - self._mean[band]
        self._squares[band] += squares + difference**2 * before * count / total
        self._mean[band] += difference * count / total
        self.count[band] = total

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each band, as ``model.pixel_mean`` takes it; 0 for a band without a value."""
        return tuple(self._mean.tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each band (of all values, not an estimate), for ``model.pixel_std``."""
        return tuple(np.sqrt(self._squares / np.maximum(self.count, 1)).tolist())


def statistics_of_files(
    paths: Iterable[str | os.PathLike[str]], channels: int = 0, nodata: float | None = None
) -> BandStatistics:
    """Mean and deviation of each band of picture files.

    Args:
        channels: as ``data.channels``: number of bands; 0 reads RGB of 8 bits.
        nodata: value that does not count; None takes that which each GeoTIFF states, where rasterio is installed.

    Raises:
        BrokenExampleError: a file cannot be read.
    """
    statistics = BandStatistics(channels or 3)
    for path in paths:
        ignored = nodata_value(path) if nodata is None and channels else nodata
        statistics.add(read_picture(path, channels=channels), ignored)
    return statistics
