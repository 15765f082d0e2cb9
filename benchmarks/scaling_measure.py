"""Measures the points of curves within a time: the process that `benchmarks.scaling` starts, and what it does there.

``python -m benchmarks.scaling_measure time|memory`` reads its work as JSON from stdin and writes lines of JSON:
``{"curve", "begun": x}`` before a point, ``{"curve", "point": {...}}`` after it, ``{"curve", "error"}`` for a curve
that failed. One process for all curves, as starting one takes longer than most points.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Operation, Row, peak_memory, time_interleaved

if TYPE_CHECKING:
    from benchmarks.scaling_curves import Curve

THREADS = 2
ROUNDS_SECONDS = 1.0  # instead of the harness's: a curve has many points
ROUNDS = 3  # at least; operations that are not slow get more
CALLS = ROUNDS + 2  # of a slow operation: it is warmed up and looked at first
MEMORY_CALLS = 2

Clock = Callable[[], float]
Timer = Callable[[Operation, Operation, int], tuple[list[float], list[float]]]


def time_curve(
    curve: Curve, seconds: float, clock: Clock = time.monotonic, timer: Timer = time_interleaved
) -> Iterator[Row]:
    """The points of a curve, the smallest first, in about `seconds`.

    What earlier points took tells what the next one would take. A peer that does not fit is left out from there on,
    and ours goes on alone; so does the point where ours does not fit. The first point is measured in any case. Each
    point is yielded twice: ``{"begun": x}``, then its figures, whose ``peer_skipped`` or ``skipped`` says why some
    are missing.
    """
    end = clock() + seconds
    known: tuple[list[tuple[int, float]], list[tuple[int, float]]] = ([], [])  # x and seconds a call: ours, theirs
    peer_left = True
    for x in curve.points:
        yield {"begun": x}
        point: Row = {"x": x, "label": curve.labels.get(x, f"{x:,}".replace(",", " "))}
        point |= dict.fromkeys(("ours_ms", "peer_ms"))
        left = end - clock()
        ours_need, peer_need = (CALLS * expected(side, x) for side in known)
        if ours_need > left:
            reasons = {"skipped": _too_long(ours_need, left), "peer_skipped": _too_long(peer_need, left)}
            yield {"point": point | reasons}
            continue
        ours, theirs = curve.setup(x)
        if peer_left and ours_need + peer_need > left:
            peer_left = False
        if peer_left:
            samples = timer(ours, theirs, ROUNDS)
        else:
            point["peer_skipped"] = _too_long(peer_need, left)
            samples = ([second for both in timer(ours, ours, ROUNDS) for second in both], [])
        del ours, theirs
        for side, name, own in zip(known, ("ours", "peer"), samples, strict=True):
            if own:
                side.append((x, statistics.median(own)))
                point |= {f"{name}_ms": 1e3 * side[-1][1], f"{name}_quartiles_ms": quartiles_ms(own)}
        yield {"point": {**point, "rounds": len(samples[0])}}


def _too_long(need: float, left: float) -> str:
    return f"would take about {need:.2g} s, {max(0.0, left):.2g} s are left"


def expected(known: Sequence[tuple[int, float]], x: int) -> float:
    """Seconds of a call at `x`: as the last two points go on; the first one grows like a root; 0 without points."""
    if not known:
        return 0.0
    last_x, last = known[-1]
    exponent = 0.5
    if len(known) > 1:
        before_x, before = known[-2]
        exponent = min(3.0, max(0.25, math.log(last / before) / math.log(last_x / before_x)))
    return float(last * (x / last_x) ** exponent)


def quartiles_ms(seconds: Sequence[float]) -> list[float]:
    """Lower and upper, in ms."""
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return [1e3 * lower, 1e3 * upper]


def peaks(curve: Curve, x: int) -> Row:
    """The most memory that a call of each side adds, in MiB, which is None where the system does not tell."""
    ours, theirs = curve.setup(x)
    return {"x": x, "ours_peak_mib": peak_memory(ours), "peer_peak_mib": peak_memory(theirs)}


def measure_times(
    work: Sequence[tuple[str, Any]], known: dict[str, Curve], end: float, clock: Clock = time.monotonic
) -> Iterator[Row]:
    """Messages about the curves named in `work`, in order; time that one leaves goes to those after it."""
    weights = [known[name].weight for name, _ in work]
    for index, (name, _) in enumerate(work):
        seconds = (end - clock()) * weights[index] / sum(weights[index:])
        try:
            for message in time_curve(known[name], seconds, clock):
                yield {"curve": name, **message}
        except Exception as error:  # one broken curve must not cost the others
            yield {"curve": name, "error": f"{type(error).__name__}: {error}"}


def measure_peaks(
    work: Sequence[tuple[str, Any]], known: dict[str, Curve], end: float, clock: Clock = time.monotonic
) -> Iterator[Row]:
    """Messages about the points ``(curve, (x, seconds a call of both sides))`` of `work`, as far as the time goes."""
    broken: set[str] = set()
    overhead = 0.0  # seconds that a point took beside its calls, at most: inputs, and memory that is given back
    for name, (x, seconds) in work:
        if name in broken or clock() + MEMORY_CALLS * seconds + overhead > end:
            continue
        yield {"curve": name, "begun": x}
        start = clock()
        try:
            yield {"curve": name, "point": peaks(known[name], x)}
            overhead = max(overhead, clock() - start - MEMORY_CALLS * seconds)
        except Exception as error:  # as above
            broken.add(name)
            yield {"curve": name, "error": f"{type(error).__name__}: {error}"}


MEASURES: dict[str, Callable[..., Iterator[Row]]] = {"time": measure_times, "memory": measure_peaks}


def main(kind: str) -> None:
    start = time.monotonic()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    request = json.load(sys.stdin)

    import torch

    from benchmarks.scaling_curves import curves

    torch.set_num_threads(THREADS)
    harness.ROUNDS_SECONDS = ROUNDS_SECONDS
    known = {curve.name: curve for curve in curves()}
    for message in MEASURES[kind](request["work"], known, start + request["seconds"]):
        if "begun" in message:
            torch.manual_seed(0)  # each point has the same inputs, whatever was measured before it
        answers.write(json.dumps(message) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
