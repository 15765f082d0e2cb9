"""Kernels are compiled for GPUs that are not here, in processes without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

from maskformer_fast.kernels import aot

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_every_kernel_fits_every_target() -> None:
    """Even from where the interpreter is asked for: the compiling processes do without."""
    # For Jetson Thor, whose code is much like that of sm_100, the quick ones of a bundle's kernels are enough here.
    thor, bundled = "sm_110", ("class_scores", "instances", "panoptic", "preprocess")
    others = [target for target in aot.SHARED_MEMORY_LIMITS if target != thor]
    compiled = {}
    for targets, modules in ((others, aot.KERNEL_MODULES), ([thor], bundled)):
        chosen = ("--targets", ",".join(targets), "--kernels", ",".join(modules))
        result = run("-m", "maskformer_fast.kernels.aot", "--check", *chosen, TRITON_INTERPRET="1")
        assert result.returncode == 0, result.stdout + result.stderr
        lines = [line.split() for line in result.stdout.splitlines()]
        part = {(name, target): figures for name, target, *figures in lines[1:-1]}
        assert set(part) == {(name, target) for name in aot.all_variants(modules) for target in targets}
        compiled |= part
    for registers, spilled, shared, _ in compiled.values():
        assert 16 <= int(registers) <= 255 and spilled == "0" and int(shared) <= 227 << 10


BUNDLED = """
from maskformer_fast.kernels.aot import all_variants, compile_kernel
variant = all_variants()["class_probabilities"]
kernel = compile_kernel(variant, "sm_87")
assert kernel.cubin[:4] == b"\\x7fELF" and kernel.symbol.encode() in kernel.cubin
assert kernel.arguments == tuple(variant.arguments.items()), kernel.arguments
assert [name for name, _ in kernel.arguments] == [
    "probabilities", "largest", "class_logits", "stride_b", "stride_q",
    "num_queries", "num_classes", "num_rows", "padded_classes",
]
assert kernel.num_warps == 4 and kernel.null_pointers == 2 and not kernel.failure
try:
    compile_kernel(variant, "sm_70")
except ValueError as error:
    assert "target: expected one of sm_80" in str(error)
else:
    raise AssertionError
"""


def test_compiled_kernel_says_how_to_launch_it() -> None:
    result = run("-c", BUNDLED, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


def test_interpreter_cannot_compile() -> None:
    code = BUNDLED.split("assert")[0]
    result = run("-c", code, TRITON_INTERPRET="1")
    assert "RuntimeError: kernels cannot be compiled where TRITON_INTERPRET is set" in result.stderr


def test_spills_and_too_much_shared_memory_fail() -> None:
    kernel = aot.CompiledKernel("k", "sm_86", "k", b"", (), 2, 4, 99 << 10, 255, 0, 0.1)
    assert not kernel.failure
    assert "spills 8 bytes" in replace(kernel, spilled_bytes=8).failure
    assert "needs 101377 bytes of shared memory" in replace(kernel, shared_bytes=(99 << 10) + 1).failure
    assert not replace(kernel, target="sm_90", shared_bytes=(99 << 10) + 1).failure


FAILING = """
import maskformer_fast.kernels.aot as aot
aot._compile_named = lambda job: "CompilationError: no"
aot.ProcessPoolExecutor = lambda *args, **kwargs: __import__("concurrent.futures").futures.ThreadPoolExecutor(1)
import sys
sys.argv = ["aot", "--check", "--targets", "sm_80"]
sys.exit(aot.main())
"""


def test_failure_is_shown_and_exits_with_1() -> None:
    result = run("-c", FAILING)
    assert result.returncode == 1 and "FAILED: CompilationError: no" in result.stdout


def test_unknown_target_is_named() -> None:
    result = run("-m", "maskformer_fast.kernels.aot", "--check", "--targets", "sm_80,sm_75")
    assert result.returncode == 2 and "--targets: expected some of sm_80," in result.stderr and "sm_75" in result.stderr
