"""Run the tests in `interpreted/` with Triton's interpreter, which executes kernels in NumPy without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDER = Path(__file__).parent / "interpreted"
QUICK = ("test_aot.py", "test_class_scores.py", "test_resize.py")

pytest.importorskip("triton", reason="needs Triton")


def run_interpreted(*files: str) -> None:
    """Run files of the folder in one process, which saves most of the imports."""
    # overflow is intended: infinite logits reach 0 and 1 by it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [*command, *(str(FOLDER / name) for name in files)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.no_cover  # kernels/ is not measured anyway
def test_quick_files() -> None:
    run_interpreted(*QUICK)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py") if path.name not in QUICK))
def test_long_files(name: str) -> None:
    run_interpreted(name)
