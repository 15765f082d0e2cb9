"""Rows with their ratios and goals, the Markdown page, and the table for a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.harness.case import Bound, Case, Row
from benchmarks.harness.machine import speeds
from benchmarks.harness.measure import MEMORY, TIME

NOTE = """\
Each row is one operation beside one peer, on the same inputs in one process, by turns after a warm-up: median
milliseconds of a call, with the quartiles of the rounds. *Ratio*: the peer's median over ours. *Limit*: the bytes that
must be read and written over the measured bandwidth of a copy, or the multiplications and additions over the measured
rate of matrix products, whichever takes longer, and what share of our time that is; given where the operation's least
work can be stated. *Peak*: the memory that a call adds, its result included, in MiB. A row's command measures that row
alone.
"""
NOTES = {
    "cpu": "Peak memory is measured in a fresh process.",
    "cuda": "Times are the device's: a CUDA graph replayed between two events, each call on inputs that have left the"
    " L2 cache. The remarks have the ratio of calls through Python, launches included. What waits for the host cannot"
    " be captured: its time is that of the call.",
}
NUMBERS = (
    "ours_ms", "peer_ms", "ratio", "ours_quartiles_ms", "peer_quartiles_ms", "rounds", "ours_peak_mib",
    "peer_peak_mib", "memory_ratio", "limit_ms", "limit_share", "bound", "agreement",
)  # fmt: skip
"""Keys of every row: None where not measured or not known."""
WORDS = {True: "reached", False: "MISSED", None: "not measured"}
HEADS = ("operation", "peer", "ours ms", "peer ms", "ratio", "goals", "limit ms", "peak: ours, peer", "remarks")


def build_rows(
    subjects: Mapping[str, tuple[str, Case]], failures: Mapping[str, str], results: Mapping[tuple[str, str], Row],
    machine: Row, device: str,
) -> list[Row]:  # fmt: skip
    """A row for each module that could not be imported, and for each case."""
    failed = [
        {"name": module, "subject": module.rpartition(".")[2], "peer": None, "goals": [], "error": reason}
        | dict.fromkeys(NUMBERS)
        for module, reason in failures.items()
    ]
    return failed + [build_row(subject, case, results, machine, device) for subject, case in subjects.values()]


def build_row(
    subject: str, case: Case, results: Mapping[tuple[str, str], Row], machine: Row, device: str = "cpu"
) -> Row:
    """The row of a case; ``error``, ``absent`` and ``not_run`` are reasons why a part of it is None.

    ``ratio`` is the peer's time over ours, ``memory_ratio`` our peak over the peer's.
    """
    row: Row = {"name": case.name, "subject": subject, "peer": case.peer, "threads": case.threads}
    row |= dict.fromkeys(NUMBERS)
    for kind in (TIME, MEMORY):
        part = dict(results.get((case.name, kind), {}))
        for key in ("error", "not_run"):
            if key in part:
                row[key] = "; ".join(filter(None, (row.get(key), f"{kind}: {part.pop(key)}")))
        row |= part  # a package that is absent is so for both
    row["ratio"] = divide(row["peer_ms"], row["ours_ms"])
    row["memory_ratio"] = divide(row["ours_peak_mib"], row["peer_peak_mib"])
    if row["bound"] is not None:
        row["limit_ms"] = Bound(**row["bound"]).milliseconds(speeds(machine, case.threads))
        row["limit_share"] = divide(row["limit_ms"], row["ours_ms"])
    row["goals"] = list(build_goals(case, row))
    option = "" if device == "cpu" else f"--device {device} "
    row["command"] = f"python -m benchmarks {option}--only {shlex.quote(case.name)}"
    return row


def divide(value: float | None, by: float | None) -> float | None:
    """None where one is None or the divisor 0."""
    return value / by if value is not None and by else None


def build_goals(case: Case, row: Row) -> Iterator[Row]:
    """The goals that a case states; ``reached`` is None where there is no figure, or the row failed."""
    failed = "error" in row
    if case.goal is not None:
        yield build_goal(">= {:g}x", case.goal, row["ratio"], failed)
    if case.memory_goal is not None:
        yield build_goal("peak memory <= {:.3g}x", case.memory_goal, row["memory_ratio"], failed, at_most=True)
    if case.max_us is not None:
        time = None if row["ours_ms"] is None else 1e3 * row["ours_ms"]
        yield build_goal("<= {:g} µs", case.max_us, time, failed, at_most=True)
    if case.bound_goal is not None:
        share = None if row["limit_share"] is None else 100 * row["limit_share"]
        yield build_goal(">= {:g} % of the limit", 100 * case.bound_goal, share, failed)
    for name, most in case.share_goals.items():
        share = (row.get("shares") or {}).get(name)
        share = None if share is None else 100 * share
        yield build_goal(f"{name} <= {{:g}} % of a call", 100 * most, share, failed, at_most=True)


def build_goal(text: str, wanted: float, measured: float | None, failed: bool, at_most: bool = False) -> Row:
    reached = None if measured is None or failed else measured <= wanted if at_most else measured >= wanted
    return {"text": text.format(wanted), "measured": measured, "reached": reached}


def markdown(report: Row) -> str:
    """The page of a report {"device", "machine", "rows"}."""
    rows, device = report["rows"], report["device"]
    parts = [f"# {report['machine'].get('gpu', 'CPU')}", machine_text(report["machine"]), "## Goals"]
    parts.append(table(("operation", "peer", "goal", "measured", ""), _goal_lines(rows)))
    parts += ["## Figures", NOTE + NOTES[device]]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        lines = [(*_cells(row), f"`{row['command']}`" if "command" in row else "")
                 for row in rows if row["subject"] == subject]  # fmt: skip
        parts += [f"### {subject.replace('_', ' ')}", table((*HEADS, "command"), lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _goal_lines(rows: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        for goal in row["goals"]:
            word = (goal["reached"] is None and _remarks(row)) or WORDS[goal["reached"]]
            yield (row["name"], row["peer"] or "", goal["text"], number(goal["measured"]), word)


def _cells(row: Row) -> tuple[str, ...]:
    times = (_time(row[f"{who}_ms"], row[f"{who}_quartiles_ms"]) for who in ("ours", "peer"))
    share = "" if row["limit_share"] is None else f" ({100 * row['limit_share']:.0f} %)"
    limit = "" if row["limit_ms"] is None else number(row["limit_ms"]) + share
    goals = "; ".join(goal["text"] for goal in row["goals"])
    peaks = ", ".join(number(row[key]) for key in ("ours_peak_mib", "peer_peak_mib"))
    return (row["name"], row["peer"] or "", *times, number(row["ratio"]), goals, limit, peaks, _remarks(row))


def _time(median: float | None, quartiles: Sequence[float] | None) -> str:
    return number(median) + (f" ({' to '.join(map(number, quartiles))})" if quartiles else "")


def _remarks(row: Row) -> str:
    remarks = [f"FAILED: {row['error']}"] if "error" in row else []
    remarks += [f"absent: {row['absent']}"] if "absent" in row else []
    remarks += [row["not_run"]] if "not_run" in row else []
    remarks += [f"not captured: {row['not_captured']}"] if row.get("not_captured") else []
    call_ratio = divide(row.get("peer_call_ms"), row.get("ours_call_ms"))
    remarks += [] if call_ratio is None else [f"calls {number(call_ratio)}x"]
    remarks += [f"{name} {100 * share:.1f} %" for name, share in (row.get("shares") or {}).items()]
    return "; ".join(remarks)


def text_table(rows: Sequence[Row]) -> str:
    """One aligned line a row, headings first."""
    lines = [HEADS[:8], *(_cells(row)[:8] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    remarks = ["", *map(_remarks, rows)]
    missed = ["", *("MISSED" if any(g["reached"] is False for g in row["goals"]) else "" for row in rows)]
    return "\n".join(
        "  ".join([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] + list(filter(None, notes))).rstrip()
        for line, *notes in zip(lines, missed, remarks, strict=True)
    )


def machine_text(machine: Row) -> str:
    """The description of a machine as a table."""

    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        return "; ".join(map(text, value)) if isinstance(value, list) else str(value)

    return table(("", ""), [(key, text(value)) for key, value in machine.items()])


def number(value: float | None) -> str:
    """Three digits, all of those before the point; "-" for None."""
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(heads: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(heads), line("---" for _ in heads), *(line(cells) for cells in lines)])
