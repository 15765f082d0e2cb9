"""Search of folders for images, and names for results: portable, distinct, inside their folder."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskformer_fast.core.image_files import (
    IMAGE_FORMATS,
    RESULT_MARK,
    in_result_folder,
    is_result_folder,
    list_files,
    result_names,
)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_hidden_files_and_other_suffixes_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a/c.png", "a/._c.png", ".thumbs/d.png", "._b.jpg", "notes.txt", "x.png.txt", "jpg")
    (tmp_path / "folder.png").mkdir()
    touch(tmp_path, "folder.png/e.webp")
    assert list_files(tmp_path) == ["a/c.png", "b.JPG", "folder.png/e.webp"]
    assert list_files(tmp_path, (".txt",)) == ["notes.txt", "x.png.txt"]
    assert list_files(tmp_path / ".thumbs") == ["d.png"], "a folder that the user names may be hidden"


def test_links_are_followed_without_an_endless_walk(tmp_path: Path) -> None:
    touch(tmp_path, "disk/1.png", "disk/deep/2.png", "photos/0.png")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/deep/up").symlink_to(tmp_path / "disk")
    (tmp_path / "photos/file.png").symlink_to(tmp_path / "disk/1.png")
    (tmp_path / "photos/lost.png").symlink_to(tmp_path / "nowhere.png")
    expected = ["0.png", "file.png", "linked/1.png", "linked/deep/2.png", "lost.png"]
    assert list_files(tmp_path / "photos") == expected, "a link to a missing file is an error to report, not to drop"


def test_pipes_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert list_files(tmp_path) == []


def test_an_unreadable_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "secret/b.png")
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    problems: list[OSError] = []
    assert list_files(tmp_path, onerror=problems.append) == ["a.png"]
    assert [error.filename for error in problems] == [str(tmp_path / "secret")]
    with pytest.raises(PermissionError):
        list_files(tmp_path)


def test_results_of_earlier_runs_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "semantic/mine.png", "out/semantic/a.png", "out/overlays/deep/b.png", "out/photo.png")
    (tmp_path / "out/images.json").write_text(json.dumps({"info": {"description": RESULT_MARK}, "images": []}))
    (tmp_path / "images.json").write_text("[]")
    assert list_files(tmp_path) == ["out/photo.png", "semantic/mine.png"]
    assert list_files(tmp_path / "out/semantic") == ["a.png"], "a folder that the user names is searched"
    assert is_result_folder(tmp_path / "out/semantic") and not is_result_folder(tmp_path / "semantic")
    assert in_result_folder(tmp_path / "out/overlays/deep/b.png", tmp_path)
    assert not in_result_folder(tmp_path / "out/overlays/deep/b.png", tmp_path / "out/overlays")


def test_every_suffix_is_of_a_format_that_pillow_knows() -> None:
    assert all(Image.registered_extensions()[suffix] == kind for suffix, kind in IMAGE_FORMATS.items())


@pytest.mark.parametrize(
    "names, expected",
    [
        (["a.jpg", "b.c.png", "deep/a.jpg"], ["a", "b.c", "deep/a"]),
        (["a.jpg", "a.png", "A.webp", "a_2.png"], ["a", "a_2", "A_3", "a_2_2"]),
        (["cam1/1.jpg", "cam2/1.jpg", "Cam1/1.jpg"], ["cam1/1", "cam2/1", "Cam1/1_2"]),
        (["../../x", "/etc/x.png", "C:\\x.jpg", "..\\x.jpg"], ["x", "etc/x", "x_2", "x_3"]),
        (["", "..", "/"], ["image", "image_2", "image_3"]),
        (["a:b?.jpg", "a\nb.jpg", "con.jpg", "LPT1.tar.png", "x ./y..png"],
         ["a_b_", "a_b", "co_", "LPT1.ta_", "x/y"]),
        (["x\udcff\udcfe.png", "x\udcfe\udcff.png"], ["x__", "x___2"]),
        (["a.png", "a.png/b.jpg"], ["a", "a_png/b"]),
        (["e\u0301.png", "\u00e9.png"], ["e\u0301", "\u00e9_2"]),
    ],
)  # fmt: skip
def test_names_of_results(names: list[str], expected: list[str]) -> None:
    assert result_names(names) == expected


PART = st.text(st.one_of(st.characters(), st.sampled_from("aA1./\\:_ \udcff\u0301")), max_size=300)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PART, st.sampled_from(["a.jpg", "a.png", "../../x", "nul", "a" * 400])), max_size=12))
@example(["a" * 300 + ".png", "a" * 301 + ".png"])
@example(["/".join(["b" * 200] * 30)])
@example(["..\\..\\x", "\\\\host\\share\\x", "C:/x", "C:x"])
@example(["é" * 200 + ".jpg"] * 3)
def test_names_stay_inside_and_are_distinct_and_portable(names: list[str]) -> None:
    results = result_names(names)
    assert len(results) == len(names) and results == result_names(names)
    assert len({unicodedata.normalize("NFC", name).casefold() for name in results}) == len(names)
    for name in results:
        path = PureWindowsPath(f"{name}_panoptic.png")
        assert not path.is_absolute() and not path.drive and ".." not in path.parts and "\\" not in name
        assert not PureWindowsPath(f"{name}.png").is_reserved()
        assert all(0 < len(part.encode()) <= 255 for part in f"{name}_panoptic.png".split("/"))
        assert not any(ord(character) < 32 or character in '<>:"|?*' for character in name)
        assert not any(part != part.rstrip(" .") or part.endswith(".png") for part in name.split("/")[:-1])


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    (name,) = result_names(["a" * 250 + ".jpg"])
    (tmp_path / f"{name}_panoptic.png").touch()
