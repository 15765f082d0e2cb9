"""Writing files so that a reader never sees half of one, whatever ends the process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["atomic_write", "write_json"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, and puts it in the place of `path` when the block ends well.

    Until then, and for good if the block raises or the process dies, `path` stays what it was. Missing folders are
    made; a link is followed, so that the file it names is replaced and not the link.

    Args:
        path: the file to write.

    Yields:
        A binary file open for writing.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: the disk (or quota) is full, said with the file's name and the room left; or any other failure.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "path: expected a file, got a folder", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # A short name of its own: `.{target.name}` could pass the file system's limit of 255 bytes.
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        # Not `tempfile`: its files are private to the user, and this one should follow the umask.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            free = shutil.disk_usage(target.parent).free / 2**20
            raise OSError(error.errno, f"disk or quota full ({free:.1f} MiB free); the earlier file, if any, is "
                          "untouched; make room and try again", str(target)) from error
        raise


def write_json(path: str | os.PathLike[str], obj: Any, indent: int | None = 2) -> None:
    """Write plain containers as strict JSON.

    Raises:
        TypeError: an object JSON has no form for.
        ValueError: NaN or infinity, which JSON does not have.
        OSError: as `atomic_write`.
    """
    text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write((text + "\n").encode())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some file systems cannot sync a folder, and the data is safe without it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
