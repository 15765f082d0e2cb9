"""What the figures were measured on: processor, versions, and the speeds that no operation can pass."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, environment

PACKAGES = ("torch", "numpy", "scipy", "transformers")


def describe_machine() -> dict[str, Any]:
    """Processor, instruction set, versions and measured peaks on one thread and on two."""
    from maskformer_fast._extension import load_extension

    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": load_extension().available_isas()[-1],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "peaks": [_fresh_peaks(threads) for threads in (1, 2)],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fresh_peaks(threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.machine", str(threads)]
    process = subprocess.run(
        command, cwd=ROOT, env=environment("time", threads), stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return found


def measure_peaks(threads: int, size: int = 2048, mebibytes: int = 256) -> dict[str, float]:
    """The best of ten: a float32 matrix product of `size` in GFLOP/s, a copy in GB/s read and written."""
    import torch

    torch.set_num_threads(threads)
    a, b, product = (torch.rand(size, size) for _ in range(3))
    source = torch.zeros(mebibytes * 2**18)
    target = torch.ones_like(source)
    return {
        "threads": threads,
        "matmul_gflop_per_s": round(2e-9 * size**3 / _best(lambda: torch.mm(a, b, out=product)), 1),
        "copy_gb_per_s": round(2e-9 * source.numel() * source.element_size() / _best(lambda: target.copy_(source)), 1),
    }


def _best(operation: Any, repeats: int = 10) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


if __name__ == "__main__":
    print(json.dumps(measure_peaks(int(sys.argv[1]))))
