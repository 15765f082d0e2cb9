"""Small video files of moving scenes, with sound, and ways to damage them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.moving_scene import MovingScene

TIME_BASE = Fraction(1, 12800)
RATE = 25


def write_clip(
    path: Path | str,
    frames: int = 50,
    size: tuple[int, int] = (48, 64),
    *,
    times: Sequence[float] | None = None,
    sound: str | None = "aac",
    image: Callable[[int], np.ndarray] | None = None,
    codec: str = "libx264",
    container: str | None = None,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    key_every: int = 25,
) -> Path:
    """Write a clip; ``times`` are seconds, by default of 25 frames a second."""
    import av

    scene = MovingScene(0, max(frames, 60), size, 4)
    image = image or scene.image
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        video = output.add_stream(codec, rate=RATE, options={"g": str(key_every)} if codec == "libx264" else {})
        video.height, video.width, video.pix_fmt = *size, pix_fmt
        video.codec_context.time_base = TIME_BASE
        voice: Any = output.add_stream(sound, rate=44100, layout="mono") if sound else None
        if voice is not None:
            voice.bit_rate = 64_000  # some encoders have no default
        spoken = 0
        for number in range(frames):
            time = number / RATE if times is None else times[number]
            frame = av.VideoFrame.from_ndarray(image(number), format="rgb24")
            frame.pts, frame.time_base = round(time / TIME_BASE), TIME_BASE
            output.mux(video.encode(frame))
            while voice is not None and spoken / 44100 < time:
                tone = 0.2 * np.sin(2 * np.pi * 440 * (spoken + np.arange(1024)) / 44100)
                part = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], format="fltp", layout="mono")
                part.sample_rate, part.pts, part.time_base = 44100, spoken, Fraction(1, 44100)
                spoken += 1024
                output.mux(voice.encode(part))
        output.mux(video.encode())
        if voice is not None:
            output.mux(voice.encode())
    return Path(path)


def frame_times(path: Path | str) -> list[float]:
    """Time stamps of all frames by PyAV, as ffprobe lists them."""
    import av

    with av.open(str(path)) as source:
        return [frame.time for frame in source.decode(source.streams.video[0])]


def sound_packets(path: Path | str) -> list[tuple[int, int, int, bytes]]:
    """Packets of sound: pts, dts, duration and content."""
    import av

    with av.open(str(path)) as source:
        return [(packet.pts, packet.dts, packet.duration, bytes(packet))
                for packet in source.demux(source.streams.audio[0]) if packet.size]  # fmt: skip


def flip_bytes(path: Path, share: tuple[float, float], step: int = 97, packet: int = 0, seed: int = 1) -> None:
    """Damage a part of a file; headers of a transport stream's packets of that many bytes are left alone."""
    make, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    for at in range(int(len(content) * share[0]), int(len(content) * share[1]), step):
        if not packet or at % packet >= 12:
            content[at] ^= int(make.integers(1, 256))
    path.write_bytes(content)


def turn(path: Path, quarter: int) -> None:
    """Set the display matrix of an MP4 file's video track: turned clockwise by that many quarters."""
    content = bytearray(path.read_bytes())
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter]
    matrix = (cosine, sine, 0, -sine, cosine, 0)
    # behind version, flags, times, track, length, layer, group and volume of the track's header
    at = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    for place, value in zip((0, 1, 2, 3, 4, 5), matrix, strict=True):
        start = at + 4 * place
        content[start : start + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
