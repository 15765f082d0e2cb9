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
from tests.support.memory import at_most


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


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R.", "imports bytearray"),
        (b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.", "as keys of dictionaries, got tuple"),
    ],
    ids=["bytearray", "deep key"],
)
def test_pickles_that_take_memory_or_the_stack_are_refused(
    tmp_path: Path, is_archive: bool, pickled: bytes, message: str
) -> None:
    path = tmp_path / "w.pth"
    if is_archive:
        path.write_bytes(archive_of([("w/data.pkl", pickled), ("w/version", b"3\n"), ("w/byteorder", b"little")]))
    else:
        content = io.BytesIO()
        torch.save([], content, _use_new_zipfile_serialization=False)
        start, end = content.getvalue().split(b"]q\x00.", 1)  # the pickle of an empty list
        path.write_bytes(start[:-2] + pickled + end)
    with at_most(400), pytest.raises(ConvertError, match=message):
        load_torch(path)


def test_flat_tuples_and_other_objects_may_be_keys(tmp_path: Path) -> None:
    content = {("a", 1): torch.ones(2), torch.float32: 3, "set": set(), "parameter": torch.nn.Parameter(torch.ones(1))}
    torch.save(content, tmp_path / "w.pth")
    assert load_torch(tmp_path / "w.pth").keys() == content.keys()
