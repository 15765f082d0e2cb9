"""Steps that were skipped because something was not finite: counted on the device, named and limited on the host.

The host asks for nothing while a step is on its way. Each step sends a small report behind its own work; the report is
read once it has arrived, a few steps later on a GPU and at once on the CPU.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from maskformer_fast.config import Config
from maskformer_fast.distributed import is_main
from maskformer_fast.structures import Batch

logger = logging.getLogger(__name__)


SHOWN = 10
"""Non-finite costs of a step that its message lists: a network that has diverged has one in each layer and image."""


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps had a non-finite cost, loss or gradient."""


class Verdict(NamedTuple):
    """What a step finds out about itself, on its device."""

    skipped: Tensor  # scalar bool
    counters: Tensor  # [2] float32: steps skipped so far, and in a row
    grad_norm: Tensor  # scalar
    losses: Tensor  # [A, 1 + terms]: of every micro-batch the total and the terms
    nonfinite: Tensor  # [A, L, B] bool: see `Losses`

    def send(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """All of it as float32 in host memory, and the event after which it is there (``None``: it is there)."""
        flat = torch.cat([part.flatten().float() for part in self])
        host = flat.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        if flat.device.type != "cuda":
            return host, None
        event = torch.cuda.Event()
        event.record()
        return host, event


class _Report(NamedTuple):
    step: int
    numbers: Tensor  # float32, see `Verdict`
    arrived: torch.cuda.Event | None
    terms: Sequence[str]
    micro_batches: list[tuple[list[int | str], list[str]]]  # ids and paths of their images
    layers: int


class SkippedSteps:
    """Reads the reports of the steps in order; ``total`` and ``in_a_row`` are those of the last one read."""

    def __init__(self, config: Config) -> None:
        self.total = 0
        self.in_a_row = 0
        self._limit = config.loss.max_nonfinite_steps
        self._what = "matching cost" if config.model.type == "maskformer" else "logits"
        self._first_layer = 0 if config.loss.deep_supervision else config.model.decoder.layers - 1
        self._pending: deque[_Report] = deque()

    def add(self, step: int, verdict: Verdict, terms: Sequence[str], batches: Sequence[Batch]) -> None:
        """Take a step's report, and read those that have arrived, perhaps this one."""
        numbers, arrived = verdict.send()
        names = [(batch.image_ids, batch.paths) for batch in batches]
        self._pending.append(_Report(step, numbers, arrived, terms, names, verdict.nonfinite.shape[1]))
        self.read(wait=False)

    def read(self, wait: bool) -> None:
        """Read what has arrived, or with ``wait`` everything.

        Raises:
            TrainingDiverged: ``loss.max_nonfinite_steps`` in a row were skipped.
        """
        while self._pending:
            arrived = self._pending[0].arrived
            if arrived is not None and not wait and not arrived.query():
                return
            if arrived is not None:
                arrived.synchronize()
            self._judge(self._pending.popleft())

    def _judge(self, report: _Report) -> None:
        skipped, total, in_a_row, *rest = report.numbers.tolist()
        self.total, self.in_a_row = int(total), int(in_a_row)
        if not skipped:
            return
        problems = self._problems(report, rest)
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        reasons = "; ".join(problems[:SHOWN] + more or ["for what another rank says"])
        if problems or is_main():
            say = logger.warning if is_main() else logger.error  # of the other ranks, errors alone are shown
            say("step %d skipped (%d so far): %s", report.step, self.total, reasons)
        if self.in_a_row >= self._limit:
            raise TrainingDiverged(
                f"{self.in_a_row} steps in a row were not finite, the last at step {report.step}: "
                f"{reasons}. Lower solver.lr, use bf16 instead of fp16, or look at the images named above; "
                f"--resume continues from the last checkpoint. loss.max_nonfinite_steps sets the limit."
            )

    def _problems(self, report: _Report, numbers: list[float]) -> list[str]:
        """Which image and decoder layer had a non-finite cost (per pixel: logit), or else what was not finite."""
        norm, width = numbers[0], 1 + len(report.terms)
        parts = len(report.micro_batches)
        losses, flags = numbers[1 : 1 + parts * width], iter(numbers[1 + parts * width :])
        where, bad_losses = [], []
        for number, (ids, paths) in enumerate(report.micro_batches):
            for layer in range(report.layers):
                where += [
                    f"non-finite {self._what} in decoder layer {self._first_layer + layer}, image {name} ({path})"
                    for name, path, flag in zip(ids, paths, flags, strict=False)
                    if flag
                ]
            own = losses[number * width : (number + 1) * width]
            if not math.isfinite(own[0]):
                broken = compress(zip(report.terms, own[1:], strict=True), (not math.isfinite(v) for v in own[1:]))
                named = ", ".join(f"{term}={value}" for term, value in broken)
                bad_losses.append(f"non-finite loss ({named}) on images {', '.join(map(str, ids))}")
        return where or bad_losses or ([] if math.isfinite(norm) else [f"gradient norm {norm}"])
