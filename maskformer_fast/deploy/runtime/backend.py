"""What `maskformer_fast.deploy.runtime` asks of a backend; which one that is, is the runtime's to choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.results import Result
from maskformer_fast.core.stages import StageSeconds


class Backend(Protocol):
    """Runs batches, several of them at a time; any thread may call."""

    max_tasks: int
    """How many tasks one `submit` takes, for which the network runs once."""
    graph_obstacle: str | None
    """Why batches are not replayed from a CUDA graph, so that each costs some launches; ``None`` where they are, and on
    a CPU."""

    def max_batch(self, height: int, width: int, task: Task) -> int:
        """The most frames of this size that one `submit` takes. Raises ``ValueError`` where it takes no such frames."""
        ...

    def submit(
        self,
        frames: Sequence[np.ndarray],  # each [H, W, 3] uint8, of one size
        *tasks: Task,
    ) -> int:
        """Begin a batch for one to `max_tasks` tasks -> a ticket, at once.

        What is wrong with the frames may be raised here or by `collect`.
        """
        ...

    def collect(self, ticket: int) -> tuple[list[Result], StageSeconds]:
        """Wait for a batch: each frame's result, at the frames' size, task after task. A ticket is good for one call.

        Raises:
            KeyError: no such ticket, or one that was collected.
            Exception: what went wrong with the batch; others are not affected.
        """
        ...

    def close(self) -> None:
        """End what is under way and give everything back; results that were not collected are lost."""
        ...
