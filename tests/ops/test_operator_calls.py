"""The small calls that run under compute-sanitizer, and the runner, without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.compute_sanitizer import ERROR_STATUS, find_sanitizer, run_under_sanitizer
from tests.support.operator_calls import CALLS


@pytest.mark.parametrize("name", [name for name in CALLS if name != "semantic_embeddings"])  # which has no CPU backend
def test_calls_are_valid(name: str) -> None:
    CALLS[name]("cpu")


def test_errors_and_time_limits_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n[ $2 = memcheck ] || exec sleep 60\necho Invalid read; exit {ERROR_STATUS}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert find_sanitizer() == str(tool)
    assert run_under_sanitizer(str(tool), "memcheck", "-c", "") == (ERROR_STATUS, "Invalid read\n")
    assert run_under_sanitizer(str(tool), "racecheck", "-c", "", seconds=0.5)[0] == -1


def test_missing_sanitizer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert find_sanitizer() is None
