"""NVIDIA's compute-sanitizer: where it is, and a run of Python under one of its tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

ERROR_STATUS = 9
"""Exit status of a run in which the sanitizer reports an error."""


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or in the CUDA toolkit."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.environ.get("PATH", ""), *(str(home / "bin") for home in [*homes, Path("/usr/local/cuda")])]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_under_sanitizer(sanitizer: str, tool: str, *arguments: str, seconds: float = 600.0) -> tuple[int, str]:
    """Run ``python ARGUMENTS`` under a tool -> exit status, -1 where it takes longer than so many seconds; output."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_STATUS), "--target-processes",
               "application-only", sys.executable, *arguments]  # fmt: skip
    # Every tensor is an allocation of its own, so that an access beyond a tensor is one beyond its allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        process = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return -1, f"not done after {seconds:g} s; {error.output or ''}"
    return process.returncode, process.stdout
