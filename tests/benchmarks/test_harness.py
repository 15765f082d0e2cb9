"""The harness of the benchmarks: statistics, ratios, goals, limits, the page, and that a failure costs one row."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.harness import clock as clocks
from benchmarks.harness import machine, report
from benchmarks.harness.case import Bound, Case, Work
from benchmarks.harness.clock import Call, Clock, ProcessorClock, take_turns, warm_up
from benchmarks.harness.measure import MEMORY, TIME, draw_inputs, measure_time, quartiles
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16

MACHINE = {"cpu": "a|b", "peaks": [{"threads": 2, "copy_gb_per_s": 10.0, "matrix_tflop_per_s": {"fp32": 0.1}}]}
CASES = """
import importlib, os, time
import torch
from benchmarks.harness import worker
from benchmarks.harness.case import Bound, Case, Work

worker.PRELOADED = ("torch", "no_such_package")  # peers' imports would take seconds

def sleeps(device):
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    return Work(lambda: time.sleep(0.002), {"long": lambda: time.sleep(0.012)})

def memory(device):  # one after the other, and all together in pieces that come from the heap
    return Work(lambda: [torch.ones(2**22).sum() for _ in range(4)],
                {"64 MiB": lambda: [torch.ones(2**12) for _ in range(4096)]})

def differs(device):
    return Work(lambda: 1.0, {"p": lambda: 0.5}, agreement=lambda ours, theirs: theirs, least={"p": 0.9})

def cases(device):
    return [
        Case("memory", "64 MiB", 1e9, memory, memory_goal=0.3),
        Case("killed", "p", 1.0, lambda device: os._exit(3), memory=False),
        Case("absent", "p", None, lambda device: importlib.import_module("no_such_package"), memory=False),
        Case("differs", "p", 1.0, differs, memory=False),
        Case("sleep short", "long", 2.0, sleeps, threads=1, bound=lambda: Bound(1000.0, 1000.0), memory=False),
    ]
"""


class FakeTime(Clock):
    """A clock that only the operations move."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def operation(self, name: str, seconds: float, calls: list[str]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            calls.append(name)

        return run


@pytest.mark.parametrize(
    ("seconds", "rounds", "calls"),
    [
        (1e-5, 25, 5 + 25 * 1000),  # a first call, four looks, and samples of 10 ms
        (0.03, 25, 5 + 25),
        (0.3, 5, 2 + 5),  # up to a second and a half
        (0.9, 3, 2 + 3),
        (4.0, 3, 1 + 3),  # slow is slow: no second look
    ],
)
def test_warmed_up_operations_take_turns_in_fewer_rounds_where_a_peer_is_slow(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int, calls: int
) -> None:
    clock = FakeTime()
    monkeypatch.setattr(clocks, "time", clock)
    names: list[str] = []
    operations = [clock.operation("a", 0.02, names), clock.operation("b", seconds, names)]
    expected = [warm_up(clock, operation)[1] for operation in operations]
    warm_up_calls = len(names)
    samples = take_turns(clock, operations, expected)
    assert samples == [pytest.approx([0.02] * rounds), pytest.approx([seconds] * rounds)]
    assert names.count("b") == pytest.approx(calls, rel=1e-3) and names.count("a") == 5 + rounds
    if seconds >= clock.sample_seconds:  # one call is one sample
        assert "".join(names[warm_up_calls:]) == ("abba" * rounds)[: 2 * rounds]


def test_quartiles_are_interpolated() -> None:
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == [2.0, 4.0]
    assert quartiles([1.0, 2.0]) == [1.25, 1.75] and quartiles([7.0]) == [7.0, 7.0]


class FakeGpuClock(Clock):
    """A GPU's clock whose captured call is the call, if it can be captured: no GPU is touched."""

    device = torch.device("cuda")

    def __init__(self, captures: bool) -> None:
        self.captures = captures

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if not self.captures:
            raise RuntimeError("it waits for the host")
        return run


@pytest.mark.parametrize("captures", [True, False])
def test_a_gpu_times_a_graph_of_calls_on_fresh_inputs_or_else_the_call(captures: bool) -> None:
    seen: list[float] = []
    work = Work(lambda x: seen.append(float(x[0])), {"p": lambda x: time.sleep(0.001)},
                lambda seed: (torch.full((16,), float(seed)),))  # fmt: skip
    inputs = draw_inputs(work, 200)
    assert [float(x[0]) for (x,) in inputs] == [0, 1, 2, 3], "64 bytes each"
    case = Case("n", "p", 1.0, lambda device: work, bound=Bound(1.0))
    row = measure_time(case, work, inputs, FakeGpuClock(captures))
    assert set(seen) == {0, 1, 2, 3} and row["peer_ms"] >= 1 and row["peer_call_ms"] >= 1
    assert row["bound"] == {"bytes": 1.0, "operations": 0.0, "rate": "fp32"}
    if captures:
        assert seen[-4:] == [0, 1, 2, 3] and row["not_captured"] is None
    else:
        reason = "RuntimeError: it waits for the host"
        assert row["not_captured"] == f"ours: {reason}; peer: {reason}" and row["peer_ms"] == row["peer_call_ms"]


def test_a_failure_costs_its_own_row_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny_cases.py").write_text(CASES)
    (tmp_path / "no_cases.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_cases", raising=False)
    monkeypatch.setattr(command, "MODULES", ("no_cases", "tiny_cases"))
    peaks = {"threads": 1, "copy_gb_per_s": 1.0, "matrix_tflop_per_s": {"fp32": 1e-6}}
    monkeypatch.setattr(command, "describe", lambda device: {"peaks": [peaks]})
    assert command.main(["--output", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert (tmp_path / "cpu.md").read_text() == report.markdown(content)

    rows = {row["name"]: row for row in content["rows"]}
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert "a_module_that_is_not_there" in errors.pop("no_cases")
    assert errors == {
        "killed": "time: its process ended with status 3",
        "differs": "time: RuntimeError: the results agree to 0.5, expected at least 0.9",
    }
    assert rows["absent"]["absent"] == "no_such_package is not installed" and rows["absent"]["ratio"] is None

    row = rows["sleep short"]
    for who, least in (("ours", 2), ("peer", 12)):
        low, high = row[f"{who}_quartiles_ms"]
        assert least <= low <= row[f"{who}_ms"] <= high
    assert row["ratio"] == row["peer_ms"] / row["ours_ms"] > 2 and row["goals"][0]["reached"] is True
    assert row["limit_ms"] == pytest.approx(1.0), "1000 operations at a million a second; 1000 bytes take 1e-3 ms"
    assert row["limit_share"] == row["limit_ms"] / row["ours_ms"] < 0.5
    assert shlex.split(row["command"]) == ["python", "-m", "benchmarks", "--only", "sleep short"]

    row = rows["memory"]
    if row["ours_peak_mib"] is not None:  # only Linux resets the peak
        assert row["ours_peak_mib"] == pytest.approx(16, rel=0.05, abs=1)
        assert row["peer_peak_mib"] == pytest.approx(64, rel=0.05, abs=1)
        assert [goal["reached"] for goal in row["goals"]] == [False, True] and row["memory_ratio"] < 0.3


def every_goal() -> tuple[Case, dict[tuple[str, str], dict[str, Any]]]:
    case = Case("it's | odd", "peer", 3.0, print, bound=Bound(1e7, 1e9), memory_goal=0.5, max_us=2e4, bound_goal=0.6,
                share_goals={"postprocess": 0.1})  # fmt: skip
    time_part = {
        "ours_ms": 20.0, "peer_ms": 50.0, "ours_quartiles_ms": [19.0, 22.25], "peer_quartiles_ms": [48.0, 1234.0],
        "bound": {"bytes": 1e7, "operations": 1e9, "rate": "fp32"}, "shares": {"postprocess": 0.05},
        "ours_call_ms": 40.0, "peer_call_ms": 60.0,
    }  # fmt: skip
    return case, {(case.name, TIME): time_part, (case.name, MEMORY): {"ours_peak_mib": 3.0, "peer_peak_mib": 12.5}}


def test_ratios_and_goals() -> None:
    case, results = every_goal()
    row = report.build_row("semantic", case, results, MACHINE, "cuda")
    assert (row["ratio"], row["memory_ratio"]) == (2.5, 0.24)
    assert (row["limit_ms"], row["limit_share"]) == (pytest.approx(10.0), pytest.approx(0.5))
    assert [(goal["text"], round(goal["measured"], 3), goal["reached"]) for goal in row["goals"]] == [
        (">= 3x", 2.5, False), ("peak memory <= 0.5x", 0.24, True), ("<= 20000 µs", 20000, True),
        (">= 60 % of the limit", 50, False), ("postprocess <= 10 % of a call", 5, True),
    ]  # fmt: skip
    assert "--device cuda --only" in row["command"]
    empty = report.build_row("semantic", case, {}, {})
    assert all(empty[name] is None for name in report.NUMBERS)
    assert [goal["reached"] for goal in empty["goals"]] == [None] * 5
    results[case.name, MEMORY] = {"ours_peak_mib": 3.0, "peer_peak_mib": 0.0}
    assert report.build_row("semantic", case, results, MACHINE)["memory_ratio"] is None
    results[case.name, TIME]["error"] = "it broke"
    assert report.build_row("semantic", case, results, MACHINE)["goals"][0]["reached"] is None


def test_page_and_table() -> None:
    case, results = every_goal()
    broken, absent = Case("b", "p", 1.0, print), Case("c", None, None, print)
    results |= {("b", TIME): {"error": "it broke"}, ("c", TIME): {"absent": "No module"}}
    subjects = {c.name: ("train_step", c) for c in (case, broken, absent)}
    rows = report.build_rows(subjects, {"benchmarks.cases.x": "ImportError: no"}, results, MACHINE, "cpu")
    page = report.markdown({"device": "cpu", "machine": MACHINE, "rows": rows})
    assert "threads 2, copy_gb_per_s 10.0, matrix_tflop_per_s fp32 0.1" in page and "a\\|b" in page
    assert "| it's \\| odd | peer | >= 3x | 2.5 | MISSED |" in page
    assert "| b | p | >= 1x | - | FAILED: time: it broke |" in page
    assert "| 20 (19 to 22.2) | 50 (48 to 1234) | 2.5 |" in page and "| 10 (50 %) | 3, 12.5 | calls 1.5x;" in page
    assert "### train step" in page and "FAILED: ImportError: no" in page and "absent: No module" in page
    figures = [line.replace("\\|", "") for line in page.partition("## Figures")[2].splitlines() if line[:1] == "|"]
    assert {line.count("|") for line in figures} == {11}, "a table's lines have one width"
    lines = report.text_table(rows).splitlines()
    assert "MISSED" in lines[2] and "FAILED: time: it broke" in lines[3] and "absent: No module" in lines[4]


def test_bound_and_peaks() -> None:
    threads = torch.get_num_threads()
    try:
        peaks = machine.measure_peaks(Clock(), 256, 8, ("fp32", "bf16"))
    finally:
        torch.set_num_threads(threads)
    assert peaks["copy_gb_per_s"] > 0.1 and set(peaks["matrix_tflop_per_s"]) == {"fp32", "bf16"}
    assert Bound(8e6).milliseconds({"copy_gb_per_s": 1.0}) == 8 and Bound(8e6).milliseconds({}) is None
    assert machine.speeds(MACHINE, 2) == MACHINE["peaks"][0] and machine.speeds(MACHINE, 1) == {}


def test_the_matrix_rate_is_that_of_the_fastest_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class NamedClock(Clock):
        """Seconds of each library's product by its name."""

        def seconds(self, run: Call, times: int = 1) -> float:
            return given[run()]

    for name in ("fp32", "bf16"):
        products = machine._matrix_products(Clock(), name, 32)
        assert {"PyTorch", "convolution"} <= set(products) <= {"PyTorch", "convolution", "oneDNN"}
        assert ("oneDNN" in products) == (name == "fp32" or convolves_bfloat16())
        results = {library: run() for library, (_, run) in products.items()}
        assert {result.dtype for result in results.values()} == {torch.float32 if name == "fp32" else torch.bfloat16}
        if "oneDNN" in results:
            assert results["oneDNN"].shape == results["PyTorch"].shape == (32, 32)
        assert products["PyTorch"][0] == 2 * 32**3 and products["convolution"][0] == 2 * 9 * 256**2 * 8**2
    for fastest in ("PyTorch", "oneDNN", "convolution"):
        given = {library: 0.5 if library == fastest else 4.0 for library in ("PyTorch", "oneDNN", "convolution")}
        named = {library: (8.0, lambda library=library: library) for library in given}
        monkeypatch.setattr(machine, "_matrix_products", lambda clock, name, size, named=named: named)
        assert machine.matrix_rate(NamedClock(), "bf16") == 16.0


def test_the_processors_clock_leaves_out_what_it_waits_for() -> None:
    assert ProcessorClock().seconds(lambda: time.sleep(0.05)) < 0.04 < Clock().seconds(lambda: time.sleep(0.05))
