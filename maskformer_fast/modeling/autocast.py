"""Mixed precision of training and inference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from maskformer_fast.config import Amp

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: Amp) -> AbstractContextManager[object]:
    """Context of `torch.autocast` in bfloat16 or float16; does nothing for ``off``."""
    return nullcontext() if amp == "off" else torch.autocast(device.type, _DTYPES[amp])
