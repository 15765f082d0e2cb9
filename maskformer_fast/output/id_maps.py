"""From the ids of an id map to indices into its list of segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskformer_fast.core.metadata import VOID, SegmentInfo
from maskformer_fast.core.results import PanopticResult

__all__ = ["result_rows", "segment_rows"]


def segment_rows(
    id_map: np.ndarray,  # [H, W] int
    segments: Sequence[SegmentInfo],
) -> np.ndarray:
    """Index into `segments` of every pixel -> [H, W] int32; `VOID` where the id is not listed.

    Raises:
        ValueError: two segments share an id.
    """
    ids = np.array([segment.id for segment in segments], dtype=np.int64)
    order = np.argsort(ids, kind="stable").astype(np.int32)
    ids = ids[order]
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"segments: expected distinct ids, got {int(ids[1:][ids[1:] == ids[:-1]][0])} twice")
    if len(ids) == 0:
        return np.full(id_map.shape, VOID, dtype=np.int32)
    if ids[0] >= 0 and ids[-1] < id_map.size:  # small ids, as those that count from 0 or 1: a table beats a search
        table = np.full(ids[-1] + 2, VOID, dtype=np.int32)
        table[ids] = order
        # All ids outside the table are mapped to its last entry, which is VOID.
        outside = np.uint32(ids[-1] + 1)
        return table[np.minimum(id_map.astype(np.int32, copy=False).view(np.uint32), outside)]
    ids = ids.astype(id_map.dtype)
    nearest = np.searchsorted(ids, id_map).clip(max=len(ids) - 1)
    return np.where(ids[nearest] == id_map, order[nearest], np.int32(VOID))


def result_rows(result: PanopticResult) -> np.ndarray:
    """Index into `result.segments` of every pixel -> [H, W] int32, `VOID` for pixels without a segment.

    Raises:
        TypeError: the id map is not an integer tensor of rank 2.
        ValueError: map and list disagree: an id is in only one of them, or listed twice.
    """
    id_map = result.id_map.detach().cpu().numpy()
    if id_map.ndim != 2 or id_map.dtype.kind not in "iu":
        raise TypeError(f"id_map: expected an integer tensor [H, W], got {id_map.dtype} of shape {id_map.shape}")
    rows = segment_rows(id_map, result.segments)
    unlisted = id_map[(rows == VOID) & (id_map != VOID)]
    if unlisted.size:
        raise ValueError(f"id_map: expected ids of listed segments or {VOID}, got {np.unique(unlisted)[:8].tolist()}")
    present = np.bincount(rows.ravel() + 1, minlength=len(result.segments) + 1)[1:]
    if not present.all():
        missing = [segment.id for segment, count in zip(result.segments, present, strict=True) if not count]
        raise ValueError(f"segments: expected pixels in id_map for every segment, got none for ids {missing[:8]}")
    return rows
