"""The benchmark harness on tiny cases: what it measures, and that a failing case costs its row only."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import class_count, cpu, harness, machine
from benchmarks.bounds import Bound, count_operations

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak of memory")
MACHINE = {"peaks": [{"threads": 1, "copy_gb_per_s": 1.0, "matrix_tflop_per_s": {"fp32": 1e-6}}]}

CASES = """
import os, time
import torch
from benchmarks import harness
from benchmarks.bounds import Bound
from benchmarks.harness import Case, Sides, shared

harness.PRELOADED = ("torch", "no_such_package")  # peers' imports would take seconds

def sleeps():
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    shared("made", lambda path: path.write_text(str(os.getpid())))
    return (lambda: time.sleep(0.002)), (lambda: time.sleep(0.012))

def memory():  # one after the other, and all together in pieces that come from the heap
    return (lambda: [torch.ones(2**22).sum() for _ in range(4)]), (lambda: [torch.ones(2**12) for _ in range(4096)])

def broken():
    raise RuntimeError("no such peer")

def killed():
    os._exit(3)

def absent():
    import no_such_package

def differs():
    def check(ours, theirs):
        raise RuntimeError(f"{ours} is not {theirs}")
    return Sides(lambda: 1, lambda: 2, check)

def cases():
    return [
        Case("sleep short", "long", 2.0, sleeps, threads=1, bound=lambda: Bound(1000.0, 1000.0, "fp32")),
        Case("broken", "nobody", 1.0, broken),
        Case("killed", "nobody", 1.0, killed),
        Case("absent", "nobody", None, absent),
        Case("differs", "nobody", 1.0, differs, memory=False),
        Case("memory", "64 MiB", 1e9, memory, memory_goal=0.3),
    ]
"""


class Ticks:
    """In the place of the clock: goes on by what the work says it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def operation(self, seconds: float, calls: list[float], first: float | None = None):
        def run() -> float:
            self.now += seconds if calls or first is None else first
            calls.append(seconds)
            return seconds

        return run


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    clock = Ticks()
    monkeypatch.setattr(harness, "time", clock)
    return clock


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    (folder / "first.py").write_text("import a_module_that_is_not_there")
    (folder / "tiny.py").write_text(CASES)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, harness.Row]:
    todo = cpu.plan([folder / "first.py", folder / "tiny.py"])
    return {row["name"]: row for row in todo.rows(cpu.run(todo, time.monotonic() + 200, lambda found: None), MACHINE)}


def test_failures_are_rows_and_lose_no_others(rows: dict[str, harness.Row]) -> None:
    assert list(rows) == ["first.py", "sleep short", "broken", "killed", "absent", "differs", "memory"]
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert "a_module_that_is_not_there" in errors.pop("first.py")
    assert errors == {
        "broken": "time: RuntimeError: no such peer; memory: RuntimeError: no such peer",
        "killed": "time: its process ended with status 3; memory: its process ended with status 3",
        "differs": "time: RuntimeError: 1 is not 2",
    }
    assert {name: row["absent"] for name, row in rows.items() if "absent" in row} == {
        "absent": "No module named 'no_such_package'"
    }


def test_row_of_a_case(rows: dict[str, harness.Row]) -> None:
    row = rows["sleep short"]
    assert row["subject"] == "tiny" and row["peer"] == "long" and row["goal"] == 2.0 and row["threads"] == 1
    assert row["command"] == "python -m benchmarks.cpu --only 'sleep short'"
    assert harness.MIN_ROUNDS <= row["rounds"] <= harness.MAX_ROUNDS
    for side, least in (("ours", 2), ("peer", 12)):
        low, high = row[f"{side}_quartiles_ms"]
        assert least <= low <= row[f"{side}_ms"] <= high
    assert row["ratio"] == row["peer_ms"] / row["ours_ms"] and row["ratio"] > 2 and row["reached"] is True
    assert row["limit_ms"] == pytest.approx(1.0), "1000 operations at a million a second; 1000 bytes take 1e-3 ms"
    assert row["limit_share"] == row["limit_ms"] / row["ours_ms"] < 0.5
    assert rows["memory"]["reached"] is False and rows["memory"]["limit_ms"] is None
    json.dumps(list(rows.values()), allow_nan=False)


@LINUX
@pytest.mark.parametrize(("name", "ours", "peer"), [("sleep short", 0, 0), ("memory", 16, 64)])
def test_memory_of_each_side(rows: dict[str, harness.Row], name: str, ours: float, peer: float) -> None:
    assert rows[name]["ours_peak_mib"] == pytest.approx(ours, rel=0.05, abs=1)
    assert rows[name]["peer_peak_mib"] == pytest.approx(peer, rel=0.05, abs=1)
    if name == "memory":
        assert rows[name]["memory_ratio"] == pytest.approx(0.25, rel=0.05) and rows[name]["memory_reached"] is True


def test_peak_memory_is_none_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_status_kib", lambda field: {}[field])
    assert harness.peak_memory(lambda: None) is None


@pytest.mark.parametrize(
    ("seconds", "rounds", "calls"),
    [
        (1e-5, 25, 5 + 25 * 1000),  # a look, four more, and samples of 10 ms
        (0.03, 25, 5 + 25),
        (0.3, 5, 2 + 5),  # up to a second and a half
        (0.9, 3, 2 + 3),
        (4.0, 3, 1 + 3),  # slow is slow: no second look
    ],
)  # fmt: skip
def test_rounds_shrink_for_slow_peers(ticks: Ticks, seconds: float, rounds: int, calls: int) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    samples = harness.time_interleaved(ticks.operation(0.02, ours), ticks.operation(seconds, theirs))
    assert [len(side) for side in samples] == [rounds, rounds]
    assert samples[0] == pytest.approx([0.02] * rounds) and samples[1] == pytest.approx([seconds] * rounds)
    assert len(theirs) == pytest.approx(calls, rel=1e-3) and len(ours) == 5 + rounds


def test_first_calls_warm_up_and_are_compared(ticks: Ticks) -> None:
    seen: list[tuple[float, float]] = []
    samples = harness.time_interleaved(
        ticks.operation(0.2, [], first=60.0), ticks.operation(0.3, []), repeats=7, check=lambda *both: seen.append(both)
    )
    assert seen == [(0.2, 0.3)]
    assert samples[0] == pytest.approx([0.2] * 7), "what is compiled in the first call is not counted"


def test_sides_take_turns(ticks: Ticks) -> None:
    order: list[str] = []

    def side(name: str):
        def run() -> None:
            ticks.now += 1.0
            order.append(name)

        return run

    harness.time_interleaved(side("a"), side("b"), repeats=4)
    assert "".join(order) == "ab" + "abba" * 2


def test_quartiles() -> None:
    assert harness.quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == [2.0, 4.0]
    assert harness.quartiles([1.0, 2.0]) == [1.25, 1.75] and harness.quartiles([7.0]) == [7.0, 7.0]


def test_what_is_shared_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(harness.SHARED_VARIABLE, str(tmp_path))
    made: list[Path] = []

    def make(path: Path) -> None:
        path.mkdir()  # fails where something of an interrupted call is left
        made.append(path)
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.shared("model", make)
    for _ in range(2):
        assert harness.shared("model", make) == tmp_path / "model"
    assert len(made) == 2 and [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("field", ["goal", "threads", "rank", "memory_goal", "patience"])
def test_invalid_case(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected >= .*got -1"):
        harness.Case(**{"name": "n", "peer": "p", "goal": 1.0, "setup": lambda: None, field: -1})


def test_two_cases_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "twice.py"
    path.write_text("from benchmarks.harness import Case\ndef cases(): return 2 * [Case('same', 'x', 1.0, print)]")
    with pytest.raises(ValueError, match="same"):
        harness.load_cases(path)


def test_operations_are_counted() -> None:
    a, b, image, weight = torch.ones(3, 5), torch.ones(5, 7), torch.ones(1, 2, 9, 9), torch.ones(4, 2, 3, 3)
    assert count_operations(lambda: (a @ b, torch.nn.functional.conv2d(image, weight))) == 2 * (105 + 49 * 4 * 2 * 9)
    assert Bound(8e6).milliseconds(MACHINE["peaks"][0]) == 8


def test_peaks_are_measured() -> None:
    threads = torch.get_num_threads()
    try:
        peaks = machine.measure_peaks(1, size=256, mebibytes=8)
    finally:
        torch.set_num_threads(threads)
    assert peaks["threads"] == 1 and peaks["copy_gb_per_s"] > 0.1
    assert set(peaks["matrix_tflop_per_s"]) == {"fp32", "bf16"} and peaks["matrix_tflop_per_s"]["fp32"] > 1e-3


def test_class_count_gives_both_models_the_same_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    runs: list[tuple[str, int, int]] = []

    def train(folder: Path, model: str, classes: int, steps: int, images: int = 512) -> class_count.Run:
        runs.append((model, classes, steps))
        step = classes * 0.01
        return class_count.Run(0.5 + classes / 1000 if model == "maskformer" else 0.5, 3.0 + step * steps, step)

    monkeypatch.setattr(class_count, "train", train)
    output = tmp_path / "out.json"
    assert class_count.main(["--minutes", "4", "--classes", "5", "20", "--output", str(output)]) == 0
    for classes, expected in ((5, 1140), (20, 285)):  # 120 s less two starts, by two steps; the trials took no time
        steps = {number for _, k, number in runs if k == classes and number != class_count.TRIAL_STEPS}
        assert len(steps) == 1 and abs(steps.pop() - expected) < 5
    rows = json.loads(output.read_text())["rows"]
    assert [(row["classes"], round(row["gain"], 3)) for row in rows] == [(5, 0.005), (20, 0.02)]
    assert "+0.0200" in capsys.readouterr().out
    with pytest.raises(ValueError, match="minutes: expected more, for 40 steps of 19 classes, got"):
        class_count.main(["--minutes", "0.6", "--output", str(output)])


def test_class_count_says_why_a_run_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)nothing, 19 classes: training failed: .*per_pixel_plus"):
        class_count.train(tmp_path / "run", "nothing", 19, 1)
