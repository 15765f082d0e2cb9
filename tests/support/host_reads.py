"""Operations for which the host waits for a device, found on CPU tensors too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique2", "_unique2",
         "repeat_interleave.Tensor", "allclose", "bincount"}  # fmt: skip


class NoHostRead(TorchDispatchMode):
    """Fails on operations for which the host waits for a device: reads of values, and shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, _, overload = func.name().removeprefix("aten::").partition(".")
        assert packet not in READS and f"{packet}.{overload}" not in READS, f"{func.name()} reads from the device"
        if packet in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), "indexed by a mask"
        return func(*args, **(kwargs or {}))
