"""Runs the tests in `interpreted/` where Triton's kernels are NumPy: no GPU is needed, and no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDER = str(Path(__file__).parent / "interpreted")

pytest.importorskip("triton", reason="needs Triton")


@pytest.mark.no_cover  # kernels/ is not measured anyway
def test_in_the_interpreter() -> None:
    """All in one process, which spares most of the imports."""
    # overflow is meant: it is how infinite logits reach 0 and 1
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", FOLDER]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
