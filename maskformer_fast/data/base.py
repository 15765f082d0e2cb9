"""The protocol of data sets, the error for one unusable example, and checks that several data sets share."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol, TypeVar

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.structures import Example

_LOGGER = logging.getLogger("maskformer_fast.data")
_LISTED = 8  # number of problems that an error message lists; the log lists all of them
_EVERY = 10
_EXAMPLES = 5  # number of examples that are named for each reason of leaving truth out


Item = TypeVar("Item")


class BrokenExampleError(ValueError):
    """An image or annotation is missing, unreadable, of the wrong size, or has unknown ids.

    ``args`` holds both arguments, so that the exception can be pickled between loader processes.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(os.fspath(path), reason)

    @property
    def path(self) -> str:
        """The unusable file."""
        return self.args[0]

    @property
    def reason(self) -> str:
        """Problem with the file."""
        return self.args[1]

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def tenths(items: Sequence[Item], training: bool) -> list[Item]:
    """Part of a data set that has no parts: of its items in order, validation has every tenth, training the others.

    Of fewer than ten items validation has the last; a single item is in both parts.
    """
    if len(items) < _EVERY:
        return list((items[:-1] or items) if training else items[-1:])
    return [item for place, item in enumerate(items, 1) if (place % _EVERY == 0) != training]


class LeftOut:
    """Counts of truth that is left out of a data set, by reason, with the first examples of each reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, example: str) -> None:
        """Count one annotation or image."""
        self.counts[reason] += 1
        if len(self._examples[reason]) < _EXAMPLES:
            self._examples[reason].append(example)

    def __str__(self) -> str:
        """Describe each reason in a line."""
        lines = []
        for reason, count in self.counts.most_common():
            more = ", ..." if count > _EXAMPLES else ""
            lines.append(f"  {count} with {reason}: {', '.join(self._examples[reason])}{more}")
        return "\n".join(lines)

    def log(self, source: str | os.PathLike[str], what: str) -> None:
        """Log all reasons in one warning, if there are any."""
        if self.counts:
            _LOGGER.warning("%s: left out %d %s:\n%s", source, self.counts.total(), what, self)


class SegmentationDataset(Protocol):
    """A sequence of examples. The same index gives the same example every time and in every process."""

    @property
    def metadata(self) -> Metadata: ...

    @property
    def task(self) -> Task:
        """Task of the training targets; the examples themselves are the same for every task."""
        ...

    @property
    def file_names(self) -> list[str]:
        """File name of each example's image, relative to the data set's folder of images; they name results."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Read one example.

        Raises:
            BrokenExampleError: its files cannot be used.
            IndexError: ``index`` is not below the length.
        """
        ...


def resolve_task(asked: Task | None, default: Task, allowed: Sequence[Task], dataset: str) -> Task:
    """Return the configured task, or ``default`` if the configuration names none.

    Raises:
        ValueError: the truth of this data set does not allow the task.
    """
    if asked is None:
        return default
    if asked not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"data.task: expected one of {choices} for data set {dataset!r}, got {asked!r}")
    return asked


def path_below(folder: Path, name: str, source: str) -> Path:
    """Return ``folder / name`` after checking that it lies below ``folder``; names in annotation files are not trusted.

    Raises:
        ValueError: ``name`` is empty, absolute, or has a part "..".
    """
    windows = PureWindowsPath(name)
    has_parent = ".." in windows.parts or ".." in PurePosixPath(name).parts
    if not name or "\0" in name or has_parent or windows.drive or windows.root or PurePosixPath(name).is_absolute():
        raise ValueError(f"{source}: expected a file name below {folder}, got {name!r}")
    return folder / name


def first_existing(candidates: Sequence[Path], what: str) -> Path:
    """Return the first path that exists.

    Raises:
        FileNotFoundError: none of them exists; the message lists them, and files of the same kind that are near.
    """
    for path in candidates:
        if path.exists():
            return path
    folders = dict.fromkeys(folder for path in candidates for folder in (path.parent, path.parent.parent))
    near = [str(path) for folder in folders for path in sorted(folder.glob(f"*{candidates[0].suffix}"))][:_LISTED]
    hint = f"; there is {', '.join(near)}: see data.train_split and data.val_split" if near else ""
    raise FileNotFoundError(f"{what} not found; looked for {', '.join(map(str, candidates))}{hint}")


def raise_or_log(problems: Sequence[str], what: str, skip_broken: bool) -> None:
    """Raise an error that lists unusable examples; with ``skip_broken``, log the list instead.

    Raises:
        ValueError: there are problems and ``skip_broken`` is False.
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
    """Check that truth has the size (height, width) of its image.

    Raises:
        BrokenExampleError: the sizes differ.
    """
    if got == image:
        return
    hint = " (if the image is turned by its EXIF orientation: --data.no-exif)" if got == image[::-1] else ""
    raise BrokenExampleError(
        path, f"expected the size of its image, {image[0]} x {image[1]}, got {got[0]} x {got[1]} (height x width){hint}"
    )
