"""Results of a video's frames as JSON, one line a frame."""

from __future__ import annotations

import json
from typing import Any

from maskformer_fast.core.metadata import Metadata
from maskformer_fast.video.pipeline import SegmentedFrame
from maskformer_fast.video.sources import LINE_START


def frame_line(frame: SegmentedFrame, metadata: Metadata) -> bytes:
    """One line for a frame.

    Its object has ``frame`` (number from the start time), ``time`` (seconds), ``size`` ([H, W]), and a list for each
    task: of the segments' ``category_id``, ``segmentation`` (compressed COCO run lengths), ``bbox`` (x, y, width,
    height), ``area`` and, except of semantic results, which have an entry for each class, ``score`` and ``track_id``.
    A frame for which inference failed has ``error`` in place of the lists.
    """
    fields: dict[str, Any] = {"time": frame.time, "size": [*frame.image.shape[:2]]}
    for task, result in frame.results.items():
        entries = result.to_coco(0, metadata.category_ids)
        kept = ["category_id", "segmentation", "bbox", "area"] + ["score"] * (task != "semantic")
        fields[task] = [{key: entry[key] for key in kept} for entry in entries]
        for entry, number in zip(fields[task], frame.tracks.get(task, ()), strict=False):
            entry["track_id"] = number
    if frame.error is not None:
        fields["error"] = f"{type(frame.error).__name__}: {frame.error}"
    rest = json.dumps(fields, allow_nan=False).removeprefix("{")
    return f"{LINE_START}{frame.index}, {rest}\n".encode()
