"""Batched rectangular assignment: which query each target gets, at the least total cost (paper section 3.3).

Jonker-Volgenant reductions and Crouse's shortest augmenting paths in C++: on the CPU with threads over the batch, on
CUDA with a warp for each small problem and a block for each large one. The optimum is that of
`scipy.optimize.linear_sum_assignment`; among several optima each may choose another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskformer_fast.core.extension import load_cuda_extension, load_extension

_library = torch.library.Library("maskformer_fast", "FRAGMENT")
_library.define(
    "linear_sum_assignment(Tensor cost, Tensor? counts=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _linear_sum_assignment_cpu(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    problems, sizes, strides = _problems(cost)
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
    extension = load_cuda_extension()
    problems, sizes, strides = _problems(cost)
    counts = None if counts is None else counts.contiguous()
    rows = torch.empty(_result_shape(cost), dtype=torch.int64, device=cost.device)
    if cost.dtype == torch.float32:
        assign, scratch_bytes = extension.linear_sum_assignment_cuda_f32, extension.assignment_scratch_bytes_f32
    else:
        assign, scratch_bytes = extension.linear_sum_assignment_cuda_f64, extension.assignment_scratch_bytes_f64
    address = 0 if counts is None else counts.data_ptr()
    arguments = (problems.data_ptr(), sizes, strides, address, rows.data_ptr())
    device = cost.device.index
    size = scratch_bytes(*arguments, device)
    # freed on return, while the kernel may run: the allocator gives it only to what comes later on this stream
    scratch = torch.empty(size, dtype=torch.uint8, device=cost.device)
    assign(*arguments, scratch.data_ptr(), size, device, torch.cuda.current_stream(device).cuda_stream)
    return rows


def _problems(cost: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """[batch, N, M], its sizes and its strides; few tensor operations, as each costs as much as a small problem."""
    problems = cost.flatten(0, -3) if cost.dim() > 3 else cost  # a copy only where the strides allow no view
    if cost.dim() == 2:
        return problems, (1, *problems.shape), (0, *problems.stride())
    return problems, problems.shape, problems.stride()


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

    Runs on the CPU over ``torch.get_num_threads()`` threads, and on a CUDA device (compute capability 8.0 or newer) on
    torch's current stream, without a synchronisation, so that CUDA graphs can capture it. Of equal optima the two may
    choose different ones, the same in every run. The result is integer: no gradient flows through it.

    Raises TypeError or ValueError for a wrong type, shape or device, ImportError where the extension is not built, or
    built without CUDA and given CUDA tensors. A count outside 0..M raises ValueError on the CPU; on CUDA, where raising
    would take a synchronisation, its problem comes back all -1.
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
