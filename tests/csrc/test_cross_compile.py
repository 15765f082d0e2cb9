"""Compilation of the C++ sources for 64-bit Arm, to vector code, and with Clang for this machine; warnings are errors.

The compilers come with the package `ziglang` (the extra `cross`). For Arm a cross compiler of the system serves too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.csrc.cmake import configure
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

EM_X86_64, EM_AARCH64 = 62, 183
ARM_VECTOR = re.compile(r"\bv\d+\.(4s|2d)\b")  # a NEON register, as four floats or two doubles


def zig(target: str) -> list[str] | None:
    return [sys.executable, "-m", "ziglang", "c++", "-target", target] if importlib.util.find_spec("ziglang") else None


def arm_compiler() -> list[str] | None:
    gcc = shutil.which("aarch64-linux-gnu-g++")
    return [gcc] if gcc else zig("aarch64-linux-gnu")


def clang() -> list[str] | None:
    system = shutil.which("clang++")
    return [system] if system else zig(f"{platform.machine()}-linux-gnu")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Commands by which CMakeLists.txt compiles each source, without the compiler: options, ``-o OBJECT -c SOURCE``."""
    build = tmp_path_factory.mktemp("cross") / "build"
    configured = configure(build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DMF_CUDA=OFF")
    assert configured.returncode == 0, configured.stdout
    entries = json.loads((build / "compile_commands.json").read_text())
    return [shlex.split(entry["command"])[1:] for entry in entries]


def source_name(command: list[str]) -> str:
    """Path of the source in csrc/ and, for kernels, the instruction set."""
    isa = next((word.partition("=")[2] for word in command if word.startswith("-DMF_ISA=")), "")
    return f"{Path(command[-1]).relative_to(ROOT / 'csrc')} {isa}".strip()


def is_hot(name: str) -> bool:
    """Whether the source holds vectorised loops: kernels, which have an instruction set, and the assignment."""
    return " " in name or name == "assignment/assignment.cpp"


def compile_all(compiler: list[str], commands: list[list[str]], folder: Path, hot: str = "-c") -> dict[str, Path]:
    """Compile all sources to objects, or hot sources to assembly with `hot` -S. Returns the outputs by source name.

    The other sources are compiled without optimisation, which would take longer and find no more mistakes.
    """
    outputs: dict[str, Path] = {}
    errors = []
    for command in commands:
        name = source_name(command)
        assert name not in outputs
        action = hot if is_hot(name) else "-c"
        outputs[name] = folder / f"{len(outputs)}{'.s' if action == '-S' else '.o'}"
        place = command.index("-o")
        options = [*command[:place], *command[place + 2 :], *([] if is_hot(name) else ["-O0"])]
        options[options.index("-c")] = action
        # Zig adds debug information, and a -c to -S
        errors.append(
            compile_one([*compiler, *options, "-g0", "-Werror", "-Wno-unused-command-line-argument"], outputs[name])
        )
    assert not any(errors), "\n".join(errors)
    return outputs


def compile_one(command: list[str], target: Path) -> str:
    """Compile one source. Returns the compiler's errors, or an empty string."""
    caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), str(target.parent / "cache"))
    result = subprocess.run(
        [*command, "-o", str(target)], env={**os.environ, **caches}, capture_output=True, text=True
    )
    return f"{shlex.join(command)}\n{result.stderr}" if result.returncode != 0 else ""


def machine(elf: Path) -> int:
    """Read the field e_machine of a 64-bit little-endian ELF file."""
    header = elf.read_bytes()[:20]
    assert header[:6] == b"\x7fELF\x02\x01", f"{elf} is not a 64-bit little-endian ELF file"
    number: int = struct.unpack_from("<H", header, 18)[0]
    return number


def has_headers_for_arm() -> bool:
    """Whether Python's headers fit Arm. Those of Debian have one processor's sizes and refuse the others."""
    folder = Path(sysconfig.get_path("include"))
    return "x86_64-linux-gnu" not in (folder / "pyconfig.h").read_text()


def test_sources_compile_to_vector_code_for_arm(commands: list[list[str]], tmp_path: Path) -> None:
    compiler = arm_compiler()
    if compiler is None:
        pytest.skip("no cross compiler: pip install ziglang, or apt install g++-aarch64-linux-gnu")
    chosen = [
        command
        for command in commands
        if not any(word.startswith("-DMF_ISA=avx") for word in command)
        and (has_headers_for_arm() or not command[-1].endswith("bindings.cpp"))
    ]
    outputs = compile_all(compiler, chosen, tmp_path, hot="-S")
    assembly = {name: path for name, path in outputs.items() if is_hot(name)}
    assert {"assignment/assignment.cpp", "semantic/kernels.cpp baseline"} < set(assembly)
    assert "common/cpu_isa.cpp" in outputs
    for path in assembly.values():
        assert not compile_one([*compiler, "-c", str(path)], path.with_suffix(".o"))
    machines = {name: machine(path.with_suffix(".o")) for name, path in outputs.items()}
    assert machines == dict.fromkeys(outputs, EM_AARCH64)
    vectors = {name: len(ARM_VECTOR.findall(path.read_text("latin-1"))) for name, path in assembly.items()}
    assert all(count > 50 for count in vectors.values()), vectors


def test_sources_compile_with_clang(commands: list[list[str]], tmp_path: Path) -> None:
    compiler = clang()
    if compiler is None:
        pytest.skip("no Clang: pip install ziglang, or apt install clang")
    objects = compile_all(compiler, commands, tmp_path)
    assert len(objects) == len(commands) >= 3
    expected = {"x86_64": EM_X86_64, "aarch64": EM_AARCH64}[platform.machine()]
    assert {machine(path) for path in objects.values()} == {expected}
