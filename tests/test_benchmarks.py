"""The benchmark harness on tiny cases: what it measures, what it writes, and that a failing case costs its row only."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import class_count, cpu, harness, machine

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak of memory")
KEYS = {"name", "peer", "ours_ms", "peer_ms", "ratio", "goal", "ours_peak_mib", "peer_peak_mib"}

CASES = '''
import os, time
import torch
from benchmarks.harness import Case

def sleeps():
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    return (lambda: time.sleep(0.002)), (lambda: time.sleep(0.012))

def memory():  # one after the other, and all together in pieces that come from the heap
    return (lambda: [torch.ones(2**22).sum() for _ in range(4)]), (lambda: [torch.ones(2**12) for _ in range(4096)])

def broken():
    raise RuntimeError("no such peer")

def killed():
    os._exit(3)

def cases():
    return [
        Case("sleep short", "long", 2.0, sleeps, threads=1),
        Case("broken", "nobody", 1.0, broken),
        Case("killed", "nobody", 1.0, killed),
        Case("memory", "64 MiB", 1e9, memory),
    ]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    (folder / "cpu_first.py").write_text("import a_module_that_is_not_there")
    (folder / "cpu_tiny.py").write_text(CASES)
    (folder / "not_cpu.py").write_text("raise SystemExit('not a file of cases')")
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, harness.Row]:
    return {row["name"]: row for row in cpu.run_all(folder)}


def test_failures_are_rows_and_lose_no_others(rows: dict[str, harness.Row]) -> None:
    assert list(rows) == ["cpu_first.py", "sleep short", "broken", "killed", "memory"]
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert set(errors) == {"cpu_first.py", "broken", "killed"}
    assert "a_module_that_is_not_there" in errors["cpu_first.py"]
    assert errors["broken"] == "time: RuntimeError: no such peer"
    assert "status 3" in errors["killed"]
    assert all(set(row) >= KEYS for name, row in rows.items() if name != "cpu_first.py")


def test_row_of_a_case(rows: dict[str, harness.Row]) -> None:
    row = rows["sleep short"]
    assert row["peer"] == "long" and row["goal"] == 2.0 and row["threads"] == 1 and row["rounds"] >= 5
    assert row["ours_ms"] >= row["ours_min_ms"] >= 2 and row["peer_ms"] >= row["peer_min_ms"] >= 12
    assert row["ratio"] == row["peer_ms"] / row["ours_ms"]
    assert row["ratio"] > 2 and row["reached"] is True
    assert rows["memory"]["reached"] is False
    json.dumps(list(rows.values()), allow_nan=False)


@LINUX
@pytest.mark.parametrize(("name", "ours", "peer"), [("sleep short", 0, 0), ("memory", 16, 64)])
def test_memory_of_each_side(rows: dict[str, harness.Row], name: str, ours: float, peer: float) -> None:
    assert rows[name]["ours_peak_mib"] == pytest.approx(ours, rel=0.05, abs=1)
    assert rows[name]["peer_peak_mib"] == pytest.approx(peer, rel=0.05, abs=1)


def test_peak_memory_is_none_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_status_kib", lambda field: {}[field])
    assert harness.peak_memory(lambda: None) is None


def test_short_operations_are_repeated_within_a_sample() -> None:
    calls = {"fast": 0, "slow": 0}

    def fast() -> None:
        calls["fast"] += 1

    def slow() -> None:
        calls["slow"] += 1
        time.sleep(harness.SAMPLE_SECONDS)

    first, second = harness.time_interleaved(fast, slow, repeats=5)
    assert len(first) == len(second) >= 5
    assert len(second) < calls["slow"] <= len(second) + 5
    assert calls["fast"] > 1000 * len(first)
    assert max(first) < 1e-4 < harness.SAMPLE_SECONDS <= min(second)


def test_a_case_that_never_ends_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "cpu_endless.py"
    path.write_text(
        "import time\nfrom benchmarks.harness import Case\n"
        "def cases(): return [Case('endless', 'x', 1.0, lambda: time.sleep(60))]"
    )
    (case,) = harness.load_cases(path)
    assert harness.run_fresh(path, case, timeout=2)["error"] == "time: not done after 2 s"


@pytest.mark.parametrize("field", ["goal", "threads", "repeats"])
def test_invalid_case(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected >= .*got -1"):
        harness.Case(**{"name": "n", "peer": "p", "goal": 1.0, "setup": lambda: None, field: -1})


def test_two_cases_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "cpu_twice.py"
    path.write_text("from benchmarks.harness import Case\ndef cases(): return 2 * [Case('same', 'x', 1.0, print)]")
    with pytest.raises(ValueError, match="same"):
        harness.load_cases(path)


def test_table_is_aligned_and_marks_what_is_missed(rows: dict[str, harness.Row]) -> None:
    head, *lines = cpu.format_table(list(rows.values())).splitlines()
    assert [line.split("  ")[0] for line in lines] == list(rows)
    by_name = dict(zip(rows, lines, strict=True))
    assert "reached" in by_name["sleep short"] and "MISSED" in by_name["memory"]
    assert "FAILED: time: RuntimeError: no such peer" in by_name["broken"]
    right = head.index(" ratio") + len(" ratio")
    assert by_name["sleep short"][:right].endswith(f"{rows['sleep short']['ratio']:.2f}")


def test_command_writes_the_file(
    folder: Path, rows: dict[str, harness.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "FOLDER", folder)
    monkeypatch.setattr(cpu, "RESULTS", tmp_path / "cpu.json")
    monkeypatch.setattr(cpu, "run_fresh", lambda path, case: rows[case.name])
    monkeypatch.setattr(machine, "_fresh_peaks", lambda threads: {"threads": threads})
    assert cpu.main(["--only", "sleep"]) == 1, "a file of cases could not be read"
    assert not list(tmp_path.iterdir()), "a part of the cases must not replace the figures of all"
    with pytest.raises(ValueError, match="only: expected"):
        (folder / "cpu_first.py").rename(folder / "first.py")
        cpu.main(["--only", "no such case"])
    assert cpu.main(["--only", "memory", "--output", str(tmp_path / "new folder" / "part.json")]) == 0, "a missed goal"
    assert cpu.main([]) == 1, "a case failed"
    part, whole = (json.loads((tmp_path / name).read_text()) for name in ("new folder/part.json", "cpu.json"))
    assert part["rows"] == [rows["memory"]]
    assert whole["rows"] == [row for name, row in rows.items() if name != "cpu_first.py"]
    assert whole["machine"].keys() >= {"cpu", "cores", "threads", "isa", "python", "torch", "numpy", "scipy", "peaks"}
    assert whole["machine"]["torch"] == torch.__version__


def test_peaks_are_measured() -> None:
    threads = torch.get_num_threads()
    try:
        peaks = machine.measure_peaks(1, size=256, mebibytes=8)
    finally:
        torch.set_num_threads(threads)
    assert peaks["threads"] == 1 and peaks["matmul_gflop_per_s"] > 1 and peaks["copy_gb_per_s"] > 0.5


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
