"""Mixed precision: the dtype in which a network computes, in training and in inference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from maskformer_fast.config import Amp

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: Amp) -> AbstractContextManager[object]:
    """Compute in bfloat16 or float16 where that is safe; a context that does nothing for ``off``."""
    return nullcontext() if amp == "off" else torch.autocast(device.type, _DTYPES[amp])
