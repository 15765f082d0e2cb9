"""Runs units of a benchmark in processes of many units each, so that neither a crash nor time loses the rest.

A unit is a case and a part of it. A process reads a list of units from its input and reports each as it comes, as lines
``{"unit", "stage", "result"}`` of JSON; the stage is "done" when it goes on to the next. ``"said"`` may tell how much
was on the error stream before the unit: what comes after it explains the unit's end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.harness import ROOT, Row

BROKEN_STATUS = 77
"""Exit status of a process whose device works no more: another goes on."""
NOT_RUN = "not run: time"

Unit = tuple[str, str]  # case, part of it
Results = dict[Unit, Row]

logger = logging.getLogger("benchmarks")


def run_units(
    command: Sequence[str],
    environment: Mapping[str, str],
    units: Sequence[Unit],
    deadline: float,  # of `time.monotonic`
    silence: Mapping[str, float],  # seconds without a word after which a case's unit hangs
    results: Results,
    changed: Callable[[Results], None],
    summary: Callable[[Row], str],
) -> int:
    """Run one process, which adds to `results` -> how many units it is done with, for good or bad: at least one.

    `changed` is called with the results so far after each unit, `summary` says a unit's result in a few words.
    """
    done, at_work, said = 0, False, 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        guard = Guard(process, deadline, silence[units[0][0]])
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it may end at once; its status tells
            json.dump(units, stdin)
        with process.stdout as lines:
            for line in lines:
                message = json.loads(line)
                unit: Unit = tuple(message["unit"])
                result = results.setdefault(unit, {})
                result |= message["result"]
                at_work = message["stage"] != "done"
                said = message.get("said", said)
                guard.silence = silence[unit[0]]
                guard.restart(final=message["stage"] == "done" and unit == units[-1])
                if message["stage"] == "done":
                    done += 1
                    logger.info("%s | %s: %s", *unit, summary(result))
                    changed(results)
        status = process.wait()
        guard.cancel()
        errors.seek(said)
        text = errors.read().strip().splitlines()
    if done == len(units):
        return done
    if guard.ended == "unit" or (guard.ended is None and not (status == BROKEN_STATUS and done)):
        reason = f"not done after {guard.silence:g} s" if guard.ended else f"its process ended with status {status}"
        if text and not guard.ended:
            reason += f": {text[-1][:300]}"
        logger.info("%s | %s: %s", *units[done], reason)
        if not at_work and done == 0:  # it could not even begin; nor would the next
            for unit in units:
                results.setdefault(unit, {})["error"] = reason
            changed(results)
            return len(units)
        results.setdefault(units[done], {})["error"] = reason
        changed(results)
        return done + 1
    if guard.ended == "deadline" and at_work:
        results[units[done]].setdefault("not_run", NOT_RUN)
        return done + 1
    return done


class Guard:
    """Ends a process, and what it started, that says nothing for `silence` s or is still there at the deadline."""

    def __init__(self, process: subprocess.Popen[str], deadline: float, silence: float) -> None:
        self.process, self.deadline, self.silence = process, deadline, silence
        self.ended: str | None = None  # "unit" or "deadline", where it was ended
        self.timer: threading.Timer | None = None
        self.restart()

    def restart(self, final: bool = False) -> None:
        """The process has spoken. After its `final` word it has a few seconds to end."""
        self.cancel()
        seconds, why = min((5.0 if final else self.silence, "unit"), (self.deadline - time.monotonic(), "deadline"))
        self.timer = threading.Timer(max(seconds, 0.0), self._end, [why])
        self.timer.daemon = True
        self.timer.start()

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def _end(self, why: str) -> None:
        self.ended = why
        end_group(self.process)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process of a session of its own and what it started: compilers, for one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
