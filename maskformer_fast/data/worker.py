"""Set-up of a loader's worker processes: one thread each, and an end together with the training process."""

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
    """Make a ``worker_init_fn`` for `torch.utils.data.DataLoader`.

    - NumPy's matrix products in a worker use one thread, since more would compete with the training process.
    - Workers ignore SIGINT and SIGTERM, which may reach the complete process group: the training process answers them,
      and needs batches until it stops. Once the training process exits, it sends its workers SIGTERM and waits for
      them, so from then on SIGTERM ends a worker.
    - On Linux the kernel kills a worker when the training process ends in any other way. Otherwise the worker could
      wait forever to write into a full pipe.
    """
    return partial(_set_up_worker, exiting=_parent_exit_event())


@functools.cache
def _parent_exit_event() -> Event:
    """Make an event that is set when this process exits.

    It is set before multiprocessing ends its children, because exit handlers run in reverse order of registration.
    """
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
