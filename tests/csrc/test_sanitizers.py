"""The C++ operators under AddressSanitizer, UBSan and ThreadSanitizer, in a program without Python (run_operators)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.cmake import PATH, configure

pytestmark = pytest.mark.slow

# Without detect_stack_use_after_return: GCC before 14 misaligns vectors of 64 bytes on its fake stack (PR 110027).
OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=0"}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command. Both output streams are in ``stdout``; nothing is raised."""
    return subprocess.run(
        [str(word) for word in command], env={**os.environ, **OPTIONS, "PATH": PATH},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def skip_without_sanitizers(sanitizers: str, folder: Path) -> None:
    source = folder / "nothing.cpp"
    source.write_text("int main() {}")
    compiler = os.environ.get("CXX", "c++").split()
    built = run(*compiler, f"-fsanitize={sanitizers}", source, "-o", folder / "nothing")
    if built.returncode != 0:
        pytest.skip(f"this compiler does not build with -fsanitize={sanitizers}: {built.stdout.strip()}")


def run_sanitized(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program, a second time without address randomisation where ThreadSanitizer cannot map its addresses."""
    result = run(program, *arguments)
    if "unexpected memory mapping" in result.stdout and shutil.which("setarch"):
        result = run("setarch", "-R", program, *arguments)
    if "unexpected memory mapping" in result.stdout or "failed to set personality" in result.stdout:
        pytest.skip(f"ThreadSanitizer does not support this kernel's address randomisation: {result.stdout.strip()}")
    return result


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
def test_operators_have_no_memory_errors_and_no_races(
    sanitizers: str, mistakes: dict[str, str], tmp_path: Path
) -> None:
    skip_without_sanitizers(sanitizers, tmp_path)
    build = tmp_path / "build"
    configured = configure(build, f"-DMF_SANITIZE={sanitizers}")
    assert configured.returncode == 0, configured.stdout
    built = run("cmake", "--build", build, "--parallel", "2")
    assert built.returncode == 0, built.stdout
    program = build / "run_operators"

    for mistake, report in mistakes.items():  # shows that the sanitizers are on and stop the program
        caught = run_sanitized(program, "--plant", mistake)
        assert caught.returncode != 0 and report in caught.stdout, caught.stdout

    result = run_sanitized(program)
    assert result.returncode == 0, result.stdout
    assert "assignment on baseline: done" in result.stdout and "concurrent callers: done" in result.stdout
