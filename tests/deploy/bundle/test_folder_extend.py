"""Bundles that several processes change, and file names that some file systems confuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from maskformer_fast.config import TestConfig
from maskformer_fast.deploy.bundle import folder as bundle_module
from maskformer_fast.deploy.bundle.folder import Bundle, extend_bundle, read_manifest, write_bundle
from maskformer_fast.deploy.bundle.manifest import BundleError, FileEntry, Manifest
from tests.support.tiny_bundle import tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "bundle", TestConfig(short_edge=None))[0]


def test_additions_of_another_process_are_not_lost(bundle: Bundle) -> None:
    same = Bundle.open(bundle.folder)  # as a second process that begins to build an engine meanwhile
    first = extend_bundle(bundle, {"engines/first.engine": b"1"})
    with pytest.raises(BundleError, match="opened .* changed since"):
        extend_bundle(same, {"engines/second.engine": b"2"})
    assert Bundle.open(bundle.folder) == first and os.listdir(bundle.folder.parent) == ["bundle"]
    both = extend_bundle(first, {"engines/second.engine": b"2"})
    assert both.read("engines/first.engine") + both.read("engines/second.engine") == b"12"


def test_a_bundle_that_was_removed_is_not_written_again(bundle: Bundle, tmp_path: Path) -> None:
    bundle.folder.rename(tmp_path / "elsewhere")
    with pytest.raises((BundleError, OSError)):
        extend_bundle(bundle, {"engines/first.engine": b"1"})
    assert os.listdir(tmp_path) == ["elsewhere"]


@pytest.mark.parametrize(
    "names",
    [("a.onnx", "A.onnx"), ("Manifest.json",), ("Kernels/a", "kernels/b"), ("a", "a/b"), ("a/b/c", "A/B")],
)
def test_names_that_file_systems_confuse_are_refused(bundle: Bundle, tmp_path: Path, names: tuple[str, ...]) -> None:
    files = {"raw.onnx": bundle.read("raw.onnx"), **dict.fromkeys(names, b"x")}
    with pytest.raises(BundleError, match="files: expected"):
        write_bundle(tmp_path / "other", bundle.manifest, files)
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("preprocess", {"short_edge": 10**400}, r"short_edge: expected 1..65536 or null"),
        ("preprocess", {"short_edge": 0}, r"short_edge: expected 1..65536 or null"),
        ("preprocess", {"max_size": 1 << 31}, r"max_size: expected 1..2147483647"),
        ("preprocess", {"size_divisibility": 65537}, r"size_divisibility: expected 0..65536"),
        ("metadata", {"colors": ((0, 256, 0),) * 5}, r"metadata.colors: expected red, green and blue of 0..255"),
        ("metadata", {"colors": ((-1, 0, 0),) * 5}, r"metadata.colors: expected red, green and blue of 0..255"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(bundle: Bundle, part: str, changes: Any, message: str) -> None:
    data = bundle.manifest.to_json()
    data[part] |= json.loads(json.dumps(changes))
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(data)


def test_the_manifest_is_read_without_the_files(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_verify", lambda *_: pytest.fail("hashes a file"))
    assert read_manifest(bundle.folder) == (bundle.manifest, bundle.digest)
    (bundle.folder / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"manifest.json: expected a file of a bundle"):
        read_manifest(bundle.folder)
    with pytest.raises(FileNotFoundError, match="expected a bundle, got no folder"):
        read_manifest(bundle.folder / "none")


def test_each_file_is_hashed_once_when_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    verify = bundle_module._verify

    def record(path: Path, name: str, entry: FileEntry) -> None:
        seen.append(name)
        verify(path, name, entry)

    monkeypatch.setattr(bundle_module, "_verify", record)
    made = tiny_bundle(tmp_path / "bundle", TestConfig(short_edge=None))[0]
    assert seen == ["raw.onnx"] and made == Bundle.open(tmp_path / "bundle")
