"""Runs the tests that need a GPU, each file in processes of its own and some of them at once, within a time limit."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu_pytest import BROKEN_STATUS, PART_VARIABLE, RESULTS_VARIABLE
from benchmarks.harness import ROOT
from benchmarks.processes import end_group

AT_ONCE = 8
"""Processes. They share the GPU; most of their time is the compiler's, on the CPU."""
PARTS = 4
"""Into which a file's tests are divided, a process each."""
MAX_PROCESSES = 6
"""Of one part: each beyond the first is due to a test that ended its process or broke the GPU's context."""
WHOLE = ("test_compute_sanitizer.py",)
"""Files to begin with, and not divided: they do several things at once by themselves."""
MARKER = "gpu"
NO_TESTS_STATUS = 5

Entry = dict[str, Any]

logger = logging.getLogger("benchmarks.gpu")


def find_files(folder: Path, marker: str = MARKER) -> list[Path]:
    """Test files that name the marker, in the order in which they are begun."""
    pattern = re.compile(rf"\bmark\.{marker}\b|@{marker}\b")
    found = (path for path in sorted(folder.rglob("test_*.py")) if pattern.search(path.read_text()))
    return sorted(found, key=lambda path: path.name not in WHOLE)


def run_tests(
    folder: Path, deadline: float, changed: Callable[[dict[str, Any]], None], marker: str = MARKER
) -> dict[str, Any]:
    """Counts, and names with reasons of what did not pass. `changed` is called with it after each part of a file.

    ``failed`` counts tests, and files that could not be imported; ``not_run`` those that found no time before
    `deadline` (of `time.monotonic`), among them the one at work then.
    """
    start = time.monotonic()
    entries: dict[str, Entry] = {}
    files = find_files(folder, marker)
    parts = [(path, k, n) for path in files for n in (1 if path.name in WHOLE else PARTS,) for k in range(n)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # in the order of files, not of their ends: `changed` need not be called from several threads
        for found in pool.map(lambda part: run_part(part[0], folder, deadline, marker, f"{part[1]}/{part[2]}"), parts):
            entries |= {entry["name"]: entry for entry in found}
            changed(summarise(entries, time.monotonic() - start))
    return summarise(entries, time.monotonic() - start)


def summarise(entries: dict[str, Entry], seconds: float) -> dict[str, Any]:
    by_outcome: dict[str, list[Entry]] = {"passed": [], "failed": [], "skipped": [], "not run": []}
    for entry in entries.values():
        by_outcome[entry["outcome"]].append({"name": entry["name"], "reason": entry["reason"]})
    passed, failed, skipped, missing = by_outcome.values()
    return {
        "passed": len(passed), "failed": len(failed), "skipped": len(skipped), "not_run": len(missing),
        "seconds": round(seconds, 1), "failures": failed, "skips": skipped, "missing": missing,
    }  # fmt: skip


def run_part(path: Path, folder: Path, deadline: float, marker: str = MARKER, part: str = "0/1") -> list[Entry]:
    """Every test of a file, or of one part ``k/n`` of it, with its outcome and reason."""
    name = str(path.relative_to(folder))
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results.jsonl"
        for _ in range(MAX_PROCESSES):
            status = _run_process(path, deadline, marker, part, results)
            found, left = _read(results)
            if status is None:
                names, reason = left or ([] if found else [name]), "not run: time"
                return found + [_entry(name, "not run", reason) for name in names]
            if not left:
                if status not in (0, 1, NO_TESTS_STATUS) and all(entry["outcome"] == "passed" for entry in found):
                    found.append(_entry(name, "failed", f"its process ended with status {status}"))
                return found
            if status != BROKEN_STATUS:  # the first that is left was at work
                failure = _entry(left[0], "failed", f"its process ended with status {status}")
                logger.info("%s: %s", left[0], failure["reason"])
                with results.open("a") as file:
                    file.write(json.dumps(failure) + "\n")
        found, left = _read(results)
    reason = f"not run: {MAX_PROCESSES} processes before had ended early"
    return found + [_entry(name, "not run", reason) for name in left]


def _entry(name: str, outcome: str, reason: str) -> Entry:
    return {"name": name, "outcome": outcome, "reason": reason}


def _run_process(path: Path, deadline: float, marker: str, part: str, results: Path) -> int | None:
    """Run what `results` does not hold yet -> status, None where time was up."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "benchmarks.gpu_pytest",
               "-p", "no:cacheprovider", str(path)]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, RESULTS_VARIABLE: str(results), PART_VARIABLE: part},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(remaining)
    except subprocess.TimeoutExpired:
        end_group(process)
        process.wait()
        return None


def _read(results: Path) -> tuple[list[Entry], list[str]]:
    """Outcomes so far, the last of each test, and the tests that have none."""
    found: dict[str, Entry] = {}
    collected: dict[str, None] = {}  # of several processes, in order
    for entry in map(json.loads, results.read_text().splitlines() if results.exists() else []):
        if "collected" in entry:
            collected |= dict.fromkeys(entry["collected"])
        else:
            found[entry["name"]] = entry
    return list(found.values()), [name for name in collected if name not in found]
