"""The C++ sources compile for 64-bit Arm, to vector code, and with Clang for this machine; warnings are errors.

The compilers come with the package `ziglang` (the extra `cross`); a cross compiler of the system's serves for Arm too.
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

import pybind11
import pytest

from tests.support.paths import ROOT

PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # the build tools, as packages
EM_X86_64, EM_AARCH64 = 62, 183
ARM_VECTOR = re.compile(r"\bv\d+\.(4s|2d)\b")  # a NEON register, as four floats or two doubles


def zig(target: str) -> list[str] | None:
    return [sys.executable, "-m", "ziglang", "c++", "-target", target] if importlib.util.find_spec("ziglang") else None


def arm_compiler() -> list[str] | None:
    gcc = shutil.which("aarch64-linux-gnu-g++")
    return [gcc] if gcc else zig("aarch64-linux-gnu")


def clang() -> list[str] | None:
    own = shutil.which("clang++")
    return [own] if own else zig(f"{platform.machine()}-linux-gnu")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """How CMakeLists.txt compiles each source here, without the compiler: options, then ``-o OBJECT -c SOURCE``."""
    build = tmp_path_factory.mktemp("cross") / "build"
    generator = ["-GNinja"] if shutil.which("ninja", path=PATH) else []
    subprocess.run(
        ["cmake", *generator, "-S", ROOT, "-B", build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
         "-DMF_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        env={**os.environ, "PATH": PATH}, check=True, capture_output=True,
    )  # fmt: skip
    entries = json.loads((build / "compile_commands.json").read_text())
    return [shlex.split(entry["command"])[1:] for entry in entries]


def is_hot(name: str) -> bool:
    """Whether most of the time is spent there, in vectors: kernels have an instruction set."""
    return " " in name or name == "assignment_cpu.cpp"


def compile_all(compiler: list[str], commands: list[list[str]], folder: Path, hot: str = "-c") -> dict[str, Path]:
    """Name of the source and the instruction set -> what the compiler made of it: objects, or with `hot` -S assembly
    of hot sources. The others are not optimised, which shows no more mistakes and takes half as long again."""
    made: dict[str, Path] = {}
    errors = []
    for command in commands:
        isa = next((word.partition("=")[2] for word in command if word.startswith("-DMF_ISA=")), "")
        name = f"{Path(command[-1]).name} {isa}".strip()
        output = hot if is_hot(name) else "-c"
        made[name] = folder / f"{len(made)}{'.s' if output == '-S' else '.o'}"
        place = command.index("-o")
        options = [*command[:place], *command[place + 2 :], *([] if is_hot(name) else ["-O0"])]
        options[options.index("-c")] = output
        # Zig adds debug information, and a -c to -S
        errors.append(
            compile_one([*compiler, *options, "-g0", "-Werror", "-Wno-unused-command-line-argument"], made[name])
        )
    assert not any(errors), "\n".join(errors)
    return made


def compile_one(command: list[str], target: Path) -> str:
    """What the compiler has against it, or nothing."""
    caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), str(target.parent / "cache"))
    result = subprocess.run(
        [*command, "-o", str(target)], env={**os.environ, **caches}, capture_output=True, text=True
    )
    return f"{shlex.join(command)}\n{result.stderr}" if result.returncode != 0 else ""


def machine(elf: Path) -> int:
    """The field e_machine of a 64-bit little-endian ELF file."""
    header = elf.read_bytes()[:20]
    assert header[:6] == b"\x7fELF\x02\x01", f"{elf} is no such file"
    number: int = struct.unpack_from("<H", header, 18)[0]
    return number


def has_headers_for_arm() -> bool:
    """False for the headers of Debian's Python, which hold one processor's sizes and refuse the others."""
    folder = Path(sysconfig.get_path("include"))
    return "x86_64-linux-gnu" not in (folder / "pyconfig.h").read_text()


@pytest.mark.slow
def test_sources_compile_for_arm(commands: list[list[str]], tmp_path: Path) -> None:
    compiler = arm_compiler()
    if compiler is None:
        pytest.skip("no cross compiler: pip install ziglang, or apt install g++-aarch64-linux-gnu")
    chosen = [
        command
        for command in commands
        if not any(word.startswith("-DMF_ISA=avx") for word in command)
        and (has_headers_for_arm() or not command[-1].endswith("bindings.cpp"))
    ]
    made = compile_all(compiler, chosen, tmp_path, hot="-S")
    assembly = {name: path for name, path in made.items() if is_hot(name)}
    assert "assignment_cpu.cpp" in assembly and len(assembly) > 1 and "cpu_isa.cpp" in made
    for path in assembly.values():
        assert not compile_one([*compiler, "-c", str(path)], path.with_suffix(".o"))
    assert {name: machine(path.with_suffix(".o")) for name, path in made.items()} == dict.fromkeys(made, EM_AARCH64)
    vectors = {name: len(ARM_VECTOR.findall(path.read_text("latin-1"))) for name, path in assembly.items()}
    assert all(count > 50 for count in vectors.values()), vectors


@pytest.mark.slow
def test_sources_compile_with_clang(commands: list[list[str]], tmp_path: Path) -> None:
    compiler = clang()
    if compiler is None:
        pytest.skip("no Clang: pip install ziglang, or apt install clang")
    objects = compile_all(compiler, commands, tmp_path)
    assert len(objects) == len(commands) >= 3
    own = {"x86_64": EM_X86_64, "aarch64": EM_AARCH64}[platform.machine()]
    assert {machine(path) for path in objects.values()} == {own}
