"""The C++ operators under AddressSanitizer, UBSan and ThreadSanitizer: `tests/cpp`, built and run without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # the build tools, as packages
# Without detect_stack_use_after_return: GCC before 14 puts vectors of 64 bytes on its fake stack unaligned (PR 110027).
OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=0"}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Both outputs together, in stdout."""
    return subprocess.run(
        [str(word) for word in command], env={**os.environ, **OPTIONS, "PATH": PATH},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def skip_where_sanitizers_are_missing(sanitizers: str, folder: Path) -> None:
    source = folder / "nothing.cpp"
    source.write_text("int main() {}")
    compiler = os.environ.get("CXX", "c++").split()
    built = run(*compiler, f"-fsanitize={sanitizers}", source, "-o", folder / "nothing")
    if built.returncode != 0:
        pytest.skip(f"this compiler does not build with -fsanitize={sanitizers}: {built.stdout.strip()}")


def run_sanitized(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program; without address randomisation where its addresses are too random for ThreadSanitizer."""
    result = run(program, *arguments)
    if "unexpected memory mapping" in result.stdout and shutil.which("setarch"):
        result = run("setarch", "-R", program, *arguments)
    if "unexpected memory mapping" in result.stdout or "failed to set personality" in result.stdout:
        pytest.skip(f"this kernel randomises addresses beyond what ThreadSanitizer knows: {result.stdout.strip()}")
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "mistakes"),
    [
        (
            "address,undefined,float-cast-overflow",
            {"out-of-bounds": "heap-buffer-overflow", "overflow": "signed integer overflow"},
        ),
        ("thread", {"race": "data race"}),
    ],
)
def test_operators_under_sanitizers(sanitizers: str, mistakes: dict[str, str], tmp_path: Path) -> None:
    skip_where_sanitizers_are_missing(sanitizers, tmp_path)
    generator = ["-GNinja"] if shutil.which("ninja", path=PATH) else []
    commands: list[list[str | Path]] = [
        ["cmake", *generator, "-S", ROOT, "-B", tmp_path / "build", f"-DMF_SANITIZE={sanitizers}"],
        ["cmake", "--build", tmp_path / "build", "--parallel", "2"],
    ]
    for command in commands:
        built = run(*command)
        assert built.returncode == 0, built.stdout
    program = tmp_path / "build" / "run_operators"

    for mistake, report in mistakes.items():  # the sanitizers are on, and fail the program
        caught = run_sanitized(program, "--plant", mistake)
        assert caught.returncode != 0 and report in caught.stdout, caught.stdout

    result = run_sanitized(program)
    assert result.returncode == 0, result.stdout
    assert "assignment on baseline: done" in result.stdout and "several callers at once: done" in result.stdout
