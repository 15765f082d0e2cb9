"""Results from a GPU on the host: the copies are made together, and the host waits for them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from maskformer_fast.core.results import Result

__all__ = ["on_host"]

_R = TypeVar("_R", bound=Result)


def on_host(results: Sequence[_R]) -> list[_R]:
    """The results with their tensors on the host; those that are there already are not copied."""
    devices: set[torch.device] = set()
    moved: list[_R] = []
    for result in results:
        tensors = {name: value for name, value in vars(result).items() if _is_on_gpu(value)}
        devices.update(tensor.device for tensor in tensors.values())
        # to pinned memory, which makes the copies asynchronous
        copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        moved.append(replace(result, **copies) if copies else result)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return moved


def _is_on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
