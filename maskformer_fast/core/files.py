"""Atomic writing of files, so that a reader never sees an incomplete one, and SHA-256 of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, TypeGuard

_LOGGER = logging.getLogger(__name__)
_FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_READ_BYTES = 1 << 20
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{16}\.tmp")


def check_no_windows_path(paths: Mapping[str, str | None]) -> None:
    """Check that no path of an option is one of Windows, unless a file of such a name exists.

    Args:
        paths: option's name -> path.

    Raises:
        ValueError: a path is one of Windows; the message has the path to write in its place.
    """
    for name, path in paths.items():
        if path and re.match(r"[A-Za-z]:[\\/]|.*\\", path) and not Path(path).exists():
            windows = PureWindowsPath(path)
            here = windows.relative_to(windows.anchor).as_posix()
            in_wsl = f"/mnt/{windows.drive[0].lower()}/{here} in WSL" if windows.drive[1:] == ":" else ""
            raise ValueError(f"{name}: expected a path with / between its folders, got {path}, a path of Windows; "
                             f"write {in_wsl or windows.as_posix()}")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, and rename it to `path` when the block ends without an exception.

    Until then, and for good if the block raises or the process dies, `path` stays as it was. Missing folders are
    created. If `path` is a symbolic link, its target is replaced.

    Args:
        path: the file to write.

    Yields:
        A binary file open for writing.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: the file cannot be written. If the disk or quota is full, the error names the free space.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "path: expected a file, got a folder", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not `.{target.name}`: it could exceed the file system's limit of 255 bytes.
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        # Not `tempfile`: its files are private to the user, whereas this one should follow the umask.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder; the content is safe without it
            flush(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_full_disk(error):
            free = shutil.disk_usage(target.parent).free / 2**20
            raise OSError(error.errno, f"disk or quota full ({free:.1f} MiB free); the earlier file, if any, is "
                          "untouched; make room and try again", str(target)) from error
        raise


def remove_temporary_files(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files that `atomic_write` left in a folder when its process was killed.

    No other process may be writing there. Nothing happens if the folder does not exist or cannot be changed.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if _TEMPORARY_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def put_aside(path: Path, reason: str) -> None:
    """Rename a damaged file, or what stands in the place of a file, with a warning that names both.

    Raises:
        OSError: it cannot be renamed.
    """
    number, aside = 0, path.with_name(f"damaged_{path.name}")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"damaged_{path.name}.{number}")
    path.rename(aside)
    _LOGGER.warning("%s: %s; what was there is kept as %s", path, reason, aside.name)


def write_json(path: str | os.PathLike[str], obj: Any, indent: int | None = 2) -> None:
    """Write plain containers as strict JSON.

    Raises:
        TypeError: an object that JSON cannot represent.
        ValueError: NaN or infinity, which JSON does not have.
        OSError: see `atomic_write`.
    """
    text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        # A lone surrogate (a byte of a file name that is not UTF-8) becomes an escape, which JSON has.
        file.write((text + "\n").encode(errors="backslashreplace"))


def is_full_disk(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error says that the disk or the quota is full."""
    return isinstance(error, OSError) and error.errno in _FULL_DISK_ERRORS


def flush(path: str | os.PathLike[str]) -> None:
    """Flush a file's content, or a folder's entries, to the disk. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content in hexadecimal (Python 3.10 lacks ``hashlib.file_digest``). Raises ``OSError``."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
