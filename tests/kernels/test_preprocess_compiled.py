"""The resize kernel is compiled for GPUs that are not here, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TARGETS = (80, 86, 87, 89, 90, 100, 120)

COMPILE = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from maskformer_fast.kernels.preprocess import variants

report = {}
for target in map(int, sys.argv[1:]):
    for variant in variants():
        names = variant.kernel.arg_names
        signature = {name: variant.arguments.get(name, "constexpr") for name in names}
        options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
        source = ASTSource(variant.kernel, signature, variant.constants)
        binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\\d+) STACK:(\\d+) SHARED:\\d+ LOCAL:(\\d+)", usage)
        report[f"{variant.name} sm_{target}"] = [*map(int, found.groups()), binary.metadata.shared]
print(json.dumps(report))
"""


def test_compiles_without_spills() -> None:
    """A spilled register or one that went through shared memory would undo what the kernel is laid out for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *map(str, TARGETS)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 3 * len(TARGETS)
    for name, (registers, stack, local, shared) in report.items():
        assert (stack, local, shared) == (0, 0, 0), f"{name}: {registers} registers, {stack=}, {local=}, {shared=}"
