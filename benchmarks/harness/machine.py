"""The machine that figures are of: processor or GPU, versions, and the speeds that no operation can pass.

``python -m benchmarks.harness.machine DEVICE THREADS`` prints these speeds as JSON. `describe` runs it in processes of
their own, so that the runner itself never opens the GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness.case import Row
from benchmarks.harness.clock import Clock, open_clock
from benchmarks.harness.runner import ROOT, environment
from maskformer_fast.core.machine import describe_machine

SECONDS = 60.0
REPEATS = 10


def describe(device: str) -> Row:
    """Processor, GPU, instruction set, versions, and peaks: of the CPU on one thread and on two.

    Raises:
        RuntimeError: there is no such device.
    """
    machine = describe_machine()
    if device == "cuda":
        driver = _last_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions = {"driver": driver, "nvcc": _last_line("nvcc", "--version")}
        return {**machine, **versions, **_measured_peaks("cuda", 1)}
    from maskformer_fast.core.extension import load_extension

    peaks = [_measured_peaks("cpu", threads) for threads in (1, 2)]
    return {**machine, "isa": load_extension().available_isas()[-1], "peaks": peaks}


def speeds(machine: Row, threads: int) -> Row:
    """A machine's measured peaks, of the CPU on so many threads, as `Bound.milliseconds` takes them."""
    return next((peaks for peaks in machine.get("peaks", ()) if peaks.get("threads", threads) == threads), {})


def _measured_peaks(device: str, threads: int) -> Row:
    command = [sys.executable, "-m", "benchmarks.harness.machine", device, str(threads)]
    process = subprocess.run(
        command, cwd=ROOT, env=environment("time", threads), capture_output=True, text=True, timeout=SECONDS
    )
    if process.returncode:
        raise RuntimeError((process.stderr.strip().splitlines() or ["no reason given"])[-1])
    result: Row = json.loads(process.stdout.splitlines()[-1])
    return result


def measure_peaks(clock: Clock, size: int, mebibytes: int, types: tuple[str, ...]) -> Row:
    """The best of ten: a copy in GB/s read and written, and `matrix_rate` in TFLOP/s by type."""
    import torch

    source = torch.zeros(mebibytes * 2**18, device=clock.device)
    target = torch.ones_like(source)
    copy = 2e-9 * source.nbytes / _best(clock, lambda: target.copy_(source))
    return {
        "copy_gb_per_s": round(copy, 1),
        "matrix_tflop_per_s": {name: round(1e-12 * matrix_rate(clock, name, size), 4) for name in types},
    }


def matrix_rate(clock: Clock, name: str, size: int = 2048) -> float:
    """Multiplications and additions a second in a type, with matrices of `size`: that of the fastest implementation.

    Candidates are PyTorch's matrix product, on a CPU also oneDNN's with packed weights, and a 3x3 convolution of 256
    channels, which is a matrix product too: on some processors one library is faster than another by far.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return max(operations / _best(clock, run) for operations, run in _matrix_products(clock, name, size).values())


def _matrix_products(clock: Clock, name: str, size: int) -> dict[str, tuple[float, Callable[[], Any]]]:
    """By library: multiplications and additions of a call, and the call."""
    import torch
    from torch.nn import functional as F

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}

    def new(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=clock.device).to(dtypes[name])

    a, b, product, side = new(size, size), new(size, size), new(size, size), max(8, size // 32)
    pixels, weight = new(1, 256, side, side), new(256, 256, 3, 3)
    products: dict[str, tuple[float, Callable[[], Any]]] = {
        "PyTorch": (2.0 * size**3, partial(torch.mm, a, b, out=product)),
        "convolution": (2.0 * weight.numel() * side**2, partial(F.conv2d, pixels, weight, padding=1)),
    }
    if clock.device.type == "cpu" and _onednn_multiplies(name):
        packed = torch.ops.mkldnn._reorder_linear_weight(b)
        by_onednn = partial(torch.ops.mkldnn._linear_pointwise, a, packed, None, "none", [], "")
        products["oneDNN"] = 2.0 * size**3, by_onednn
    return products


def _onednn_multiplies(name: str) -> bool:
    """Whether oneDNN has matrix products of a type on this processor: in bfloat16 it needs AVX-512."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    return name == "fp32" or (name == "bf16" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _best(clock: Clock, operation: Callable[[], Any]) -> float:
    return min([clock.seconds(operation) for _ in range(REPEATS + 1)][1:])


def _last_line(*command: str) -> str | None:
    """The last line that a program prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    process = subprocess.run(command, capture_output=True, text=True)
    lines = process.stdout.strip().splitlines()
    return lines[-1] if process.returncode == 0 and lines else None


def main(device: str, threads: int) -> int:
    import torch

    if device == "cpu":
        torch.set_num_threads(threads)
        peaks = measure_peaks(open_clock("cpu"), 2048, 256, ("fp32", "bf16"))
        print(json.dumps({"threads": threads, **peaks}))
        return 0
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here", file=sys.stderr)
        return 1
    gpu = torch.cuda.get_device_properties(0)
    print(json.dumps({
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "peaks": [measure_peaks(open_clock("cuda"), 8192, 2048, ("fp16", "bf16", "tf32", "fp32"))],
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
