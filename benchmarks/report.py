"""Rows of the CPU suite, its Markdown page and its table for a terminal; and what pages of the GPU share with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.bounds import Bound
from benchmarks.harness import MEMORY, TIME, Case, Row

NOTE = """\
Each row is one operation beside one peer, on the same inputs in one process, by turns after a warm-up: median
milliseconds of a call, with the quartiles of the rounds. *Ratio*: the peer's median over ours; *goal*: what it is to
reach, where one is stated. *Limit*: the bytes that must be read and written over the measured bandwidth of a copy, or
the multiplications and additions over the measured rate of matrix products, whichever takes longer, and what share of
our time that is; given where the operation's least work can be stated. *Peak*: the memory that a call adds, its result
included, in MiB, measured in a fresh process. A row's command measures that row alone.
"""
NUMBERS = (
    "ours_ms", "peer_ms", "ratio", "ours_quartiles_ms", "peer_quartiles_ms", "rounds", "ours_peak_mib",
    "peer_peak_mib", "memory_ratio", "limit_ms", "limit_share",
)  # fmt: skip
"""Of a row: None where not measured or not known."""
WORDS = {True: "reached", False: "MISSED", None: ""}


def build_row(subject: str, case: Case, results: Mapping[tuple[str, str], Row], machine: Row) -> Row:
    """What is known of a case; ``error``, ``absent`` and ``not_run`` say why something is not.

    ``ratio`` is the peer's time over ours, ``memory_ratio`` our peak over the peer's; ``reached`` and
    ``memory_reached`` tell whether they reach ``goal`` and ``memory_goal``, None where there is no goal or no figure.
    """
    row: Row = {"name": case.name, "subject": subject, "peer": case.peer, "threads": case.threads}
    row |= {"goal": case.goal, "memory_goal": case.memory_goal} | dict.fromkeys(NUMBERS)
    for kind in (TIME, MEMORY):
        part = dict(results.get((case.name, kind), {}))
        for key in ("error", "not_run"):
            if key in part:
                row[key] = "; ".join(filter(None, (row.get(key), f"{kind}: {part.pop(key)}")))
        row |= part  # a package that is absent is so for both
    if row["ours_ms"] is not None:
        row["ratio"] = row["peer_ms"] / row["ours_ms"]
    if row["ours_peak_mib"] is not None and row["peer_peak_mib"]:
        row["memory_ratio"] = row["ours_peak_mib"] / row["peer_peak_mib"]
    if "bound" in row:
        row["limit_ms"] = Bound(**row["bound"]).milliseconds(speeds(machine, case.threads))
    if row["limit_ms"] is not None and row["ours_ms"] is not None:
        row["limit_share"] = row["limit_ms"] / row["ours_ms"]
    row["reached"] = None if None in (case.goal, row["ratio"]) else row["ratio"] >= case.goal
    known = None not in (case.memory_goal, row["memory_ratio"])
    row["memory_reached"] = row["memory_ratio"] <= case.memory_goal if known else None
    row["command"] = f"python -m benchmarks.cpu --only {shlex.quote(case.name)}"
    return row


def speeds(machine: Row, threads: int) -> Row:
    """The measured peaks of this machine on so many threads, as `Bound.milliseconds` takes them."""
    return next((peaks for peaks in machine.get("peaks", ()) if peaks["threads"] == threads), {})


def markdown(report: Row) -> str:
    """The page of a report {"machine", "rows"}."""
    rows = report["rows"]
    parts = ["# CPU", machine_text(report["machine"]), "## Goals"]
    parts.append(table(("operation", "peer", "goal", "measured", ""), _goal_lines(rows)))
    parts += ["## Figures", NOTE]
    heads = ("operation", "peer", "goal", "ours ms", "peer ms", "ratio", "limit ms", "peak: ours, peer", "remarks")
    for subject in dict.fromkeys(row["subject"] for row in rows):
        lines = [_line(row) for row in rows if row["subject"] == subject]
        parts += [f"### {subject.replace('_', ' ')}", table((*heads, "command"), lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _goal_lines(rows: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        for goal, value, reached, text in (
            (row.get("goal"), row.get("ratio"), row.get("reached"), ">= {:g}x"),
            (row.get("memory_goal"), row.get("memory_ratio"), row.get("memory_reached"), "peak memory <= {:g}x"),
        ):
            if goal is not None:
                measured = "-" if value is None else f"{number(value)}x"
                word = _remarks(row) or "not measured" if reached is None else WORDS[reached]
                yield (row["name"], row["peer"], text.format(goal), measured, word)


def _line(row: Row) -> tuple[str, ...]:
    if "ours_ms" not in row:  # a file that could not be read
        return (row["name"], *[""] * 7, _remarks(row), "")
    times = [
        "-" if row[f"{side}_ms"] is None
        else f"{number(row[f'{side}_ms'])} ({' to '.join(map(number, row[f'{side}_quartiles_ms']))})"
        for side in ("ours", "peer")
    ]  # fmt: skip
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    share = "" if row["limit_share"] is None else f" ({100 * row['limit_share']:.0f} %)"
    limit = "" if row["limit_ms"] is None else number(row["limit_ms"]) + share
    peaks = ", ".join(number(row[key]) for key in ("ours_peak_mib", "peer_peak_mib"))
    return (row["name"], row["peer"], goal, *times, number(row["ratio"]), limit, peaks, _remarks(row),
            f"`{row['command']}`")  # fmt: skip


def _remarks(row: Row) -> str:
    remarks = [f"FAILED: {row['error']}"] if "error" in row else []
    remarks += [f"absent: {row['absent']}"] if "absent" in row else []
    return "; ".join(remarks + ([row["not_run"]] if "not_run" in row else []))


def text_table(rows: Sequence[Row]) -> str:
    """One aligned line a row, headings first."""
    lines = [("operation", "peer", "ours ms", "peer ms", "ratio", "goal", "", "limit ms", "ours MiB", "peer MiB")]
    for row in rows:
        if row.get("ours_ms") is None:
            lines.append((row["name"], row.get("peer", ""), *[""] * 4, _remarks(row), "", "", ""))
            continue
        lines.append((
            row["name"],
            row["peer"],
            f"{row['ours_ms']:.4g}",
            f"{row['peer_ms']:.4g}",
            f"{row['ratio']:.2f}",
            "" if row["goal"] is None else f"{row['goal']:g}",
            "; ".join(filter(None, (WORDS[row["reached"]], _remarks(row)))),
            number(row["limit_ms"]),
            number(row["ours_peak_mib"]),
            number(row["peer_peak_mib"]),
        ))
    # a remark may be long: it does not widen its column
    widths = [max(len(line[k]) for line in lines if k != 6 or line[6] in WORDS.values()) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if k in (0, 1, 6) else cell.rjust(w)
                  for k, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )  # fmt: skip


def machine_text(machine: Row) -> str:
    """A table of what is known of a machine."""

    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        return "; ".join(map(text, value)) if isinstance(value, list) else str(value)

    return table(("", ""), [(key, text(value)) for key, value in machine.items()])


def number(value: float | None) -> str:
    """Three digits, all of those before the point; "-" for None."""
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(heads: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """In Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(heads), line("---" for _ in heads), *(line(cells) for cells in lines)])
