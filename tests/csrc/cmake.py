"""CMake as the tests of csrc/ call it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

from tests.support.paths import ROOT

PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
"""Search path that includes the build tools installed as Python packages."""


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configure the project in the folder `build`. Both output streams are in ``stdout``; nothing is raised."""
    generator = ["-GNinja"] if shutil.which("ninja", path=PATH) else []
    python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    return subprocess.run(
        ["cmake", *generator, "-S", ROOT, "-B", build, *python, *options],
        env={**os.environ, "PATH": PATH, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
