"""Check of the zip archives of ``torch.save`` before PyTorch reads them: they unpack to no more than the file.

PyTorch and Python's ``zipfile`` search the directory of an archive in different ways. So the directory must lie where
both find the same one.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from maskformer_fast.interop.names import ConvertError

_END, _LOCATOR, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
"""Records at the end of an archive: of every one, and the two before it in one for files of more than 4 GiB."""
_LOCAL_HEADER_BYTES = 30


def check_archive(path: Path) -> None:
    """Check that each entry is stored as it is and has bytes of its own.

    Raises:
        ConvertError: a damaged archive, a compressed one, or one whose entries share bytes or whose directory is
            ambiguous. The message does not have the path.
    """
    try:
        with path.open("rb") as file:
            start = _directory(file)
            with zipfile.ZipFile(file) as archive:
                items, found = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"not a readable file of torch.save: {error}") from error
    if start != found:
        raise ConvertError("refused: an archive whose directory is not where its end says")
    end = 0
    for item in sorted(items, key=lambda item: item.header_offset):
        if item.compress_type != zipfile.ZIP_STORED or item.file_size != item.compress_size:
            raise ConvertError(f"refused: a compressed archive ({item.filename!r}); torch.save stores without")
        if item.header_offset < end:
            raise ConvertError(f"refused: an archive whose entries overlap ({item.filename!r})")
        end = item.header_offset + _LOCAL_HEADER_BYTES + item.file_size
    if end > start:
        raise ConvertError("refused: an archive whose entries overlap its directory")


def _directory(file: BinaryIO) -> int:
    """Position of the directory by the records at the end of the file, as PyTorch reads them."""
    size = file.seek(0, os.SEEK_END)
    place = size - _END.size
    if place < 0:
        raise ConvertError("not a readable file of torch.save: it is cut off")
    signature, *_, offset, comment = _read(file, _END, place)
    if signature != b"PK\x05\x06" or comment != 0:
        raise ConvertError("not a readable file of torch.save: it does not end as an archive (cut off, or with bytes "
                           "after its end)")
    if place >= _LOCATOR.size + _END64.size:
        signature, _, place64, _ = _read(file, _LOCATOR, place - _LOCATOR.size)
        if signature == b"PK\x06\x07":
            expected = place - _LOCATOR.size - _END64.size
            signature, *_, offset = _read(file, _END64, expected)
            if signature != b"PK\x06\x06" or place64 != expected:
                raise ConvertError("refused: an archive with two ends")
    return int(offset)


def _read(file: BinaryIO, record: struct.Struct, place: int) -> tuple[bytes | int, ...]:
    file.seek(place)
    return record.unpack(file.read(record.size))
