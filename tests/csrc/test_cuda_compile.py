"""The CUDA sources compile for every GPU that we name, with warnings as errors and without register spills."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from tests.support.paths import ROOT

PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # the build tools, as packages
MAX_REGISTERS = 128  # of a thread, so that a block of 512 finds room
FUNCTION = re.compile(
    r"Function properties for (?P<name>\S+)\n\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers"
)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_87", "sm_90", "sm_100", "sm_120"])
def test_compiles_without_spills(target: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    if target not in known:
        pytest.skip(f"this nvcc does not know {target}")
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    assert sources
    for source in sources:
        result = subprocess.run(
            [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch={target}", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra",
             "-Xptxas=-v,-warn-spills,-warn-lmem-usage", "-o", tmp_path / "out.cubin", source],
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        functions = [match.groupdict() for match in FUNCTION.finditer(result.stderr)]
        assert len(functions) == result.stderr.count("Compiling entry function") > 0
        for function in functions:
            assert function["stack"] == function["stores"] == function["loads"] == "0", function
            assert int(function["registers"]) <= MAX_REGISTERS, function


@pytest.mark.slow
def test_asking_for_cuda_without_nvcc_is_an_error(tmp_path: Path) -> None:
    command = ["cmake", "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(
        [*command, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DMF_CUDA=ON"],
        env={**os.environ, "PATH": PATH, "CUDACXX": "/nonexistent/nvcc"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "MF_CUDA=ON: no nvcc that works" in result.stderr
