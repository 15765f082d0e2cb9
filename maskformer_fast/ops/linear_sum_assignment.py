"""Batched rectangular assignment: which query each target gets, at the least total cost (paper section 3.3).

Jonker-Volgenant reductions and Crouse's shortest augmenting paths in C++, threads over the batch. The optimum is
that of `scipy.optimize.linear_sum_assignment`; among several optima either may choose another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskformer_fast._extension import load_extension

_library = torch.library.Library("maskformer_fast", "FRAGMENT")
_library.define(
    "linear_sum_assignment(Tensor cost, Tensor? counts=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _linear_sum_assignment_cpu(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    # few tensor operations: each costs as much as a small problem
    problems = cost.flatten(0, -3) if cost.dim() > 3 else cost  # a copy only where the strides allow no view
    sizes: tuple[int, ...] = problems.shape
    strides: tuple[int, ...] = problems.stride()
    if cost.dim() == 2:
        sizes, strides = (1, *sizes), (0, *strides)
    counts = None if counts is None else counts.contiguous()
    rows = torch.empty(_result_shape(cost), dtype=torch.int64)
    extension = load_extension()
    assign = (
        extension.linear_sum_assignment_f32 if cost.dtype == torch.float32 else extension.linear_sum_assignment_f64
    )
    assign(
        problems.data_ptr(),
        sizes,
        strides,
        0 if counts is None else counts.data_ptr(),
        rows.data_ptr(),
        torch.get_num_threads(),
    )
    return rows


def _linear_sum_assignment_cuda(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    # solved on the host: two copies and one synchronisation
    rows = _linear_sum_assignment_cpu(cost.cpu(), None if counts is None else counts.cpu())
    return rows.to(cost.device)


def _linear_sum_assignment_fake(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    return cost.new_empty(_result_shape(cost), dtype=torch.int64)


_library.impl("linear_sum_assignment", _linear_sum_assignment_cpu, "CPU")
_library.impl("linear_sum_assignment", _linear_sum_assignment_cuda, "CUDA")
torch.library.register_fake("maskformer_fast::linear_sum_assignment", _linear_sum_assignment_fake, lib=_library)
_operator = torch.ops.maskformer_fast.linear_sum_assignment.default  # looked up once: a microsecond is a small problem


def _result_shape(cost: Tensor) -> tuple[int, ...]:
    return (*cost.shape[:-2], cost.shape[-1])


def _check(cost: Tensor, counts: Tensor | None) -> None:
    if not isinstance(cost, Tensor):
        raise TypeError(f"cost: expected a Tensor, got {type(cost).__name__}")
    if cost.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cost: expected torch.float32 or torch.float64, got {cost.dtype}")
    if cost.dim() < 2:
        raise ValueError(f"cost: expected shape [..., N, M], got {tuple(cost.shape)}")
    if counts is None:
        return
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts: expected a Tensor or None, got {type(counts).__name__}")
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: expected torch.int64, got {counts.dtype}")
    if counts.shape != cost.shape[:-2]:
        raise ValueError(f"counts: expected shape {tuple(cost.shape[:-2])} as cost's, got {tuple(counts.shape)}")
    if counts.device != cost.device:
        raise ValueError(f"counts: expected on {cost.device} as cost, got {counts.device}")


def linear_sum_assignment(
    cost: Tensor,  # [..., N, M] float32/64
    counts: Tensor | None = None,  # [...] int64
) -> Tensor:
    """Assign a row (query) to each column (target) at the least total cost -> int64 [..., M], on cost's device.

    Column ``j`` of a problem gets the index of its row, or -1 where it has none: every column ``j >= counts``, and,
    where ``counts > N``, the columns that the optimum leaves out (N of them are assigned). No row is used twice.
    Without ``counts`` all M columns count. Any strides are taken as they are.

    A cost of +inf forbids the pair. A problem whose valid columns hold NaN or -inf, or which has no assignment of
    finite cost, comes back all -1; the other problems of the batch are not touched by it. Potentials are float64.

    Runs on the CPU over ``torch.get_num_threads()`` threads. CUDA tensors are copied to the host and the result
    back, which synchronises. The result is integer: no gradient flows through it.

    Raises TypeError or ValueError for a wrong type, shape or device, ValueError for a count outside 0..M,
    ImportError where the extension is not built.
    """
    _check(cost, counts)
    return _operator(cost, counts)


def linear_sum_assignment_eager(
    cost: Tensor,  # [..., N, M] float32/64
    counts: Tensor | None = None,  # [...] int64
) -> Tensor:
    """`linear_sum_assignment` by SciPy, a problem at a time: oracle of the tests and baseline of the benchmarks."""
    from scipy.optimize import linear_sum_assignment as solve  # SciPy comes with the extras train and test only

    _check(cost, counts)
    total = cost.shape[-1]
    problems = (cost.detach().flatten(0, -3) if cost.dim() > 2 else cost.detach()[None]).cpu().numpy()
    limits = [total] * len(problems) if counts is None else counts.reshape(-1).tolist()
    result = torch.full((len(problems), total), -1, dtype=torch.int64)
    for problem, limit, out in zip(problems, limits, result, strict=True):
        if not 0 <= limit <= total:
            raise ValueError(f"counts: expected 0..{total} (columns of cost), got {limit}")
        try:
            rows, columns = solve(problem[:, :limit])
        except ValueError:  # SciPy's word for NaN, -inf or no finite assignment
            continue
        out[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return result.view(_result_shape(cost)).to(cost.device)
