"""Batched rectangular assignment: which query each target gets, at the least total cost (paper section 3.3).

Jonker-Volgenant reductions and Crouse's shortest augmenting paths in C++: on the CPU with threads over the batch, on
CUDA with a warp for each small problem and a block for each large one. The optimum is that of
`scipy.optimize.linear_sum_assignment`. Where there are several optima, each may choose another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.extension import load_cuda_extension, load_extension
from maskformer_fast.ops.registration import register_operator


class _Arguments(NamedTuple):
    cost: Tensor  # [..., N, M] float32/64
    counts: Tensor | None = None  # [...] int64

    @property
    def result_shape(self) -> tuple[int, ...]:
        return (*self.cost.shape[:-2], self.cost.shape[-1])

    def problems(self) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        """[batch, N, M], its sizes and its strides."""
        # Few tensor operations: each costs as much as a small problem. flatten copies only where it must.
        cost = self.cost
        problems = cost.flatten(0, -3) if cost.dim() > 3 else cost
        if cost.dim() == 2:
            return problems, (1, *problems.shape), (0, *problems.stride())
        return problems, problems.shape, problems.stride()


def _linear_sum_assignment_cpu(arguments: _Arguments) -> Tensor:
    extension = load_extension()
    problems, sizes, strides = arguments.problems()
    counts = None if arguments.counts is None else arguments.counts.contiguous()
    rows = torch.empty(arguments.result_shape, dtype=torch.int64)
    is_single = problems.dtype == torch.float32
    assign = extension.linear_sum_assignment_f32 if is_single else extension.linear_sum_assignment_f64
    assign(*_addresses(arguments, problems, sizes, strides, counts, rows), torch.get_num_threads())
    return rows


def _linear_sum_assignment_cuda(arguments: _Arguments) -> Tensor:
    extension = load_cuda_extension()
    problems, sizes, strides = arguments.problems()
    counts = None if arguments.counts is None else arguments.counts.contiguous()
    rows = torch.empty(arguments.result_shape, dtype=torch.int64, device=problems.device)
    if problems.dtype == torch.float32:
        assign, scratch_bytes = extension.linear_sum_assignment_cuda_f32, extension.assignment_scratch_bytes_f32
    else:
        assign, scratch_bytes = extension.linear_sum_assignment_cuda_f64, extension.assignment_scratch_bytes_f64
    inputs = _addresses(arguments, problems, sizes, strides, counts, rows)
    device = problems.device.index
    size = scratch_bytes(*inputs, device)
    # freed on return, while the kernel may run: the allocator gives it only to what comes later on this stream
    scratch = torch.empty(size, dtype=torch.uint8, device=problems.device)
    stream = torch.cuda.current_stream(device).cuda_stream
    assign(*inputs, address_of(scratch, "scratch", "uint8", (size,)), size, device, stream)
    return rows


def _addresses(
    arguments: _Arguments,
    problems: Tensor,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    counts: Tensor | None,
    rows: Tensor,
) -> tuple[int | tuple[int, ...], ...]:
    """Arrays of both backends as the extension takes them."""
    cost_type = "float32" if problems.dtype == torch.float32 else "float64"
    return (
        address_of(problems, "cost", cost_type, sizes[-problems.dim() :], any_strides=True), sizes, strides,
        address_of(counts, "counts", "int64", arguments.cost.shape[:-2]),
        address_of(rows, "rows", "int64", arguments.result_shape),
    )  # fmt: skip


def _linear_sum_assignment_fake(arguments: _Arguments) -> Tensor:
    return arguments.cost.new_empty(arguments.result_shape, dtype=torch.int64)


def _check(arguments: _Arguments) -> None:
    cost, counts = arguments
    if cost.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cost: expected torch.float32 or torch.float64, got {cost.dtype}")
    if cost.dim() < 2:
        raise ValueError(f"cost: expected shape [..., N, M], got {tuple(cost.shape)}")
    if counts is None:
        return
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: expected torch.int64, got {counts.dtype}")
    if counts.shape != cost.shape[:-2]:
        raise ValueError(f"counts: expected shape {tuple(cost.shape[:-2])} as cost's, got {tuple(counts.shape)}")
    if counts.device != cost.device:
        raise ValueError(f"counts: expected on {cost.device} as cost, got {counts.device}")


_linear_sum_assignment = register_operator(
    "linear_sum_assignment(Tensor cost, Tensor? counts=None) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_linear_sum_assignment_cpu,
    cuda=_linear_sum_assignment_cuda,
    fake=_linear_sum_assignment_fake,
)


def _check_types(cost: object, counts: object) -> None:
    """Raise ``TypeError`` for what is no tensor, which the operator itself cannot be given."""
    if not isinstance(cost, Tensor):
        raise TypeError(f"cost: expected a Tensor, got {type(cost).__name__}")
    if counts is not None and not isinstance(counts, Tensor):
        raise TypeError(f"counts: expected a Tensor or None, got {type(counts).__name__}")


def linear_sum_assignment(
    cost: Tensor,  # [..., N, M] float32/64
    counts: Tensor | None = None,  # [...] int64
    maximize: bool = False,
) -> Tensor:
    """Assign a row (query) to each column (target) at the least total cost -> int64 [..., M], on cost's device.

    With `maximize`, at the largest total. `assign_pairs` returns pairs and raises errors as SciPy does.

    Column ``j`` of a problem gets the index of its row, or -1 where it has none: every column ``j >= counts``, and,
    where ``counts > N``, the columns that the optimum leaves out (N of them are assigned). No row is used twice.
    Without ``counts`` all M columns count. Inputs may have any strides.

    A cost of +inf (with `maximize` -inf) forbids the pair. A problem gives all -1 where its valid columns contain NaN
    or the other infinity, and where it has no assignment of finite cost; the other problems of the batch are not
    affected. Potentials are float64.

    Runs on the CPU over ``torch.get_num_threads()`` threads, and on a CUDA device (compute capability 8.0 or newer) on
    torch's current stream, without a synchronisation, so that CUDA graphs can capture it. Among equal optima the two
    devices may choose different ones, each the same in every run. The result is integer and has no gradient.

    Raises TypeError or ValueError for a wrong type, shape or device. Raises ImportError where the extension is not
    built, and for CUDA tensors where it was built without CUDA. A count outside 0..M raises ValueError on the CPU; on
    CUDA, where raising would need a synchronisation, its problem gives all -1.
    """
    _check_types(cost, counts)
    return _linear_sum_assignment(-cost if maximize else cost, counts)


def assign_pairs(
    cost: Tensor | Sequence[Tensor],  # [..., N, M], or matrices [N_i, M_i] of any sizes; any real dtype
    maximize: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Solve a batch as `scipy.optimize.linear_sum_assignment` solves each matrix -> rows and columns of each.

    For matchers that loop over images with SciPy. Both results are int64 [min(N, M)] on the cost's device, rows in
    ascending order. Where there are several optima, SciPy may choose another. Integers, booleans and half precision are
    computed exactly, as SciPy computes them. Matrices of different sizes are padded to one batch. The host waits for
    the device once, to raise the errors; `linear_sum_assignment` does not wait.

    Raises:
        ValueError: as SciPy raises it, "cost matrix is infeasible" and "matrix contains invalid numeric entries",
            with the number of the matrix; also a matrix that is not of rank 2.
        TypeError: matrices that are no tensors of real numbers.
    """
    if isinstance(cost, Tensor) and cost.dim() > 2:
        wide = cost.shape[-2] < cost.shape[-1]
        batch = _costs([cost], maximize)[0].flatten(0, -3)
        batch = batch.mT if wide else batch
        shapes = [(batch.shape[1], batch.shape[2], wide)] * len(batch)
        counts = None
    else:
        matrices = [cost] if isinstance(cost, Tensor) else list(cost)
        _check_matrices(matrices)
        # wide matrices are transposed: their rows get columns
        tall = [m.mT if m.shape[0] < m.shape[1] else m for m in _costs(matrices, maximize)]
        shapes = [(*m.shape, m.shape != t.shape) for m, t in zip(tall, matrices, strict=True)]
        height, width = (max((m.shape[side] for m in tall), default=0) for side in (0, 1))
        padded = [F.pad(m, (0, width - m.shape[1], 0, height - m.shape[0]), value=torch.inf) for m in tall]
        batch = torch.stack(padded) if padded else torch.zeros(0, 0, 0)
        counts = torch.tensor([m.shape[1] for m in tall], dtype=torch.int64).to(batch.device)
    if not shapes:
        return []
    rows = linear_sum_assignment(batch, counts)
    wanted = batch.shape[2] if counts is None else counts
    failed = torch.stack([(rows >= 0).sum(1) < wanted, (batch.isnan() | batch.isneginf()).flatten(1).any(1)])
    for number, (is_infeasible, is_invalid) in enumerate(failed.T.tolist()):
        if is_infeasible or is_invalid:
            reason = "matrix contains invalid numeric entries" if is_invalid else "cost matrix is infeasible"
            raise ValueError(f"cost[{number}]: {reason}")
    ordered, order = rows.where(rows >= 0, batch.shape[1]).sort(1)
    every = torch.arange(batch.shape[2], device=batch.device)
    return [
        (every[:size], found[:size]) if is_wide else (first[:size], second[:size])
        for (_, size, is_wide), found, first, second in zip(shapes, rows, ordered, order, strict=True)
    ]


def _check_matrices(matrices: list[Tensor]) -> None:
    for number, matrix in enumerate(matrices):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"cost[{number}]: expected a Tensor, got {type(matrix).__name__}")
        if matrix.dim() != 2:
            raise ValueError(f"cost[{number}]: expected a matrix (2-D array), got a {matrix.dim()}-D array")


def _costs(matrices: list[Tensor], maximize: bool) -> list[Tensor]:
    """Costs to minimize, in float32 where all matrices fit into it exactly, else in float64."""
    for number, matrix in enumerate(matrices):
        if matrix.is_complex():
            raise TypeError(f"cost[{number}]: expected real numbers, got {matrix.dtype}")
    is_single = all(matrix.dtype in (torch.float32, torch.float16, torch.bfloat16) for matrix in matrices)
    costs = [matrix.detach().to(torch.float32 if is_single else torch.float64) for matrix in matrices]
    return [-cost for cost in costs] if maximize else costs


def linear_sum_assignment_eager(
    cost: Tensor,  # [..., N, M] float32/64
    counts: Tensor | None = None,  # [...] int64
) -> Tensor:
    """`linear_sum_assignment` by SciPy, a problem at a time: oracle of the tests and baseline of the benchmarks."""
    from scipy.optimize import linear_sum_assignment as solve  # SciPy comes with the extras train and test only

    _check_types(cost, counts)
    _check(_Arguments(cost, counts))
    total = cost.shape[-1]
    problems = (cost.detach().flatten(0, -3) if cost.dim() > 2 else cost.detach()[None]).cpu().numpy()
    limits = [total] * len(problems) if counts is None else counts.reshape(-1).tolist()
    result = torch.full((len(problems), total), -1, dtype=torch.int64)
    for problem, limit, out in zip(problems, limits, result, strict=True):
        if not 0 <= limit <= total:
            raise ValueError(f"counts: expected 0..{total} (columns of cost), got {limit}")
        try:
            rows, columns = solve(problem[:, :limit])
        except ValueError:  # raised for NaN, -inf and where no assignment has finite cost
            continue
        out[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return result.view(_Arguments(cost).result_shape).to(cost.device)
