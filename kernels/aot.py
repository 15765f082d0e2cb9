"""Compile Triton kernels for GPUs that need not be present: no driver and no device is needed.

    python -m maskformer_fast.kernels.aot --check [--targets sm_80,sm_90] [--kernels semantic]

compiles every variant that the kernel modules list, prints registers, spilled bytes, shared memory and time of each,
and exits with 1 if one spills more than `ALLOWED_SPILLS`, needs more shared memory than its target has, or does not
compile.

    python -m maskformer_fast.kernels.aot --report [--record] [--targets sm_90] [--kernels semantic]

compiles the launches of the modules' goal calls and prints what their machine code predicts (`report`). With
``--record`` it writes the rows to `report.RECORD`, else it exits with 1 if a count is not recorded or has risen.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskformer_fast.kernels.report import TARGETS, predict, risen, table, write_record

if TYPE_CHECKING:
    from maskformer_fast.kernels.variant import KernelVariant

KERNEL_MODULES = (
    "class_scores", "deformable_attention", "mask_loss", "matching_cost", "point_cost", "point_loss", "points",
    "resize", "rle", "segments_instances", "segments_panoptic", "semantic", "semantic_embeddings",
)  # fmt: skip
"""Modules of this folder with functions ``variants() -> list[KernelVariant]`` and ``goal_calls() -> list[GoalLaunch]``.
Add the name of a new module here."""

SHARED_MEMORY_LIMITS = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_87": 163 << 10, "sm_89": 99 << 10,
    "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_110": 227 << 10, "sm_120": 99 << 10,
}  # fmt: skip
"""Targets -> most bytes of shared memory of one block (CUDA C++ programming guide, "compute capabilities").
sm_87 is Jetson Orin, sm_110 Jetson Thor, which CUDA before 13 called sm_101."""
FIRST_TRITON = {"sm_110": (3, 7)}
"""Targets -> first version of Triton whose assembler knows them; all others are known to 3.6."""

ALLOWED_SPILLS = {
    ("3.7", "panoptic_claim_fp32_mask2former", "sm_80"): 8,
    ("3.6", "mask_sums_backward_gamma_2", "sm_80"): 8,
    ("3.6", "mask_sums_backward_gamma_any", "sm_80"): 8,
    ("3.6", "panoptic_claim_fp16_maskformer", "sm_90"): 8,
    ("3.6", "panoptic_claim_fp32_maskformer", "sm_90"): 8,
    ("3.6", "panoptic_claim_most", "sm_100"): 8,
    ("3.6", "semantic_logits_fp16_q128_k200_t99_scores_margins", "sm_100"): 16,
    ("3.6", "semantic_embeddings_bf16_q256", "sm_100"): 16,
    ("3.6", "deformable_attention_bf16", "sm_100"): 16,
    ("3.6", "deformable_attention_bf16", "sm_120"): 16,
    ("3.6", "deformable_attention_backward_fp32", "sm_120"): 8,
    ("3.6", "deformable_attention_backward_fp16", "sm_120"): 8,
    ("3.6", "deformable_attention_backward_bf16", "sm_120"): 8,
    ("3.8", "deformable_attention_backward_fp32", "sm_120"): 8,
    ("3.8", "mask_sums_gamma_2", "sm_90"): 16,
    ("3.8", "matching_cost_sums_embeddings_bf16_2_kept", "sm_100"): 8,
}
"""(Triton version, kernel, target) -> most bytes that a thread may spill, 0 for all others. With 72 to 168 of 255
registers the assembler spills two to four values for another block on each multiprocessor. Other orders of their
statements move such spills to other targets and Triton versions."""


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code of a kernel and what a launch needs (``cuModuleLoadData``, ``cuLaunchKernel``)."""

    variant: str
    target: str
    symbol: str
    """Name of the function in the cubin."""
    cubin: bytes
    arguments: tuple[tuple[str, str], ...]
    """(name, Triton type) in the order of the launch; `null_pointers` null pointers follow."""
    null_pointers: int
    """Number of parameters after the arguments, for scratch memory that these kernels do not use."""
    num_warps: int
    """Warps of a block, of 32 threads each."""
    shared_bytes: int
    """Dynamic shared memory of a block; above 48 KiB the function's attribute for it must be raised first."""
    registers: int
    spilled_bytes: int
    seconds: float
    triton_version: str
    """Major and minor version of the compiler."""

    @property
    def failure(self) -> str:
        """Reason why this kernel must not be among those that are checked here, or an empty string."""
        if self.spilled_bytes > ALLOWED_SPILLS.get((self.triton_version, self.variant, self.target), 0):
            return f"spills {self.spilled_bytes} bytes a thread"
        return self.obstacle

    @property
    def obstacle(self) -> str:
        """Reason why this kernel cannot run, or an empty string."""
        limit = SHARED_MEMORY_LIMITS[self.target]
        if self.shared_bytes > limit:
            return f"needs {self.shared_bytes} bytes of shared memory, {self.target} has {limit}"
        return ""


def known_targets(triton_version: str) -> tuple[str, ...]:
    """Targets that a version of Triton such as ``3.7.0`` can compile for."""
    version = tuple(map(int, triton_version.split(".")[:2]))
    return tuple(target for target in SHARED_MEMORY_LIMITS if version >= FIRST_TRITON.get(target, (0, 0)))


def compile_kernel(variant: KernelVariant, target: str) -> CompiledKernel:
    """Compile one variant for one target such as ``sm_87``.

    Raises ValueError for a target that is unknown, here or to Triton, RuntimeError where Triton was imported as
    interpreter or the kernel needs scratch memory, and the compiler's own errors.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in SHARED_MEMORY_LIMITS:
        raise ValueError(f"target: expected one of {', '.join(SHARED_MEMORY_LIMITS)}, got {target!r}")
    if target not in known_targets(triton.__version__):
        first = ".".join(map(str, FIRST_TRITON[target]))
        raise ValueError(f"target: expected Triton {first} or newer for {target}, got {triton.__version__}")
    if not isinstance(variant.kernel, triton.JITFunction):
        raise RuntimeError("kernels cannot be compiled where TRITON_INTERPRET is set: start Python without it")
    names = variant.kernel.arg_names
    constants = dict(variant.constants)
    if "TARGET" in constants:  # a kernel whose form depends on the target
        constants["TARGET"] = int(target.removeprefix("sm_"))
    source = ASTSource(
        variant.kernel,
        {name: variant.arguments.get(name, "constexpr") for name in names},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    start = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    seconds = time.perf_counter() - start
    metadata = compiled.metadata
    if metadata.global_scratch_size:
        raise RuntimeError(f"{variant.name} asks for {metadata.global_scratch_size} bytes of scratch memory a block")
    arguments = tuple((name, variant.arguments[name]) for name in names if name in variant.arguments)
    registers, spilled = _resources(compiled.asm["cubin"])
    return CompiledKernel(
        variant.name,
        target,
        metadata.name,
        compiled.asm["cubin"],
        arguments,
        _parameter_count(compiled.asm["ptx"]) - len(arguments),
        metadata.num_warps,
        metadata.shared,
        registers,
        spilled,
        seconds,
        ".".join(triton.__version__.split(".")[:2]),
    )


def _parameter_count(ptx: str) -> int:
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise RuntimeError("the compiler's assembly has no entry point")
    return entry[1].count(".param")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread. Without arrays and calls, the stack is spilled registers."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if match is None:
        raise RuntimeError(f"cuobjdump reported no registers: {report[-300:]}")
    return int(match[1]), int(match[2]) + int(match[3])


def all_variants(modules: tuple[str, ...] = KERNEL_MODULES) -> dict[str, KernelVariant]:
    """Specialisations of the modules, by name."""
    listed = [
        variant
        for module in modules
        for variant in importlib.import_module(f"maskformer_fast.kernels.{module}").variants()
    ]
    named = {variant.name: variant for variant in listed}
    if len(named) != len(listed):
        raise ValueError("names of kernel variants: expected no name twice")
    return named


def _compile_named(job: tuple[str, str, str]) -> CompiledKernel | str:
    """Compile one variant -> the kernel, or the error as text, because not every exception can be pickled."""
    module, name, target = job
    try:
        return compile_kernel(all_variants((module,))[name], target)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {reason[-1]}"


def check(modules: tuple[str, ...], targets: tuple[str, ...]) -> int:
    """Compile all variants for all targets in other processes, print the table -> number of failures."""
    jobs = [(module, name, target) for module in modules for name in all_variants((module,)) for target in targets]
    print(f"{'kernel':42s} {'target':7s} {'registers':>9s} {'spilled':>8s} {'shared':>8s} {'seconds':>8s}")
    failures = 0
    with tempfile.TemporaryDirectory() as cache:
        # an empty cache, so that the times are those of compilation; no interpreter, in which nothing can be compiled
        prepare = partial(_prepare_worker, cache)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, initializer=prepare) as pool:
            for (_, name, target), result in zip(jobs, pool.map(_compile_named, jobs), strict=True):
                reason = result if isinstance(result, str) else result.failure
                failures += bool(reason)
                figures = ""
                if isinstance(result, CompiledKernel):
                    figures = (
                        f"{result.registers:9d} {result.spilled_bytes:8d} {result.shared_bytes:8d} "
                        f"{result.seconds:8.2f}"
                    )
                print(f"{name:42s} {target:7s} {figures}{'  FAILED: ' + reason if reason else ''}", flush=True)
    print(f"{len(jobs)} compiled, {failures} failed")
    return failures


def _prepare_worker(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


def goal_rows(module: str, target: str) -> list[dict[str, Any]]:
    """Rows of `report` of a module's goal calls for one target."""
    compiled: dict[str, CompiledKernel] = {}
    rows = []
    for launch in importlib.import_module(f"maskformer_fast.kernels.{module}").goal_calls():
        key = repr(launch.variant)
        if key not in compiled:
            compiled[key] = compile_kernel(launch.variant, target)
        rows.append(predict(module, launch, compiled[key]))
    return rows


def print_report(modules: tuple[str, ...], targets: tuple[str, ...], record: bool) -> int:
    """Print the rows of the modules' goal calls; record them, or else compare -> number of rises from the record."""
    jobs = [(module, target) for target in targets for module in modules]
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        # an empty cache: kernels in another could name the lines of source of another copy of the files
        prepare = partial(_prepare_worker, cache)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, initializer=prepare) as pool:
            rows = [row for of_job in pool.map(goal_rows, *zip(*jobs, strict=True)) for row in of_job]
    print(table(rows))
    if record:
        write_record(rows)
        return 0
    complaints = risen(rows)
    print("\n".join(["", *complaints]), file=sys.stderr)
    return len(complaints)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m maskformer_fast.kernels.aot", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compile, print a table, exit 1 on failure")
    what.add_argument("--report", action="store_true", help="predict the goal calls from the machine code")
    parser.add_argument("--record", action="store_true", help="write the report's rows to the record")
    parser.add_argument("--targets", help=f"of {','.join(SHARED_MEMORY_LIMITS)}; a report knows {','.join(TARGETS)}")
    parser.add_argument("--kernels", default=",".join(KERNEL_MODULES), help="of %(default)s")
    arguments = parser.parse_args()
    if arguments.record and not arguments.report:
        parser.error("--record: expected with --report only")
    targets_known = known_targets(importlib.metadata.version("triton"))
    if arguments.report:
        targets_known = tuple(target for target in targets_known if target in TARGETS)
    arguments.targets = arguments.targets or ",".join(targets_known)
    chosen = []
    for name, known in (("targets", targets_known), ("kernels", KERNEL_MODULES)):
        values = tuple(getattr(arguments, name).split(","))
        if unknown := sorted(set(values) - set(known)):
            parser.error(f"--{name}: expected some of {','.join(known)}, got {','.join(unknown)}")
        chosen.append(values)
    targets, modules = chosen
    if arguments.report:
        return 1 if print_report(modules, targets, arguments.record) else 0
    return 1 if check(modules, targets) else 0


if __name__ == "__main__":
    sys.exit(main())
