"""Videos, cameras and streams: results of every frame, with identities across frames.

Nothing here imports PyAV until a video is opened.
"""

from maskformer_fast.video.options import VideoOptions
from maskformer_fast.video.pipeline import SegmentedFrame, segment_video
from maskformer_fast.video.tracker import Tracker, track

__all__ = ["SegmentedFrame", "Tracker", "VideoOptions", "segment_video", "track"]
