"""Plugin of pytest: runs a part of the tests, and writes a line of JSON for each that ends into GPU_TEST_RESULTS.

So that what is known survives a process that crashes or is ended. After a failure that broke the GPU's context, in
which every later test would fail too, the process ends itself; `benchmarks.gpu_tests` starts another for the rest.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

RESULTS_VARIABLE = "GPU_TEST_RESULTS"
PART_VARIABLE = "GPU_TEST_PART"
"""``k/n``: the k-th (from 0) of n equal parts of what is collected."""
BROKEN_STATUS = 77
OWN = {"maskformer_fast", "benchmarks", "tests"}


def _write(entry: dict[str, Any]) -> None:
    with open(os.environ[RESULTS_VARIABLE], "a") as file:
        file.write(json.dumps(entry) + "\n")


def _outcome(report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str]:
    """passed, failed or skipped, and why; a package that is not installed is a reason to skip."""
    if report.passed:
        return "passed", ""
    text = report.longreprtext
    absent = re.findall(r"ModuleNotFoundError: No module named '([\w.]+)'", text)
    if report.failed and absent and absent[-1].split(".")[0] not in OWN:
        return "skipped", f"{absent[-1]} is not installed"
    if report.skipped and isinstance(report.longrepr, tuple):
        return "skipped", str(report.longrepr[2]).removeprefix("Skipped: ")
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return report.outcome, (errors or text.strip().splitlines() or [""])[0][:300]


def _device_works() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        outcome, reason = _outcome(report)
        _write({"name": report.nodeid, "outcome": outcome, "reason": reason})


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of this part that no process before has ended."""
    part, parts = map(int, os.environ[PART_VARIABLE].split("/"))
    mine = items[part * len(items) // parts : (part + 1) * len(items) // parts]  # neighbours share compiled kernels
    results = Path(os.environ[RESULTS_VARIABLE])
    lines = results.read_text().splitlines() if results.exists() else []
    ended = {entry["name"] for entry in map(json.loads, lines) if "name" in entry}
    items[:] = [item for item in mine if item.nodeid not in ended]


def pytest_collection_finish(session: pytest.Session) -> None:
    _write({"collected": [item.nodeid for item in session.items]})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        outcome, reason = _outcome(report)
        _write({"name": report.nodeid, "outcome": outcome, "reason": reason})
        if report.failed and not _device_works():
            os._exit(BROKEN_STATUS)
