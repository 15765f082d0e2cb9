"""Builds maskformer_fast._C with CMake. The metadata of the package are in pyproject.toml."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).parent.resolve()
BUILD_TOOLS = 'pip install "pybind11>=2.13" "cmake>=3.24" ninja'


def find_program(name: str, folder_attribute: str) -> str | None:
    """Find a program in the Python package of its name, which need not be on the PATH, else on the PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        return shutil.which(name)
    return shutil.which(name, path=folder) or shutil.which(name)


class CMakeBuild(build_ext):
    """Builds the extension with CMake, configured from scratch, so that leftovers of other builds have no effect."""

    def build_extension(self, ext: Extension) -> None:
        try:
            pybind11 = importlib.import_module("pybind11")
        except ImportError as error:
            raise SetupError(f"building maskformer_fast._C needs pybind11 ({error}); run: {BUILD_TOOLS}") from error
        cmake = find_program("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise SetupError(f"building maskformer_fast._C needs CMake 3.24 or newer; run: {BUILD_TOOLS}")
        target = (Path.cwd() / self.get_ext_fullpath(ext.name)).resolve()
        build = (Path(self.build_temp) / ext.name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "--fresh",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            "-DMF_CUDA=" + os.environ.get("MF_CUDA", "AUTO"),
        ]
        ninja = find_program("ninja", "BIN_DIR")
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self._run(
            configure,
            "could not configure; it needs CMake 3.24 or newer, a C++17 compiler (Debian, Ubuntu: apt install g++; "
            "or name one in CXX) and Python's headers (apt install python3-dev)",
        )
        self._run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], "did not compile")

    @staticmethod
    def _run(command: list[str], failure: str) -> None:
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"maskformer_fast._C {failure}. The reason is printed above. ({error})") from error


setup(
    packages=[*find_packages(include=["maskformer_fast", "maskformer_fast.*"]), "maskformer_fast.kernels"],
    # installed as a subpackage, because a public package has the name `kernels`
    package_dir={"maskformer_fast.kernels": "kernels"},
    ext_modules=[Extension("maskformer_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
