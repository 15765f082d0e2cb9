"""The runner of the tests that need a GPU, on files of tests that fail, crash, hang, or lack a package."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import gpu_tests
from tests.support.paths import ROOT

TESTS = """
import os, time
import pytest

def test_of_no_gpu():
    assert False

@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2])
def test_passes(number):
    assert True

@pytest.mark.gpu
def test_fails():
    assert 1 == 2, "one is not two"

@pytest.mark.gpu
def test_dies():
    os._exit(5)

@pytest.mark.gpu
def test_dies_not():
    assert True

@pytest.mark.gpu
def test_lacks_a_package():
    import no_such_package

@pytest.mark.gpu
def test_skips():
    pytest.skip("for a reason")
"""
LACKING = "import no_such_package\nimport pytest\n@pytest.mark.gpu\ndef test_nothing(): pass\n"
BROKEN = LACKING.replace("no_such_package", "benchmarks.no_such_module")
ENDLESS = "import pytest, time\n@pytest.mark.gpu\ndef test_endless(): time.sleep(60)\n"
OTHER = "def test_other(): assert False\n"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture
def test_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tests"
    (folder / "deep").mkdir(parents=True)
    write(folder, test_lacking=LACKING, test_broken=BROKEN, test_other=OTHER)
    write(folder / "deep", test_a=TESTS)
    return folder


def test_tests_are_found_by_their_marker() -> None:
    names = [path.name for path in gpu_tests.find_files(ROOT / "tests")]
    assert names[0] == "test_compute_sanitizer.py" and set(gpu_tests.WHOLE) <= set(names)
    assert {"test_semantic_gpu.py", "test_assignment_gpu.py"} <= set(names)
    assert "test_build.py" not in names


def test_outcomes_of_tests(test_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "PARTS", 2)
    states = []
    found = gpu_tests.run_tests(test_folder, time.monotonic() + 200, states.append)
    short = {kind: {entry["name"].split("/")[-1]: entry["reason"] for entry in found[kind]}
             for kind in ("failures", "skips", "missing")}  # fmt: skip
    assert found["passed"] == 3
    assert short["failures"].pop("test_broken.py").startswith("ModuleNotFoundError: No module named 'benchmarks.no")
    assert short == {
        "failures": {
            "test_a.py::test_fails": "AssertionError: one is not two",
            "test_a.py::test_dies": "its process ended with status 5",
        },
        "skips": {
            "test_a.py::test_lacks_a_package": "no_such_package is not installed",
            "test_a.py::test_skips": "for a reason",
            "test_lacking.py": "no_such_package is not installed",
        },
        "missing": {},
    }
    assert (found["failed"], found["skipped"], found["not_run"]) == (3, 3, 0)
    assert len(states) == 2 * 3


def test_what_finds_no_time_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "PARTS", 1)
    write(tmp_path, test_endless=ENDLESS)
    for seconds in (-1, 6):
        found = gpu_tests.run_tests(tmp_path, time.monotonic() + seconds, lambda state: None)
        assert (found["passed"], found["failed"], found["not_run"]) == (0, 0, 1) and found["seconds"] < seconds + 10
        (entry,) = found["missing"]
        assert entry["reason"] == "not run: time" and "test_endless.py" in entry["name"]


def test_a_broken_context_costs_one_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # stands for a context that an illegal access broke: from then on, synchronizing raises
    code = "import pytest, sys, types\nbroken = False\n"
    code += "def sync():\n    if broken: raise RuntimeError('illegal access')\n"
    code += "cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=sync)\n"
    code += "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
    code += "@pytest.mark.gpu\ndef test_breaks():\n    global broken\n    broken = True\n    sync()\n"
    code += "@pytest.mark.gpu\ndef test_after():\n    sync()\n"
    write(tmp_path, test_context=code)
    monkeypatch.setattr(gpu_tests, "PARTS", 1)
    found = gpu_tests.run_tests(tmp_path, time.monotonic() + 60, lambda state: None)
    assert found["passed"] == 1
    assert [entry["reason"] for entry in found["failures"]] == ["RuntimeError: illegal access"]
