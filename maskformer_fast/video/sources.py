"""What can be segmented as a video: files, cameras and addresses of streams, found among a command's inputs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from maskformer_fast.core.image_files import IMAGE_SUFFIXES, in_result_folder, list_files

VIDEO_SUFFIXES = (
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
)  # fmt: skip
"""File name endings of videos, in lower case."""
STREAM_PROTOCOLS = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "http", "https")
"""Beginnings of addresses of streams."""
LIVE_PROTOCOLS = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp")
"""Protocols whose senders do not wait: frames that come faster than they are segmented are dropped."""
_SIGNATURES = (
    ("mov", re.compile(rb".{4}(ftyp|moov|mdat|wide|skip|free)", re.DOTALL)),
    ("matroska", re.compile(rb"\x1a\x45\xdf\xa3")),
    ("avi", re.compile(rb"RIFF.{4}AVI ", re.DOTALL)),
    ("flv", re.compile(rb"FLV")),
    ("mpeg", re.compile(rb"\x00\x00\x01[\xba\xb3]")),
    ("ogg", re.compile(rb"OggS")),
    ("asf", re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11")),
    ("mpegts", re.compile(rb"(.{4})?G.{187}(.{4})?G", re.DOTALL)),
)
"""FFmpeg's container format, and the first bytes of its files."""
_SIGNATURE_BYTES = 400
_TASK_ENDING = re.compile(r"_(semantic|panoptic|instance)$")

Kind = Literal["file", "camera", "stream"]


class Source(NamedTuple):
    """A video to segment."""

    address: str
    """Path of a file or of a camera's device, or an address."""
    name: str
    """Path below the folder that the user named, the file's name, or a name without the address's password."""
    kind: Kind

    @property
    def is_live(self) -> bool:
        """Whether the sender does not wait for us."""
        return self.kind == "camera" or (self.kind == "stream" and self.address.split(":")[0] in LIVE_PROTOCOLS)

    @property
    def shown(self) -> str:
        """The address without user and password, for messages."""
        return re.sub(r"//[^/@]*@", "//", self.address) if self.kind == "stream" else self.address


def source_of(address: str | os.PathLike[str]) -> Source:
    """The source of one file, camera (``/dev/video0`` or ``camera:0``) or address (``rtsp://...``)."""
    text = os.fspath(address)
    number = re.fullmatch(r"(?:camera:|/dev/video)(\d+)", text)
    if number:
        return Source(f"/dev/video{number[1]}", f"camera_{number[1]}.", "camera")
    if is_stream(text):
        parts = urlsplit(text)
        host = parts.netloc.rpartition("@")[2].replace(":", "_")
        return Source(text, f"{host}{parts.path.rstrip('/').replace('/', '_')}.", "stream")
    return Source(text, Path(text).name, "file")


def is_stream(text: str) -> bool:
    """Whether a text is an address of a stream."""
    return text.split("://")[0] in STREAM_PROTOCOLS and "://" in text


def container_format(path: str | os.PathLike[str]) -> str | None:
    """FFmpeg's format of a file by its first bytes; None for what is no video, such as a play list.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_SIGNATURE_BYTES)
    return next((name for name, signature in _SIGNATURES if signature.match(head)), None)


def is_cut_short(path: str | os.PathLike[str]) -> bool:
    """Whether a part of an MP4 or MOV file, by its length, reaches beyond the file's end."""
    size, at = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:  # of 64 bits, behind the part's type
                length = int.from_bytes(head[8:16], "big")
            if length < 8:  # 0 is up to the end; others are none
                return False
            at += length
    return at > size


def is_video(path: str) -> bool:
    """Whether a file is taken for a video: by its ending, or, if it has neither that of an image, by its content."""
    name = path.lower()
    if name.endswith(VIDEO_SUFFIXES):
        return True
    try:
        return os.path.isfile(path) and not name.endswith(IMAGE_SUFFIXES) and container_format(path) is not None
    except OSError:
        return False


def find_videos(patterns: Sequence[str]) -> tuple[list[Source], list[str]]:
    """Take the videos out of a command's inputs -> videos, and the patterns that may have images.

    Folders are searched by `image_files.list_files`. Overlay videos of this command are left out unless they are named.
    """
    videos: list[Source] = []
    others: list[str] = []
    for pattern in patterns:
        source = source_of(pattern)
        if source.kind != "file" or (os.path.isfile(pattern) and is_video(pattern)):
            videos.append(source)
            continue
        names, has_images = _below(pattern)
        videos += names
        if has_images or not names:
            others.append(pattern)
    return videos, others


def _below(pattern: str) -> tuple[list[Source], bool]:
    """Videos of a folder or a glob, and whether it may have images too."""
    if os.path.isdir(pattern):
        names = list_files(pattern, (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES), onerror=lambda error: None)
        found = [(str(Path(pattern, name)), name) for name in names]
    elif os.path.isfile(pattern):
        return [], True
    else:
        fixed = list(takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
        matches = sorted(glob.glob(pattern, recursive=True))
        found = [(path, Path(path).name) for path in matches if os.path.isfile(path)
                 and not in_result_folder(path, Path(*fixed))]  # fmt: skip
    videos = [(path, name) for path, name in found if is_video(path)]
    return [Source(path, name, "file") for path, name in videos if not _is_result(path)], len(videos) < len(found)


def _is_result(path: str) -> bool:
    """Whether a file is an overlay video of this command: its lines lie beside it."""
    whole = Path(path)
    return is_result_lines(whole.with_name(f"{_TASK_ENDING.sub('', whole.stem)}.jsonl")) and bool(
        _TASK_ENDING.search(whole.stem)
    )


LINE_START = '{"frame": '
"""Beginning of each line of a video's results."""


def is_result_lines(path: Path) -> bool:
    """Whether a file begins as the results of a video, or has no line."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LINE_START)) in (LINE_START.encode(), b"")
    except OSError:
        return False
