"""Results of many images by several processes: parts of the JSON files that outlive a killed run, and their merge.

While `predict` runs, the folder ``.parts`` below that of the results has ``run.json``, the settings of the run, and a
file of each process that ever worked on it. A line of such a file has the entries of one image for all JSON files. It
is flushed to the disk before the next batch begins, so that a run that was killed knows what is finished. The merge
reads all parts in the order of the images, a line of each at a time, and writes the same files for any number of
processes.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write, remove_temporary_files, write_json
from maskformer_fast.core.image_files import RESULT_FOLDERS, RESULT_LIST, RESULT_MARK
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.output.formats import coco_categories
from maskformer_fast.output.label_files import LabelEntries, LabelWriter
from maskformer_fast.output.writer import ResultWriter

PARTS_FOLDER = ".parts"
"""Folder, below that of the results, of an unfinished run."""
MOST_PARTS = 64
"""Number of files of parts from which on a resumed run joins them, as a merge opens all of them at once."""
_POLL_SECONDS = 0.2  # between two looks at whether all processes have finished
_REPORT_SECONDS = 60.0  # between two lines of the log while waiting for them
_LINE = re.compile(rb"(\d{1,18})" + rb"\t([^\t\n]*)" * 5 + rb"\n")

_LOGGER = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """A line of a part: JSON texts of an image's entries, empty where there are none."""

    number: int
    image: bytes
    panoptic: bytes
    instances: bytes
    labels: bytes  # as `label_files.LabelEntries`
    failure: bytes  # "NAME: reason" as a JSON string; empty if the image has results


class MergedRun(NamedTuple):
    """What the JSON files of a run have."""

    images: int
    """Number of images with results."""
    failed: list[str]
    """File name and reason of each image without."""


class Share:
    """Batches of consecutive images that a process works on: one of every ``ranks`` batches with unfinished images.

    Images share a batch whatever the number of processes, and whether or not a run was interrupted.
    """

    def __init__(
        self,
        finished: np.ndarray,  # [N] bool
        batch_size: int,
        rank: int,
        ranks: int,
    ) -> None:
        self.rank = rank
        self._count, self._size = len(finished), batch_size
        starts = np.arange(0, self._count, batch_size)
        unfinished = ~np.logical_and.reduceat(finished, starts) if self._count else starts
        self._starts = starts[unfinished][rank::ranks] if self._count else starts

    @property
    def images(self) -> int:
        """Number of images of the batches."""
        return sum(map(len, self))

    def __iter__(self) -> Iterator[range]:
        for start in self._starts.tolist():
            yield range(start, min(start + self._size, self._count))


class PartsWriter(ResultWriter):
    """A `ResultWriter` that keeps the entries of the JSON files on the disk, and goes on where an earlier run stopped.

    Use: `start` in one process, `join` in each, then `write` for images in ascending order with `end_batch` after each
    batch, `finish` in each, and `merge` in one.
    """

    def __init__(
        self, folder: Path, metadata: Metadata, overlays: bool, names: Sequence[str], file_names: Sequence[str],
        tasks: Sequence[Task], labels: LabelWriter | None = None,
    ) -> None:  # fmt: skip
        """Write nothing yet; arguments and errors are those of `ResultWriter`."""
        super().__init__(folder, metadata, overlays, names, file_names, labels)
        self.parts = folder / PARTS_FOLDER
        self.tasks = set(tasks)
        self._entries: list[_Entry] = []
        self._file: IO[bytes] | None = None
        self._end: Path | None = None
        self._lock: IO[bytes] | None = None

    def start(self, settings: Mapping[str, object], resume: bool) -> tuple[str, np.ndarray]:
        """Open the folder of parts -> name of this session for `join`, and whether each image is finished, bool [N].

        An image that failed in an earlier run is not finished: it is tried again.

        Args:
            settings: whatever changes results, as JSON has it.
            resume: go on with an unfinished run, which must have the same settings; else delete what it has.

        Raises:
            ValueError: an unfinished run in the folder has other settings, or another process works on it.
        """
        settings = json.loads(json.dumps({**settings, "images": len(self.names)}, default=str))
        self.begin()
        self._take_lock()
        stored = self.parts / "run.json"
        if stored.exists():  # processes that were killed may have left files that they were writing
            for name in RESULT_FOLDERS:
                for folder, _, _ in os.walk(self.folder / name):
                    remove_temporary_files(folder)
            remove_temporary_files(self.folder)
        try:
            before = json.loads(stored.read_text()) if resume else None
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):  # also parts of unknown settings are of no use
            for path in self._part_files():
                path.unlink()
            write_json(stored, settings)
            before = settings
        for name in sorted({*settings, *before}):
            check(before.get(name) == settings.get(name), "output",
                  f"the settings of the unfinished run in {self.folder} ({name}: {_short(before.get(name))}); give "
                  "them again, choose another folder, or start anew with --no-resume",
                  f"{name}: {_short(settings.get(name))}")  # fmt: skip
        for leftover in self.parts.glob("*.end"):
            leftover.unlink()
        if len(self._part_files()) > MOST_PARTS:
            self._join_parts()
        finished = np.zeros(len(self.names), bool)
        for path in self._part_files():
            for entry in _entries(path, len(self.names)):
                finished[entry.number] |= not entry.failure
        if finished.any():
            _LOGGER.info("%s: goes on with an unfinished run, %d of %d images are finished", self.folder,
                         int(finished.sum()), len(finished))  # fmt: skip
        return secrets.token_hex(4), finished

    def join(self, session: str, process: int) -> None:
        """Open this process's own part, of a session that `start` began."""
        self._end = self.parts / f"{session}_{process}.end"
        self._file = open(self.parts / f"{session}_{process}.part", "xb")  # noqa: SIM115 (closed by `finish`)

    def add(
        self, number: int, image_id: int | str, size: tuple[int, int], panoptic: Sequence[dict[str, Any]],
        instances: Sequence[dict[str, Any]], tasks: Iterable[Task], labels: LabelEntries | None = None,
    ) -> None:  # fmt: skip
        """Take the entries of an image, as `ResultWriter.add`; `end_batch` writes them."""
        image = {"id": image_id, "file_name": self.file_names[number], "height": size[0], "width": size[1],
                 "result": self.names[number]}  # fmt: skip
        texts = (_text(image), _texts(panoptic), _texts(instances), b"" if labels is None else _text(labels))
        self._entries.append(_Entry(number, *texts, b""))

    def fail(self, number: int | None, file_name: str, reason: object) -> None:
        """Note that an image has no results, as `ResultWriter.fail`; its number must be known."""
        assert number is not None
        super().fail(number, file_name, reason)
        self._entries.append(_Entry(number, b"", b"", b"", b"", _text(self.failed[-1])))

    def end_batch(self) -> None:
        """Write what `add` and `fail` took since the last call, in order, as a merge needs it; flush it to the disk."""
        assert self._file is not None  # by `join`
        self._file.write(b"".join(_line(*entry) for entry in sorted(self._entries)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._entries.clear()

    def finish(self) -> None:
        """Close this process's part and mark it as complete."""
        assert self._file is not None and self._end is not None  # by `join`
        self.end_batch()
        self._file.close()
        with atomic_write(self._end):
            pass

    def wait(self, session: str, processes: int) -> None:
        """Wait until so many processes of a session have called `finish`, whatever time they take."""
        ends = [self.parts / f"{session}_{process}.end" for process in range(processes)]
        reported = time.monotonic()
        while missing := [path for path in ends if not path.exists()]:
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                _LOGGER.info("waiting for %d of %d processes", len(missing), processes)
            time.sleep(_POLL_SECONDS)

    def merge(self, complete: bool = True) -> MergedRun:
        """Write the JSON files from all parts; with ``complete``, delete the parts then.

        Memory does not grow with the number of images, but for the list of those that failed.
        """
        files: dict[str, IO[bytes]] = {}
        count = 0
        failed: list[str] = []
        categories = _text(coco_categories(self.metadata))
        with ExitStack() as stack:
            for name in (RESULT_LIST, *(f"{kind}.json" for kind, task in (("panoptic", "panoptic"),
                                                                        ("instances", "instance"))
                                        if task in self.tasks)):  # fmt: skip
                files[name] = stack.enter_context(atomic_write(self.folder / name))
            listing, panoptic = _List(files[RESULT_LIST]), None
            listing.file.write(b'{"info": ' + _text({"description": RESULT_MARK}) + b', "images": [')
            if "panoptic.json" in files:
                panoptic = _List(files["panoptic.json"])
                panoptic.file.write(b'{"images": [')
            segments = _List(stack.enter_context(TemporaryFile(dir=self.parts)))
            instances = _List(files["instances.json"], b",\n") if "instances.json" in files else None
            if instances is not None:
                instances.file.write(b"[\n")
            for entry in _in_order(self._part_files(), len(self.names)):
                if entry.failure:
                    failed.append(str(json.loads(entry.failure)))
                    continue
                count += 1
                listing.add(entry.image)
                if panoptic is not None:
                    panoptic.add(entry.image)
                    segments.add(entry.panoptic)
                if instances is not None:
                    instances.add(entry.instances)
            listing.file.write(b'], "annotations": [], "categories": ' + categories + b"}\n")
            if panoptic is not None:
                panoptic.file.write(b'], "annotations": [')
                segments.file.seek(0)
                shutil.copyfileobj(segments.file, panoptic.file)
                panoptic.file.write(b'], "categories": ' + categories + b"}\n")
            if instances is not None:
                instances.file.write(b"\n]\n")
        if self.labels is not None and count:
            self.labels.close(self._label_entries)
        if complete:
            if self._lock is not None:
                self._lock.close()
            shutil.rmtree(self.parts, ignore_errors=True)
        self.failed = failed
        return MergedRun(count, failed)

    def close(self) -> None:
        """Write the JSON files of what is finished so far, and keep the parts; for a run that is interrupted."""
        if self._file is not None and not self._file.closed:
            self.end_batch()
            self._file.close()
        self.merge(complete=False)

    def _label_entries(self) -> Iterator[LabelEntries]:
        for entry in _in_order(self._part_files(), len(self.names)):
            if entry.labels:
                yield json.loads(entry.labels)

    def _take_lock(self) -> None:
        """Lock the folder of parts against other runs until this process ends, however it ends."""
        self.parts.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.parts / "lock", "wb")  # noqa: SIM115
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(f"output: expected a folder no other run is using, got {self.folder}") from None

    def _part_files(self) -> list[Path]:
        return sorted(self.parts.glob("*.part"))

    def _join_parts(self) -> None:
        """Put the lines of all parts into one."""
        before = self._part_files()
        with atomic_write(self.parts / f"{secrets.token_hex(4)}_joined.part") as file:
            for entry in _in_order(before, len(self.names)):
                file.write(_line(*entry))
        for path in before:
            path.unlink()


class _List:
    """Elements of a JSON list, written one after another."""

    def __init__(self, file: IO[bytes], separator: bytes = b", ") -> None:
        self.file = file
        self._separator = separator
        self._empty = True

    def add(self, texts: bytes) -> None:
        """Write one or several elements, or none."""
        if texts:
            self.file.write(texts if self._empty else self._separator + texts)
            self._empty = False


def _in_order(paths: Sequence[Path], count: int) -> Iterator[_Entry]:
    """Entries of all parts by image, one for each; results of an image count more than its failure in another run."""
    entries = heapq.merge(*(_entries(path, count) for path in paths), key=lambda entry: entry.number)
    for _, same in groupby(entries, key=lambda entry: entry.number):
        yield min(same, key=lambda entry: bool(entry.failure))


def _entries(path: Path, count: int) -> Iterator[_Entry]:
    """Complete lines of a part; the last one of a killed process may be none."""
    with open(path, "rb") as file:
        for line in file:
            match = _LINE.fullmatch(line)
            if match is not None and int(match[1]) < count and (match[2] or match[6]):
                yield _Entry(int(match[1]), *match.groups()[1:])


def _line(number: int, *texts: bytes) -> bytes:
    return b"\t".join((b"%d" % number, *texts)) + b"\n"


def _texts(entries: Sequence[dict[str, Any]]) -> bytes:
    return b", ".join(map(_text, entries))


def _text(value: object) -> bytes:
    """JSON without line breaks and tabs, which it has as escapes only; surrogates become escapes too."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
