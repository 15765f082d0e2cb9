"""Steps skipped because a number was not finite: counted on the device, reported and limited on the host.

The host never waits for a step. Each step copies a small report to the host after its own work. The host reads the
report once it has arrived: a few steps later on a GPU, at once on the CPU.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskformer_fast.config import Config
from maskformer_fast.distributed import is_main
from maskformer_fast.structures import Batch

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 10
"""Most non-finite costs that the message of a step lists; a diverged network has one in each layer and image."""


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps had a non-finite cost, loss or gradient."""


class StepReport(NamedTuple):
    """Numbers of a step that decide whether it is skipped and tell why."""

    skipped: Tensor  # scalar bool
    counters: Tensor  # [2] float32: steps skipped so far, and in a row
    grad_norm: Tensor  # scalar
    losses: Tensor  # [A, 1 + terms]: total and terms of every micro-batch
    nonfinite: Tensor  # [A, L, B] bool: `Losses.nonfinite` of every micro-batch

    def to_host(self) -> tuple[StepReport, torch.cuda.Event | None]:
        """Copy in host memory, all float32, and the event after which it can be read (``None``: at once)."""
        flat = torch.cat([part.flatten().float() for part in self])
        on_host = flat.to("cpu", non_blocking=True)  # one transfer, from a GPU into pinned memory
        pieces = on_host.split([part.numel() for part in self])
        copy = StepReport(*(piece.view(part.shape) for piece, part in zip(pieces, self, strict=True)))
        if flat.device.type != "cuda":
            return copy, None
        event = torch.cuda.Event()
        event.record()
        return copy, event


class _PendingReport(NamedTuple):
    step: int
    report: StepReport  # in host memory
    arrived: torch.cuda.Event | None
    terms: Sequence[str]
    micro_batches: list[tuple[list[int | str], list[str]]]  # ids and paths of their images


class SkippedSteps:
    """Reads the reports of the steps in order; ``total`` and ``in_a_row`` are the counts of the last report read."""

    def __init__(self, config: Config) -> None:
        self.total = 0
        self.in_a_row = 0
        self._limit = config.loss.max_nonfinite_steps
        self._cost_name = "matching cost" if config.model.classifies_masks else "logits"
        final = config.model.decoder.layers - (
            config.model.type not in ("mask2former", "eomt")  # whose first predictions are of no layer
        )
        self._first_layer = 0 if config.loss.deep_supervision else final
        self._pending: deque[_PendingReport] = deque()

    def add(self, step: int, report: StepReport, terms: Sequence[str], batches: Sequence[Batch]) -> None:
        """Queue a step's report, then read those that have arrived, possibly this one.

        Raises:
            TrainingDiverged: see `read`.
        """
        on_host, arrived = report.to_host()
        images = [(batch.image_ids, batch.paths) for batch in batches]
        self._pending.append(_PendingReport(step, on_host, arrived, terms, images))
        self.read(wait=False)

    def read(self, wait: bool) -> None:
        """Read the reports that have arrived, or with ``wait`` all of them.

        Raises:
            TrainingDiverged: ``loss.max_nonfinite_steps`` steps in a row were skipped.
        """
        while self._pending:
            arrived = self._pending[0].arrived
            if arrived is not None and not wait and not arrived.query():
                return
            if arrived is not None:
                arrived.synchronize()
            self._read_report(self._pending.popleft())

    def _read_report(self, pending: _PendingReport) -> None:
        self.total, self.in_a_row = map(int, pending.report.counters.tolist())
        if not pending.report.skipped.tolist():
            return
        problems = self._problems(pending)
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        reasons = "; ".join(problems[:MAX_PROBLEMS] + more or ["for a reason that another rank logs"])
        if problems or is_main():
            log = logger.warning if is_main() else logger.error  # ranks other than 0 show errors only
            log("step %d skipped (%d so far): %s", pending.step, self.total, reasons)
        if self.in_a_row >= self._limit:
            raise TrainingDiverged(
                f"{self.in_a_row} steps in a row were not finite, the last at step {pending.step}: "
                f"{reasons}. Lower solver.lr, use bf16 instead of fp16, or look at the images named above; "
                f"--resume continues from the last checkpoint. loss.max_nonfinite_steps sets the limit."
            )

    def _problems(self, pending: _PendingReport) -> list[str]:
        """Images and layers with a non-finite cost; without any, non-finite losses; else a non-finite gradient norm."""
        report = pending.report
        bad_costs, bad_losses = [], []
        numbers = zip(pending.micro_batches, report.losses.tolist(), report.nonfinite.tolist(), strict=True)
        for (ids, paths), (total, *terms), layers in numbers:
            for layer, flags in enumerate(layers, start=self._first_layer):
                bad_costs += [
                    f"non-finite {self._cost_name} in decoder layer {layer}, image {name} ({path})"
                    for name, path, flag in zip(ids, paths, flags, strict=True)
                    if flag
                ]
            if not math.isfinite(total):
                named = zip(pending.terms, terms, strict=True)
                bad_terms = ", ".join(f"{term}={value}" for term, value in named if not math.isfinite(value))
                bad_losses.append(f"non-finite loss ({bad_terms}) on images {', '.join(map(str, ids))}")
        grad_norm: Any = report.grad_norm.tolist()  # a float, as the tensor is a scalar
        return bad_costs or bad_losses or ([] if math.isfinite(grad_norm) else [f"gradient norm {grad_norm}"])
