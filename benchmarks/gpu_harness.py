"""Times an operation beside several peers on a GPU; what a `Case` is, and the process that measures it.

A case and one of its sides, ours or a peer, are a *unit*. ``python -m benchmarks.gpu_harness FILE DEVICE`` reads a list
of units of FILE's ``cases()`` from its input and measures one after another. It reports each as it comes, so that
whatever ends the process costs the unit at work only; `benchmarks.gpu_schedule` then starts another.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.bounds import Bound
from benchmarks.gpu_clock import WARM_UP_CALLS, Clock, open_clock, sample
from benchmarks.harness import Row, describe, load_cases
from benchmarks.processes import BROKEN_STATUS, Unit

OURS = "ours"
MAX_COPIES = 256
"""Sets of inputs, at most."""
CAPTURED_MS = 100.0
"""Calls of together about this time are captured as one graph, at most: a slow call's temporaries fill the cache."""


@dataclass(frozen=True)
class Peer:
    """What our operator is compared with."""

    name: str  # of its side in `Work`
    ratio: float | None = None  # goal: its time over ours
    memory_ratio: float | None = None  # goal: its peak memory over ours
    graph: bool = True  # no: it waits for the host, and no graph can hold it
    rank: int = 0  # as the case's, where it is higher


@dataclass(frozen=True)
class Case:
    """One operation of one size on one kind of data, beside its peers."""

    name: str  # operator, size, kind of data; unique among all files
    setup: Callable[[torch.device], Work]
    peers: tuple[Peer, ...]
    bound: Bound
    max_us: float | None = None  # goal for our time
    bound_share: float | None = None  # goal for the bound over our time
    graph: bool = True
    rank: int = 0  # units of rank 0 are measured first, of all files
    max_shares: Mapping[str, float] = field(default_factory=dict)  # goals for `Work.shares`
    patience: float = 0.0  # seconds that a unit may take beyond others': something large is built


@dataclass
class Work:
    """What a case's setup makes: how to draw a set of inputs, and what each side does with one."""

    draw: Callable[[int], tuple[Any, ...]]  # of a seed: the arguments of every side
    sides: dict[str, Callable[..., object]]  # ours and the peers'
    agreement: Callable[[Any, Any], float] | None = None  # of our result and a peer's: 1 where they are equal
    least_agreement: float = 0.99
    shares: Callable[..., dict[str, float]] | None = None  # of the inputs: parts of our call's time, by name


def draw_inputs(work: Work, fresh_bytes: int) -> list[tuple[Any, ...]]:
    """As many sets of inputs as fill `fresh_bytes`, so that each is read from memory and not from the cache."""
    inputs = [work.draw(0)]
    size = max(1, sum(tensor.nbytes for tensor in tensors(inputs[0])))
    count = min(MAX_COPIES, math.ceil(fresh_bytes / size))
    return inputs + [work.draw(seed) for seed in range(1, count)]


def tensors(value: object) -> Iterator[Tensor]:
    """Those in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def measure(clock: Clock, side: Callable[..., object], inputs: list[tuple[Any, ...]], graph: bool) -> Row:
    """``call``: called as a user does; ``graph``: replayed, the device's work alone, or why it could not be captured.

    Both go round the inputs. Peak memory is that of a call.
    """
    for _ in range(WARM_UP_CALLS):  # compiles, and lets torch.compile settle
        side(*inputs[0])
    turn = itertools.cycle(inputs)
    row: Row = {"call": sample(clock, lambda: side(*next(turn))), "copies": len(inputs)}
    row["peak_mib"] = clock.peak_mib(lambda: side(*inputs[0]))
    if not graph:
        return row
    captured = inputs[: max(1, math.ceil(CAPTURED_MS / max(row["call"]["ms"], 1e-6)))]

    def round_of_calls() -> None:
        for arguments in captured:
            side(*arguments)

    try:
        replay = clock.capture(round_of_calls)
        replay()
        row["graph"] = sample(clock, replay, len(captured))
    except Exception as error:
        if not clock.is_healthy():
            raise
        row["no_graph"] = describe(error)
    return row


class Worker:
    """Measures units and reports them as lines of JSON."""

    def __init__(self, path: Path, device: str, out: TextIO) -> None:
        self.cases: dict[str, Case] = {case.name: case for case in load_cases(path)}
        self.clock = open_clock(device)
        self.out = out
        self.current: tuple[str, Work, list[tuple[Any, ...]]] | None = None

    def report(self, unit: Unit, stage: str, result: Row) -> None:
        self.out.write(json.dumps({"unit": unit, "stage": stage, "result": result}) + "\n")
        self.out.flush()

    def run(self, units: list[Unit]) -> int:
        """-> the status to exit with."""
        for unit in units:
            self.report(unit, "begun", {})
            try:
                self.measure_unit(unit)
                result: Row = {}
            except ModuleNotFoundError as error:
                result = {"absent": str(error)}
            except Exception as error:
                traceback.print_exc()
                result = {"error": describe(error)}
            self.report(unit, "done", result)
            if not self.clock.is_healthy():
                return BROKEN_STATUS
        return 0

    def measure_unit(self, unit: Unit) -> None:
        name, side = unit
        case = self.cases[name]
        if self.current is None or self.current[0] != name:
            self.current = None  # frees the inputs before
            self.clock.release()
            work = case.setup(self.clock.device)
            self.current = (name, work, draw_inputs(work, self.clock.fresh_bytes))
        _, work, inputs = self.current
        graph = case.graph if side == OURS else next(peer.graph for peer in case.peers if peer.name == side)
        self.report(unit, "timed", measure(self.clock, work.sides[side], inputs, graph))
        if side == OURS and work.shares is not None:
            self.report(unit, "shared", {"shares": work.shares(*inputs[0])})
        if side != OURS and work.agreement is not None:
            # Last, as ours may be what ends the process; the peer's figures are out by now.
            agreement = float(work.agreement(work.sides[OURS](*inputs[0]), work.sides[side](*inputs[0])))
            self.report(unit, "compared", {"agreement": agreement})
            if not agreement >= work.least_agreement:
                raise RuntimeError(f"agrees with ours to {agreement:.4f}, expected {work.least_agreement:g} at least")
        self.clock.release()


def main(path: str, device: str) -> int:
    units = [(name, side) for name, side in json.load(sys.stdin)]
    # What libraries print goes to the error stream; the real output is the report's.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(0)
    return Worker(Path(path), device, out).run(units)


if __name__ == "__main__":
    from benchmarks import gpu_harness  # not this module, __main__, but the one whose classes the cases use

    sys.exit(gpu_harness.main(*sys.argv[1:]))
