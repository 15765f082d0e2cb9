"""``make gpu`` with the CPU in the place of a GPU: tiny cases, of which some fail, crash, hang and find no time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_clock, gpu_harness, gpu_machine, gpu_report, gpu_schedule, gpu_tests
from benchmarks.gpu_clock import HostClock, sample
from benchmarks.gpu_harness import OURS, Bound
from tests.support.paths import ROOT

MACHINE = {"gpu": "NVIDIA Fake/9 GPU", "copy_gb_per_s": 100.0, "matrix_tflop_per_s": {"fp16": 0.001}}

CASES = """
import torch
from benchmarks import gpu_clock
from benchmarks.gpu_harness import OURS, Bound, Case, Peer, Work

class Ticks:  # goes on by what the work says it takes: other processes have no part in it
    now = 0.0

    @classmethod
    def perf_counter(cls):
        cls.now += 1e-6
        return cls.now

def spin(milliseconds):
    Ticks.now += 1e-3 * milliseconds

def plain(device):
    gpu_clock.SECONDS, gpu_clock.time = 0.05, Ticks
    seen = set()
    def ours(x):
        seen.add(x.data_ptr())
        assert device.type == "cpu" and len(seen) <= 16
        spin(0.2)
        return x
    def slow(x):
        print("a library says something")  # must not disturb the report
        spin(1.2)
        return x
    def other(x):
        return x + 1
    def absent(x):
        import no_such_package
    def broken(x):
        raise RuntimeError("it does\\nnot work")
    sides = {OURS: ours, "slow": slow, "other": other, "absent": absent, "broken": broken}
    return Work(lambda seed: (torch.full((1024,), float(seed)),), sides, lambda a, b: float(torch.equal(a, b)))

def cases():
    peers = (Peer("slow", 3.0, 2.0), Peer("absent", 1.0), Peer("broken", 1.0), Peer("other"), Peer("none", rank=1))
    return [
        Case("plain", plain, peers[:-1], Bound(100.0, 1000.0), max_us=150.0, bound_share=0.01),
        Case("late", plain, peers[-1:], Bound(1.0), rank=2),
        Case("ranked", plain, peers[-1:], Bound(1.0)),
    ]
"""

SCRIPTED = """
# In the place of the worker: a side's name says what becomes of it.
from benchmarks.gpu_harness import Bound, Case, Peer

def cases():
    def case(name, *sides, **more):
        return Case(name, None, tuple(Peer(side) for side in sides), Bound(1.0), **more)
    return [case("first", "good", "dies", "hangs", "breaks", "fails"), case("second", "half", "good", rank=1)]
"""
WORKER = """
import json, os, sys, time

def say(unit, stage, **result):
    print(json.dumps({"unit": unit, "stage": stage, "result": result}), flush=True)

time.sleep(1000 if "endless" in sys.argv[1] else 0)
assert "unable" not in sys.argv[1], "it cannot begin"
for unit in json.load(sys.stdin):
    side = unit[1]
    say(unit, "begun")
    if side == "dies":
        print("last words", file=sys.stderr)
        os._exit(9)
    if side == "hangs":
        time.sleep(1000)
    say(unit, "timed", call={"ms": 2.0 if side == "ours" else 8.0})
    if side == "half":
        os._exit(3)
    say(unit, "done", **({"error": "no"} if side in ("fails", "breaks") else {}))
    if side == "breaks":
        sys.exit(77)
"""


def write(folder: Path, **files: str) -> list[Path]:
    paths = [folder / f"{name}.py" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text)
    return paths


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (worker,) = write(tmp_path, worker=WORKER)
    monkeypatch.setattr(gpu_schedule, "WORKER", [sys.executable, str(worker)])
    monkeypatch.setattr(gpu_schedule, "UNIT_SECONDS", 3.0)


def failures(results: gpu_schedule.Results) -> dict[str, str]:
    """Case and side of the units that have no result, and why."""
    found = {" ".join(unit): gpu_schedule.summary(result) for unit, result in results.items()}
    return {unit: text for unit, text in found.items() if not text.startswith("call")}


def test_plan_puts_the_lower_rank_first(tmp_path: Path) -> None:
    todo = gpu_schedule.plan(write(tmp_path, gpu_a=CASES, gpu_b="import not_there_either"))
    units = [" ".join(unit) for _, batch in todo.batches for unit in batch]
    first = [f"plain {side}" for side in (OURS, "slow", "absent", "broken", "other")]
    assert units == [*first, "ranked ours", "ranked none", "late ours", "late none"]
    assert [len(batch) for _, batch in todo.batches] == [6, 1, 2]
    assert "not_there_either" in todo.failures["gpu_b.py"]


def test_each_unit_has_its_result_whatever_the_others_do(tmp_path: Path, scripted) -> None:
    todo = gpu_schedule.plan(write(tmp_path, gpu_a=SCRIPTED))
    states: list[int] = []
    results = gpu_schedule.run(todo, "cpu", time.monotonic() + 100, lambda found: states.append(len(found)))
    assert len(results) == 9
    assert failures(results) == {
        "first dies": "its process ended with status 9: last words", "first hangs": "not done after 3 s",
        "first breaks": "no", "first fails": "no", "second half": "its process ended with status 3",
    }  # fmt: skip
    assert results["second", "half"]["call"] == {"ms": 8.0}, "what was known before it ended stays"
    assert states == sorted(states) and len(states) >= len(results), "each was handed on as it came"
    first, second = gpu_report.build_rows(todo, results, MACHINE)
    assert [peer["ratio"] for peer in first["peers"]] == [4, None, None, 4, 4]
    assert [peer["ratio"] for peer in second["peers"]] == [4, 4]


@pytest.mark.parametrize(("name", "seconds"), [("gpu_a", 1.0), ("gpu_endless", 1.0), ("gpu_a", -1.0)])
def test_what_finds_no_time_says_so(name: str, seconds: float, tmp_path: Path, scripted, monkeypatch) -> None:
    monkeypatch.setattr(gpu_schedule, "UNIT_SECONDS", 100.0)
    text = SCRIPTED.replace('"dies", "hangs"', '"hangs", "dies"')
    todo = gpu_schedule.plan(write(tmp_path, **{name: text}))
    start = time.monotonic()
    results = gpu_schedule.run(todo, "cpu", start + seconds, lambda found: None)
    assert time.monotonic() - start < 5 and len(results) == 9
    assert set(failures(results).values()) == {"not run: time"} and {"second ours", "first hangs"} <= set(
        failures(results)
    )
    rows = gpu_report.build_rows(todo, results, MACHINE)
    assert not gpu_report.has_errors(rows)
    assert gpu_report.markdown({"machine": MACHINE, "tests": None, "rows": rows}).count("not run: time") >= 6


def test_a_process_that_cannot_begin_fails_all_its_units(tmp_path: Path, scripted) -> None:
    todo = gpu_schedule.plan(write(tmp_path, gpu_unable=SCRIPTED))
    results = gpu_schedule.run(todo, "cpu", time.monotonic() + 60, lambda found: None)
    assert len(results) == 9 and all("it cannot begin" in result["error"] for result in results.values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    """The plan of two files, of which one cannot be read, and the results of its real process."""
    folder = tmp_path_factory.mktemp("gpu_cases")
    todo = gpu_schedule.plan(write(folder, gpu_a=CASES, gpu_b="import not_there_either"), only="plain")
    return todo, gpu_schedule.run(todo, "cpu", time.monotonic() + 100, lambda found: None)


def test_times_of_a_side(measured) -> None:
    _, results = measured
    for side, least in ((OURS, 0.2), ("slow", 1.2)):
        result = results["plain", side]
        for kind in ("call", "graph"):
            for name in ("low_ms", "ms", "high_ms"):  # a sample adds a tick of 1 µs
                assert least < result[kind][name] < 1.01 * least
            assert result[kind]["samples"] >= 7
        assert result["copies"] == 16, "inputs of 4 KiB fill 64 KiB"
    assert results["plain", "slow"]["agreement"] == 1.0
    assert results["plain", "absent"] == {"absent": "No module named 'no_such_package'"}
    assert results["plain", "broken"] == {"error": "RuntimeError: it does"}
    assert "agrees with ours to 0.0000" in results["plain", "other"]["error"]
    assert results["plain", "other"]["call"]["ms"] > 0, "what was timed before it failed stays"


def test_rows_ratios_and_goals(measured) -> None:
    plain, unread = gpu_report.build_rows(*measured, MACHINE)
    assert plain["bound_ms"] == pytest.approx(1e-3), "1000 operations at 1e9 a second; 100 bytes take 1e-6 ms"
    assert plain["bound_share"] == plain["bound_ms"] / plain["ours"]["graph"]["ms"]
    slow = plain["peers"][0]
    assert slow["ratio"] == slow["graph"]["ms"] / plain["ours"]["graph"]["ms"] == pytest.approx(6, rel=0.01)
    assert slow["call_ratio"] == slow["call"]["ms"] / plain["ours"]["call"]["ms"]
    assert plain["goals"][1]["value"] == 100 * plain["bound_share"]
    goals = {goal["text"]: goal["reached"] for goal in plain["goals"]}
    memory = goals.pop("peak memory <= 1/2 of slow")
    assert goals == {"<= 150 µs": False, ">= 1 % of the bound": False, ">= 3x slow": True, ">= 1x absent": None,
                     ">= 1x broken": None}  # fmt: skip
    assert memory is None or isinstance(memory, bool)
    assert "not_there_either" in unread["error"]
    assert gpu_report.has_errors([plain]) and gpu_report.has_errors([unread])
    assert not gpu_report.has_errors([{**plain, "peers": plain["peers"][:2]}])


def test_page_shows_every_row(measured) -> None:
    rows = gpu_report.build_rows(*measured, MACHINE)
    page = gpu_report.markdown({"machine": MACHINE, "tests": gpu_tests.summarise({}, 1.5), "rows": rows})
    assert page.startswith("# NVIDIA Fake/9 GPU\n") and "fp16 0.001" in page
    assert "| plain | >= 3x slow | " in page and "| reached |" in page and "| MISSED |" in page
    assert "| not measured |" in page and "FAILED: RuntimeError: it does |" in page
    assert "No module named 'no_such_package'" in page and "not_there_either" in page
    widths = {line.count(" | ") for line in page.partition("## Figures")[2].splitlines() if line.startswith("|")}
    assert widths == {10}, "a table's lines have one width"


def test_a_broken_device_ends_the_process(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("time", "SECONDS"):  # which the cases change
        monkeypatch.setattr(gpu_clock, name, getattr(gpu_clock, name))
    class Broken(HostClock):
        healthy = True

        def is_healthy(self) -> bool:
            return self.healthy

    (path,) = write(tmp_path, gpu_a=CASES)
    out = (tmp_path / "out").open("w+")
    worker = gpu_harness.Worker(path, "cpu", out)
    worker.clock = Broken()
    Broken.healthy = False
    assert worker.run([("plain", "broken"), ("plain", OURS)]) == gpu_harness.BROKEN_STATUS
    out.seek(0)
    messages = [json.loads(line) for line in out]
    assert {tuple(message["unit"]) for message in messages} == {("plain", "broken")}
    assert messages[-1]["result"] == {"error": "RuntimeError: it does"}


def test_a_capture_that_fails_leaves_the_call() -> None:
    class NoGraphs(HostClock):
        def capture(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

    row = gpu_harness.measure(NoGraphs(), lambda x: x, [(torch.ones(1),)], graph=True)
    assert row["call"]["ms"] > 0 and "graph" not in row and "not permitted" in row["no_graph"]


def test_two_cases_of_one_name_in_two_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'plain'"):
        gpu_schedule.plan(write(tmp_path, gpu_a=CASES, gpu_b=CASES))


def test_short_runs_are_repeated_within_a_sample() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        time.sleep(1e-4)

    found = sample(HostClock(), run, calls=10)
    assert 1e-2 <= found["ms"] < 1 and calls > 2 * found["samples"]


def test_bound_is_the_larger_of_two_and_none_where_not_measured() -> None:
    assert Bound(1e9).milliseconds(MACHINE) == pytest.approx(10)
    assert Bound(1e9, 1e9).milliseconds(MACHINE) == pytest.approx(1000)
    assert Bound(1.0, 1.0, "bf16").milliseconds(MACHINE) is None
    assert Bound(1.0).milliseconds({"gpu": "x"}) is None


LACKING = "import no_such_package\nimport pytest\n@pytest.mark.gpu\ndef test_nothing(): pass\n"
FAILING = "import pytest\n@pytest.mark.gpu\ndef test_fails(): assert 1 == 2, 'one is not two'\n"


def test_whole_command(tmp_path: Path, scripted, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    write(tests, test_lacking=LACKING, test_failing=FAILING)
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "FILES", [path.name for path in write(tmp_path, gpu_a=SCRIPTED)])
    monkeypatch.setattr(gpu, "TESTS", tests)
    monkeypatch.setattr(gpu_tests, "PARTS", 1)
    monkeypatch.setattr(gpu, "describe_machine", lambda device: MACHINE)
    assert gpu.main(["--device", "cpu", "--started", str(time.time() - 10)]) == 1
    report = json.loads((tmp_path / "results" / "NVIDIA-Fake-9-GPU.json").read_text())
    assert report["machine"] == MACHINE
    assert (report["tests"]["failed"], report["tests"]["skipped"]) == (1, 1)
    assert [row["name"] for row in report["rows"]] == ["first", "second"]
    page = (tmp_path / "results" / "NVIDIA-Fake-9-GPU.md").read_text()
    out = capsys.readouterr().out
    assert page.partition("## Figures")[0] in out and "one is not two" in out and "NVIDIA-Fake-9-GPU.md" in out
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "NVIDIA-Fake-9-GPU.json", "NVIDIA-Fake-9-GPU.md"]  # fmt: skip


def test_status_tells_failures_from_missed_goals_and_time() -> None:
    row = {"peers": [{"not_run": "not run: time"}], "ours": {}, "goals": [{"reached": False}]}
    assert gpu.status({"tests": None, "rows": [row]}) == 0
    assert gpu.status({"tests": {"failed": 1}, "rows": [row]}) == 1
    assert gpu.status({"tests": {"failed": 0}, "rows": [{**row, "ours": {"error": "x"}}]}) == 1


def test_time_spent_before_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "FILES", [path.name for path in write(tmp_path, gpu_a=CASES)])
    monkeypatch.setattr(gpu, "describe_machine", lambda device: MACHINE)
    started = str(time.time() - 3600)
    assert gpu.main(["--device", "cpu", "--no-tests", "--started", started, "--output", str(tmp_path / "out")]) == 0
    assert "not run: time" in (tmp_path / "out" / "NVIDIA-Fake-9-GPU.md").read_text()


def test_the_parts_of_the_nine_minutes() -> None:
    assert gpu.TESTS_SECONDS + gpu.BENCHMARKS_SECONDS + gpu.MACHINE_SECONDS < gpu.TOTAL_SECONDS + 60 <= 590
    assert all((ROOT / "benchmarks" / name).is_file() for name in gpu.FILES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_no_gpu_is_said(tmp_path: Path, capsys) -> None:
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: torch finds no CUDA device here\n"
    assert not list(tmp_path.iterdir())


def test_unknown_names_and_partial_results(capsys) -> None:
    assert gpu.main(["--only", "no such case", "--output", "x"]) == 2
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "semantic"])


def test_machine_is_described() -> None:
    machine = gpu_machine.describe("cpu")
    assert machine.keys() >= {"gpu", "torch", "triton", "python", "copy_gb_per_s", "matrix_tflop_per_s"}
    assert machine["torch"] == torch.__version__ and machine["copy_gb_per_s"] > 0.1
    assert set(machine["matrix_tflop_per_s"]) == {"fp16", "bf16", "tf32", "fp32"}
