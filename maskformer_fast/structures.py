"""Data that the parts of the package exchange: examples, batches, predictions and targets.

Masks are bit-packed along the width, 8 pixels to a byte, least significant bit first (``numpy.packbits`` with
``bitorder="little"``): pixel ``x`` is bit ``x % 8`` of byte ``x // 8``. Padding bits are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.core.metadata import VOID, SegmentInfo


def pack_masks(
    masks: Tensor,  # [..., H, W] bool
) -> Tensor:
    """Pack boolean masks 8 pixels to a byte -> uint8 [..., H, ceil(W/8)], on the masks' device."""
    if masks.dtype != torch.bool:
        raise TypeError(f"masks: expected torch.bool, got {masks.dtype}")
    bits = torch.nn.functional.pad(masks, (0, -masks.shape[-1] % 8))
    shape = (*bits.shape[:-1], bits.shape[-1] // 8)
    # Eight bytes of 0 or 1 are a number; the product moves bit 0 of byte i to bit 56 + i, and no sums carry.
    numbers = bits.contiguous().flatten().view(torch.int64).view(shape)
    return ((numbers * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_masks(
    packed: Tensor,  # [..., H, ceil(W/8)] uint8
    width: int,
) -> Tensor:
    """Inverse of `pack_masks` -> bool [..., H, width]."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected torch.uint8, got {packed.dtype}")
    if (width + 7) // 8 != packed.shape[-1]:
        raise ValueError(f"width: expected one that packs to {packed.shape[-1]} bytes, got {width}")
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :width].to(torch.bool)


class Projection(NamedTuple):
    """A linear convolution that keeps the size (odd k, zero padding), not yet applied to its input."""

    weight: Tensor  # [D, C, k, k]
    bias: Tensor  # [D]

    def embed(
        self,
        features: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Apply the convolution, in the precision of the features -> [B, D, h, w]."""
        weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
        return F.conv2d(features, weight, bias, padding=weight.shape[-1] // 2)

    def fold(
        self,
        embeddings: Tensor,  # [N, D]
    ) -> Projection:
        """Convolution that computes the embeddings times this one's output: weight [N, C, k, k], bias [N]."""
        weight, bias = self.weight.to(embeddings.dtype), self.bias.to(embeddings.dtype)
        return Projection((embeddings @ weight.flatten(1)).unflatten(1, weight.shape[1:]), embeddings @ bias)


class Predictions(NamedTuple):
    """Output of the network for a batch. Mask logits stay factored; `ops.mask_product.layer_mask_logits` computes them.

    L is the number of decoder layers kept (all with deep supervision, else 1), the final one last. In inference the
    last convolution of the pixel decoder is not applied but given as ``projection``, so that it can be computed for the
    wanted masks only; ``pixel_embeddings`` are the same either way.
    """

    class_logits: Tensor  # [L, B, Q, K+1], "no object" last
    mask_embeddings: Tensor  # [L, B, Q, D]
    pixel_features: Tensor  # pixel embeddings [B, D, h, w] at stride 4 of the padded input, or [B, C, h, w] to project
    valid_sizes: Tensor  # [B, 2] int64, on any device: height, width of each image inside the padded input
    input_size: tuple[int, int]  # height, width of the padded input
    projection: Projection | None = None  # from features to pixel embeddings; None where they are embeddings already

    @property
    def pixel_embeddings(self) -> Tensor:
        """[B, D, h, w]; with a projection they are computed at every call."""
        return self.pixel_features if self.projection is None else self.projection.embed(self.pixel_features)


class LayerPredictions(NamedTuple):
    """Output of a network whose layers have pixel features of their own: `Predictions` of each, the final one last."""

    layers: tuple[Predictions, ...]  # each of a single layer


class PixelPredictions(NamedTuple):
    """Output of a per-pixel baseline for a batch: class scores at every pixel, no queries."""

    logits: Tensor  # [L, B, K, h, w], the final layer last
    valid_sizes: Tensor  # [B, 2] int64
    input_size: tuple[int, int]


class Targets(NamedTuple):
    """Ground truth of a batch for any of the three tasks; masks may overlap."""

    labels: Tensor  # [B, T] int64, rows beyond counts[b] are 0
    counts: Tensor  # [B] int64
    masks: Tensor  # [B, T, H, ceil(W/8)] uint8, packed, H x W = the padded input size
    valid_sizes: Tensor  # [B, 2] int64
    input_size: tuple[int, int]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """Copy to a device."""
        moved = [t.to(device, non_blocking=non_blocking) for t in self[:4]]
        return Targets(moved[0], moved[1], moved[2], moved[3], self.input_size)


class Batch(NamedTuple):
    """One micro-batch of one rank, as the training loader gives it."""

    images: Tensor  # [B, 3, H, W] uint8 RGB, zero outside the valid sizes
    targets: Targets
    image_ids: list[int | str]
    paths: list[str]
    broken: list[tuple[str, str]]  # path and reason of each example that was replaced because it could not be read


@dataclass
class Example:
    """One image and its ground truth, as a data set reads them, at their own resolution.

    Ground truth without overlap (semantic, panoptic) is an ``id_map``, with overlap (instances) ``masks``. Exactly one
    of them is set. Semantic ground truth uses the class index as the segment's id.
    """

    image: np.ndarray  # [H, W, 3] uint8 RGB
    segments: list[SegmentInfo]
    id_map: np.ndarray | None = None  # [H, W] int32, VOID where unlabelled
    masks: np.ndarray | None = None  # [T, H, W] bool, in the order of segments
    image_id: int | str = 0
    path: str = ""

    def __post_init__(self) -> None:
        if (self.id_map is None) == (self.masks is None):
            raise ValueError("Example: expected exactly one of id_map and masks")

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return self.image.shape[0], self.image.shape[1]

    def segment_masks(self, segments: list[SegmentInfo]) -> np.ndarray:
        """Masks of the given segments, which must be this example's -> [T, H, W] bool."""
        if self.masks is not None:
            rows = {segment.id: row for row, segment in enumerate(self.segments)}
            return self.masks[[rows[segment.id] for segment in segments]]
        ids = np.array([segment.id for segment in segments], dtype=np.int32)
        assert self.id_map is not None  # by __post_init__
        return self.id_map[None] == ids[:, None, None]

    def semantic_map(self) -> np.ndarray:
        """Class index of every pixel -> [H, W] int32, VOID where no segment is; later masks cover earlier ones."""
        labels = np.full(self.size, VOID, dtype=np.int32)
        if self.masks is not None:
            for segment, mask in zip(self.segments, self.masks, strict=True):
                labels[mask] = segment.category
        elif self.segments and self.id_map is not None:
            order = sorted(self.segments, key=lambda segment: segment.id)
            ids = np.array([segment.id for segment in order], dtype=np.int32)
            categories = np.array([segment.category for segment in order], dtype=np.int32)
            row = np.searchsorted(ids, self.id_map).clip(max=len(ids) - 1)
            known = ids[row] == self.id_map
            labels[known] = categories[row[known]]
        return labels
