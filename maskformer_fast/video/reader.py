"""Pictures and sound of a video file, camera or stream."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from maskformer_fast.core.checks import check
from maskformer_fast.video.av_tools import av_tools
from maskformer_fast.video.options import VideoOptions
from maskformer_fast.video.sources import Source, container_format, is_cut_short

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 26
"""Pixels of the largest frame that is decoded: 8192 x 8192."""
OPEN_SECONDS = 10.0
"""Seconds to wait for a stream to open, and for its next data."""
FIRST_WAIT = 1.0
"""Seconds before the first attempt to take up a stream again; each further one waits twice as long."""
LONGEST_WAIT = 30.0
"""Seconds before an attempt, at most."""
KEY_SECONDS = 12.0
"""Seconds between key frames, at most, in files whose format has no index of them, for ``start``."""
_INDEXED = ("mov", "matroska", "avi")
_SEEK_TO = 1_000_000  # units of a container's time stamps in a second
_FILE_PROTOCOLS = "file"
_STREAM_PROTOCOLS = "rtsp,rtsps,rtp,srtp,rtmp,rtmps,rtmpt,srt,udp,tcp,tls,http,https,httpproxy,crypto"


class VideoError(ValueError):
    """A video of which nothing can be segmented; the message has its name and the reason."""


class Picture(NamedTuple):
    """A decoded frame."""

    image: np.ndarray  # [H, W, 3] uint8 RGB, upright
    number: int
    """Number of the frame from the start time, also counting frames that are not segmented."""
    time: float
    """Time stamp in seconds: a file's as stored, a camera's or stream's from its first frame."""
    offset: Fraction
    """Seconds from the start of what is segmented."""


class Sound(NamedTuple):
    """A packet of sound, as stored; time stamps count from the start of what is segmented."""

    data: bytes
    pts: int
    dts: int
    duration: int
    time_base: Fraction


@dataclass
class ReadCounts:
    """What became of a video's frames."""

    decoded: int = 0
    damaged: int = 0
    """Frames that could not be decoded, or only in part, and are left out."""
    breaks: int = 0
    """Times that a stream broke off and was taken up again."""


class VideoReader:
    """Reads pictures and sound packets in the order in which they come. One iteration, by one thread.

    Attributes:
        counts: of frames so far.
        problem: reason why reading ended before the end, if it did.
        time_base: unit of the frames' time stamps in seconds.
        rate: average number of frames a second.
        sound: stream of an MP4 container with the format of the sound, a template for `VideoWriter`; None without.
    """

    def __init__(self, source: Source, options: VideoOptions, with_sound: bool = True) -> None:
        """Open the source.

        Args:
            with_sound: give the packets of its first sound stream, if MP4 can have such sound.

        Raises:
            VideoError: it cannot be opened, has no video stream, or its frames are too large.
            ModuleNotFoundError: PyAV is not installed.
        """
        self._av = av_tools()
        self.source, self.options = source, options
        self.counts = ReadCounts()
        self.problem: str | None = None
        self._stopped = threading.Event()
        self._origin: Fraction | None = None  # time stamp, in seconds, of the beginning
        self._shift = Fraction(0)  # added to time stamps since a stream was taken up again
        self._last: Fraction | None = None  # time stamp of the last frame
        self._resumed = False
        self._again_to: Fraction | None = None  # time stamp up to which a file at an address was read before
        self._has_frames = False
        self._container, self._stream = self._open()
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.rate = Fraction(rate) if rate and 0 < rate <= 1000 else Fraction(25)
        self.time_base = Fraction(self._stream.time_base or Fraction(1, 1000))
        template: tuple[Any, Any] = self._sound_template() if with_sound else (None, None)
        self.sound, self._holder = template

    def _open(self) -> tuple[Any, Any]:
        """Open the source -> container, video stream."""
        source, options = self.source, {"max_pixels": str(MAX_PIXELS)}
        form: str | None = None
        try:
            if source.kind == "file":
                form = container_format(source.address)
                if form is None:
                    raise VideoError("no video, or of an unknown format")
                options["protocol_whitelist"] = _FILE_PROTOCOLS
            elif source.kind == "camera":
                form = "v4l2"
            else:
                options["protocol_whitelist"] = _STREAM_PROTOCOLS
                if source.address.startswith("rtsp"):
                    options["rtsp_transport"] = "tcp"
            address = f"file:{source.address}" if source.kind == "file" else source.address
            timeout = None if source.kind == "file" else OPEN_SECONDS
            container = self._av.open(address, format=form, options=options, timeout=timeout)
        except (OSError, ValueError, self._av.error.FFmpegError) as error:
            raise VideoError(f"{source.shown}: {_reason(error)}") from None
        try:
            videos = [stream for stream in container.streams.video if stream.codec_context is not None]
            check(len(videos) > 0, source.shown, "a video stream", "none", VideoError)
            stream = videos[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            check(width * height <= MAX_PIXELS, source.shown, f"frames of at most {MAX_PIXELS} pixels",
                  f"{width}x{height}", VideoError)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        except VideoError:
            container.close()
            raise
        return container, stream

    def _sound_template(self) -> tuple[Any, Any]:
        """The sound's format in a container of its own, which outlives the source's -> stream, container."""
        if not self._container.streams.audio:
            return None, None
        holder = self._av.open(io.BytesIO(), "w", format="mp4")
        stream = self._container.streams.audio[0]
        try:
            return holder.add_stream_from_template(stream), holder
        except (ValueError, self._av.error.FFmpegError):
            logger.warning("%s: sound of %s is left out, as MP4 does not have it", self.source.shown,
                           stream.codec_context.name)
            return None, None

    @property
    def seconds(self) -> float | None:
        """Length of a file, as it says; None for other sources and where it is not known."""
        known = self._container.duration if self.source.kind == "file" else None
        return known / _SEEK_TO if known else None

    def stop(self) -> None:
        """End the iteration, from another thread, before its next item."""
        self._stopped.set()

    def close(self) -> None:
        """Close the source. No iteration may be under way."""
        self._container.close()

    def __iter__(self) -> Iterator[Picture | Sound]:
        """Pictures of frames that are to be segmented, and packets of sound.

        A damaged frame is left out and counted. A camera or stream that breaks off is opened again, after
        `FIRST_WAIT` seconds, twice as many before each further attempt, until ``options.retries`` failed; frames go on
        at later times. Reading never raises for what a video contains; see ``problem``.
        """
        while True:
            error: Exception | None = None
            try:
                yield from self._read()
            except (self._av.error.FFmpegError, MemoryError) as caught:
                error = caught
            if self._stopped.is_set() or self._is_past_end() or not self._breaks(error):
                return
            logger.warning("%s: broke off (%s)", self.source.shown, _reason(error) if error else "its end")
            if not self._take_up():
                return

    def _breaks(self, error: Exception | None) -> bool:
        """Whether the source may be taken up again; of a file whose end is missing, note the reason."""
        if self.source.kind != "file" and (error is not None or not self._container.duration):
            return True
        if error is not None:
            self.problem = f"breaks off after {self.counts.decoded} frames: {_reason(error)}"
        elif not self._has_frames:
            damaged = f", {self.counts.damaged} damaged ones" if self.counts.damaged else ""
            self.problem = f"no frame could be read{damaged}"
        elif (self.source.kind == "file" and self._container.format.name.startswith("mov")
              and is_cut_short(self.source.address)):  # fmt: skip
            self.problem = f"breaks off after {self.counts.decoded} frames: the file's end is missing"
        return False

    def _take_up(self) -> bool:
        """Open a stream again -> whether that worked."""
        self._container.close()
        wait, reason = FIRST_WAIT, "retries is 0"
        for _ in range(self.options.retries):
            if self._stopped.wait(wait):
                return False
            wait = min(2 * wait, LONGEST_WAIT)
            try:
                self._container, self._stream = self._open()
            except VideoError as error:
                reason = str(error).removeprefix(f"{self.source.shown}: ")
                continue
            self.counts.breaks += 1
            if self._container.duration:
                self._again_to = self._last
            else:
                self._resumed = True
            return True
        self.problem = (f"broke off after {self.counts.decoded} frames and did not come back in "
                        f"{self.options.retries} attempts: {reason}")  # fmt: skip
        return False

    def _read(self) -> Iterator[Picture | Sound]:
        """Items of the open container up to its end."""
        streams, start = [self._stream], self.options.start
        sound = None
        if self.sound is not None and self._container.streams.audio:
            sound = self._container.streams.audio[0]
            if sound.codec_context.name == self.sound.codec_context.name:
                streams.append(sound)
        # Formats without an index do not find the key frame before a time.
        start -= 0.0 if self._container.format.name.startswith(_INDEXED) else KEY_SECONDS
        if start > 0 and self.source.kind == "file" and self._container.start_time is not None:
            with suppress(self._av.error.FFmpegError):  # else everything before the start is decoded
                self._container.seek(self._container.start_time + int(start * _SEEK_TO))
        for packet in self._container.demux(streams):
            if self._stopped.is_set() or (self._is_past_end() and self._sound_is_past_end(packet, sound)):
                return
            if packet.stream is sound:
                yield from self._sound_of(packet)
            elif not self._is_past_end():
                yield from self._pictures_of(packet)

    def _pictures_of(self, packet: Any) -> Iterator[Picture]:
        """Decode a packet."""
        try:
            frames = packet.decode()
        except self._av.error.FFmpegError:
            if packet.size > 0:
                self.counts.damaged += 1
                self.counts.decoded += 1
            return
        for frame in frames:
            picture = self._picture(frame)
            if picture is not None:
                yield picture

    def _picture(self, frame: Any) -> Picture | None:
        """A frame that is to be segmented, or None."""
        self._has_frames = True
        time = self._time_of(frame)
        if self._again_to is not None and time <= self._again_to:
            return None
        offset = time - self._beginning(time) - Fraction(self.options.start)
        if offset < 0:
            return None
        self._last = time
        if self._is_past_end():
            return None
        number = self.counts.decoded
        self.counts.decoded += 1
        if frame.is_corrupt:
            self.counts.damaged += 1
            return None
        if number % self.options.every:
            return None
        image = frame.to_ndarray(format="rgb24")
        turns = round(frame.rotation / 90) % 4
        image = np.ascontiguousarray(np.rot90(image, turns)) if turns else image
        shown = time if self.source.kind == "file" else time - self._beginning(time)
        return Picture(image, number, float(shown), offset)

    def _time_of(self, frame: Any) -> Fraction:
        """A frame's time stamp in seconds, after that of the frame before it where a stream was taken up again."""
        base = Fraction(frame.time_base or self.time_base)
        stamp = frame.pts if frame.pts is not None else frame.dts
        period = 1 / self.rate
        if stamp is None:
            return Fraction(0) if self._last is None else self._last + period
        if self._resumed and self._last is not None:
            self._shift = max(Fraction(0), self._last + period - stamp * base)
            self._resumed = False
        return stamp * base + self._shift

    def _beginning(self, time: Fraction) -> Fraction:
        """Time stamp in seconds from which the start and end times count."""
        if self._origin is None:
            known = self._container.start_time if self.source.kind == "file" else None
            self._origin = time if known is None else Fraction(known, _SEEK_TO)
        return self._origin

    def _is_past_end(self) -> bool:
        end = self.options.end
        return end is not None and self._last is not None and self._last - self._beginning(self._last) >= end

    def _sound_is_past_end(self, packet: Any, sound: Any) -> bool:
        """Whether, after the last picture, no sound before the end is still to come."""
        if sound is None or packet.dts is None or self.options.end is None:
            return True
        return packet.dts * packet.time_base + self._shift - self._beginning(Fraction(0)) >= self.options.end

    def _sound_of(self, packet: Any) -> Iterator[Sound]:
        """A packet of sound of the time between start and end."""
        if packet.pts is None or packet.dts is None or packet.size == 0:
            return
        if self._origin is None and self.source.kind != "file":
            return  # sound before the first picture
        base = Fraction(packet.time_base)
        if self._again_to is not None and packet.pts * base <= self._again_to:
            return
        before = self._beginning(Fraction(0)) + Fraction(self.options.start) - self._shift
        since = packet.pts * base - before
        length = self.options.end
        # Of a start that is not the beginning, sound begins with the first packet that does not reach before it.
        if (self.options.start and since < 0) or (length is not None and since >= length - self.options.start):
            return
        shift = round(before / base)
        yield Sound(bytes(packet), packet.pts - shift, packet.dts - shift, packet.duration or 0, base)


def _reason(error: Exception) -> str:
    """One line of an error, without the address that FFmpeg adds."""
    text = getattr(error, "strerror", None)
    if text:
        return str(text)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
