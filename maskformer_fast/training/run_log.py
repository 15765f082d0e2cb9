"""Logs of a run: JSON lines that survive a crash, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.core.files import atomic_write

logger = logging.getLogger(__name__)


class RunLog:
    """Appends one JSON object a line to ``log.jsonl``; a resumed run first drops what lies beyond its start.

    A line that cannot be written, as on a full disk, is kept for the next one's turn: a run is worth more than its log.
    """

    def __init__(self, folder: Path, start_step: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= start_step]
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._path = path
        self._warned = False
        self._writer = _tensorboard(folder, start_step) if tensorboard else None

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning("%s: not all of the log could be written: %s", self._path, error)
            self._warned = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers of a step."""
        written = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with self._tolerant():
            self._file.write(json.dumps({"step": step, **written}) + "\n")
            self._file.flush()
        if self._writer is not None:
            with self._tolerant():
                for name, value in values.items():
                    self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def picture(
        self,
        step: int,
        image: np.ndarray,  # [H, W, 3] uint8
    ) -> None:
        """Log a picture to TensorBoard (the file itself is the caller's)."""
        if self._writer is not None:
            with self._tolerant():
                self._writer.add_image("val/predictions", image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close both logs."""
        with self._tolerant():
            self._file.close()
        if self._writer is not None:
            with self._tolerant():
                self._writer.close()


class NoLog:
    """In the place of a `RunLog` on the ranks that write none."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def picture(self, step: int, image: np.ndarray) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _whole_lines(path: Path) -> list[str]:
    """Lines that are complete JSON: a killed run can leave half a line at the end."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            json.loads(line)
        except json.JSONDecodeError:
            continue
        lines.append(line)
    return lines


def _tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning('TensorBoard logs are off: pip install "maskformer_fast[train]" brings tensorboard')
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)
