"""The first look at a GPU, with programs in place of its steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.studies import gpu_first_look
from benchmarks.studies.gpu_first_look import Step, predicted, read_counters, run_steps
from tests.support.paths import ROOT


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_each_step_fails_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    todo = [
        Step("crash", 0.5, python('import os; print(\'{"call": "x", "measured_us": 2.5}\', flush=True); os.abort()')),
        Step("hang", 0.05, python("import time; print('begun', flush=True); time.sleep(60)")),
        Step("missing", 0.1, ("/nonexistent/program",)),
        Step("good", 0.5, python(f"print(open({str(file)!r}).read().count('running'))")),
    ]
    outcomes = run_steps(todo, 40.0, file, {"gpu": "none"})
    assert [outcome["status"] for outcome in outcomes][1:] == [
        "out of time", "[Errno 2] No such file or directory: '/nonexistent/program'", "done",
    ]  # fmt: skip
    assert outcomes[0]["status"].startswith("failed") and outcomes[0]["rows"] == [{"call": "x", "measured_us": 2.5}]
    assert outcomes[1]["log"] == ["begun"] and outcomes[1]["seconds"] < 30
    assert json.loads(file.read_text()) == {"machine": {"gpu": "none"}, "steps": outcomes}


def test_shares_of_the_steps() -> None:
    todo = gpu_first_look.steps("sm_90")
    assert sum(step.share for step in todo) <= 1
    assert {step.command[-1] for step in todo if gpu_first_look.MODULE in step.command} == set(gpu_first_look.STEPS)
    for path in (part for step in todo for part in step.command if part.startswith("tests/")):
        assert (ROOT / path).exists()


def test_predicted() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    row = predicted("semantic 512x512 K=150 B=1 fp16", "sm_90")
    assert 0 < row["floor_us"] < row["predicted_us"] and row["predicted_instructions"] > 1e6
    assert predicted("mask loss P=300 128x128 -> 512x512: forward", "sm_90")["predicted_us"] > 0
    assert predicted("cake", "sm_90") == {}
    assert all(predicted(call, "sm_90") for call in gpu_first_look.COUNTED)


def test_counters_of_nsight_compute() -> None:
    text = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","_claim_kernel","smsp__inst_executed.sum","inst","72,000,000"
"0","1","_claim_kernel","sm__warps_active.avg.pct_of_peak_sustained_active","%","12.5"
"1","1","_number_kernel","smsp__inst_executed.sum","inst","9"
"""
    assert read_counters(text) == [
        {
            "kernel": "_claim_kernel",
            "smsp__inst_executed.sum": 72e6,
            "sm__warps_active.avg.pct_of_peak_sustained_active": 12.5,
        },
        {"kernel": "_number_kernel", "smsp__inst_executed.sum": 9.0},
    ]
    assert read_counters("==ERROR== no permission") == []


@pytest.mark.slow
def test_calls_have_predictions() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    names = [name for name, _ in gpu_first_look.calls(torch.device("cpu"))]
    assert len(set(names)) == len(names) and set(gpu_first_look.COUNTED) <= set(names)
    assert [name for name in names if not predicted(name, "sm_90")] == ["assignment 96 x 100x20"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu() -> None:
    command = [sys.executable, "-m", gpu_first_look.MODULE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.endswith("no CUDA device: nothing to look at\n")


def test_make_gpu_begins_with_it() -> None:
    text = (ROOT / "Makefile").read_text()
    recipe = text[text.index("\ngpu: $(GPU_READY)") :]
    assert (
        recipe.index("gpu_first_look")
        < recipe.index("pytest tests -m gpu")
        < recipe.index("-m benchmarks --device cuda")
    )
