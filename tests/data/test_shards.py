"""Tar files of images: members, patterns, and files of hostile origin."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.data import BrokenExampleError, shards
from maskformer_fast.data.images import read_image
from maskformer_fast.data.large_pictures import open_picture
from maskformer_fast.data.shards import expand_braces, list_members, member_name, read_member
from maskformer_fast.predict import file_names, find_images


def png(number: int, **options: object) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (12, 15, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG", **options)
    return content.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as file:  # type: ignore[call-overload]
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_at_their_offsets(tmp_path, kind):
    long = "deep/" * 18 + "x" * 90 + "/é.png"
    contents = {f"{number:04d}.{suffix}": png(number) for number in range(3) for suffix in ("jpg", "left.png")}
    contents[long] = png(9)
    listed = [*contents.items(), ("0000.json", b"{}"), ("._0000.jpg", b"hidden"), ("0000.cls", b"7")]
    path = write(tmp_path / "a.tar", listed[::-1], format=kind)
    members, problems = list_members(path)
    assert not problems and {member.name for member in members} == set(contents)
    for member in members:
        assert read_member(path, member) == contents[member.name]
    assert member_name(path, members[-1]) == "a/0000.jpg"
    whole = read_image("x", content=contents[long])
    np.testing.assert_array_equal(whole, np.asarray(Image.open(io.BytesIO(contents[long]))))
    with open_picture(path, member=members[-1]) as picture:
        np.testing.assert_array_equal(picture.read((2, 3, 9, 11)), read_image("x", content=png(0))[2:9, 3:11])


def test_members_that_lead_elsewhere_or_have_no_content_are_left_out_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 5000)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for number in range(5):
            entry = tarfile.TarInfo(f"../{number}.png")
            entry.size = 4
            file.addfile(entry, io.BytesIO(b"evil"))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("null.png", tarfile.CHRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            file.addfile(entry)
        for name, content in (("/root.png", b"evil"), ("large.png", b"0" * 5001), ("good.png", png(1))):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    members, problems = list_members(path)
    assert [member.name for member in members] == ["good.png"]
    assert len(problems) == 3
    assert "left out 6 with a name that leads out of the folder: ../0.png, ../1.png, ../2.png, ..." in problems[0]
    assert "3 with no content of its own" in problems[1] and "1 with more than 5000 bytes: large.png" in problems[2]


def negative_size(name: str) -> bytes:
    """Header of a member whose size is -1024, in base 256."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_damaged_files_give_the_members_before_the_damage_and_a_line(tmp_path):
    content = write(tmp_path / "a.tar", [(f"{number}.png", png(number)) for number in range(4)]).read_bytes()
    second = len(content[: content.index(b"1.png")])
    third = len(content[: content.index(b"2.png")])
    cases = {
        "cut in a member": (content[: third + 700], 2),
        "cut in a header": (content[: third + 100], 2),
        "no end": (content[: content.index(b"3.png")], 3),
        "damaged header": (content[:third] + b"\x07" * 512 + content[third + 512 :], 2),
        "negative size": (content[:second] + negative_size("1.png") + content[second + 512 :], 1),
        "empty": (b"", 0),
        "not tar": (b"\x1f\x8b" + bytes(range(256)) * 8, 0),
    }
    for name, (damaged, count) in cases.items():
        (tmp_path / "b.tar").write_bytes(damaged)
        members, problems = list_members(tmp_path / "b.tar")
        assert len(members) == count, (name, members, problems)
        assert bool(problems) == (name != "no end"), (name, problems)
    members, _ = list_members(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content[: members[2].offset + 10])
    with pytest.raises(BrokenExampleError, match=r"2\.png: expected \d+ bytes, got 10"):
        read_member(tmp_path / "a.tar", members[2])


def test_a_header_larger_than_any_name_is_refused(tmp_path):
    entry = tarfile.TarInfo("x.png")
    entry.pax_headers = {"comment": "y" * (3 << 20)}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        file.addfile(entry)
    members, problems = list_members(path)
    assert not members and "a header of 31" in problems[0]


@pytest.mark.parametrize("mode, suffix", [("w:gz", ".tar.gz"), ("w:xz", ".TAR.XZ"), ("w:gz", ".tgz"), ("w:gz", ".tar")])
def test_a_compressed_shard_is_refused_in_one_line(tmp_path, mode, suffix):
    path = tmp_path / f"a{suffix}"
    with tarfile.open(path, mode) as file:
        entry = tarfile.TarInfo("0.png")
        entry.size = len(png(0))
        file.addfile(entry, io.BytesIO(png(0)))
    inputs, problems = find_images([str(path)])
    assert not inputs and problems[0].startswith(f"{path}: expected an uncompressed tar file")


def test_images_of_shards_of_one_name_are_told_apart(tmp_path):
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "shard-000.tar", [(f"{number}.png", png(number)) for number in range(2)])
    inputs, problems = find_images([str(tmp_path / "*" / "shard-000.tar")])
    assert not problems and [image.name for image in inputs] == ["shard-000/0.png", "shard-000/1.png"] * 2
    expected = [f"{tmp_path}/{folder}/shard-000/{number}.png" for folder in ("train", "val") for number in (0, 1)]
    assert file_names(inputs) == expected
    assert file_names(inputs[:2]) == ["shard-000/0.png", "shard-000/1.png"]


def test_braces_count_with_the_digits_of_the_first_number():
    assert expand_braces("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand_braces("{0..1}/{9..10}.tar") == ["0/9.tar", "0/10.tar", "1/9.tar", "1/10.tar"]
    assert expand_braces("{a,b}.tar") == ["{a,b}.tar"] and expand_braces("{3..1}.tar") == []
    with pytest.raises(ValueError, match="at most 1000000 names"):
        expand_braces("{0..9999}{0..9999}.tar")


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_deep_pictures_of_a_shard_are_read_as_their_files(tmp_path, bits):
    values = np.random.default_rng(bits).integers(0, 1 << bits, (9, 11), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    content = (tmp_path / "grey.png").read_bytes()
    np.testing.assert_array_equal(read_image("x", content=content), read_image(tmp_path / "grey.png"))
    with pytest.raises(BrokenExampleError, match="got HTML"):
        read_image("x", content=b"<html>")
