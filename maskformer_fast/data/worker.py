"""A loader's worker processes: one thread each, an end together with the training process, and deaths explained."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any

import threadpoolctl

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_PATIENCE = 2.0
"""Time in seconds for a worker to end after it stopped answering: its connections close a little earlier."""
_working: set[BaseProcess] = set()
"""Workers of the loaders that are being iterated over, or that the last error came from."""


class WorkerDied(RuntimeError):
    """A worker process ended before its loader. The message says how, and what helps."""


def iterate_over(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a `torch.utils.data.DataLoader`.

    Raises:
        WorkerDied: a worker died. PyTorch's own error depends on what the worker was doing: RuntimeError, EOFError,
            ConnectionResetError, FileNotFoundError...
    """
    _working.difference_update({worker for worker in _working if worker.exitcode is not None})
    before = set(multiprocessing.active_children())
    items = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    _working.update(workers)
    try:
        yield from items
    except GeneratorExit:
        _working.difference_update(workers)
        raise
    except Exception as error:
        # The workers stay in `_working`: PyTorch's own error of a death may come between any two lines from here on.
        if workers and (death := _wait_for_death(workers)) is not None:
            raise death from error
        _working.difference_update(workers)
        raise
    _working.difference_update(workers)


def worker_death(error: BaseException) -> WorkerDied | None:
    """Death of a worker, if that is what an error comes from; ``None`` if all workers are alive.

    PyTorch raises an error in the main thread as soon as a worker is killed, wherever that thread is.
    """
    return error if isinstance(error, WorkerDied) else _death(_working)


@contextlib.contextmanager
def worker_deaths_explained() -> Iterator[None]:
    """Raise `WorkerDied` in place of an error in the block that comes from the death of a worker."""
    try:
        yield
    except Exception as error:
        death = worker_death(error)
        if death is None or death is error:
            raise
        raise death from error


def _wait_for_death(workers: Iterable[BaseProcess]) -> WorkerDied | None:
    """Wait until a worker has ended -> its death, or ``None`` after `_PATIENCE`."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        # PyTorch's handler of SIGCHLD, which the death brings, raises RuntimeError wherever this thread is.
        with contextlib.suppress(RuntimeError):
            death = _death(workers)
            if death is not None or time.monotonic() >= deadline:
                return death
            time.sleep(0.02)


def _death(workers: Iterable[BaseProcess]) -> WorkerDied | None:
    for worker in workers:
        status = worker.exitcode
        if status is None:
            continue
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        if status == -signal.SIGBUS:
            cause = "It ran out of shared memory: give the container more (docker: --shm-size 8g or --ipc host)"
        else:
            cause = ("Most likely the system ran out of memory and its OOM killer chose that process (dmesg would say "
                     "so): use fewer --data.workers, or free memory")
        return WorkerDied(f"a data loader process died: process {worker.pid} {how}. {cause}")
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


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
