"""Options of videos."""

from __future__ import annotations

from dataclasses import dataclass

from maskformer_fast.core.checks import check, check_finite


@dataclass(frozen=True)
class VideoOptions:
    """Videos, cameras and streams: which frames are segmented, and how objects are followed."""

    every: int = 1
    """Segment one frame of so many."""
    start: float = 0.0
    """Seconds from the beginning of a video that are left out."""
    end: float | None = None
    """Seconds from the beginning of a video at which to stop; ``None``: at its end."""
    min_score: float = 0.5
    """Instance: least score of an instance that is written, drawn and followed."""
    gap: int = 30
    """Number of segmented frames for which an object that is not seen keeps its track id."""
    retries: int = 5
    """Number of attempts, one after the other, to take up a stream or camera again that broke off."""

    def __post_init__(self) -> None:
        check_finite(self, "video")
        check(self.every > 0, "video.every", "> 0", self.every)
        check(self.start >= 0, "video.start", ">= 0 s", self.start)
        check(self.end is None or self.end > self.start, "video.end", f"> {self.start} s, the start", self.end)
        check(0.0 <= self.min_score <= 1.0, "video.min_score", "0..1", self.min_score)
        check(self.gap >= 0, "video.gap", ">= 0", self.gap)
        check(self.retries >= 0, "video.retries", ">= 0", self.retries)
