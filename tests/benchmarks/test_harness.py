"""The harness of the benchmarks: statistics, goals, the page, the order of units, and that a failure costs one row."""

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
from benchmarks.harness import machine, report, runner, worker
from benchmarks.harness.case import OURS, Bound, Case, Work, beside
from benchmarks.harness.clock import Clock, take_turns, warm_up
from benchmarks.harness.measure import MEMORY, TIME, draw_inputs, measure_time, quartiles

MACHINE = {"cpu": "a|b", "peaks": [{"threads": 2, "copy_gb_per_s": 10.0, "matrix_tflop_per_s": {"fp32": 0.1}}]}
CASES = """
import os, time
import torch
from benchmarks.harness import worker
from benchmarks.harness.case import Bound, Case, Work
from benchmarks.harness.runner import shared

worker.PRELOADED = ("torch", "no_such_package")  # peers' imports would take seconds

def sleeps(device):
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    shared("made", lambda path: path.write_text(str(os.getpid())))
    return Work(lambda: time.sleep(0.002), {"long": lambda: time.sleep(0.012)})

def memory(device):  # one after the other, and all together in pieces that come from the heap
    return Work(lambda: [torch.ones(2**22).sum() for _ in range(4)],
                {"64 MiB": lambda: [torch.ones(2**12) for _ in range(4096)]})

def broken(device):
    raise RuntimeError("no such peer")

def killed(device):
    os._exit(3)

def hanging(device):
    time.sleep(1000)

def absent(device):
    import no_such_package

def differs(device):
    return Work(lambda: 1.0, {"p": lambda: 0.5}, agreement=lambda ours, theirs: theirs, least={"p": 0.9})

def cases(device):
    return [
        Case("memory", "64 MiB", 1e9, memory, memory_goal=0.3),
        Case("sleep short", "long", 2.0, sleeps, threads=1, bound=lambda: Bound(1000.0, 1000.0), memory=False),
        Case("broken", "p", 1.0, broken, memory=False),
        Case("killed", "p", 1.0, killed, memory=False),
        Case("absent", "p", None, absent, memory=False),
        Case("differs", "p", 1.0, differs, memory=False),
        Case("hanging", "p", 1.0, hanging, memory=False),
        Case("after", None, None, lambda device: Work(list, {}), memory=False),
    ]
"""


class FakeTime(Clock):
    """A clock that only the operations move."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def operation(self, seconds: float, calls: list[float], first: float | None = None) -> Callable[[], float]:
        def run() -> float:
            self.now += seconds if calls or first is None else first
            calls.append(seconds)
            return seconds

        return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(clocks, "time", clock)
    return clock


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
def test_rounds_shrink_for_slow_peers(fake: FakeTime, seconds: float, rounds: int, calls: int) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    operations = [fake.operation(0.02, ours), fake.operation(seconds, theirs)]
    expected = [warm_up(fake, operation)[1] for operation in operations]
    samples = take_turns(fake, operations, expected)
    assert [len(own) for own in samples] == [rounds, rounds]
    assert samples[0] == pytest.approx([0.02] * rounds) and samples[1] == pytest.approx([seconds] * rounds)
    assert len(theirs) == pytest.approx(calls, rel=1e-3) and len(ours) == 5 + rounds


def test_implementations_take_turns_after_a_first_call_that_is_not_counted(fake: FakeTime) -> None:
    order: list[str] = []

    def named(name: str, run: Callable[[], float]) -> Callable[[], Any]:
        return lambda: (order.append(name), run())

    a, b = named("a", fake.operation(1.0, [], first=60.0)), named("b", fake.operation(1.0, []))
    assert warm_up(fake, a)[1] == 60 and warm_up(fake, b)[1] == 1
    order.clear()
    assert take_turns(fake, [a, b], [1.0, 1.0]) == [[1.0] * 3, [1.0] * 3]
    assert "".join(order) == "abbaab"


def test_quartiles_are_interpolated() -> None:
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == [2.0, 4.0]
    assert quartiles([1.0, 2.0]) == [1.25, 1.75] and quartiles([7.0]) == [7.0, 7.0]


def test_inputs_of_a_gpu_leave_its_cache_and_a_graph_holds_a_call_on_each() -> None:
    clock = Clock()
    clock.device = torch.device("cuda")  # a captured call is the call: no GPU is touched
    seen: list[float] = []
    work = Work(lambda x: seen.append(float(x[0])), {"p": lambda x: time.sleep(0.001)},
                lambda seed: (torch.full((16,), float(seed)),))  # fmt: skip
    inputs = draw_inputs(work, 200)
    assert [float(x[0]) for (x,) in inputs] == [0, 1, 2, 3], "64 bytes each"
    row = measure_time(Case("n", "p", 1.0, lambda device: work, bound=Bound(1.0)), work, inputs, clock)
    assert set(seen) == {0, 1, 2, 3} and seen[-4:] == [0, 1, 2, 3]
    assert row["peer_ms"] >= 1 and row["peer_call_ms"] >= 1 and row["not_captured"] is None
    assert row["bound"] == {"bytes": 1.0, "operations": 0.0, "rate": "fp32"}


def test_an_implementation_that_cannot_be_captured_keeps_the_time_of_its_call() -> None:
    class Fails(Clock):
        device = torch.device("cuda")

        def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
            raise RuntimeError("it waits for the host")

    work = Work(lambda: time.sleep(0.001), {})
    row = measure_time(Case("n", None, None, lambda device: work), work, [()], Fails())
    assert row["ours_ms"] >= 1 and row["not_captured"] == "ours: RuntimeError: it waits for the host"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with `CASES`; beside it lies ``no_cases``, which cannot be imported."""
    (tmp_path / "tiny_cases.py").write_text(CASES)
    (tmp_path / "no_cases.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "UNIT_SECONDS", {"cpu": 20.0})
    monkeypatch.delitem(sys.modules, "tiny_cases", raising=False)
    return "tiny_cases"


def test_a_failure_costs_its_own_row(module: str) -> None:
    todo = runner.plan(["no_cases", module], "cpu")
    todo.cases["hanging"][1].__dict__["extra_seconds"] = -18.0
    states: list[int] = []
    results = runner.run(todo, time.monotonic() + 200, lambda found: states.append(len(found)))
    assert states == sorted(states), "each result is handed on as it comes"
    peaks = {"peaks": [{"threads": 1, "copy_gb_per_s": 1.0, "matrix_tflop_per_s": {"fp32": 1e-6}}]}
    rows = {row["name"]: row for row in report.build_rows(todo.cases, todo.failures, results, peaks, "cpu")}
    json.dumps(rows, allow_nan=False)
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert "a_module_that_is_not_there" in errors.pop("no_cases")
    assert errors == {
        "broken": "time: RuntimeError: no such peer",
        "killed": "time: its process ended with status 3",
        "differs": "time: RuntimeError: the results agree to 0.5, expected at least 0.9",
        "hanging": "time: not done after 2 s",
    }
    assert {name: row["absent"] for name, row in rows.items() if "absent" in row} == {
        "absent": "No module named 'no_such_package'"
    }
    assert rows["after"]["ours_ms"] is not None and rows["after"]["ratio"] is None

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


def test_peak_memory_is_none_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise OSError("no such file")

    monkeypatch.setattr(clocks, "reset_peak_resident_bytes", fails)
    assert Clock().peak_mib(lambda: None) is None


def test_goals_first_and_memory_later_but_that_with_a_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("late", "p", None, print, rank=1), Case("one thread", "p", 2.0, print, threads=1),
             Case("goal", "p", 8.0, print, memory_goal=0.5), Case("other", "p", 1.0, print, memory=False)]  # fmt: skip
    monkeypatch.setattr(runner, "load_cases", lambda module, device: cases)
    todo = runner.plan(["any"], "cpu")
    assert [(batch.threads, batch.kind, *(name for name, _ in batch.units)) for batch in todo.batches] == [
        (1, TIME, "one thread"), (2, TIME, "goal", "other"), (2, MEMORY, "goal"), (2, TIME, "late"),
        (1, MEMORY, "one thread"), (2, MEMORY, "late"),
    ]  # fmt: skip
    assert {batch.kind for batch in runner.plan(["any"], "cuda").batches} == {TIME}, "memory comes along on a GPU"


@pytest.mark.parametrize(("only", "count"), [("after", 1), ("tiny_cases:", 8), (", long", 1), ("nothing", 0)])
def test_only_selects_by_name_subject_and_peer(module: str, only: str, count: int) -> None:
    assert len(runner.plan([module], "cpu", only).cases) == count


def test_what_finds_no_time_says_so(module: str) -> None:
    todo = runner.plan([module], "cpu", "after")
    results = runner.run(todo, time.monotonic(), lambda found: None)
    row = report.build_row("tiny", todo.cases["after"][1], results, MACHINE)
    assert row["not_run"] == "time: not run: time" and "error" not in row


def test_what_is_shared_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runner.SHARED_VARIABLE, str(tmp_path))
    made: list[Path] = []

    def make(path: Path) -> None:
        path.mkdir()  # fails where something of an interrupted call is left
        made.append(path)
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.shared("model", make)
    for _ in range(2):
        assert runner.shared("model", make) == tmp_path / "model"
    assert len(made) == 2 and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_cases_of_one_name_are_refused(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"goal: expected >= 0, got -1 in the case 'n'"):
        Case("n", "p", -1, print)
    double = type("Module", (), {"cases": staticmethod(lambda device: 2 * beside("n", {"p": 1.0}, print))})
    monkeypatch.setattr(worker.importlib, "import_module", lambda name: double)
    with pytest.raises(ValueError, match=r"expected a name each, got \['n, vs p'\]"):
        worker.load_cases("double", "cpu")


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


def test_command_writes_json_and_page(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "MODULES", (module,))
    monkeypatch.setattr(command, "describe", lambda device: MACHINE)
    assert command.main(["--list"]) == 0
    assert "tiny_cases: sleep short  (beside: long)  goal 2x" in capsys.readouterr().out
    assert command.main(["--only", "no such case"]) == 2
    assert command.main(["--only", "a", "--minutes", "1e-9", "--output", str(tmp_path / "new")]) == 0
    content = json.loads((tmp_path / "new" / "cpu-a.json").read_text())
    assert content["device"] == "cpu" and len(content["rows"]) == 8
    assert content["rows"][0]["command"] in (tmp_path / "new" / "cpu-a.md").read_text()
    with pytest.raises(SystemExit):
        command.main(["--minutes", "0"])
    assert command.file_name("cuda", {"gpu": "NVIDIA H200 (x)"}, "") == "NVIDIA-H200-x"


def test_bound_and_peaks() -> None:
    threads = torch.get_num_threads()
    try:
        peaks = machine.measure_peaks(Clock(), 256, 8, ("fp32", "bf16"))
    finally:
        torch.set_num_threads(threads)
    assert peaks["copy_gb_per_s"] > 0.1 and set(peaks["matrix_tflop_per_s"]) == {"fp32", "bf16"}
    assert Bound(8e6).milliseconds({"copy_gb_per_s": 1.0}) == 8 and Bound(8e6).milliseconds({}) is None
    assert machine.speeds(MACHINE, 2) == MACHINE["peaks"][0] and machine.speeds(MACHINE, 1) == {}
    assert OURS == "ours"
