"""Description of this machine, and the memory of this process: its peak, and what the C library keeps of it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "numpy", "scipy", "pillow", "transformers", "onnxruntime", "openvino", "nncf", "tensorrt",
    "tensorrt_rtx", "cuda-python",
)  # fmt: skip
"""Packages whose versions belong to a description of a machine."""
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""Linux's names of instructions that multiply in bfloat16: of x86-64 processors, and of Arm's."""
BYTE_FLAGS = ("avx512_vnni", "avx_vnni")
"""Linux's names of instructions of x86-64 that add up products of bytes in 32 bits."""
ISAS_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
"""oneDNN's names of instruction sets."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's <malloc.h>


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, threads, GPUs as ``nvidia-smi`` names them, system, and versions of what is installed.

    The keys are ``cpu``, ``cores`` (those that this process may use), ``threads`` (``OMP_NUM_THREADS``), ``gpus``,
    ``system``, ``python``, and the name of each installed package of `PACKAGES`.
    """
    return {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
        "gpus": gpu_names(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version for package in PACKAGES if (version := installed_version(package))},
    }


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return process.stdout.strip().splitlines() if process.returncode == 0 else []


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16, as far as the system tells; True where it tells nothing."""
    flags = _processor_flags()
    return not flags or not flags.isdisjoint(BFLOAT16_FLAGS)


def saturates_bytes() -> bool:
    """Whether products of bytes saturate: on x86-64 without VNNI, or where the system does not tell.

    VNNI counts as missing too where ``ONEDNN_MAX_CPU_ISA`` keeps oneDNN, and so OpenVINO, from using it.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return limit in ISAS_WITHOUT_VNNI or _processor_flags().isdisjoint(BYTE_FLAGS)


def _processor_flags() -> set[str]:
    """Names of the processor's features on Linux; elsewhere none."""
    return {flag for name in ("flags", "Features") for line in _processor_lines(name) for flag in line.split()}


def processor_name() -> str:
    """Name of the processor as the system tells it."""
    models = _processor_lines("model name")
    return models[0] if models else platform.processor() or platform.machine()


def processor_vendor() -> str:
    """Vendor as an x86-64 processor names itself, ``AuthenticAMD`` or ``GenuineIntel``; another where it is unknown."""
    lines = _processor_lines("vendor_id")
    # Windows's name of a processor ends with the vendor.
    return lines[0] if lines else platform.processor().rpartition(" ")[2]


def installed_version(package: str) -> str | None:
    """Version of an installed package, by its name in the package index; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_resident_bytes() -> int:
    """Peak size of this process's resident set in bytes, since its start or since `reset_peak_resident_bytes`.

    Raises:
        OSError: the system does not record it.
    """
    # Linux hands `ru_maxrss` on from the process that started this one, so its own peak is read from `status`.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError as error:
        raise OSError("this system does not record the peak memory of a process") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_resident_bytes() -> None:
    """Make the current size of the resident set the peak that `peak_resident_bytes` gives.

    Raises:
        OSError: the system cannot; only Linux can.
    """
    Path("/proc/self/clear_refs").write_text("5")


def available_memory_bytes() -> int:
    """Memory that this process can still take: of the machine, and of the control groups that limit the process.

    Files that Linux keeps in memory and can drop do not count as taken.

    Raises:
        OSError: the system does not tell.
    """
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(lines["MemAvailable"].split()[0]) * 1024, *_left_in_groups(Path("/proc/self/cgroup"))])


def _left_in_groups(listing: Path, mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Memory left in each control group (v2, and v1's for memory) of a listing, and in those above them."""
    try:
        entries = [line.split(":", 2) for line in listing.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, group in entries:
        if controllers not in ("", "memory"):
            continue
        root = mount / controllers
        names = ("memory.max", "memory.current") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes")
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            try:
                limit, used = ((place / name).read_text().strip() for name in names)
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                if limit != "max":
                    droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
                    left.append(max(0, int(limit) - int(used) + droppable))
            except (OSError, ValueError):  # the topmost group has no limit
                continue
    return left


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next arrays of this process -> whether it does.

    glibc gives arrays beyond 32 MiB back to the system as soon as they are freed. Each layer of a network then gets
    pages that the kernel clears anew, which takes a tenth of a forward pass at 512x512 and a third at 1024x2048. Kept
    memory makes the process's peak larger, by up to a half at 1024x2048. The setting is the process's and stays.

    Does nothing with another C library, and where the environment sets the allocation itself (`MALLOC_MMAP_MAX_`,
    ``GLIBC_TUNABLES=glibc.malloc...``).
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_MAX, 0)) and bool(library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _processor_lines(name: str) -> list[str]:
    """What Linux tells of each core under this name; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name]
