"""Scaling curves: fitted exponents, what is measured in a limited time, and what the file says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import linregress

from benchmarks import scaling, scaling_measure, sides
from benchmarks.scaling_curves import AXES, Curve, curves
from benchmarks.scaling_measure import CALLS, MEMORY_CALLS, expected, measure_peaks, measure_times, time_curve

XS = st.lists(st.integers(1, 10**7), min_size=3, max_size=9, unique=True)


@settings(max_examples=60, deadline=None)
@given(xs=XS, exponent=st.floats(-1, 4), factor=st.floats(1e-6, 1e3))
def test_a_power_law_gives_its_exponent(xs: list[int], exponent: float, factor: float) -> None:
    fit = scaling.fit_exponent([(x, factor * x**exponent) for x in xs])
    assert fit is not None
    assume(math.log(fit.high / fit.low) > 1e-3)
    assert fit.exponent == pytest.approx(exponent, abs=1e-6)
    assert 0 <= fit.error < 1e-6


@settings(max_examples=60, deadline=None)
@given(xs=XS, data=st.data())
def test_fit_is_scipys_of_the_upper_half(xs: list[int], data: st.DataObject) -> None:
    times = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=len(xs), max_size=len(xs)))
    points = list(zip(xs, times, strict=True))
    fit = scaling.fit_exponent(data.draw(st.permutations(points)))
    upper = sorted(points)[-max(3, (len(points) + 1) // 2) :]
    assume(math.log(upper[-1][0] / upper[0][0]) > 1e-2)
    assume(len({time for _, time in upper}) > 1)  # SciPy's error of a constant is not a number
    oracle = linregress(*np.log(np.array(upper)).T)
    assert fit is not None and (fit.low, fit.high) == (upper[0][0], upper[-1][0])
    assert fit.exponent == pytest.approx(oracle.slope, rel=1e-6, abs=1e-6)
    assert fit.error == pytest.approx(oracle.stderr, rel=1e-4, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.1, 10), unit=st.floats(0.1, 10))
def test_units_do_not_change_the_exponent(factor: float, unit: float) -> None:
    points = [(1, 5.0), (2, 5.5), (4, 7.0), (8, 13.0), (16, 22.0)]
    one, other = (scaling.fit_exponent(p) for p in (points, [(unit * x, factor * y) for x, y in points]))
    assert one is not None and other is not None
    assert one[:2] == pytest.approx(other[:2], rel=1e-6)


def test_what_small_sizes_cost_in_any_case_does_not_count() -> None:
    fit = scaling.fit_exponent([(1, 50.0), (10, 50.0), (100, 100.0), (1000, 1000.0), (10000, 10000.0)])
    assert fit == pytest.approx((1.0, 0.0, 100, 10000), abs=1e-9)


@pytest.mark.parametrize("points", [[], [(1, 1.0)], [(1, 1.0), (2, 2.0)], [(3, 1.0), (3, 2.0), (3, 4.0)]])
def test_too_few_points_have_no_fit(points: list[tuple[float, float]]) -> None:
    assert scaling.fit_exponent(points) is None


@pytest.mark.parametrize("bad", [(0, 1.0), (-1, 1.0), (4, 0.0), (4, -2.0)])
def test_a_fit_refuses_what_has_no_logarithm(bad: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="points: expected numbers above 0, got"):
        scaling.fit_exponent([(1, 1.0), (2, 2.0), bad])


def test_fits_of_both_sides_say_their_points() -> None:
    times = [(1, 8.0, 1.0), (2, 8.0, 4.0), (4, 16.0, 16.0), (8, 32.0, 64.0), (16, 64.0, None)]
    curve: dict[str, Any] = {"points": [{"x": x, "ours_ms": ours, "peer_ms": peer} for x, ours, peer in times]}
    scaling.add_fit(curve)
    assert (curve["ours_exponent"], curve["peer_exponent"]) == pytest.approx((1.0, 2.0))
    assert curve["fit"] == "log-log least squares over points 4..16; peer: points 2..8"
    for point in curve["points"]:
        point["peer_ms"] = None
    scaling.add_fit(curve)
    assert curve["peer_exponent"] is None and curve["peer_exponent_error"] is None
    assert curve["fit"].endswith("; peer: none, too few points")


class Clock:
    """A clock that only the operations of `power_curve` and `timer` move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def timer(self, first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> Any:
        """As `time_interleaved` does with slow operations."""
        samples: tuple[list[float], list[float]] = ([], [])
        for _ in range(2):
            first(), second()
        for _ in range(repeats):
            for own, operation in zip(samples, (first, second), strict=True):
                start = self.now
                operation()
                own.append(self.now - start)
        return samples


def power_curve(clock: Clock, ours: Callable[[int], float], peer: Callable[[int], float], **options: Any) -> Curve:
    """A curve whose sides take the given seconds at x."""

    def take(seconds: float) -> None:
        clock.now += seconds

    fields = {"name": "curve", "subject": "operators", "axis": "classes", "unit": "classes", "peer": "peer",
              "points": (1, 2, 4, 8, 16), "weight": 1.0} | options  # fmt: skip
    return Curve(setup=lambda x: (lambda: take(ours(x)), lambda: take(peer(x))), **fields)


def points_of(messages: Any) -> list[dict[str, Any]]:
    return [message["point"] for message in messages if "point" in message]


def test_a_curve_in_plenty_of_time() -> None:
    clock = Clock()
    curve = power_curve(clock, lambda x: 0.001 * x, lambda x: 0.01 * x**2, labels={16: "4x4"}, points=(4, 16, 1024))
    messages = list(time_curve(curve, 1e6, clock, clock.timer))
    assert [message["begun"] for message in messages[::2]] == [4, 16, 1024], "announced before it is measured"
    points = points_of(messages)
    assert [(p["x"], p["label"]) for p in points] == [(4, "4"), (16, "4x4"), (1024, "1 024")]
    assert [p["ours_ms"] for p in points] == pytest.approx([4, 16, 1024])
    assert [p["peer_ms"] for p in points] == pytest.approx([160, 2560, 10485760])
    assert all(p["rounds"] == 3 and p["peer_quartiles_ms"] == pytest.approx([p["peer_ms"]] * 2) for p in points)
    assert not any("skipped" in key for p in points for key in p)


def test_a_slow_peer_leaves_its_largest_points_out() -> None:
    clock = Clock()
    curve = power_curve(clock, lambda x: 0.001, lambda x: float(x))
    points = points_of(time_curve(curve, 60, clock, clock.timer))  # 5 calls of 1, 2 and 4 s fit, not those of 8
    assert [p["peer_ms"] is not None for p in points] == [True, True, True, False, False]
    assert all(p["ours_ms"] == pytest.approx(1, abs=1e-6) for p in points), "ours goes on alone"
    assert points[3]["peer_skipped"] == "would take about 40 s, 25 s are left"
    assert [p["rounds"] for p in points] == [3, 3, 3, 6, 6] and clock.now < 1060


def test_a_peer_that_was_left_out_stays_out() -> None:
    clock = Clock()
    slow = {1: 1.0, 2: 2.0, 4: 100.0, 8: 0.0, 16: 0.0}
    points = points_of(time_curve(power_curve(clock, lambda x: 0.1, slow.__getitem__), 50, clock, clock.timer))
    assert [p["peer_ms"] is None for p in points] == [False, False, False, True, True]


def test_points_that_do_not_fit_say_so() -> None:
    clock = Clock()
    points = points_of(time_curve(power_curve(clock, lambda x: float(x), lambda x: float(x)), 0.0, clock, clock.timer))
    assert points[0]["ours_ms"] == pytest.approx(1000), "the first is measured in any case"
    assert all(p["ours_ms"] is None and p["peer_ms"] is None for p in points[1:])
    assert all("s, 0 s are left" in p["skipped"] and "s, 0 s are left" in p["peer_skipped"] for p in points[1:])
    assert clock.now == 1010


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.tuples(st.floats(0.25, 3), st.floats(0.25, 3)),
    first=st.tuples(st.floats(1e-4, 10), st.floats(1e-4, 10)), seconds=st.floats(0, 1000),
)  # fmt: skip
def test_a_curve_keeps_to_its_time(exponents: tuple[float, float], first: tuple[float, float], seconds: float) -> None:
    """Beyond the first two points, which are measured to know what the others take."""
    clock = Clock()
    ours, peer = (lambda x, e=e, f=f: f * x**e for e, f in zip(exponents, first, strict=True))
    points = points_of(time_curve(power_curve(clock, ours, peer), seconds, clock, clock.timer))
    known = CALLS * sum(side(x) for side in (ours, peer) for x in (1, 2))
    assert clock.now - 1000 <= seconds + known + CALLS * ours(16) * (1 + 1e-9)
    assert len(points) == 5 and sorted(p["x"] for p in points) == [p["x"] for p in points]
    for point in points:  # every side of every point has a time or a reason
        assert (point["ours_ms"] is None) == ("skipped" in point)
        assert (point["peer_ms"] is None) == ("peer_skipped" in point)


@pytest.mark.parametrize(
    ("known", "seconds"),
    [([], 0.0), ([(4, 2.0)], 4.0), ([(4, 2.0), (8, 8.0)], 32.0), ([(4, 2.0), (8, 2.0)], 2 * 2**0.25),
     ([(4, 1.0), (8, 64.0)], 512.0)],
)  # fmt: skip
def test_expected_seconds(known: list[tuple[int, float]], seconds: float) -> None:
    assert expected(known, 16) == pytest.approx(seconds)


def test_time_of_one_curve_goes_to_the_next_and_a_failure_costs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, given_seconds = Clock(), {}

    def stand_in(curve: Curve, seconds: float, clock: Clock) -> Any:
        given_seconds[curve.name] = seconds
        if curve.name == "broken":
            raise RuntimeError("no such peer")
        clock.now += 10
        yield {"begun": 1}

    monkeypatch.setattr(scaling_measure, "time_curve", stand_in)
    known = {name: power_curve(clock, float, float, name=name, weight=weight)
             for name, weight in (("first", 1.0), ("broken", 1.0), ("last", 2.0))}  # fmt: skip
    messages = list(measure_times([(name, None) for name in known], known, clock() + 100, clock))
    assert given_seconds == pytest.approx({"first": 25, "broken": 30, "last": 90})
    assert messages == [{"curve": "first", "begun": 1}, {"curve": "broken", "error": "RuntimeError: no such peer"},
                        {"curve": "last", "begun": 1}]  # fmt: skip


def test_peaks_as_far_as_the_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(scaling_measure, "peak_memory", lambda operation: operation() or 7.0)
    known = {name: power_curve(clock, float, float, name=name) for name in ("good", "broken")}

    def broken(x: int) -> Any:
        raise MemoryError("too large")

    object.__setattr__(known["broken"], "setup", broken)
    work = [("good", (1, 2.0)), ("broken", (1, 2.0)), ("broken", (2, 3.0)), ("good", (4, 8.0)), ("good", (8, 16.0))]
    end = clock() + 2.0 + MEMORY_CALLS * 8.0
    messages = list(measure_peaks(work, known, end, clock))
    assert points_of(messages) == [{"x": x, "ours_peak_mib": 7.0, "peer_peak_mib": 7.0} for x in (1, 4)]
    assert [m["error"] for m in messages if "error" in m] == ["MemoryError: too large"]


WORKER = """
import json, os, sys, time
for name, action in json.load(sys.stdin)["work"]:
    print(json.dumps({"curve": name, "begun": 1}), flush=True)
    if action == "die": os._exit(3)
    if action == "hang": time.sleep(60)
    print(json.dumps({"curve": name, "point": {"x": 1}}), flush=True)
"""


@pytest.mark.no_cover
def test_a_process_that_dies_costs_the_curve_at_work(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    heard: list[dict[str, Any]] = []
    work = [("a", ""), ("b", "die"), ("c", ""), ("b", ""), ("d", "die")]
    scaling.measure("time", work, 300.0, heard.append, [sys.executable, str(tmp_path / "worker.py")])
    assert [m["curve"] for m in heard if "point" in m] == ["a", "c"]
    reason = "time: its process ended with status 3"
    assert [(m["curve"], m["error"]) for m in heard if "error" in m] == [("b", reason), ("d", reason)]


@pytest.mark.no_cover
def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(scaling, "GRACE_SECONDS", 0.2)
    heard: list[dict[str, Any]] = []
    work = [("d", "hang"), ("e", "")]
    scaling.measure("memory", work, 0.5, heard.append, [sys.executable, str(tmp_path / "worker.py")])
    assert [m for m in heard if "begun" not in m] == [{"curve": "d", "error": "memory: not done in its time"}]


@pytest.mark.no_cover
def test_the_process_measures_a_curve() -> None:
    """The smallest there is, by name, through the process that `benchmarks.scaling` starts."""
    heard: list[dict[str, Any]] = []
    scaling.measure("memory", [("assignment, queries = targets", (50, 0.001))], 300, heard.append)
    assert [set(m) - {"curve"} for m in heard] == [{"begun"}, {"point"}]
    assert set(heard[1]["point"]) == {"x", "ours_peak_mib", "peer_peak_mib"} and heard[1]["point"]["x"] == 50


def test_command_writes_point_by_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    chosen = [power_curve(clock, float, float, name=name, weight=weight, memory=name == "cheap")
              for name, weight in (("dear", 9.0), ("cheap", 1.0))]  # fmt: skip
    output = tmp_path / "scaling.json"
    asked: list[tuple[str, Any]] = []

    def measure(kind: str, work: Any, seconds: float, received: Callable[[Any], None]) -> None:
        asked.append((kind, work))
        if kind == "memory":
            received({"curve": "cheap", "point": {"x": 2, "ours_peak_mib": 0.5, "peer_peak_mib": 4.0}})
            return
        for name, _ in work:
            for x in (1, 2, 4):
                received({"curve": name, "begun": x})
                peer = 3.0 * x if name == "cheap" and x < 4 else None
                received({"curve": name, "point": {"x": x, "label": str(x), "ours_ms": 2.0 * x, "peer_ms": peer}})
                if output.exists():
                    written = json.loads(output.read_text())["curves"]
                    assert any(p["x"] == x for curve in written for p in curve["points"]), "written as it is measured"
        if len(work) == 2:
            received({"curve": "dear", "error": "RuntimeError: too dear"})

    monkeypatch.setattr("benchmarks.scaling_curves.curves", lambda: chosen)
    monkeypatch.setattr(scaling, "describe_machine", lambda: {"cpu": "stand-in"})
    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "RESULTS", output)
    assert scaling.main(["--only", "cheap"]) == 0 and not output.exists(), "a part must not replace the whole"
    assert scaling.main([]) == 1, "a curve failed"
    assert asked[-2] == ("time", [("cheap", None), ("dear", None)]), "what short curves leave goes to the long ones"
    assert asked[-1] == ("memory", [("cheap", (1, 0.005)), ("cheap", (2, 0.010))])
    content = json.loads(output.read_text())
    assert content["machine"] == {"cpu": "stand-in"}
    assert [curve["name"] for curve in content["curves"]] == ["dear", "cheap"]
    keys = {"name", "subject", "axis", "unit", "peer", "threads", "points", "ours_exponent", "peer_exponent", "fit",
            "ours_exponent_error", "peer_exponent_error"}  # fmt: skip
    assert set(content["curves"][1]) == keys and set(content["curves"][0]) == keys | {"error"}
    assert content["curves"][1]["points"][1] == {
        "x": 2, "label": "2", "ours_ms": 4.0, "peer_ms": 6.0, "ours_peak_mib": 0.5, "peer_peak_mib": 4.0
    }  # fmt: skip
    assert "FAILED: RuntimeError: too dear" in capsys.readouterr().out
    monkeypatch.setattr(scaling, "measure", lambda *arguments: None)
    assert scaling.main(["--only", "cheap", "--minutes", "0.5", "--output", str(tmp_path / "none.json")]) == 1
    (row,) = json.loads((tmp_path / "none.json").read_text())["curves"]
    assert row["error"] == "time: nothing was left of 0.5 minutes" and row["points"] == []
    with pytest.raises(ValueError, match="only: expected a part of a curve's name or peer, got 'nothing'"):
        scaling.main(["--only", "nothing"])


def test_curves_are_well_formed() -> None:
    known = curves()
    assert len({curve.name for curve in known}) == len(known)
    assert {curve.axis for curve in known} == set(AXES)
    for curve in known:
        assert len(curve.points) >= 3 and list(curve.points) == sorted(set(curve.points)), curve.name
        assert not curve.labels or set(curve.labels) == set(curve.points), curve.name
        assert curve.weight > 0 and curve.subject in ("end_to_end", "network", "operators")


@pytest.mark.parametrize(("queries", "batch"), [(25, 2), (100, 1), (230, 1)])
def test_semantic_sides_agree(queries: int, batch: int) -> None:
    torch.manual_seed(0)
    operations = sides.semantic("peaky", 30, queries, (64, 96), batch)
    ours, official, theirs = (operations[name]() for name in (sides.OURS, sides.OFFICIAL, sides.HUGGINGFACE))
    assert ours.labels.shape == official.shape == (batch, 64, 96)
    assert (ours.labels == official).float().mean() > 0.995
    assert (torch.stack(theirs) == official).float().mean() > 0.8, "it resizes scores, not logits"
    _, classes = sides.semantic_logits("peaky", 30, queries, (16, 24))
    live = (classes.softmax(-1)[..., :-1].amax(-1) > 0.5).sum()
    assert classes.shape == (1, queries, 31) and live == pytest.approx(queries / 5, abs=1)


@pytest.mark.parametrize("queries", [25, 300])
def test_panoptic_sides_agree(queries: int) -> None:
    torch.manual_seed(0)
    operations = sides.panoptic(queries, (96, 128))
    ours, official = operations[sides.OURS](), operations[sides.OFFICIAL]()
    assert official[0].unique().numel() > 3
    assert ours[0].squeeze(0).unique().numel() == official[0].unique().numel()


def test_matching_sides_agree() -> None:
    torch.manual_seed(0)
    operations = sides.matching(queries=12, targets=5, batch=2)
    query = operations[sides.OURS]().query[0]
    for row, (queries, order) in zip(query, operations[sides.HUGGINGFACE](), strict=True):
        assert torch.equal(row[order], queries)


def test_criterion_sides_agree() -> None:
    torch.manual_seed(0)
    operations = sides.criterion(batch=1)
    for got, wanted in zip(operations[sides.OURS](), operations[sides.OFFICIAL](), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
