"""Modules made unavailable, for tests of the messages that say what to install."""

from __future__ import annotations

import pytest

from maskformer_fast.core import extension


def hide_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loader of kernels fail as it does where Triton is not installed."""

    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(extension.importlib, "import_module", fail)
    extension.load_kernels.cache_clear()
