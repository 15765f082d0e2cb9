"""Archives of torch.save: those that unpack to more than the file are refused before PyTorch reads them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from maskformer_fast.interop.archive import check_archive
from maskformer_fast.interop.files import load_torch
from maskformer_fast.interop.names import ConvertError


def saved(count: int = 3, size: int = 1000) -> bytes:
    content = io.BytesIO()
    torch.save({f"w{index}": torch.zeros(size) for index in range(count)}, content)
    return content.getvalue()


def archive_of(entries: list[tuple[str, bytes]], *, shared: bool = False, moved: int = 0, beside: int = 0) -> bytes:
    """A stored archive; ``shared`` entries below data/ are one, the directory is announced ``moved`` bytes later.

    ``beside`` is added to the sizes in the directory.
    """
    out, places, first = io.BytesIO(), [], -1
    for name, data in entries:
        if shared and "/data/" in name and first >= 0:
            places.append((name, data, first))
            continue
        place = out.tell()
        first = place if "/data/" in name else first
        sizes = (zlib.crc32(data), len(data), len(data), len(name), 0)
        out.write(struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, *sizes) + name.encode() + data)
        places.append((name, data, place))
    start = out.tell()
    for name, data, place in places:
        sizes = (zlib.crc32(data), len(data) + beside, len(data) + beside, len(name), 0, 0, 0, 0, 0, place)
        out.write(struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, *sizes) + name.encode())
    size = out.tell() - start
    out.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, len(places), len(places), size, start + moved, 0))
    return out.getvalue()


def entries_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def packed(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries_of(content):
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize(
    "content", [saved(), saved(0), saved(1, 0), archive_of(entries_of(saved()))], ids=range(4)
)
def test_undamaged_archives_pass(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    check_archive(path)
    assert isinstance(load_torch(path), dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (packed(saved()), "refused: a compressed archive"),
        (packed(saved()) + b"PK\x05\x06", "does not end as an archive"),
        (saved() + b"\0", "does not end as an archive"),
        (saved()[:-1], "does not end as an archive"),
        (saved() + b"PK\x05\x06" + bytes(18), "directory|not a readable"),
        (b"x" * 100 + archive_of(entries_of(saved())), "directory is not where"),
        (archive_of(entries_of(saved()), moved=10), "directory is not where"),
        (archive_of(entries_of(saved()), shared=True), "entries overlap"),
        (archive_of(entries_of(saved()), beside=5000), "entries overlap"),
        (saved()[:-98] + saved()[:-98] + saved()[-98:], "directory|two ends|not a readable"),
        (b"PK\x03\x04", "cut off"),
        (b"", "cut off"),
    ],
    ids=range(12),
)
def test_archives_that_unpack_to_more_or_are_ambiguous_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=message):
        check_archive(path)
    with pytest.raises(ConvertError):
        load_torch(path)


def test_two_records_of_the_end_are_refused(tmp_path: Path) -> None:
    content = bytearray(saved())
    assert content[-42:-38] == b"PK\x06\x07", "torch.save writes the records of large files"
    content[-34:-26] = struct.pack("<Q", 0)
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ConvertError, match="an archive with two ends"):
        check_archive(tmp_path / "w.pth")
