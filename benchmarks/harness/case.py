"""A `Case`, one operation of one size beside one peer, and the `Work` that its setup makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Operation = Callable[..., Any]
Inputs = tuple[Any, ...]
Row = dict[str, Any]

OURS = "ours"


def no_inputs(seed: int) -> Inputs:
    """Draw no inputs, for operations whose inputs are bound already."""
    return ()


class Work(NamedTuple):
    """Our implementation and its peers, the inputs that all of them take, and how close their results must be."""

    ours: Operation
    peers: Mapping[str, Operation]  # by name
    draw: Callable[[int], Inputs] = no_inputs  # makes a set of inputs from a seed
    agreement: Callable[[Any, Any], float] | None = None  # of our result and a peer's: 1 where they are equal
    least: Mapping[str, float] = {}  # least agreement by peer; a peer that is not named is not compared
    shares: Callable[..., dict[str, float]] | None = None  # of a set of inputs: the parts of our call's time


@dataclass(frozen=True)
class Bound:
    """The least work of an operation: memory traffic, and multiplications and additions by a matrix unit."""

    bytes: float  # each input read once, each output written once
    operations: float = 0.0
    rate: str = "fp32"  # the matrix unit's type: "fp16", "bf16", "tf32" or "fp32"

    def milliseconds(self, speeds: Row) -> float | None:
        """Least time at a machine's measured copy bandwidth and matrix rates; None where these were not measured."""
        bandwidth, rates = speeds.get("copy_gb_per_s"), speeds.get("matrix_tflop_per_s") or {}
        if not bandwidth or (self.operations and not rates.get(self.rate)):
            return None
        matrix = self.operations / (1e9 * rates[self.rate]) if self.operations else 0.0
        return max(self.bytes / (1e6 * bandwidth), matrix)


@dataclass(frozen=True)
class Case:
    """One operation of one size on one kind of data, beside one peer: a row of the results."""

    name: str  # unique on a device
    peer: str | None  # a name in `Work.peers`; None: ours alone
    goal: float | None  # the peer's time over ours, at least; None: none is stated
    setup: Callable[[torch.device], Work]
    threads: int = 2  # of the CPU
    rank: int = 0  # cases of rank 0 are measured first, over all subjects
    bound: Bound | Callable[[], Bound] | None = None  # a function is called after the setup
    memory: bool = True  # whether peak memory is measured on the CPU; on a GPU it always is
    memory_goal: float | None = None  # our peak memory over the peer's, at most; measured as early as the time
    extra_seconds: float = 0.0  # time that a process may take beyond others' before it counts as hanging
    captured: bool = True  # on a GPU: our call can be captured as a CUDA graph, as it does not wait for the host
    peer_captured: bool = True
    max_us: float | None = None  # goal: our time in microseconds, at most
    bound_goal: float | None = None  # goal: the bound's time over ours, at least
    share_goals: Mapping[str, float] = field(default_factory=dict)  # goals: `Work.shares`, at most

    def __post_init__(self) -> None:
        for name, low in (("goal", 0), ("threads", 1), ("rank", 0), ("memory_goal", 0), ("extra_seconds", 0)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name}: expected >= {low}, got {value!r} in the case {self.name!r}")


def beside(
    name: str, peers: Mapping[str, float | None], setup: Callable[[torch.device], Work], **options: Any
) -> list[Case]:
    """Cases of one operation beside several peers, given with their goals; a peer ends its case's name."""
    return [Case(f"{name}, vs {peer}", peer, goal, setup, **options) for peer, goal in peers.items()]
