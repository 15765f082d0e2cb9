"""Images in tar files, the shards of a WebDataset: listed once, then read at their offsets by any process.

A shard may come from anywhere. Only headers are looked at, nothing is extracted, and what is no image is left out; what
cannot be used is described in a few lines.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from maskformer_fast.core.image_files import IMAGE_SUFFIXES
from maskformer_fast.data.base import BrokenExampleError

MAX_MEMBER_BYTES = 1 << 29
"""Bytes of the largest file of a shard that is read, as it is read into memory."""
MAX_SHARDS = 1_000_000
"""Number of names that a pattern with braces may stand for."""
_MAX_HEADER_BYTES = 1 << 20  # of one header, which names of members are in
_EXAMPLES = 3  # members that are named for each reason of leaving some out
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Member(NamedTuple):
    """A file of a tar file: where its content lies."""

    name: str
    offset: int  # bytes
    size: int  # bytes


def is_shard(path: str) -> bool:
    """Whether a path or pattern names tar files; of compressed ones `list_members` says that they cannot be read."""
    return path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def expand_braces(pattern: str) -> list[str]:
    """Names that a pattern stands for: ``{000..010}`` counts, with as many digits as its first number.

    Raises:
        ValueError: more than `MAX_SHARDS` names.
    """
    parts = _RANGE.split(pattern)  # text, first, last, text, first, last, text...
    choices: list[list[str]] = [[parts[0]]]
    total = 1
    for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        count = max(0, int(last) - int(first) + 1)
        total *= count
        if total > MAX_SHARDS:
            raise ValueError(f"images: expected at most {MAX_SHARDS} names from a pattern, got more from {pattern}")
        choices += [[f"{number:0{len(first)}d}" for number in range(int(first), int(first) + count)], [text]]
    return ["".join(names) for names in product(*choices)]


def list_members(path: str | os.PathLike[str]) -> tuple[list[Member], list[str]]:
    """Images of a tar file in its order, and problems: a line for the file's end, and one for each kind of bad member.

    Members of other suffixes than images', and hidden ones, are left out without a word: a WebDataset has labels too.
    Left out with a line are members whose name has ``..`` or begins with ``/``, links and devices, sparse files, and
    images of more than `MAX_MEMBER_BYTES`.
    """
    members: list[Member] = []
    left_out: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    problems: list[str] = []
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            for entry in _headers(file):
                name = entry.name
                if not name.lower().endswith(IMAGE_SUFFIXES) or PurePosixPath(name).name.startswith("."):
                    continue
                reason = _refusal(entry, length)
                if reason is None:
                    members.append(Member(name, entry.offset_data, entry.size))
                    continue
                left_out[reason] += 1
                if left_out[reason] <= _EXAMPLES:
                    examples.setdefault(reason, []).append(name)
    except (OSError, ValueError, tarfile.TarError, MemoryError, OverflowError, RecursionError) as error:
        problems.append(f"{path}: expected an uncompressed tar file to its end: {error or type(error).__name__}")
    for reason, count in left_out.items():
        more = ", ..." if count > _EXAMPLES else ""
        problems.append(f"{path}: left out {count} with {reason}: {', '.join(examples[reason])}{more}")
    return members, problems


def read_member(path: str | os.PathLike[str], member: Member) -> bytes:
    """Content of a member of a tar file.

    Raises:
        BrokenExampleError: the file is missing or ends before the member does.
    """
    try:
        with open(path, "rb") as file:
            file.seek(member.offset)
            content = file.read(min(member.size, MAX_MEMBER_BYTES))
    except OSError as error:
        raise BrokenExampleError(path, f"{member.name}: cannot be read: {error}") from error
    if len(content) != member.size:
        raise BrokenExampleError(path, f"{member.name}: expected {member.size} bytes, got {len(content)}")
    return content


def member_name(path: str | os.PathLike[str], member: Member) -> str:
    """Name of an image of a shard: the shard's, without ``.tar``, and the member's."""
    return f"{Path(path).name[: -len('.tar')]}/{member.name}"


class _Headers:
    """A tar file of which only headers are read; a header that is larger than any true one is an error."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._furthest = 0
        self.tell = file.tell

    def seek(self, offset: int) -> int:
        if offset < self._furthest:  # sizes below 0 would make a loop
            raise tarfile.ReadError(f"a header that leads back to byte {offset}")
        self._furthest = offset
        return self._file.seek(offset)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, expected at most {_MAX_HEADER_BYTES}")
        return self._file.read(size)


def _headers(file: IO[bytes]) -> Iterator[Any]:
    opened = tarfile.open(fileobj=_Headers(file), mode="r:", encoding="utf-8", errors="surrogateescape")  # type: ignore[call-overload]  # noqa: SIM115
    while (entry := opened.next()) is not None:
        yield entry
        opened.members = []  # which would take memory for every member
    file.seek(opened.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # `next` ends in silence there
        raise tarfile.ReadError(f"a damaged header at byte {opened.offset}")


def _refusal(entry: Any, length: int) -> str | None:
    """Why a member is left out; None if it is not."""
    if entry.name.startswith("/") or ".." in PurePosixPath(entry.name).parts:
        return "a name that leads out of the folder"
    if not entry.isreg():
        return "no content of its own (a link, folder or device)"
    if entry.issparse():
        return "a sparse content"
    if entry.size > MAX_MEMBER_BYTES:
        return f"more than {MAX_MEMBER_BYTES} bytes"
    if entry.size < 0 or entry.offset_data + entry.size > length:
        return "a content that the file ends before"
    return None
