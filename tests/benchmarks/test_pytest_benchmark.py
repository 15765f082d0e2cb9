"""``pytest benchmarks``: what it measures, and that runs can be saved and compared as with any other project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def run(*arguments: str, storage: Path) -> str:
    """Its output, once it has passed; the file of assignments alone, as others import transformers."""
    command = [
        sys.executable, "-m", "pytest", "benchmarks/test_matching.py", "-p", "no:cacheprovider", "-p", "no:xdist",
        f"--benchmark-storage=file://{storage}", "--benchmark-max-time=0.01", "--benchmark-min-rounds=3", *arguments,
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.no_cover
def test_runs_are_saved_and_compared(tmp_path: Path) -> None:
    chosen = ("-k", "assignment and 100x20", "--benchmark-only")
    run(*chosen, "--benchmark-autosave", storage=tmp_path / "storage")
    (saved,) = (tmp_path / "storage").rglob("0001_*.json")
    content = json.loads(saved.read_text())
    assert {"packages", "isa"} <= content["machine_info"].keys() and content["machine_info"]["packages"]["torch"]
    names = {row["name"]: row for row in content["benchmarks"]}
    assert names.keys() >= {"test_assignment[cpu-ours-100x20]", "test_assignment[cpu-scipy-100x20]"}
    assert {row["group"] for row in names.values()} == {"assignment 16 x 100x20"}
    assert all(row["extra_info"]["threads"] >= 1 and row["stats"]["rounds"] >= 3 for row in names.values())

    second = run(*chosen, "--benchmark-compare", f"--benchmark-json={tmp_path / 'second.json'}",
                 storage=tmp_path / "storage")  # fmt: skip
    assert "(NOW)" in second and "(0001_" in second, "both runs are in one table"
    assert len(json.loads((tmp_path / "second.json").read_text())["benchmarks"]) == len(names)
