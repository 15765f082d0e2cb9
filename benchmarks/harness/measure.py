"""Measures a case in this process: its times, or on the CPU its peak memory."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.harness.case import OURS, Case, Inputs, Operation, Row, Work
from benchmarks.harness.clock import Clock, estimate, take_turns, warm_up

TIME, MEMORY = "time", "memory"
MAX_COPIES = 256
"""Sets of inputs, at most."""
CAPTURED_SECONDS = 0.1
"""Calls that together take about this time are captured as one graph, at most: a slow call fills the cache itself."""


def measure_time(case: Case, work: Work, inputs: Sequence[Inputs], clock: Clock) -> Row:
    """The part of the row about time: medians and quartiles in ms, and the bound.

    On a GPU also the peak memory of a call, and two times: ``ours_ms`` is the device's alone, of a CUDA graph replayed
    between two events, where the call could be captured; ``ours_call_ms`` is of a call through Python.

    Raises:
        RuntimeError: the results of both implementations differ by more than `Work.least` allows.
    """
    captured = {OURS: case.captured, "peer": case.peer_captured}
    implementations = {OURS: work.ours} | ({} if case.peer is None else {"peer": work.peers[case.peer]})
    calls = {name: partial(call_next, run, itertools.cycle(inputs)) for name, run in implementations.items()}
    row: Row = {"agreement": None, "shares": None}
    first_calls = [warm_up(clock, partial(run, *inputs[0])) for run in implementations.values()]
    results, expected = zip(*first_calls, strict=True)
    least = work.least.get(case.peer or "")
    if least is not None and work.agreement is not None:
        row["agreement"] = float(work.agreement(*results))
        if not row["agreement"] >= least:
            raise RuntimeError(f"the results agree to {row['agreement']:.6g}, expected at least {least:.6g}")
    del first_calls, results
    samples = dict(zip(calls, take_turns(clock, list(calls.values()), expected), strict=True))
    if clock.device.type == "cuda":
        for name, run in implementations.items():
            row[f"{name}_call_ms"] = 1e3 * statistics.median(samples[name])
            row[f"{name}_peak_mib"] = clock.peak_mib(partial(run, *inputs[0]))
        replayed = {name: run for name, run in implementations.items() if captured[name]}
        per_call, row["not_captured"] = time_graphs(replayed, dict(zip(calls, expected, strict=True)), inputs, clock)
        samples |= per_call
    if work.shares is not None:
        row["shares"] = work.shares(*inputs[0])
    for name, seconds in samples.items():
        milliseconds = [1e3 * value for value in seconds]
        row |= {f"{name}_ms": statistics.median(milliseconds), f"{name}_quartiles_ms": quartiles(milliseconds)}
    bound = case.bound() if callable(case.bound) else case.bound
    return {**row, "rounds": len(samples[OURS]), "bound": None if bound is None else asdict(bound)}


def time_graphs(
    implementations: dict[str, Operation], expected: dict[str, float], inputs: Sequence[Inputs], clock: Clock
) -> tuple[dict[str, list[float]], str | None]:
    """Seconds per call of the implementations that can be captured, and why others cannot.

    Raises:
        Exception: a capture left the device unable to work.
    """
    replays: dict[str, tuple[Callable[[], Any], int]] = {}
    reasons = []
    for name, run in implementations.items():
        chosen = inputs[: max(1, math.ceil(CAPTURED_SECONDS / max(expected[name], 1e-9)))]
        try:
            replay = clock.capture(partial(call_each, run, chosen))
            replay()
            replays[name] = replay, len(chosen)
        except Exception as error:
            if not clock.works():
                raise
            reasons.append(f"{name}: {describe(error)}")
    operations = [replay for replay, _ in replays.values()]
    samples = take_turns(clock, operations, [estimate(clock, replay) for replay in operations])
    per_call = {
        name: [seconds / count for seconds in taken]
        for (name, (_, count)), taken in zip(replays.items(), samples, strict=True)
    }
    return per_call, "; ".join(reasons) or None


def call_next(run: Operation, inputs: Iterator[Inputs]) -> Any:
    return run(*next(inputs))


def call_each(run: Operation, inputs: Sequence[Inputs]) -> None:
    for arguments in inputs:
        run(*arguments)


def measure_memory(case: Case, work: Work, inputs: Sequence[Inputs], clock: Clock) -> Row:
    """The part of the row about memory: the most MiB that a call of each implementation adds to the process."""
    row: Row = {"ours_peak_mib": clock.peak_mib(partial(work.ours, *inputs[0]))}
    if case.peer is not None:
        row["peer_peak_mib"] = clock.peak_mib(partial(work.peers[case.peer], *inputs[0]))
    return row


MEASURES: dict[str, Callable[[Case, Work, Sequence[Inputs], Clock], Row]] = {
    TIME: measure_time, MEMORY: measure_memory,
}  # fmt: skip


def draw_inputs(work: Work, fresh_bytes: int) -> list[Inputs]:
    """Make enough sets of inputs to fill `fresh_bytes`, so that each is read from memory and not from the cache."""
    inputs = [work.draw(0)]
    size = max(1, sum(tensor.nbytes for tensor in tensors(inputs[0])))
    return inputs + [work.draw(seed) for seed in range(1, min(MAX_COPIES, math.ceil(fresh_bytes / size)))]


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third, interpolated; the only value twice where there is one."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def describe(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
