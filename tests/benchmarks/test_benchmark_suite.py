"""The CPU's suite: order and time, with a script in the place of the worker; rows, page and table; the command."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cpu, machine, report
from benchmarks.bounds import Bound
from benchmarks.harness import MEMORY, TIME, Case

MACHINE = {"cpu": "a|b", "peaks": [{"threads": 2, "copy_gb_per_s": 10.0, "matrix_tflop_per_s": {"fp32": 0.1}}]}

SCRIPTED = """
# In the place of the worker: a peer's name says what becomes of it.
from benchmarks.harness import Case

def cases():
    return [
        Case("late", "fine", None, print, rank=1),
        Case("one thread", "fine", 2.0, print, threads=1),
        Case("goal", "fine", 8.0, print, memory_goal=0.5),
        Case("hanging", "hangs", 2.0, print, memory=False),
        Case("after", "fine", 2.0, print, memory=False),
    ]
"""
WORKER = """
import json, os, sys, time

units = json.load(sys.stdin)
with open(os.environ["ORDER"], "a") as file:
    file.write(json.dumps([os.environ["OMP_NUM_THREADS"], "MALLOC_TRIM_THRESHOLD_" in os.environ, units]) + "\\n")
for name, kind in units:
    print(json.dumps({"unit": [name, kind], "stage": "begun", "result": {}}), flush=True)
    if name == "hanging":
        time.sleep(1000)
    result = {"ours_ms": 1.0, "peer_ms": 4.0, "ours_quartiles_ms": [0.5, 2.0], "peer_quartiles_ms": [3.0, 5.0],
              "rounds": 3, "bound": {"bytes": 1e6, "operations": 0.0, "rate": "fp32"}}
    if kind == "memory":
        result = {"ours_peak_mib": 10.0, "peer_peak_mib": 40.0}
    print(json.dumps({"unit": [name, kind], "stage": "done", "result": result}), flush=True)
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one file of cases; `order` in it gets a line for each process."""
    (tmp_path / "script.py").write_text(SCRIPTED)
    (tmp_path / "worker").write_text(WORKER)
    monkeypatch.setattr(cpu, "WORKER", [sys.executable, str(tmp_path / "worker")])
    monkeypatch.setattr(cpu, "UNIT_SECONDS", 2.0)
    monkeypatch.setattr(cpu, "FOLDER", tmp_path)
    monkeypatch.setattr(cpu, "SUBJECTS", ("script", "not_there_yet"))
    monkeypatch.setattr(cpu, "RESULTS", tmp_path / "results" / "cpu.json")
    monkeypatch.setattr(machine, "_fresh_peaks", lambda threads: {**MACHINE["peaks"][0], "threads": threads})
    monkeypatch.setenv("ORDER", str(tmp_path / "order"))
    return tmp_path


def test_goals_first_and_memory_later_but_that_with_a_goal(scripted: Path) -> None:
    todo = cpu.plan([scripted / "script.py"])
    assert [(batch.threads, *batch.units) for batch in todo.batches] == [
        (1, ("one thread", TIME)),
        (2, ("goal", TIME), ("hanging", TIME), ("after", TIME)),
        (2, ("goal", MEMORY)),
        (2, ("late", TIME)),
        (1, ("one thread", MEMORY)),
        (2, ("late", MEMORY)),
    ]


@pytest.mark.parametrize(
    ("only", "names"),
    [("late", ["late"]), ("goal", ["goal"]), ("a", ["late", "one thread", "goal", "hanging", "after"]),
     ("script: o", ["one thread"]), (", hangs", ["hanging"]), ("nothing", [])],
)  # fmt: skip
def test_a_name_selects_its_case_alone(scripted: Path, only: str, names: list[str]) -> None:
    assert list(cpu.plan([scripted / "script.py"], only).cases) == names


def test_two_cases_of_one_name_in_two_files(scripted: Path) -> None:
    (scripted / "other.py").write_text(SCRIPTED)
    with pytest.raises(ValueError, match="cases: expected a name each, got 'late'"):
        cpu.plan([scripted / "script.py", scripted / "other.py"])


def test_units_are_measured_in_order_and_one_that_hangs_is_given_up(scripted: Path) -> None:
    todo = cpu.plan([scripted / "script.py"])
    states: list[int] = []
    results = cpu.run(todo, time.monotonic() + 60, lambda found: states.append(len(found)))
    assert results["hanging", TIME] == {"error": "not done after 2 s"}
    assert len(results) == 8 and states == sorted(states) and len(states) >= 8, "each was handed on as it came"
    processes = [json.loads(line) for line in (scripted / "order").read_text().splitlines()]
    assert [(threads, fresh, units[0][0]) for threads, fresh, units in processes] == [
        ("1", False, "one thread"), ("2", False, "goal"), ("2", False, "after"), ("2", True, "goal"),
        ("2", False, "late"), ("1", True, "one thread"), ("2", True, "late"),
    ]  # fmt: skip
    rows = {row["name"]: row for row in todo.rows(results, MACHINE)}
    assert list(rows) == ["late", "one thread", "goal", "hanging", "after"], "shown in the order of the file"
    assert rows["goal"]["reached"] is False and rows["goal"]["memory_reached"] is True
    assert rows["goal"]["limit_ms"] == pytest.approx(0.1) and rows["goal"]["limit_share"] == pytest.approx(0.1)
    assert rows["one thread"]["reached"] is True and rows["one thread"]["limit_ms"] is None, "no peaks of one thread"
    assert rows["late"]["reached"] is None and rows["after"]["ours_peak_mib"] is None


def test_what_finds_no_time_says_so(scripted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "UNIT_SECONDS", 100.0)
    todo = cpu.plan([scripted / "script.py"])
    start = time.monotonic()
    results = cpu.run(todo, start + 1.0, lambda found: None)
    assert time.monotonic() - start < 5
    late = {name for (name, kind), result in results.items() if kind == TIME and "not_run" in result}
    assert late >= {"hanging", "after", "late"}
    rows = {row["name"]: row for row in todo.rows(results, MACHINE)}
    assert rows["late"]["not_run"] == "time: not run: time; memory: not run: time" and "error" not in rows["late"]
    page = report.markdown({"machine": MACHINE, "rows": list(rows.values())})
    assert "| after | fine | >= 2x | - | time: not run: time |" in page


def case_and_results():
    case = Case("it's | odd", "peer", 3.0, print, bound=Bound(1e7, 1e9, "fp32"), memory_goal=0.5)
    time_part = {
        "ours_ms": 20.0, "peer_ms": 50.0, "ours_quartiles_ms": [19.0, 22.25], "peer_quartiles_ms": [48.0, 1234.0],
        "rounds": 3, "bound": {"bytes": 1e7, "operations": 1e9, "rate": "fp32"},
    }  # fmt: skip
    return case, {(case.name, TIME): time_part, (case.name, MEMORY): {"ours_peak_mib": 3.0, "peer_peak_mib": 12.5}}


def test_row() -> None:
    case, results = case_and_results()
    row = report.build_row("operators", case, results, MACHINE)
    assert (row["ratio"], row["reached"], row["memory_ratio"], row["memory_reached"]) == (2.5, False, 0.24, True)
    assert (row["limit_ms"], row["limit_share"]) == (pytest.approx(10.0), pytest.approx(0.5))
    assert shlex.split(row["command"])[-2:] == ["--only", case.name]
    empty = report.build_row("operators", case, {}, {})
    assert set(empty) >= set(report.NUMBERS) and all(empty[name] is None for name in report.NUMBERS)
    assert empty["reached"] is None and empty["memory_reached"] is None
    nothing = {"ours_peak_mib": 3.0, "peer_peak_mib": 0.0}
    assert report.build_row("s", case, {(case.name, MEMORY): nothing}, {})["memory_ratio"] is None
    untold = {"ours_peak_mib": None, "peer_peak_mib": None}
    assert report.build_row("s", case, {(case.name, MEMORY): untold}, {})["memory_reached"] is None


def test_page_and_table() -> None:
    case, results = case_and_results()
    row = report.build_row("train_step", case, results, MACHINE)
    failed = {"name": "network.py", "subject": "network", "peer": "", "error": "ImportError: no"}
    broken = report.build_row("network", Case("b", "p", 1.0, print), {("b", TIME): {"error": "it broke"}}, MACHINE)
    absent = report.build_row("network", Case("c", "p", None, print), {("c", TIME): {"absent": "No module"}}, MACHINE)
    rows = [row, failed, broken, absent]
    page = report.markdown({"machine": MACHINE, "rows": rows})
    assert "threads 2, copy_gb_per_s 10.0, matrix_tflop_per_s fp32 0.1" in page and "a\\|b" in page
    assert "| it's \\| odd | peer | >= 3x | 2.5x | MISSED |" in page
    assert "| peak memory <= 0.5x | 0.24x | reached |" in page
    assert "| 20 (19 to 22.2) | 50 (48 to 1234) | 2.5 | 10 (50 %) | 3, 12.5 |" in page
    assert "### train step" in page and "### network" in page and "FAILED: ImportError: no" in page
    assert "FAILED: time: it broke" in page and "absent: No module" in page
    figures = [line.replace("\\|", "") for line in page.partition("## Figures")[2].splitlines() if line[:1] == "|"]
    assert {line.count("|") for line in figures} == {11}, "a table's lines have one width"
    head, *lines = report.text_table(rows).splitlines()
    assert "MISSED" in lines[0] and lines[0][: head.index(" ratio") + len(" ratio")].endswith("2.50")
    assert "FAILED: time: it broke" in lines[2] and "absent: No module" in lines[3]


def test_command_writes_the_files(scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["--only", "goal"]) == 0, "a missed goal"
    assert not (scripted / "results").exists(), "a part of the cases must not replace the figures of all"
    with pytest.raises(ValueError, match="only: expected"):
        cpu.main(["--only", "no such case"])
    output = scripted / "new folder" / "part.json"
    assert cpu.main(["--only", "goal", "--output", str(output)]) == 0
    assert [row["name"] for row in json.loads(output.read_text())["rows"]] == ["goal"]
    assert cpu.main([]) == 1, "one hung"
    assert "FAILED: time: not done after 2 s" in capsys.readouterr().out
    content = json.loads((scripted / "results" / "cpu.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["late", "one thread", "goal", "hanging", "after"]
    assert content["machine"].keys() >= {"cpu", "cores", "threads", "isa", "python", "torch", "numpy", "scipy", "peaks"}
    assert content["machine"]["torch"] == torch.__version__
    page = (scripted / "results" / "cpu.md").read_text()
    assert all(f"`{row['command']}`" in page for row in content["rows"])


def test_minutes_are_positive() -> None:
    with pytest.raises(SystemExit):
        cpu.main(["--minutes", "0"])
