"""Overlay videos: pictures encoded at their times, with the sound of the source as it is."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from maskformer_fast.core.files import is_full_disk
from maskformer_fast.video.av_tools import av_tools
from maskformer_fast.video.reader import Sound

logger = logging.getLogger(__name__)

_CONTAINER = {"movflags": "frag_keyframe+delay_moov", "frag_duration": "10000000"}
"""Fragments of at most 10 s: no index of all frames is kept in memory, and a killed process leaves a file to play."""
_ENCODERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"preset": "veryfast", "crf": "21"}), ("libopenh264", {}), ("mpeg4", {"qscale": "3"}),
)  # fmt: skip
"""Encoders, the first of which that FFmpeg has is taken, with their options."""


class VideoWriter:
    """Writes one MP4 file (H.264 where FFmpeg can). `close` completes it."""

    def __init__(
        self,
        file: BinaryIO,
        size: tuple[int, int],
        time_base: Fraction,
        rate: Fraction,
        sound: Any | None = None,
    ) -> None:
        """Begin the file.

        Args:
            file: open for writing.
            size: height and width of its pictures; odd sides become one pixel longer, for the encoder.
            time_base: unit of time stamps in seconds, the source's.
            rate: average number of pictures a second, which players may show.
            sound: template of the sound's stream, that of a `VideoReader`.
        """
        self._av = av = av_tools()
        self._size = size[0] + size[0] % 2, size[1] + size[1] % 2
        self._container = av.open(file, "w", format="mp4", options=dict(_CONTAINER))
        name, options = next((name, options) for name, options in _ENCODERS if name in av.codecs_available)
        self._video = self._container.add_stream(name, rate=rate, options=options)
        self._video.height, self._video.width = self._size
        self._video.pix_fmt = "yuv420p"
        # MPEG-4 has at most 16 bits for the unit of time
        self._time_base = time_base if name != "mpeg4" or time_base.denominator < 1 << 16 else Fraction(1, 1000)
        self._video.codec_context.time_base = self._time_base
        self._sound = None if sound is None else self._container.add_stream_from_template(sound)
        # MPEG-TS has a header in each packet of AAC in place of one in the stream, which MP4 has.
        is_adts = sound is not None and sound.codec_context.name == "aac" and not sound.codec_context.extradata
        self._filter = av.BitStreamFilterContext("aac_adtstoasc", sound) if is_adts else None
        self._refused = False
        self._last: int | None = None

    def write(
        self,
        picture: np.ndarray,  # [H, W, 3] uint8 RGB
        offset: Fraction,
    ) -> None:
        """Encode a picture, shown from ``offset`` seconds on; of another size than the file's, it is scaled."""
        height, width = self._size
        if picture.shape[0] in (height - 1, height) and picture.shape[1] in (width - 1, width):
            pad = (0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)
            picture = np.pad(picture, pad, "edge") if picture.shape[:2] != self._size else picture
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(width=width, height=height, format="yuv420p")
        stamp = round(offset / self._time_base)
        # Encoders refuse two pictures of one time, which damaged files have.
        self._last = stamp if self._last is None else max(stamp, self._last + 1)
        frame.pts, frame.time_base = self._last, self._time_base
        self._container.mux(self._video.encode(frame))

    def write_sound(self, sound: Sound) -> None:
        """Add a packet of sound as it is. One that MP4 cannot have, as a damaged one, is left out, with a warning.

        Raises:
            OSError: the disk is full.
        """
        if self._sound is None:
            return
        packet = self._av.Packet(sound.data)
        packet.time_base, packet.pts, packet.dts = sound.time_base, sound.pts, sound.dts
        packet.duration = sound.duration
        try:
            for filtered in self._filter.filter(packet) if self._filter else [packet]:
                filtered.stream, filtered.time_base = self._sound, sound.time_base
                self._container.mux(filtered)
        except (ValueError, self._av.error.FFmpegError) as error:
            if is_full_disk(error):
                raise
            if not self._refused:
                logger.warning("packets of sound are left out: %s", error)
            self._refused = True

    def close(self) -> None:
        """Encode the pictures that the encoder still holds, and complete the file."""
        self._container.mux(self._video.encode())
        self._container.close()
