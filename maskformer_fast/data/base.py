"""What every data set offers, and the error for one example that cannot be read."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.structures import Example

_LOGGER = logging.getLogger("maskformer_fast.data")
_LISTED = 8  # paths an error message spells out; a log line lists them all


class BrokenExampleError(ValueError):
    """One image or annotation cannot be used: unreadable, of the wrong size, with unknown ids, or missing.

    Both arguments are the exception's ``args``, so it survives pickling between loader processes.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(os.fspath(path), reason)

    @property
    def path(self) -> str:
        """File to blame."""
        return self.args[0]

    @property
    def reason(self) -> str:
        return self.args[1]

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class SegmentationDataset(Protocol):
    """A sequence of examples. Reading the same index twice gives the same example, in any process."""

    @property
    def metadata(self) -> Metadata: ...

    @property
    def task(self) -> Task:
        """What training targets are made of; the examples themselves are the same for every task."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Read one example.

        Raises:
            BrokenExampleError: its files cannot be used.
            IndexError: ``index`` is not below the length.
        """
        ...


def resolve_task(asked: Task | None, own: Task, allowed: Sequence[Task], dataset: str) -> Task:
    """The task asked for, or the data set's own.

    Raises:
        ValueError: the truth of this data set does not allow the task.
    """
    if asked is None:
        return own
    if asked not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"data.task: expected one of {choices} for data set {dataset!r}, got {asked!r}")
    return asked


def inside(folder: Path, name: str, source: str) -> Path:
    """``folder / name``, where ``name`` comes from a file of the data set and must stay below ``folder``.

    Raises:
        ValueError: ``name`` is empty, absolute, or climbs with "..".
    """
    windows = PureWindowsPath(name)
    climbs = ".." in windows.parts or ".." in PurePosixPath(name).parts
    if not name or "\0" in name or climbs or windows.drive or windows.root or PurePosixPath(name).is_absolute():
        raise ValueError(f"{source}: expected a file name below {folder}, got {name!r}")
    return folder / name


def first_existing(candidates: Sequence[Path], what: str) -> Path:
    """The first path that exists.

    Raises:
        FileNotFoundError: none does; the message lists them.
    """
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(f"{what} not found; looked for {', '.join(map(str, candidates))}")


def leave_out(problems: Sequence[str], what: str, skip_broken: bool) -> None:
    """Stop because of examples that cannot be used, or log the list of them and go on.

    Raises:
        ValueError: there are problems, and ``skip_broken`` is off.
    """
    if not problems:
        return
    if skip_broken:
        _LOGGER.warning("left out %d: %s:\n%s", len(problems), what, "\n".join(problems))
        return
    shown = "\n  ".join(problems[:_LISTED])
    more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    raise ValueError(f"{len(problems)} {what} (--data.skip-broken leaves them out):\n  {shown}{more}")


def check_same_size(path: str | os.PathLike[str], got: tuple[int, int], image: tuple[int, int]) -> None:
    """Truth must have the size of its image.

    Raises:
        BrokenExampleError: it has not.
    """
    if got == image:
        return
    hint = "; the image was turned as its EXIF orientation says" if got == image[::-1] else ""
    raise BrokenExampleError(
        path, f"expected the size of its image, {image[0]} x {image[1]}, got {got[0]} x {got[1]} (height x width){hint}"
    )
