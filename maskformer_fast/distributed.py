"""Several processes as one run: their group, their agreement, wrapped networks, and states that know nothing of ranks.

Everything here also works in a single process, where it does nothing. `torchrun` starts the processes, names the rank
of each in its environment, ends all when one fails, and starts them again as often as ``--max-restarts`` says.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from maskformer_fast.core.checks import check

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: at the start, and wherever rank 0 does something alone."""


class RankError(RuntimeError):
    """Rank 0 failed where the others wait for it; its own message says why."""


def rank() -> int:
    """This process's number in the run, 0 where there is but one."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files and talks to the user."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun started this group of processes again after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started; without its environment, nothing happens.

    On GPUs each process takes the one of its ``LOCAL_RANK`` and tensors go through NCCL; on the CPU, and for objects
    and flags everywhere, through gloo. Ranks other than 0 log errors only. A block that raises leaves the group as it
    is: the process is about to end, and leaving in order would wait for ranks that may be gone.

    Args:
        device: ``config.device``.

    Raises:
        ValueError: half of torchrun's environment, a device of one rank's own, or fewer GPUs than processes.
    """
    ranks = os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ:
        check(ranks == "1", "WORLD_SIZE", "to be set by torchrun, together with RANK", ranks)
        yield
        return
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        check(device in ("auto", "cuda"), "device", "auto or cuda, each process takes a GPU of its own", device)
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        check(local < count, "nproc-per-node", f"at most the {count} GPUs of this machine", f"rank {local} on it")
        torch.cuda.set_device(local)
        _join("cpu:gloo,cuda:nccl", torch.device("cuda", local))
    else:
        _join("gloo")
    if not is_main():
        logging.getLogger().setLevel(logging.ERROR)  # warnings are of the run, and rank 0 gives them
    yield
    dist.destroy_process_group()


class LateFlag:
    """A flag that ranks agree on without waiting for each other: each call tells what all had said at the call before.

    All ranks make the same calls and get the same answers. Through the host's network, so no device is waited for.
    """

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None

    def __call__(self, flag: bool) -> bool:
        """Say the own flag -> whether any rank's was set at the call before; in one process, the flag itself."""
        if world_size() == 1:
            return flag
        if self._work is not None:
            self._work.wait()
        agreed = bool(self._value)
        self._value = torch.tensor(int(flag))
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, async_op=True)
        return agreed


def gather_objects(value: T) -> list[T]:
    """The value (anything that can be pickled) of every rank, in their order, on every rank."""
    found: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def gather_on_main(value: T) -> list[T]:
    """The value of every rank, in their order, on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size() if is_main() else []
    dist.gather_object(value, found if is_main() else None)
    return found


def on_main(function: Callable[[], T]) -> T:
    """Call on rank 0 alone and give its result to every rank.

    Raises:
        RankError: on the other ranks, where the function raised on rank 0, which gets the exception itself.
    """
    if world_size() == 1:
        return function()
    failure: Exception | None = None
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = function()
        except Exception as error:
            failure, box[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(box)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise RankError(f"rank 0 failed: {box[1]}")
    return box[0]


def gather_ranks(
    values: Tensor,  # [N], of the same length on every rank
) -> Tensor:
    """The values of all ranks in their order -> [ranks * N], without waiting for the device."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def max_over_ranks(
    value: Tensor,  # [...] without NaN
) -> Tensor:
    """Largest value of any rank -> [...], without waiting for the device."""
    if world_size() == 1:
        return value
    largest = value.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def mean_over_ranks(
    value: Tensor,  # [...] float
) -> Tensor:
    """Mean over the ranks -> [...], without waiting for the device."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()


def unsharded(value: Tensor) -> Tensor:
    """A plain tensor of what may be sharded, on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shared_out(
    value: Tensor,  # any shape, whole, the same on all ranks
    like: Tensor,
) -> Tensor:
    """The value as ``like`` holds its own: this rank's share where that is sharded and of the same shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _join(backend: str, device: torch.device | None = None) -> None:
    """Form the default group once all ranks are there. Raises RuntimeError if they do not come."""
    store, own, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    meeting = dist.PrefixStore(_meet(store, own, size), store)
    dist.init_process_group(backend, store=meeting, rank=own, world_size=size, timeout=PATIENCE, device_id=device)


def _meet(store: dist.Store, own: int, size: int, patience: timedelta = PATIENCE) -> str:
    """Wait until all ranks are there -> a name of this meeting, like none before.

    torchrun's store outlives the processes (torch 2.13): a group that was started again would read addresses that dead
    ranks left there. So each rank says hello by a token of its own, rank 0 proposes the tokens that it sees, again when
    one changes, and the meeting is on when every rank has agreed to a proposal that has its own token.
    """

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    token, agreed = secrets.token_hex(8), ""
    store.set(f"hello_{own}", token)
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        if own == 0:
            seen = [read(f"hello_{other}") for other in range(size)]
            if all(seen) and agreed != ",".join(seen):
                store.set("proposal", ",".join(seen))
        proposal = read("proposal")
        if proposal != agreed and token in proposal.split(","):
            store.set(f"agreed_{own}", agreed := proposal)
        if own == 0 and agreed and all(read(f"agreed_{other}") == agreed for other in range(size)):
            store.set("meeting", agreed)
        if agreed and read("meeting") == agreed:
            return hashlib.sha256(agreed.encode()).hexdigest()
        time.sleep(0.02)
    missing = [str(other) for other in range(size) if read(f"agreed_{other}") != read("proposal")]
    raise RuntimeError(f"rank {own}: expected {size} ranks within {patience}, no word of {', '.join(missing)}")


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def resolve_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises ``ValueError`` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected auto or a device that torch can use here, got {device!r}") from error
    return resolved
