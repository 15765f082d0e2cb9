"""Results of the three tasks, with tensors from PyTorch or NumPy arrays from a bundle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from maskformer_fast.core.metadata import SegmentInfo

ArrayT = TypeVar("ArrayT")
"""Type of the arrays of one result: ``torch.Tensor`` or ``numpy.ndarray``."""


@dataclass
class SemanticResult(Generic[ArrayT]):
    """Class of every pixel."""

    labels: ArrayT  # [H, W] uint8 (K <= 255) or int16
    scores: ArrayT | None = None  # [H, W] float32, sum over queries of the winning class


@dataclass
class PanopticResult(Generic[ArrayT]):
    """Segments that do not overlap. Ids count from 1; pixels without a segment are `VOID`."""

    id_map: ArrayT  # [H, W] int32
    segments: list[SegmentInfo] = field(default_factory=list)


@dataclass
class InstanceResult(Generic[ArrayT]):
    """Scored instances, best first; they may overlap."""

    labels: ArrayT  # [N] int64
    scores: ArrayT  # [N] float32
    masks: ArrayT  # [N, H, ceil(W/8)] uint8, 8 pixels to a byte, least significant bit first
    boxes: ArrayT  # [N, 4] float32: x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask
    size: tuple[int, int]  # H, W


Result = SemanticResult[Any] | PanopticResult[Any] | InstanceResult[Any]
