"""Compilation of the kernels for GPUs that are not present, in processes without the interpreter."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="needs Triton")

from maskformer_fast.kernels import aot

pytestmark = pytest.mark.no_cover  # kernels/ is not measured anyway


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


SAME_CODE = ("sm_86", "sm_87", "sm_89")
"""Triton generates the PTX of sm_80 for these too; what ptxas makes of it differs."""
THOR = "sm_110"
QUICK = ("class_scores", "segments_instances", "segments_panoptic", "resize")
"""Modules of a bundle's kernels that compile quickly."""

ASSEMBLED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from maskformer_fast.kernels import aot

compile_source, made = triton.compile, []
triton.compile = lambda *arguments, **options: made.append(compile_source(*arguments, **options)) or made[-1]
for name, variant in aot.all_variants().items():
    kernel = aot.compile_kernel(variant, "sm_80")
    ptx = made[-1].asm["ptx"]
    print(name, "sm_80", kernel.registers, kernel.spilled_bytes, kernel.shared_bytes)
    for target in TARGETS:
        number = int(target.removeprefix("sm_"))
        backend = make_backend(GPUTarget("cuda", number, 32))
        code = ptx.replace(".target sm_80", f".target {target}")
        cubin = backend.make_cubin(code, {}, backend.parse_options({}), number)
        print(name, target, *aot._resources(cubin), kernel.shared_bytes)
        if name in ("matching_cost_sums_embeddings_bf16_2", "rle_bytes_write", "resize_fp16"):
            kernel_itself = aot.compile_kernel(variant, target)
            assert made[-1].asm["ptx"] == code and kernel_itself.cubin == cubin, (name, target)
"""


def check_figures(
    lines: list[list[str]], targets: set[str], modules: tuple[str, ...] = aot.KERNEL_MODULES
) -> None:
    """Rows of name, target, registers, spilled bytes, shared bytes, of all variants for all of the targets."""
    variants = aot.all_variants(modules)
    assert {tuple(line[:2]) for line in lines} == {(name, target) for name in variants for target in targets}
    version = ".".join(importlib.metadata.version("triton").split(".")[:2])
    for name, target, registers, spilled, shared, *_ in lines:
        assert 16 <= int(registers) <= 255 and int(shared) <= aot.SHARED_MEMORY_LIMITS[target]
        assert int(spilled) <= aot.ALLOWED_SPILLS.get((version, name, target), 0)


@pytest.mark.slow
def test_every_kernel_fits_every_target() -> None:
    """TRITON_INTERPRET is set: the compiling processes must remove it."""
    targets = [target for target in aot.SHARED_MEMORY_LIMITS if target not in ("sm_80", *SAME_CODE, THOR)]
    # The code for Jetson Thor is much like that for sm_100: the quick kernels are enough.
    for chosen, modules in ((targets, aot.KERNEL_MODULES), ([THOR], QUICK)):
        options = ("--targets", ",".join(chosen), "--kernels", ",".join(modules))
        result = run("-m", "maskformer_fast.kernels.aot", "--check", *options, TRITON_INTERPRET="1")
        assert result.returncode == 0, result.stdout + result.stderr
        check_figures([line.split() for line in result.stdout.splitlines()[1:-1]], set(chosen), modules)


@pytest.mark.slow
def test_every_kernel_fits_where_the_code_of_sm_80_runs(tmp_path: Path) -> None:
    """Generating code takes most of the time: it is generated for one target and assembled for all four."""
    code = ASSEMBLED.replace("TARGETS", str(SAME_CODE))
    result = run("-c", code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    check_figures([line.split() for line in result.stdout.splitlines()], {"sm_80", *SAME_CODE})


BUNDLED = """
from maskformer_fast.kernels.aot import all_variants, compile_kernel
variant = all_variants()["class_probabilities"]
kernel = compile_kernel(variant, "sm_87")
assert kernel.cubin[:4] == b"\\x7fELF" and kernel.symbol.encode() in kernel.cubin
assert kernel.arguments == tuple(variant.arguments.items()), kernel.arguments
assert [name for name, _ in kernel.arguments] == [
    "probabilities", "class_logits", "stride_b", "stride_q",
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


def test_one_module_fits_sm_90() -> None:
    result = run("-m", "maskformer_fast.kernels.aot", "--check", "--targets", "sm_90", "--kernels", "class_scores")
    assert result.returncode == 0, result.stdout + result.stderr
    check_figures([line.split() for line in result.stdout.splitlines()[1:-1]], {"sm_90"}, ("class_scores",))


def test_compiled_kernel_describes_its_launch() -> None:
    result = run("-c", BUNDLED, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


def test_spills_and_too_much_shared_memory_fail() -> None:
    kernel = aot.CompiledKernel("k", "sm_86", "k", b"", (), 2, 4, 99 << 10, 255, 0, 0.1, "3.8")
    assert not kernel.failure
    assert "spills 8 bytes" in replace(kernel, spilled_bytes=8).failure
    excepted = replace(
        kernel, variant="matching_cost_sums_embeddings_bf16_2_kept", target="sm_100", spilled_bytes=8
    )
    assert not excepted.failure
    assert "spills 8 bytes" in replace(excepted, triton_version="3.7").failure
    assert "spills 16 bytes" in replace(excepted, spilled_bytes=16).failure
    assert "needs 101377 bytes of shared memory" in replace(kernel, shared_bytes=(99 << 10) + 1).failure
    assert not replace(kernel, target="sm_90", shared_bytes=(99 << 10) + 1).failure


def test_targets_are_those_that_triton_s_assembler_knows() -> None:
    assert "sm_110" in aot.known_targets("3.7.0") and "sm_110" in aot.known_targets("3.10.1")
    assert aot.known_targets("3.6.0") == tuple(target for target in aot.SHARED_MEMORY_LIMITS if target != "sm_110")


def test_failure_is_shown_and_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot, "_compile_named", lambda job: "CompilationError: no")
    monkeypatch.setattr(aot, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(sys, "argv", ["aot", "--check", "--targets", "sm_80"])
    assert aot.main() == 1
    assert "FAILED: CompilationError: no" in capsys.readouterr().out


def test_unknown_target_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", "--check", "--targets", "sm_80,sm_75"])
    with pytest.raises(SystemExit) as exit:
        aot.main()
    message = capsys.readouterr().err
    assert exit.value.code == 2 and "--targets: expected some of sm_80," in message and "sm_75" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--check", "--record"), "--record: expected with --report only"),
        (("--report", "--targets", "sm_80"), "--targets: expected some of sm_87,sm_90,sm_100,sm_120, got sm_80"),
        (("--report", "--kernels", "cake"), "got cake"),
        ((), "one of the arguments --check --report is required"),
    ],
)
def test_options(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", *options])
    with pytest.raises(SystemExit):
        aot.main()
    assert message in capsys.readouterr().err
