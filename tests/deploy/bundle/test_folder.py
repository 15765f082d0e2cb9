"""Bundles are written completely or not at all, and refused after any change of any byte."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.core.metadata import Metadata
from maskformer_fast.deploy.bundle import folder as bundle_module
from maskformer_fast.deploy.bundle.folder import Bundle, extend_bundle, write_bundle
from maskformer_fast.deploy.bundle.manifest import (
    MAX_BYTES,
    BundleError,
    Engine,
    Graph,
    Manifest,
    Parity,
    Postprocess,
    Preprocess,
    Profile,
    Shape,
    TensorSpec,
    manifest_bytes,
    parse_manifest,
)

FILES = {"raw.onnx": bytes(range(256)) * 3, "kernels/sm_87/a.cubin": b"cubin", "kernels/tapes.json": b"[]"}
ENGINE = Engine(
    "engines/a.engine", "tensorrt_rtx", "1.2", "fp16", ("sm_87",),
    Profile(Shape(1, 32, 32), Shape(1, 512, 512), Shape(8, 1024, 2048)), {"level": 3, "cache": "x", "refittable": True},
    (TensorSpec("class_logits", "float16", ("B", 3, 3)),),
)  # fmt: skip


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = dict(
        name="tiny", created_with={"torch": "2.13"}, num_queries=3, num_classes=2,
        metadata=Metadata("two", ("sky", "r\u00e4v"), (False, True), (1, 7), ((0, 1, 2), (3, 4, 5))),
        preprocess=Preprocess((1, 2.5, 3), (1, 1, 1), None, 2048, 32),
        postprocess=Postprocess(0.8, 0.8, 100, "maskformer"),
        graphs={"raw": Graph("raw.onnx", (TensorSpec("images", "uint8", ("B", 3, "H", "W")),), (), 20, True)},
        kernels=("sm_87",), parity=(Parity("raw", Shape(2, 333, 250), 1e-6, 0.9999, 1.0),),
    )  # fmt: skip
    return Manifest(**fields | changes)


@pytest.fixture
def written(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle", manifest(), FILES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_written_bundle_is_read_back(written: Bundle) -> None:
    again = Bundle.open(written.folder, digest=written.digest)
    assert again == written and again.manifest.metadata.class_names == ("sky", "r\u00e4v")
    assert {name: again.read(name) for name in FILES} == FILES
    assert contents(written.folder).keys() == {*FILES, "manifest.json"}
    assert [path.name for path in written.folder.parent.iterdir()] == ["bundle"]
    again = extend_bundle(written, {ENGINE.file: b"engine"}, engines=(ENGINE,))
    assert Bundle.open(written.folder).manifest.engines == (ENGINE,) and again.read(ENGINE.file) == b"engine"
    assert {name: again.read(name) for name in FILES} == FILES
    assert [path.name for path in written.folder.parent.iterdir()] == ["bundle"]


def test_every_byte_of_the_manifest_counts(written: Bundle) -> None:
    content = (written.folder / "manifest.json").read_bytes()
    assert parse_manifest(content) == (written.manifest, written.digest)
    for position in range(len(content)):
        for change in (0x01, 0x20, 0x80):
            changed = bytearray(content)
            changed[position] ^= change
            with pytest.raises(BundleError):
                parse_manifest(bytes(changed))
        with pytest.raises(BundleError):
            parse_manifest(content[:position])
        with pytest.raises(BundleError):
            parse_manifest(content[:position] + b" " + content[position:])
    with pytest.raises(BundleError):
        parse_manifest(content + b"\n")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_changed_file_is_refused(written: Bundle, name: str) -> None:
    path = written.folder / name
    content = path.read_bytes()
    for position in {0, len(content) - 1, *range(0, len(content), 37)}:
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=name):
            Bundle.open(written.folder)
        if name != "manifest.json":
            with pytest.raises(BundleError, match=name):
                written.read(name)
    for changed in (content[:-1], content + b"\0", b""):
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=name):
            Bundle.open(written.folder)
        if name != "manifest.json":
            with pytest.raises(BundleError, match=name):
                written.read(name)
    path.unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.open(written.folder)
    path.write_bytes(content)
    Bundle.open(written.folder)


def test_other_files_are_refused(written: Bundle, tmp_path: Path) -> None:
    folder = written.folder
    for name in ("extra", "kernels/sm_87/.hidden", "engines/x.engine"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        with pytest.raises(BundleError, match=path.name):
            Bundle.open(folder)
        path.unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(BundleError, match="pipe"):
        Bundle.open(folder)
    (folder / "pipe").unlink()
    for name in ("raw.onnx", "manifest.json", "kernels"):  # even a link to the right content is refused
        aside = tmp_path / "aside"
        (folder / name).rename(aside)
        (folder / name).symlink_to(aside)
        with pytest.raises(BundleError, match=name):
            Bundle.open(folder)
        if name == "raw.onnx":
            with pytest.raises(BundleError, match=name):
                written.read(name)
        (folder / name).unlink()
        aside.rename(folder / name)
    (folder / "raw.onnx").unlink()
    (folder / "raw.onnx").mkdir()
    with pytest.raises(BundleError, match="raw.onnx"):
        Bundle.open(folder)


def test_another_digest_is_refused(written: Bundle) -> None:
    with pytest.raises(BundleError, match="digest"):
        Bundle.open(written.folder, digest="0" * 64)
    with pytest.raises(BundleError, match="expected a file of the bundle"):
        written.read("../secret")
    with pytest.raises(FileNotFoundError):
        Bundle.open(written.folder / "nothing")


@pytest.mark.parametrize(
    "name",
    [
        "../x", "/etc/x", "a//b", "a/./b", "..", "a/../b", ".x", "a\\b", "a\0", "", "manifest.json", "a" * 200,
        "a/a/a/a/a",
    ],
)  # fmt: skip
def test_paths_outside_the_bundle_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="files"):
        write_bundle(tmp_path / "bundle", manifest(), {**FILES, name: b""})
    assert not list(tmp_path.iterdir())
    data = manifest().to_json()
    data["files"] = {name: {"sha256": "0" * 64, "bytes": 0}}
    with pytest.raises(BundleError, match="files"):
        Manifest.from_json(data)


def test_a_failed_write_leaves_the_old_bundle(written: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(written.folder)
    with pytest.raises(BundleError, match="none of that name"):
        write_bundle(written.folder, manifest(), {})
    with pytest.raises(BundleError, match="none of that name"):
        extend_bundle(written, {}, engines=(ENGINE,))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_module, "_put", fail)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(written.folder, manifest(name="other"), FILES)
    assert contents(written.folder) == before
    assert [path.name for path in written.folder.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("has_exchange", [True, False])
def test_a_bundle_is_replaced_completely(
    written: Bundle, monkeypatch: pytest.MonkeyPatch, has_exchange: bool
) -> None:
    if not has_exchange:
        monkeypatch.setattr(bundle_module, "_exchange", lambda *_: False)
    other = write_bundle(written.folder, manifest(name="other", kernels=()), {"raw.onnx": b"other"})
    assert other.manifest.name == "other" and contents(written.folder).keys() == {"raw.onnx", "manifest.json"}
    assert [path.name for path in written.folder.parent.iterdir()] == ["bundle"]
    with pytest.raises(BundleError):
        written.read("kernels/tapes.json")


def test_other_folders_and_files_are_not_replaced(written: Bundle, tmp_path: Path) -> None:
    (written.folder / "notes.txt").write_text("mine")
    before = contents(written.folder)
    with pytest.raises(BundleError, match="remove it first.*notes.txt"):
        write_bundle(written.folder, manifest(), FILES)
    assert contents(written.folder) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match="remove it first"):
        write_bundle(tmp_path / "file", manifest(), FILES)
    (tmp_path / "empty").mkdir()
    assert write_bundle(tmp_path / "empty", manifest(), FILES).manifest.name == "tiny"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"NaN", b"1e999", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe",
        b"9" * 5000, b" " * (MAX_BYTES + 1), b'{"format": "maskformer_fast.bundle.1"}\n',
    ],
)  # fmt: skip
def test_hostile_manifests_are_refused(written: Bundle, content: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(content)
    (written.folder / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(written.folder)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside plain containers."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, child in children for inner in nodes(child, (*path, key)))]


FULL = replace(manifest(), engines=(ENGINE,)).to_json()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(nodes(FULL)[1:]), JSON)
def test_wrong_values_are_errors_or_other_manifests(path: tuple[Any, ...], value: Any) -> None:
    data = json.loads(json.dumps(FULL))
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    try:
        read = Manifest.from_json(data)
    except BundleError:
        return
    assert read.to_json() == data, "accepted values are kept"
    again, digest = parse_manifest(manifest_bytes(read)[0])
    assert again == read and len(digest) == 64


FREE_KEYS = {"raw", "torch", "level", "cache", "refittable"}  # keys of dictionaries, which may be any text


@pytest.mark.parametrize("path", [path for path in nodes(FULL)[1:] if path[-1] not in FREE_KEYS], ids=str)
def test_missing_unknown_and_mistyped_values_are_named(path: tuple[Any, ...]) -> None:
    name = next(str(key) for key in reversed(path) if isinstance(key, str))
    mistyped = {"no": ["such", {"type": None}]}
    changes: list[tuple[Any, str]] = [(mistyped, name)]
    if isinstance(path[-1], str):
        changes.append((None, name))  # None leaves the key out
    for value, named in changes:
        data = json.loads(json.dumps(FULL))
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        if value is None:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
        with pytest.raises(BundleError, match=named):
            Manifest.from_json(data)


@pytest.mark.parametrize("path", [(), ("metadata",), ("engines", 0, "profile", "minimum"), ("graphs", "raw")])
def test_unknown_keys_are_named(path: tuple[Any, ...]) -> None:
    data = json.loads(json.dumps(FULL))
    parent = data
    for key in path:
        parent = parent[key]
    parent["surplus"] = 1
    with pytest.raises(BundleError, match="surplus"):
        Manifest.from_json(data)


def test_shapes_are_parsed_and_profiles_are_checked() -> None:
    assert Shape.parse("512x333") == Shape(1, 512, 333) and Shape.parse("2X5x7") == Shape(2, 5, 7)
    assert str(Shape(2, 5, 7)) == "2x5x7"
    for text in ("", "5", "axb", "0x5", "-1x5", "1x2x3x4", "5x", "５x５"):
        with pytest.raises(ValueError, match="shape"):
            Shape.parse(text)
    assert ENGINE.profile.contains(Shape(8, 1024, 2048)) and ENGINE.profile.contains(Shape(1, 32, 32))
    assert not ENGINE.profile.contains(Shape(9, 32, 32)) and not ENGINE.profile.contains(Shape(1, 31, 32))
    with pytest.raises(BundleError, match="height"):
        Profile(Shape(1, 33, 32), Shape(1, 32, 32), Shape(1, 64, 64))
