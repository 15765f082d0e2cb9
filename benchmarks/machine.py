"""What the figures were measured on: processor, versions, and the speeds that no operation can pass."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, environment

PACKAGES = ("torch", "numpy", "scipy", "transformers", "onnxruntime")


def describe_machine() -> dict[str, Any]:
    """Processor, instruction set, versions and measured peaks on one thread and on two."""
    from maskformer_fast.core.extension import load_extension

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


def _fresh_peaks(threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.machine", str(threads)]
    process = subprocess.run(
        command, cwd=ROOT, env=environment("time", threads), stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def measure_peaks(threads: int, size: int = 2048, mebibytes: int = 256) -> dict[str, Any]:
    """The best of ten: a copy in GB/s read and written, and TFLOP/s of float32 and bfloat16 with matrices of `size`.

    These are those of a matrix product or of a 3x3 convolution of 256 channels, which is a matrix product too, by
    another library: on some processors it is the faster of the two by far.
    """
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    source = torch.zeros(mebibytes * 2**18)
    target = torch.ones_like(source)
    copy = 2e-9 * source.numel() * source.element_size() / _best(lambda: target.copy_(source))
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b, product = (torch.rand(size, size, dtype=dtype) for _ in range(3))
        side = max(8, size // 32)
        pixels, weight = torch.rand(1, 256, side, side, dtype=dtype), torch.rand(256, 256, 3, 3, dtype=dtype)
        product_rate = 2 * size**3 / _best(partial(torch.mm, a, b, out=product))
        convolution_rate = 2 * weight.numel() * side**2 / _best(partial(F.conv2d, pixels, weight, padding=1))
        rates[name] = round(1e-12 * max(product_rate, convolution_rate), 4)
    return {"threads": threads, "copy_gb_per_s": round(copy, 1), "matrix_tflop_per_s": rates}


def _best(operation: Any, repeats: int = 10) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


if __name__ == "__main__":
    print(json.dumps(measure_peaks(int(sys.argv[1]))))
