"""Several processes as one run: process group, collectives, sharded tensors; and the device of a process.

All functions also work in a single process, without a group. `torchrun` starts the processes, sets each one's rank in
its environment, ends all when one fails, and restarts them up to ``--max-restarts`` times.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.core.machine import peak_resident_bytes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Longest time that a rank waits for the others: at the start, and wherever rank 0 does something alone."""


class RankError(RuntimeError):
    """Rank 0 failed while the others waited for it; its own error says why."""


def rank() -> int:
    """Rank of this process; 0 without a group."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """Number of processes of the run; 1 without a group."""
    return dist.get_world_size() if _in_group() else 1


def is_main() -> bool:
    """Whether this is rank 0, which alone writes files and prints results."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun has restarted the processes after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the group of processes that torchrun started; does nothing without its environment.

    With GPUs each process takes the one of its ``LOCAL_RANK``, and tensors go through NCCL. Tensors on the CPU, objects
    and flags go through gloo. Ranks other than 0 log errors only. A block that raises leaves the group as it is: the
    process is about to end, and destroying the group would wait for ranks that may be gone.

    Args:
        device: ``config.device``.

    Raises:
        ValueError: torchrun's environment is incomplete, `device` names a single GPU, or there are fewer GPUs than
            processes.
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
        logging.getLogger().setLevel(logging.ERROR)  # warnings concern the run: rank 0 logs them once
    yield
    dist.destroy_process_group()


class DelayedFlag:
    """A flag that is set as soon as any rank sets it, known one call later so that no rank waits for another.

    All ranks make the same calls and get the same results. The flag goes through gloo: no device is waited for.
    """

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None

    def __call__(self, flag: bool) -> bool:
        """Pass this rank's flag -> whether any rank's was set at the previous call; in one process, the flag itself."""
        if world_size() == 1:
            return flag
        if self._work is not None:
            self._work.wait()
        any_set = bool(self._value)
        self._value = torch.tensor(int(flag))
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, async_op=True)
        return any_set


def gather_objects(value: T) -> list[T]:
    """Values (anything that can be pickled) of all ranks, in their order, on every rank."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_on_main(value: T) -> list[T]:
    """Values (anything that can be pickled) of all ranks, in their order, on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if is_main() else []
    dist.gather_object(value, values if is_main() else None)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone and return its result on every rank.

    Raises:
        RankError: on the other ranks, if the function raised on rank 0. Rank 0 raises the exception itself.
    """
    if world_size() == 1:
        return function()
    failure: Exception | None = None
    result, message = None, None
    if is_main():
        try:
            result = function()
        except Exception as error:
            failure, message = error, f"{type(error).__name__}: {error}"
    broadcast: list[Any] = [result, message]
    dist.broadcast_object_list(broadcast)
    result, message = broadcast
    if failure is not None:
        raise failure
    if message is not None:
        raise RankError(f"rank 0 failed: {message}")
    return result  # type: ignore[return-value]


def gather_ranks(
    values: Tensor,  # [N], of the same length on every rank
) -> Tensor:
    """Concatenate the values of all ranks in their order -> [ranks * N], without waiting for the device."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def max_over_ranks(
    value: Tensor,  # [...] without NaN
) -> Tensor:
    """Elementwise maximum over the ranks -> [...], without waiting for the device."""
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


def is_sharded(value: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is one rank's part of a larger one."""
    tensors = sys.modules.get("torch.distributed.tensor")  # of who shards; others do without its 40 MiB
    return tensors is not None and isinstance(value, tensors.DTensor)


def unsharded(value: Tensor) -> Tensor:
    """Full tensor on every rank, of one that may be sharded."""
    return value.full_tensor() if is_sharded(value) else value


def shard_like(
    value: Tensor,  # any shape, the full tensor, equal on all ranks
    like: Tensor,
) -> Tensor:
    """Shard of a full tensor for this rank, if ``like`` is sharded and of the same shape; else the tensor itself."""
    if not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _join(backend: str, device: torch.device | None = None) -> None:
    """Form the default group once all ranks are there. Raises RuntimeError if they do not come."""
    store, this_rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives the processes, also when it restarts them (torch 2.13). `init_process_group` alone would
    # read addresses that ranks of an earlier start left there, and could not connect to them.
    fresh = dist.PrefixStore(_agree_on_prefix(store, this_rank, size), store)
    dist.init_process_group(backend, store=fresh, rank=this_rank, world_size=size, timeout=TIMEOUT, device_id=device)


def _agree_on_prefix(store: dist.Store, this_rank: int, size: int, timeout: timedelta = TIMEOUT) -> str:
    """Wait until all ranks are there -> a prefix for keys of the store that no earlier start has used.

    ``TORCHELASTIC_RESTART_COUNT`` would not do: it stays the same when torchrun restarts the ranks because a node
    joined. So each rank writes a random token. Rank 0 proposes the list of the tokens, again when one changes. A rank
    accepts a proposal that contains its own token. The prefix is made of the list that all ranks have accepted.

    Raises:
        RuntimeError: not all ranks have accepted within the timeout.
    """

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    token, accepted = secrets.token_hex(8), ""
    store.set(f"token_{this_rank}", token)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if this_rank == 0:
            tokens = [read(f"token_{other}") for other in range(size)]
            if all(tokens) and accepted != ",".join(tokens):
                store.set("proposal", ",".join(tokens))
        proposal = read("proposal")
        if proposal != accepted and token in proposal.split(","):
            store.set(f"accepted_{this_rank}", accepted := proposal)
        if this_rank == 0 and accepted and all(read(f"accepted_{other}") == accepted for other in range(size)):
            store.set("accepted_by_all", accepted)
        if accepted and read("accepted_by_all") == accepted:
            return hashlib.sha256(accepted.encode()).hexdigest()
        time.sleep(0.02)
    missing = [str(other) for other in range(size) if read(f"accepted_{other}") != read("proposal")]
    raise RuntimeError(
        f"rank {this_rank}: expected {size} ranks within {timeout}, no answer from {', '.join(missing)}"
    )


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def resolve_device(device: str) -> torch.device:
    """Device by name; ``auto`` is the GPU if there is one. Raises ``ValueError`` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected auto or a device that torch can use here, got {device!r}") from error
    return resolved


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of tensors on a CUDA device, otherwise of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
