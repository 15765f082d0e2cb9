"""Atomic writes: a reader sees the earlier file or the complete new one, also after errors and on a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from maskformer_fast.core.files import atomic_write, check_no_windows_path, write_json


def test_the_file_is_replaced_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists(), "nothing is there before the block ends"
    assert path.read_bytes() == b"one"
    with pytest.raises(RuntimeError, match="stop"), atomic_write(path) as file:
        file.write(b"two")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["file.bin"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "not private to the user"
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path):
        pass


def test_the_longest_name_and_a_link_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    with atomic_write(path) as file:
        file.write(b"x")
    link = tmp_path / "link"
    link.symlink_to(path)
    with atomic_write(link) as file:
        file.write(b"y")
    assert link.is_symlink() and path.read_bytes() == b"y"


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"miou": 0.5})
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object) -> None:
        raise full

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"full \(.* MiB free\).*metrics.json") as caught, atomic_write(path) as file:
        if moment == "write":
            fail()
        file.write(b"half")
    assert caught.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"miou": 0.5} and os.listdir(tmp_path) == ["metrics.json"]


def test_json_is_strict_and_a_refused_object_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "Zürich", "ap": None, "list": [1, 2.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Zürich", "ap": None, "list": [1, 2.5]}
    for bad, error in (({"ap": float("nan")}, ValueError), ({"ap": np.float32(1)}, TypeError)):
        with pytest.raises(error):
            write_json(path, bad)
    assert "Zürich" in path.read_text(encoding="utf-8"), "a refused object leaves the file"


def test_paths_of_windows_are_refused_with_the_path_to_write_unless_they_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / r"a\b").touch()
    check_no_windows_path({"a": None, "b": "", "c": "d/e", "d": r"a\b", "e": "c:x"})
    with pytest.raises(ValueError, match=r"picture: expected .*, got D:\\x y\\z.png, .*write /mnt/d/x y/z.png in WSL"):
        check_no_windows_path({"output": "x", "picture": r"D:\x y\z.png"})
