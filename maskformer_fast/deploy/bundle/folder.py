"""A bundle: a folder with graphs, engines and kernels, and a manifest with the hash of each of these files.

Every file of a bundle is verified before any is used, and the bytes that are used are those that were hashed. Writing
and extending prepare a complete folder beside the bundle and exchange the two. A reader sees the old bundle or the new
one, whatever ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskformer_fast.core.files import atomic_write
from maskformer_fast.deploy.bundle.manifest import (
    MANIFEST_NAME,
    MAX_BYTES,
    BundleError,
    FileEntry,
    Manifest,
    check_file_name,
    expect,
    manifest_bytes,
    parse_manifest,
)

_CHUNK_BYTES = 2**20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # arguments of Linux's renameat2


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest
    digest: str
    """SHA-256 of the manifest, which lists those of all files. Pinning it admits this bundle and no other."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str], digest: str | None = None) -> Bundle:
        """Verify every file of a bundle. Only the manifest is parsed.

        Args:
            folder: the bundle.
            digest: expected `digest`, for a bundle from a place that is not trusted.

        Raises:
            FileNotFoundError: there is no such folder.
            BundleError: a file is missing, changed, not listed, or not a plain file; or the manifest is not one.
        """
        manifest, actual = read_manifest(folder)
        path = Path(os.path.realpath(folder))
        with naming(path):
            expect(digest is None or digest == actual, "digest", f"{digest}, which was asked for", actual)
            _check_references(manifest)
            listed = manifest.files
            present = set()
            for name in _walk(path):
                expect(name in listed or name == MANIFEST_NAME, str(path), "files of the manifest only", name)
                present.add(name)
            missing = sorted(listed.keys() - present)
            expect(not missing, str(path), "every file of the manifest", f"none of {missing}")
            for name, entry in listed.items():
                _verify(path / name, name, entry)
        return cls(path, manifest, actual)

    def read(self, name: str) -> bytes:
        """Content of a file of the bundle. It is read once and hashed before it is returned.

        Raises:
            BundleError: the bundle has no such file, or it has changed since the bundle was opened.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.folder}: expected a file of the bundle, got {name!r}")
        content = _read(self.folder / name, entry.bytes)
        _check_entry(name, entry, len(content), hashlib.sha256(content).hexdigest())
        return content


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Put a bundle's folder in front of a `BundleError` that does not have it."""
    try:
        yield
    except BundleError as error:
        if str(folder) in str(error):
            raise
        raise BundleError(f"{folder}: {error}") from error


def read_manifest(folder: str | os.PathLike[str]) -> tuple[Manifest, str]:
    """Manifest and digest of a bundle. The other files are not verified; `Bundle.open` does that.

    Raises:
        FileNotFoundError: there is no such folder.
        BundleError: there is no manifest, or it was changed.
    """
    path = Path(os.path.realpath(folder))
    if not path.is_dir():
        raise FileNotFoundError(errno.ENOENT, "folder: expected a bundle, got no folder", str(folder))
    with naming(path):
        return parse_manifest(_read(path / MANIFEST_NAME, MAX_BYTES))


def write_bundle(folder: str | os.PathLike[str], manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write a bundle in one step, replacing one that is there. A failure leaves the folder as it was.

    Args:
        folder: destination; missing parent folders are made.
        manifest: its ``files`` are computed here.
        files: content of each file, by its relative path.

    Raises:
        BundleError: the folder has other content than an undamaged bundle, or the manifest names a file not given.
    """
    target = check_destination(folder)
    entries = {name: _entry(content) for name, content in files.items()}
    return _replace_folder(target, replace(manifest, files=entries), files, None)


def check_outside(bundle: Bundle, output: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` for an output folder inside the bundle: with foreign files a bundle does not open."""
    path = Path(os.path.realpath(output))
    if path.is_relative_to(bundle.folder):
        raise ValueError(f"output: expected a folder outside of the bundle {bundle.folder}, got {output}")


def check_destination(folder: str | os.PathLike[str]) -> Path:
    """The folder's real path, if a bundle may be written there.

    Only an empty folder or an undamaged bundle is replaced: other content may be someone's data. Raises `BundleError`.
    """
    target = Path(os.path.realpath(folder))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    try:
        expect(target.is_dir(), str(target), "a folder", "something else")
        Bundle.open(target)
    except BundleError as error:
        raise BundleError(
            f"{target}: expected a new folder, an empty one, or an intact bundle to replace; remove it first ({error})"
        ) from None
    return target


def extend_bundle(bundle: Bundle, files: Mapping[str, bytes], **manifest_changes: Any) -> Bundle:
    """Add or replace files of a bundle and change fields of its manifest. A failure changes nothing.

    Files that the changed manifest no longer refers to stay. Raises `BundleError` as `write_bundle` does, and where
    another process has changed the bundle since it was opened, so that nobody's additions are lost.
    """
    entries = bundle.manifest.files | {name: _entry(content) for name, content in files.items()}
    manifest = replace(bundle.manifest, **manifest_changes, files=entries)
    return _replace_folder(bundle.folder, manifest, files, bundle)


def _replace_folder(target: Path, manifest: Manifest, files: Mapping[str, bytes], old: Bundle | None) -> Bundle:
    """Prepare a bundle beside ``target`` and put it there.

    Files that are not among ``files`` are links to those of the old bundle, which must be the one at ``target``.
    """
    _check_references(manifest)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        staging.mkdir()
        for name, content in files.items():
            check_file_name(name)
            with atomic_write(staging / name) as file:
                file.write(content)
        for name in manifest.files.keys() - files.keys() if old else ():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _link(target / name, staging / name)
        content, _ = manifest_bytes(manifest)
        with atomic_write(staging / MANIFEST_NAME) as file:
            file.write(content)
        made = Bundle.open(staging)  # a bundle that does not open is not left behind
        if old is not None:
            _check_unchanged(old)
        _put(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # the old bundle after an exchange, the new one after a failure
    return replace(made, folder=target)


def _check_unchanged(bundle: Bundle) -> None:
    try:
        digest: str | None = read_manifest(bundle.folder)[1]
    except (BundleError, FileNotFoundError):
        digest = None
    if digest != bundle.digest:
        raise BundleError(f"{bundle.folder}: expected the bundle that was opened (digest {bundle.digest}), got one "
                          f"that was changed since (digest {digest}); do it again")


def _put(staging: Path, target: Path) -> None:
    """Give ``staging`` the name ``target``; a bundle that was there gets the name ``staging``."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(staging, target)
        return
    if _exchange(staging, target):
        return
    aside = target.parent / f".{secrets.token_hex(8)}.tmp"  # two steps where the system cannot exchange names
    os.rename(target, aside)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(aside, target)
        raise
    os.rename(aside, staging)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step by Linux's renameat2. False where the system does not offer it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_references(manifest: Manifest) -> None:
    """Raise `BundleError` unless the files of all graphs and engines are listed."""
    names = [graph.file for graph in manifest.graphs.values()]
    names += [name for engine in manifest.engines for name in (engine.file, engine.weights) if name is not None]
    for name in names:
        expect(name in manifest.files, name, "a file of the bundle", "none of that name")


def _walk(folder: Path, prefix: str = "") -> Iterator[str]:
    """Relative paths of all files below a folder. Links and special files raise `BundleError`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                expect(prefix.count("/") < 4, str(folder), "folders of a bundle", name)
                yield from _walk(folder / entry.name, name + "/")
            else:
                expect(entry.is_file(follow_symlinks=False), name, "a plain file", "a link or a special file")
                yield name


@contextlib.contextmanager
def _plain_file(path: Path) -> Iterator[int]:
    """Descriptor of a plain file. Links are not followed, and a pipe in its place does not block."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise BundleError(f"{path}: expected a file of a bundle, got {error.strerror}") from None
    try:
        expect(stat.S_ISREG(os.fstat(descriptor).st_mode), str(path), "a plain file", "a folder or a special file")
        yield descriptor
    finally:
        os.close(descriptor)


def _read(path: Path, limit: int) -> bytes:
    """Content of a plain file, at most one byte more than the limit, by which the caller notices a larger file."""
    with _plain_file(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read(limit + 1)


def _verify(path: Path, name: str, entry: FileEntry) -> None:
    digest, size = hashlib.sha256(), 0
    with _plain_file(path) as descriptor:
        _check_size(name, entry, os.fstat(descriptor).st_size)  # before reading gigabytes
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    _check_entry(name, entry, size, digest.hexdigest())


def _entry(content: bytes) -> FileEntry:
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def _check_size(name: str, entry: FileEntry, size: int) -> None:
    expect(size == entry.bytes, name, f"{entry.bytes} bytes, as the manifest says", size)


def _check_entry(name: str, entry: FileEntry, size: int, digest: str) -> None:
    _check_size(name, entry, size)
    expect(digest == entry.sha256, name, f"the SHA-256 {entry.sha256}, as the manifest says", digest)
