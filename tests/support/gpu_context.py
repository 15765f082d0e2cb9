"""Plugin of pytest for ``make gpu``: ends an xdist worker whose CUDA context is broken.

After an illegal access every later test of the process would fail too; xdist starts another worker for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if hasattr(item.config, "workerinput") and not _context_works():
        os._exit(1)  # xdist counts the test as failed
    return result


def _context_works() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
