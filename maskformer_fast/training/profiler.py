"""Trace of a few training steps by PyTorch's profiler (``--profile``), for https://ui.perfetto.dev."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from maskformer_fast.distributed import rank

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 5
"""Number of steps before the trace; the last of them is the profiler's own warm-up."""
TRACED_STEPS = 3
"""Number of steps in the trace."""


@contextmanager
def profile_steps(folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Trace `TRACED_STEPS` steps after `WARM_UP_STEPS`; the caller calls the yielded function after each step.

    Each rank writes ``folder/trace_rank_N.json``. Training goes on after that at its usual speed.
    """
    path = folder / f"trace_rank_{rank()}.json"
    written = False

    def write(profiler: profile) -> None:
        nonlocal written
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        written = True
        logger.info("trace of a few steps: %s (open it in https://ui.perfetto.dev)", path)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    plan = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
    if not written:
        logger.warning("no trace was written: it takes %d steps", WARM_UP_STEPS + TRACED_STEPS)
