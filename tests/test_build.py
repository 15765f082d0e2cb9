"""Build of the wheel and the source archive, offline, and use of the wheel without the sources.

The sources lie in a folder with a space in its name that holds the leftovers of an aborted build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BUILD_FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "constraints.txt", "LICENSE", "README.md")
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")


def copy_sources(folder: Path) -> Path:
    folder.mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, folder)
    for name in ("maskformer_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=IGNORED)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("build") / "a folder with spaces")


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    stale = "CMAKE_GENERATOR:INTERNAL=Unix Makefiles\nCMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere\n"
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    for name in (f"temp.linux-x86_64-cpython-{version}", f"temp.linux-aarch64-cpython-{version}"):
        cache = sources / "build" / name / "maskformer_fast._C" / "CMakeCache.txt"
        cache.parent.mkdir(parents=True)
        cache.write_text(stale)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    # without optimisation, which takes three times as long; the other tests run the optimised build
    compiler = sources.with_name("c++")
    compiler.write_text('#!/bin/sh\nexec ' + os.environ.get("CXX", "c++") + ' "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "MF_CUDA": "OFF", "CXX": str(compiler)}
    subprocess.run([*command, "-w", "out", "."], cwd=sources, env=environment, check=True)
    (path,) = (sources / "out").glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_contains_all_files_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    patterns = ("*.yaml", "*.json", "*.css", "*.js", "py.typed")
    data = [p for pattern in patterns for p in (ROOT / "maskformer_fast").rglob(pattern)]
    assert any(path.suffix == ".yaml" for path in data), "no recipes found: is this test looking in the right place?"
    expected = {
        str(path.relative_to(ROOT)) for path in [*(ROOT / "maskformer_fast").rglob("*.py"), *data]
    } | {str(Path("maskformer_fast") / path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")}
    assert not expected - names
    assert any(re.fullmatch(r"maskformer_fast/_C\..*\.so", name) for name in names)
    assert not [name for name in names if name.startswith(("kernels", "tests", "csrc", "benchmarks"))]


@pytest.mark.slow
def test_wheel_has_the_metadata_of_pyproject(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"train", "deploy", "test"} <= set(metadata.get_all("Provides-Extra", []))
    assert any(line.startswith("torch") for line in metadata.get_all("Requires-Dist", []))


@pytest.mark.slow
def test_wheel_works_without_the_sources(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, maskformer_fast.kernels, maskformer_fast._C as C\n"
        "from maskformer_fast.ops import linear_sum_assignment\n"
        "assert linear_sum_assignment(-torch.eye(3)[1:]).tolist() == [-1, 0, 1]\n"
        "assert not C.has_cuda\n"
        "print(C.__file__, maskformer_fast.kernels.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True, capture_output=True, text=True,
    )
    assert all(path.startswith(str(tmp_path)) for path in result.stdout.split())


def test_source_archive_contains_all_files_of_the_build(sources: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--formats=zip"], cwd=sources, check=True)
    (archive,) = (sources / "dist").glob("*.zip")
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(archive).namelist()}
    csrc = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert "csrc/semantic/kernels.cpp" in csrc
    assert not ({"CMakeLists.txt", "LICENSE", "kernels/__init__.py", "maskformer_fast/py.typed"} | csrc) - names


def test_build_names_a_missing_compiler(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=sources, env={**os.environ, "CXX": "/nonexistent/c++"},
        capture_output=True, text=True,
    )
    assert result.returncode != 0
    assert "a C++17 compiler" in result.stderr and "/nonexistent/c++" in result.stderr + result.stdout


def test_constraints_pin_every_dependency_of_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    extras = project["optional-dependencies"]
    tested = ("train", "deploy", "openvino", "quantize", "quantize-openvino", "test", "cross", "rtx")
    requirements = [*project["dependencies"], *(name for extra in tested for name in extras[extra])]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", line)[0]).lower() for line in requirements}
    assert not names - pinned - {"maskformer-fast"}
    assert pins["torch"] == "2.13.0"
