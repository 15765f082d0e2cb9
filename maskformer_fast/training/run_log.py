"""Logs of a run: JSON lines, TensorBoard if it is installed, and the loggers of `training.loggers`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.core.files import atomic_write, put_aside
from maskformer_fast.training.loggers import Logger

logger = logging.getLogger(__name__)


class RunLog:
    """Appends JSON objects, one a line, to ``log.jsonl``. A resumed run first drops the lines after its first step.

    A failed write, as on a full disk, raises no error: training goes on, and the next write tries again.
    """

    def __init__(
        self, folder: Path, start_step: int, tensorboard: bool, validates: bool = False, loggers: Sequence[Logger] = ()
    ) -> None:
        """``validates``: the run begins with a validation, so that an earlier one of the same step is dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [
            line
            for line, content in _read_lines(path)
            if content["step"] < start_step + (not (validates and any(key.startswith("val/") for key in content)))
        ]
        with atomic_write(path) as file:
            file.write(b"".join(line + b"\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._path = path
        self._warned = False
        self._loggers = loggers
        self._writer = _tensorboard(folder, start_step) if tensorboard else None

    @contextmanager
    def _warn_once_if_it_fails(self) -> Iterator[None]:
        """Turn an error of writing into a warning, once a run."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning("%s: not all of the log could be written: %s", self._path, error)
            self._warned = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers of a step."""
        written = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with self._warn_once_if_it_fails():
            self._file.write(json.dumps({"step": step, **written}) + "\n")
            self._file.flush()
        for target in self._loggers:
            target.scalars(step, values)
        if self._writer is not None:
            with self._warn_once_if_it_fails():
                for name, value in values.items():
                    self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def picture(
        self,
        step: int,
        image: np.ndarray,  # [H, W, 3] uint8
    ) -> None:
        """Log a picture to TensorBoard and the loggers; writes no image file."""
        for target in self._loggers:
            target.picture(step, image)
        if self._writer is not None:
            with self._warn_once_if_it_fails():
                self._writer.add_image("val/predictions", image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close all logs."""
        for target in self._loggers:
            target.close()
        with self._warn_once_if_it_fails():
            self._file.close()
        if self._writer is not None:
            with self._warn_once_if_it_fails():
                self._writer.close()


class NoLog:
    """Log of the ranks that write none, with the methods of `RunLog`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def picture(self, step: int, image: np.ndarray) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines of a log, as written and as JSON objects with a step.

    A killed run can leave half a line at the end, which is left out. Other lines that cannot be read are left out with
    a warning, and the file as it was is kept beside the new one.
    """
    try:
        written = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        put_aside(path, str(error))
        return []
    read = [(line, _entry(line)) for line in written]
    bad = [number for number, (line, entry) in enumerate(read, 1)
           if entry is None and line and (number < len(read) or not line.startswith(b"{"))]
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        put_aside(path, f"{len(bad)} of {len(read) - (not written[-1])} lines are damaged (line {shown}) and left out")
    return [(line, entry) for line, entry in read if entry is not None]


def _entry(line: bytes) -> dict[str, Any] | None:
    """JSON object of a line of the log; ``None`` if the line is damaged, or two lines for other readers."""
    if b"\r" in line.rstrip(b"\r"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step")) is int else None


def _tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning('TensorBoard logs are off: pip install "maskformer_fast[train]" brings tensorboard')
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)
