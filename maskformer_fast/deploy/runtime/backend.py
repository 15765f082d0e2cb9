"""Interface of a backend, which `deploy.runtime.session` chooses and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.results import Result
from maskformer_fast.core.stages import StageSeconds


class Backend(Protocol):
    """Runs several batches at a time. Any thread may call."""

    max_tasks: int
    """Number of tasks that one `submit` takes; the network runs once for all of them."""
    graph_obstacle: str | None
    """Reason why a GPU launches batches piece by piece and not as a CUDA graph; ``None`` where it does not."""

    def max_batch(self, height: int, width: int, task: Task) -> int:
        """Number of frames of this size that one `submit` takes. Raises ``ValueError`` where it takes none."""
        ...

    def submit(
        self,
        frames: Sequence[np.ndarray],  # each [H, W, 3] uint8, or bands [H, W, C] uint8 or uint16; of one size
        *tasks: Task,
    ) -> int:
        """Begin a batch for one to `max_tasks` tasks and return at once -> a ticket.

        Errors of the frames are raised here or by `collect`.
        """
        ...

    def collect(self, ticket: int) -> tuple[list[Result], StageSeconds]:
        """Wait for a batch -> results of all frames at the frames' size, task after task; seconds of the stages.

        Raises:
            KeyError: an unknown ticket, or one that was collected before.
            Exception: the error of this batch. Other batches are not affected.
        """
        ...

    def close(self) -> None:
        """End all batches and release everything. Results that were not collected are lost."""
        ...
