"""Rows, goals and the Markdown page of what the GPU benchmarks and tests found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu_harness import OURS, Case, Peer
from benchmarks.gpu_schedule import Plan, Results
from benchmarks.harness import Row
from benchmarks.report import machine_text, number, table

NOTE = """\
Times are medians of a call in µs, each call on inputs that have left the L2 cache. *Graph*: the device's time, a CUDA
graph replayed between two events; goals and ratios are about it. *Call*: the same through Python, launches included. A
peer that waits for the host cannot be captured: its call is what its ratio counts. *Bound*: the bytes that must be read
and written over the measured bandwidth of a copy, or multiplications and additions over the measured rate of matrix
products, whichever takes longer. *Peak*: the most memory that a call allocates, MiB, its result included.
"""


def build_rows(plan: Plan, results: Results, machine: Row) -> list[Row]:
    """A row for each case, with those of its peers and its goals; and one for each file that could not be read."""
    rows = [_row(case, results, machine) for case in plan.cases.values()]
    return rows + [{"name": name, "error": reason, "peers": [], "goals": []} for name, reason in plan.failures.items()]


def _row(case: Case, results: Results, machine: Row) -> Row:
    ours = dict(results.get((case.name, OURS), {}))
    time, bound = device_ms(ours), case.bound.milliseconds(machine)
    row: Row = {
        "name": case.name, "ours": ours, "bound_ms": bound, "bytes": case.bound.bytes,
        "operations": case.bound.operations, "rate": case.bound.rate if case.bound.operations else None,
        "bound_share": bound / time if bound and time else None,
    }  # fmt: skip
    row["peers"] = [_peer_row(case, peer, ours, results) for peer in case.peers]
    row["goals"] = list(_goals(case, row))
    return row


def _peer_row(case: Case, peer: Peer, ours: Row, results: Results) -> Row:
    theirs = dict(results.get((case.name, peer.name), {}))
    call, our_call = (side["call"]["ms"] if "call" in side else None for side in (theirs, ours))
    return {
        "name": peer.name,
        **theirs,
        "ratio": _ratio(device_ms(theirs), device_ms(ours)),
        "call_ratio": _ratio(call, our_call),
        "memory_ratio": _ratio(theirs.get("peak_mib"), ours.get("peak_mib")),
    }


def device_ms(side: Row) -> float | None:
    """Of a graph where there is one, else of a call."""
    timed = side.get("graph") or side.get("call")
    return timed["ms"] if timed else None


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs is not None and ours else None


def _goals(case: Case, row: Row) -> Iterable[Row]:
    """Each with ``reached``: None where it was not measured, or one of the sides failed."""
    peers = {peer["name"]: peer for peer in row["peers"]}
    time = device_ms(row["ours"])
    broken = "error" in row["ours"]
    if case.max_us is not None:
        yield _goal(f"<= {case.max_us:g} µs", 1e3 * time if time else None, case.max_us, broken, at_most=True)
    if case.bound_share is not None:
        share = None if row["bound_share"] is None else 100 * row["bound_share"]
        yield _goal(f">= {100 * case.bound_share:g} % of the bound", share, 100 * case.bound_share, broken)
    for name, most in case.max_shares.items():
        share = row["ours"].get("shares", {}).get(name)
        text = f"{name} <= {100 * most:g} % of a call"
        yield _goal(text, None if share is None else 100 * share, 100 * most, broken, at_most=True)
    for peer in case.peers:
        found = peers[peer.name]
        failed = broken or "error" in found
        if peer.ratio is not None:
            yield _goal(f">= {peer.ratio:g}x {peer.name}", found["ratio"], peer.ratio, failed)
        if peer.memory_ratio is not None:
            text = f"peak memory <= 1/{peer.memory_ratio:g} of {peer.name}"
            yield _goal(text, found["memory_ratio"], peer.memory_ratio, failed)


def _goal(text: str, value: float | None, wanted: float, failed: bool, at_most: bool = False) -> Row:
    reached = None if value is None or failed else value <= wanted if at_most else value >= wanted
    return {"text": text, "value": value, "reached": reached}


def has_errors(rows: Iterable[Row]) -> bool:
    """Whether anything broke; what is not installed or found no time did not."""
    return any("error" in part for row in rows for part in (row, row.get("ours", {}), *row["peers"]))


def markdown(report: dict[str, Any]) -> str:
    """The page of a report {"machine", "tests", "rows"}."""
    machine, rows = report["machine"], report["rows"]
    parts = [f"# {machine.get('gpu', 'GPU')}", machine_text(machine)]
    if report["tests"] is not None:
        parts += ["## Tests", _tests_text(report["tests"])]
    parts += ["## Goals", table(("operation", "goal", "measured", ""), _goal_lines(rows)), "## Figures", NOTE]
    heads = ("operation", "side", "graph", "call", "bound", "% of bound", "peak", "ratio", "call ratio", "peak ratio")
    parts.append(table((*heads, "remarks"), [line for row in rows for line in _row_lines(row)]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _tests_text(tests: Row) -> str:
    counts = ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped", "not_run"))
    lines = [f"{counts}; {tests['seconds']:.0f} s."]
    for kind, title in (("failures", "Failed"), ("skips", "Skipped"), ("missing", "Not run")):
        if tests[kind]:
            lines.append(table((title, "reason"), [(entry["name"], entry["reason"]) for entry in tests[kind]]))
    return "\n\n".join(lines)


def _goal_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    words = {True: "reached", False: "MISSED", None: "not measured"}
    return [
        (row["name"], goal["text"], number(goal["value"]), words[goal["reached"]])
        for row in rows
        for goal in row["goals"]
    ]


def _row_lines(row: Row) -> Iterable[tuple[str, ...]]:
    if "error" in row:
        yield (row["name"], *[""] * 9, f"FAILED: {row['error']}")
        return
    share = "" if row["bound_share"] is None else f"{100 * row['bound_share']:.0f}"
    bound = "" if row["bound_ms"] is None else number(1e3 * row["bound_ms"])
    yield (row["name"], OURS, *_times(row["ours"]), bound, share, number(row["ours"].get("peak_mib")), "", "", "",
           _remarks(row["ours"]))  # fmt: skip
    for peer in row["peers"]:
        ratios = (number(peer[key]) for key in ("ratio", "call_ratio", "memory_ratio"))
        yield ("", peer["name"], *_times(peer), "", "", number(peer.get("peak_mib")), *ratios, _remarks(peer))


def _times(side: Row) -> tuple[str, str]:
    graph, call = (number(1e3 * side[key]["ms"]) if key in side else "-" for key in ("graph", "call"))
    return graph, call


def _remarks(side: Row) -> str:
    remarks = [f"FAILED: {side['error']}"] if "error" in side else []
    remarks += [side[key] for key in ("absent", "not_run") if key in side]
    remarks += [f"no graph: {side['no_graph']}"] if "no_graph" in side else []
    remarks += [f"agrees {side['agreement']:.4f}"] if "agreement" in side else []
    remarks += [f"{name} {100 * share:.1f} %" for name, share in side.get("shares", {}).items()]
    return "; ".join(remarks)
