"""Every operator on small inputs under NVIDIA's memcheck and racecheck: accesses out of bounds, races in shared memory.

Freed memory is given back at once, so that an access beyond a tensor is one beyond its allocation. The checks of
all operators run side by side, as most of their time is the start of Python and compilers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.operator_calls import CALLS
from tests.support.paths import ROOT

TOOLS = ("memcheck", "racecheck")
SECONDS = 150.0
"""For one operator under one tool."""
AT_ONCE = 9
ERROR_STATUS = 9


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or in the CUDA toolkit."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.environ.get("PATH", ""), *(str(home / "bin") for home in [*homes, Path("/usr/local/cuda")])]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def check(sanitizer: str, tool: str, name: str) -> tuple[int, str]:
    """-> the status, and what the tool and the operator said."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_STATUS), "--target-processes",
               "application-only", sys.executable, "-m", "tests.support.operator_calls", "cuda", name]  # fmt: skip
    try:
        process = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return -1, f"not done after {SECONDS:g} s; {error.output or ''}"
    return process.returncode, process.stdout


@pytest.fixture(scope="module")
def checks() -> Iterator[dict[tuple[str, str], Future[tuple[int, str]]]]:
    """Of each tool and operator, at work from the first test on."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH, nor in $CUDA_HOME/bin")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {(tool, name): pool.submit(check, sanitizer, tool, name) for tool in TOOLS for name in CALLS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("tool", TOOLS)
def test_operator_is_clean(tool: str, name: str, checks: dict[tuple[str, str], Future[tuple[int, str]]]) -> None:
    status, output = checks[tool, name].result()
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")  # as inside some virtual machines
    assert status == 0, output[-4000:]
    assert f"called {name}" in output, "the operator itself must have ended well"


@pytest.mark.parametrize("name", [name for name in CALLS if name != "semantic_embeddings"])  # which has no CPU backend
def test_calls_are_valid(name: str) -> None:
    CALLS[name]("cpu")


def test_errors_and_hangs_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n[ $2 = memcheck ] || exec sleep 60\necho Invalid read; exit {ERROR_STATUS}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert find_sanitizer() == str(tool)
    assert check(str(tool), "memcheck", "resize") == (ERROR_STATUS, "Invalid read\n")
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.5)
    assert check(str(tool), "racecheck", "resize")[0] == -1


def test_missing_tool_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert find_sanitizer() is None
