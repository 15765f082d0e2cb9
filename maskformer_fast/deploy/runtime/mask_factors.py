"""Mask logits that are computed for the queries that a result needs, from factors that the network gives.

MaskFormer's pixel decoder ends in a linear 3x3 convolution, whose output is multiplied by the queries' mask embeddings.
Folded into the convolution's kernel, the embeddings make it one with an output channel a query (`ops.mask_product` has
the mathematics). That takes a tenth of the multiplications for 100 queries of 256 channels, and less for fewer queries.
Mask2Former's ends in a 1x1 convolution, which the graph folds into the embeddings: a product with its input is left.
EoMT has that product alone.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.extension import load_extension

PANEL = 16
"""Output channels that lie together in packed weights. The number of input channels must be a multiple of it."""
_POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2.0), -math.sqrt(2.0))
"""Interpolation points of Winograd's F(4, 3), without the sixth, infinity."""


class Projection(NamedTuple):
    """The pixel decoder's last convolution, 3x3 with zero padding."""

    weight: np.ndarray  # [D, C, 3, 3] float32
    bias: np.ndarray  # [D] float32


class ImageMasks:
    """Mask logits [Q, h, w] float32 of an image; indexing by queries computes theirs."""

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(
        self,
        embeddings: np.ndarray,  # [Q, D] float32; [Q, C] or, with an offset last, [Q, C + 1] without a projection
        features: np.ndarray,  # [h, w, C] float32, the convolution's input
        projection: Projection | None,  # None: the features are multiplied as they are
        threads: int,
    ) -> None:
        self.shape = (len(embeddings), *features.shape[:2])
        self._embeddings, self._features, self._projection, self._threads = embeddings, features, projection, threads

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, queries: np.ndarray) -> np.ndarray:
        """Logits of some queries -> [N, h, w]."""
        embeddings = self._embeddings[queries]
        height, width, channels = self._features.shape
        if self._projection is None:
            masks = embeddings[:, :channels] @ self._features.reshape(-1, channels).T
            if embeddings.shape[1] > channels:
                masks += embeddings[:, channels:]
            return masks.reshape(-1, height, width)
        result = np.empty((height, width, len(embeddings)), np.float32)
        if result.size:
            weight, bias = self._projection
            packed = pack_winograd((embeddings @ weight.reshape(len(weight), -1)).reshape(-1, channels, 3, 3))
            folded = embeddings @ bias
            load_extension().conv3x3_winograd(
                address_of(self._features, "features", "float32", self._features.shape), "float32",
                (1, height, width, channels, len(embeddings)),
                address_of(packed, "packed", "float32", packed.shape),
                address_of(folded, "bias", "float32", folded.shape), False,
                address_of(result, "result", "float32", result.shape), self._threads,
            )  # fmt: skip
        return result.transpose(2, 0, 1)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))]


class FactoredMasks:
    """Mask logits [B, Q, h, w] float32 of a batch; an index gives those of an image."""

    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(
        self,
        embeddings: np.ndarray,  # [B, Q, D] float32; see `ImageMasks`
        features: np.ndarray,  # [B, h, w, C] float32
        projection: Projection | None,
        threads: int,
    ) -> None:
        self.shape = (*embeddings.shape[:2], *features.shape[1:3])
        self.size = math.prod(self.shape)
        self._embeddings, self._features, self._projection, self._threads = embeddings, features, projection, threads

    def __getitem__(self, row: int) -> ImageMasks:
        return ImageMasks(self._embeddings[row], self._features[row], self._projection, self._threads)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(self[row]) for row in range(self.shape[0])])


def pack_winograd(
    weight: np.ndarray,  # [N, C, 3, 3] float32, N > 0
) -> np.ndarray:
    """Transform and pack a convolution's weights as `ops.convolution` does -> [36, ceil(N / 16), C, 16] float32."""
    count, channels = weight.shape[:2]
    rows = np.zeros((-(-count // PANEL) * PANEL, channels, 9), np.float32)
    rows[:count] = weight.reshape(count, channels, 9)
    columns = rows.reshape(-1, PANEL, channels, 9).transpose(3, 0, 2, 1).reshape(9, -1)
    return np.ascontiguousarray(_transform() @ columns).reshape(36, -1, channels, PANEL)


@functools.cache
def _transform() -> np.ndarray:
    """Winograd transform of a kernel's 9 weights, the Kronecker product of G with itself -> [36, 9] float32."""
    rows = []
    for point in _POINTS:
        scale = math.prod(point - other for other in _POINTS if other != point)
        rows.append([1 / scale, point / scale, point**2 / scale])
    values = np.array([*rows, [0.0, 0.0, 1.0]])
    return np.kron(values, values).astype(np.float32)
