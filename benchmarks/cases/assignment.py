"""Batched rectangular assignment beside SciPy in a loop and, where it is installed, torch-linear-assignment."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.case import Bound, Case, Operation, Work, beside
from maskformer_fast.ops import linear_sum_assignment
from maskformer_fast.ops.assignment import linear_sum_assignment_eager

SCIPY, SCIPY_COPIES, TORCH_ASSIGNMENT = "SciPy in a loop", "SciPy with the copies", "torch-linear-assignment"
KINDS = ("uniform", "matcher-like", "integer ties")
CPU_SHAPES = {(100, 20): (16, 256), (100, 100): (16,), (300, 300): (4,), (1000, 1000): (1,)}  # rows, columns: batches
CUDA_SHAPES = {(96, 100, 20): 0, (96, 100, 100): 1, (16, 300, 300): 1}  # shapes: rank

Shape = tuple[int, int, int]  # problems, rows, columns


def random_costs(kind: str, shape: Shape) -> Tensor:
    """Float32 costs [batch, queries, targets]."""
    rng = np.random.default_rng(0)
    if kind == "uniform":
        return torch.from_numpy(rng.random(shape, dtype=np.float32))
    if kind == "integer ties":
        return torch.from_numpy(rng.integers(0, 20, shape).astype(np.float32))
    # Like a matcher's: each target resembles some query, and each query has its level.
    batch, queries, targets = shape
    query = rng.normal(size=(batch, queries, 16)).astype(np.float32)
    alike = np.take_along_axis(query, rng.integers(0, queries, (batch, targets, 1)), 1)
    target = 0.7 * alike + 0.7 * rng.normal(size=alike.shape).astype(np.float32)
    level = 2 * rng.random((batch, queries, 1), dtype=np.float32)
    return torch.from_numpy(level - query @ target.transpose(0, 2, 1) / 4).contiguous()


def setup(device: torch.device, kind: str, shape: Shape) -> Work:
    """Assignments of random costs. Total costs are compared, as equal optima may be chosen differently."""
    costs = random_costs(kind, shape)
    problems = list(costs.numpy())

    def draw(seed: int) -> tuple[Tensor]:
        # other problems each time, and none of another difficulty: rolled along the batch and the rows
        return (costs.roll((seed, seed), (0, 1)).to(device),)

    def scipy_loop(_: Tensor) -> list[object]:
        from scipy.optimize import linear_sum_assignment as solve

        return [solve(problem) for problem in problems]

    def torch_assignment(cost: Tensor) -> Tensor:
        from torch_linear_assignment import batch_linear_assignment

        result: Tensor = batch_linear_assignment(cost.mT.contiguous())  # it assigns a column to each row
        return result

    def agreement(ours: Tensor, theirs: Tensor | list[tuple[np.ndarray, np.ndarray]]) -> float:
        """Share of the problems whose total costs are the same."""
        (drawn,) = draw(0)
        totals = []
        for result in (ours, theirs):
            if isinstance(result, Tensor):
                if result.shape != shape[::2] or result.min() < 0:
                    return 0.0
                totals.append(drawn.double().gather(1, result.long().unsqueeze(1)).sum((1, 2)))
            else:
                sums = [cost[pairs].sum(dtype=np.float64) for cost, pairs in zip(problems, result, strict=True)]
                totals.append(torch.tensor(np.array(sums), device=device))
        tolerance = 1e-9 if device.type == "cpu" else 1e-6
        return (totals[0] - totals[1]).abs().le(tolerance * totals[1].abs().clamp(min=1)).float().mean().item()

    peers: dict[str, Operation] = {
        SCIPY: scipy_loop, SCIPY_COPIES: linear_sum_assignment_eager, TORCH_ASSIGNMENT: torch_assignment,
    }  # fmt: skip
    return Work(linear_sum_assignment, peers, draw, agreement, dict.fromkeys(peers, 1.0))


def bound(shape: Shape) -> Bound:
    """Costs read, the query of each target written."""
    batch, queries, targets = shape
    return Bound(4.0 * batch * queries * targets + 8.0 * batch * targets)


def cases(device: str) -> list[Case]:
    return cpu_cases() if device == "cpu" else cuda_cases()


def cpu_cases() -> list[Case]:
    rows = []
    for (queries, targets), batches in CPU_SHAPES.items():
        small = (queries, targets) == (100, 20)
        for batch in batches:
            shape = (batch, queries, targets)
            for kind in KINDS:
                for threads in (1, 2) if small else (1,):
                    name = f"assignment {batch} x {queries}x{targets}, {kind}, {threads} thread{'s' * (threads > 1)}"
                    goal = 3.0 if not small else 4.0 if threads == 1 else 7.0
                    rows.append(Case(name, SCIPY, goal, partial(setup, kind=kind, shape=shape), threads=threads,
                                     bound=bound(shape), memory=False))  # fmt: skip
    shape = (16, 100, 20)
    return rows + beside(
        "assignment 16 x 100x20, matcher-like", {TORCH_ASSIGNMENT: None},
        partial(setup, kind="matcher-like", shape=shape), memory=False,
    )  # fmt: skip


def cuda_cases() -> list[Case]:
    rows = []
    for shape, rank in CUDA_SHAPES.items():
        for kind in KINDS:
            count, queries, targets = shape
            first = shape == (96, 100, 20) and kind == "matcher-like"
            name, make = f"assignment {count} x {queries}x{targets}, {kind}", partial(setup, kind=kind, shape=shape)
            rows += beside(name, {SCIPY_COPIES: 10.0 if first else None}, make, bound=bound(shape), peer_captured=False,
                           max_us=60.0 if first else None, rank=rank if kind == "matcher-like" else 2)  # fmt: skip
            if first:
                rows += beside(name, {TORCH_ASSIGNMENT: None}, make, bound=bound(shape), peer_captured=False)
    return rows
