"""The processes of a run, as `torch.distributed` has them; without it, one process of rank 0."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _initialised() else 0


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _initialised() else 1


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def any_rank(flag: bool) -> bool:
    """Whether any process says so. All of them must ask; they wait for each other."""
    if world_size() == 1:
        return flag
    said: list[bool] = [False] * world_size()
    distributed.all_gather_object(said, flag)
    return any(said)


def gather_ranks(
    values: Tensor,  # [N], of the same length in every process
) -> Tensor:
    """Concatenate the values of all processes in the order of their ranks -> [ranks * N], without a synchronisation."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def max_over_ranks(
    value: Tensor,  # [...] finite
) -> Tensor:
    """Largest value of any process -> [...], without a synchronisation."""
    if world_size() == 1:
        return value
    result = value.clone()
    distributed.all_reduce(result, distributed.ReduceOp.MAX)
    return result


def mean_over_ranks(
    value: Tensor,  # [...] float
) -> Tensor:
    """Mean over the processes -> [...], without a synchronisation."""
    if world_size() == 1:
        return value
    result = value.clone()
    distributed.all_reduce(result)
    return result / world_size()
