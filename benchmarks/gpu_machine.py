"""What a GPU's figures were measured on: the GPU, versions, and the speeds that no operation can pass.

``python -m benchmarks.gpu_machine cuda`` prints it as JSON; it exits with 1 and the reason where there is no GPU.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu_clock import Clock, open_clock, sample
from benchmarks.machine import version

PACKAGES = ("torch", "triton", "numpy", "scipy", "pillow", "transformers")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
COPY_BYTES = 2 << 30
MATRIX_SIZE = 8192


def describe(device: str) -> dict[str, Any]:
    """Of ``cuda``; ``cpu`` stands in for the tests, with rates of sizes too small to mean anything."""
    clock = open_clock(device)
    found: dict[str, Any] = {"gpu": platform.processor() or platform.machine() or "CPU"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(clock.device)
        found = {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "nvcc": _output("nvcc", "--version"),
        }
    return {
        **found,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        **(measure_peaks(clock) if device == "cuda" else measure_peaks(clock, 1 << 20, 64)),
    }


def measure_peaks(clock: Clock, copy_bytes: int = COPY_BYTES, size: int = MATRIX_SIZE) -> dict[str, Any]:
    """Medians: a copy in GB/s read and written, a product of random matrices in TFLOP/s."""
    rates = {}
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype in DTYPES.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
        product = a @ b
        milliseconds = sample(clock, lambda a=a, b=b, product=product: torch.mm(a, b, out=product))["ms"]
        rates[name] = round(2e-9 * size**3 / milliseconds, 3)
    torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device=clock.device)
    target = source.clone()
    copy_ms = sample(clock, lambda: target.copy_(source))["ms"]
    return {"copy_gb_per_s": round(2e-6 * copy_bytes / copy_ms, 1), "matrix_tflop_per_s": rates}


def _output(*command: str) -> str | None:
    """The last line that a program prints, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = process.stdout.strip().splitlines()
    return lines[-1] if process.returncode == 0 and lines else None


def main(device: str) -> int:
    if device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device here", file=sys.stderr)
        return 1
    print(json.dumps(describe(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
