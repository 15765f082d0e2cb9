"""What a loader's worker process does first: few threads, and an end that comes with its parent's and not before."""

from __future__ import annotations

import atexit
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event
from types import FrameType

import threadpoolctl

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def worker_setup() -> Callable[[int], None]:
    """A ``worker_init_fn`` for `torch.utils.data.DataLoader`.

    Workers keep NumPy's matrix products to one thread (more would fight the training process for its cores). Signals
    that ask a whole process group to stop are for the training process to answer, which needs its batches until then,
    so workers ignore them; but not SIGTERM once that process exits, as it then waits for workers it has sent one. On
    Linux they die with it however it ends: a full result pipe would keep an orphan forever.
    """
    return partial(_set_up_worker, exiting=_parent_exits())


@functools.cache
def _parent_exits() -> Event:
    """Set when this process exits, before multiprocessing ends its children: handlers run in reverse order."""
    event = multiprocessing.Event()
    atexit.register(event.set)
    return event


def _set_up_worker(_: int, exiting: Event) -> None:
    def terminated(_number: int, _frame: FrameType | None) -> None:
        if exiting.is_set():
            os._exit(0)

    threadpoolctl.threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminated)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
