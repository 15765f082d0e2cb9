"""Compilation of the CUDA sources for every supported GPU, with warnings as errors and without register spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.cmake import configure
from tests.support.paths import ROOT

MAX_REGISTERS = 128
"""Registers of a thread, so that a block of 512 threads fits on a multiprocessor."""
FUNCTION = re.compile(
    r"Function properties for (?P<name>\S+)\n\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers"
)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_87", "sm_90", "sm_100", "sm_120"])
def test_cuda_kernels_compile_without_spills(target: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    if target not in known:
        pytest.skip(f"this nvcc does not know {target}")
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    assert sources
    for source in sources:
        result = subprocess.run(
            [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch={target}", "-Icsrc", "-Werror=all-warnings",
             "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
             "-o", tmp_path / "out.cubin", source],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        functions = [match.groupdict() for match in FUNCTION.finditer(result.stderr)]
        assert len(functions) == result.stderr.count("Compiling entry function") > 0
        for function in functions:
            assert function["stack"] == function["stores"] == function["loads"] == "0", function
            assert int(function["registers"]) <= MAX_REGISTERS, function


def test_build_with_cuda_fails_without_nvcc(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DMF_CUDA=ON", CUDACXX="/nonexistent/nvcc")
    assert result.returncode != 0
    assert "MF_CUDA=ON: no nvcc that works" in result.stdout
