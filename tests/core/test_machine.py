"""Descriptions of the machine and the peak memory of a process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maskformer_fast.core import machine

MIB = 2**20


def test_description_names_the_processor_and_the_installed_versions() -> None:
    description = machine.describe_machine()
    assert description["cpu"] and description["cores"] >= 1
    assert description["numpy"] == np.__version__
    assert list(description)[:6] == ["cpu", "cores", "threads", "gpus", "system", "python"]


@pytest.mark.parametrize(
    ("lines", "processor", "expected"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", "x86_64", "AuthenticAMD"),
        (None, "AMD64 Family 25 Model 33 Stepping 2, AuthenticAMD", "AuthenticAMD"),
        (None, "Intel64 Family 6 Model 154 Stepping 4, GenuineIntel", "GenuineIntel"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", "", ""),
    ],
)
def test_vendor_is_as_the_processor_names_itself(lines, processor, expected, monkeypatch) -> None:
    def read_text(path: Path) -> str:
        if lines is None:
            raise FileNotFoundError(path)
        return lines

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    assert machine.processor_vendor() == expected


@pytest.mark.parametrize(
    ("architecture", "flags", "limit", "expected"),
    [
        ("x86_64", "avx2 fma", None, True), ("x86_64", "avx512f avx512_bf16", None, True), ("AMD64", "", None, True),
        ("x86_64", "avx2 avx_vnni", None, False), ("x86_64", "avx512f avx512_vnni", None, False),
        ("x86_64", "avx2 avx512_vnni", "avx2", True), ("x86_64", "avx512_vnni", "AVX512_CORE_VNNI", False),
        ("aarch64", "", None, False),
    ],
)  # fmt: skip
def test_bytes_saturate_on_processors_without_vnni(architecture, flags, limit, expected, monkeypatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(Path, "read_text", lambda path: f"processor\t: 0\nflags\t: {flags}\n")
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert machine.saturates_bytes() == expected


def test_version_of_a_package_that_is_not_installed_is_none() -> None:
    assert machine.installed_version("numpy") == importlib.metadata.version("numpy")
    assert machine.installed_version("no-such-package-is-installed") is None


def test_no_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu_names() == []


def test_peak_grows_by_an_array_and_stays_when_the_array_is_freed() -> None:
    before = machine.peak_resident_bytes()
    array = np.ones(before + 64 * MIB, dtype=np.uint8)
    del array
    assert machine.peak_resident_bytes() >= before + 64 * MIB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak")
def test_peak_starts_anew_after_a_reset() -> None:
    array = np.ones(256 * MIB, dtype=np.uint8)
    high = machine.peak_resident_bytes()
    del array
    machine.reset_peak_resident_bytes()
    assert machine.peak_resident_bytes() < high - 128 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the peak that Linux hands on to a new process")
def test_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    array = np.ones(512 * MIB, dtype=np.uint8)
    code = "from maskformer_fast.core.machine import peak_resident_bytes; print(peak_resident_bytes())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    del array
    assert int(output) < 256 * MIB


KEPT = """
import numpy as np
from maskformer_fast.core.machine import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
print(keep_freed_memory())
before = resident()
array = np.ones(64 << 20, np.uint8)
del array
print(resident() - before > 32 << 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(
    ("environment", "kept"),
    [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, False)],
)
def test_freed_memory_stays_with_the_process_unless_the_environment_sets_the_allocation(
    environment: dict[str, str], kept: bool
) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = subprocess.run([sys.executable, "-c", KEPT], env=inherited | environment, capture_output=True, text=True)
    assert process.stdout.split() == [str(kept)] * 2, process.stderr
