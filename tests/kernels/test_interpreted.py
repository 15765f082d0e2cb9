"""Runs the tests in `interpreted/` where Triton's kernels are NumPy: no GPU is needed, and no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))

pytest.importorskip("triton", reason="needs Triton")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(path: Path) -> None:
    # overflow is meant: it is how infinite logits reach 0 and 1
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        str(path),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
