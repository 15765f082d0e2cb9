"""Results as NumPy arrays: field for field what `maskformer_fast.structures` has as tensors, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from maskformer_fast.metadata import SegmentInfo


@dataclass
class SemanticResult:
    """Label of every pixel at the frame's size."""

    labels: np.ndarray  # [H, W] uint8 (K <= 255) or int16


@dataclass
class PanopticResult:
    """Non-overlapping segments; ids count from 1, `VOID` where no segment is."""

    id_map: np.ndarray  # [H, W] int32
    segments: list[SegmentInfo] = field(default_factory=list)


@dataclass
class InstanceResult:
    """Scored, possibly overlapping instances, best first."""

    labels: np.ndarray  # [N] int64
    scores: np.ndarray  # [N] float32
    masks: np.ndarray  # [N, H, ceil(W/8)] uint8, 8 pixels to a byte, least significant bit first
    boxes: np.ndarray  # [N, 4] float32: x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask
    size: tuple[int, int]  # H, W

    def unpacked_masks(self) -> np.ndarray:
        """Masks a byte to a pixel -> bool [N, H, W]."""
        return np.unpackbits(self.masks, axis=-1, count=self.size[1], bitorder="little").view(np.bool_)


Result = SemanticResult | PanopticResult | InstanceResult
