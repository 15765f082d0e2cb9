"""The assignment against SciPy, with certificates of optimality (dual potentials, exchanges), and at its edges."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment as scipy_assignment
from torch import Tensor

from maskformer_fast.core import extension
from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops import linear_sum_assignment
from maskformer_fast.ops.assignment import _Arguments, _linear_sum_assignment_cuda, linear_sum_assignment_eager

# N rows, M columns: tall, wide, square, vector widths and their neighbours, single rows and columns
SHAPES = [(100, 20), (20, 100), (33, 33), (1, 1), (1, 9), (9, 1), (4, 4), (5, 3), (3, 5), (8, 7), (7, 8), (64, 63)]


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape) * 3.0


def tied(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-3, 4, size=shape).astype(float)


def forbidden(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.where(rng.random(shape) < 0.2, np.inf, rng.normal(size=shape))


def structured(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Like a matcher's: rows and columns have a level of their own, and many rows want the same column."""
    rows = rng.normal(size=(*shape[:-1], 1)) * 5
    columns = rng.normal(size=(*shape[:-2], 1, shape[-1])) * 5
    return rows + columns + rng.normal(size=shape) * 0.1


def check_assignment(cost: np.ndarray, rows: np.ndarray, count: int | None = None) -> None:
    """One problem: a valid assignment whose cost is SciPy's, or all -1 where SciPy finds none."""
    count = cost.shape[1] if count is None else count
    assert (rows[count:] == -1).all()
    valid = cost[:, :count].astype(np.float64)
    try:
        expected = valid[scipy_assignment(valid)].sum()
    except ValueError:
        assert (rows == -1).all()
        return
    columns = np.flatnonzero(rows >= 0)
    assert len(columns) == min(valid.shape)
    assert len(set(rows[columns])) == len(columns)
    got = valid[rows[columns], columns].sum()
    assert math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [uniform, tied, forbidden, structured])
@pytest.mark.parametrize("shape", SHAPES)
def test_cost_equals_scipy(shape: tuple[int, int], make, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(sum(shape) + len(make.__name__))
    cost = torch.from_numpy(make(rng, (6, *shape))).to(dtype)
    rows = linear_sum_assignment(cost)
    assert rows.shape == (6, shape[1]) and rows.dtype == torch.int64
    for problem, result in zip(cost.numpy(), rows.numpy(), strict=True):
        check_assignment(problem, result)


@pytest.mark.parametrize("make", [uniform, tied, forbidden])
def test_ragged_batch_equals_scipy(make) -> None:
    rng = np.random.default_rng(7)
    cost = torch.from_numpy(make(rng, (3, 5, 10, 17)))
    counts = torch.from_numpy(rng.integers(0, 18, (3, 5)))
    counts[0, 0], counts[0, 1], counts[0, 2] = 0, 17, 10
    cost[0, 0, :, 0] = math.nan  # beyond the count, so nobody looks
    rows = linear_sum_assignment(cost, counts)
    assert rows.shape == (3, 5, 17)
    for problem, result, count in zip(cost.flatten(0, 1), rows.flatten(0, 1), counts.flatten(), strict=True):
        check_assignment(problem.numpy(), result.numpy(), int(count))


@pytest.mark.parametrize("make", [uniform, tied])
def test_large_problem_equals_scipy(make) -> None:
    cost = torch.from_numpy(make(np.random.default_rng(3), (1000, 1000))).float()
    check_assignment(cost.numpy(), linear_sum_assignment(cost).numpy())


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    levels=st.sampled_from([2, 5, 1000]),
    forbid=st.sampled_from([0.0, 0.3, 0.7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_exchange_improves(rows: int, columns: int, levels: int, forbid: float, seed: int) -> None:
    """Optimality without an oracle: no negative cycle in the residual graph; and SciPy agrees on the cost."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, levels, (rows, columns)).astype(float)
    cost[rng.random(cost.shape) < forbid] = np.inf
    result = linear_sum_assignment(torch.from_numpy(cost)).numpy()
    check_assignment(cost, result)
    if (result < 0).all():
        return
    # nodes: rows (the short side), columns, and a hub through which a free column replaces a used one
    if rows > columns:
        owner = np.full(rows, -1)
        owner[result] = np.arange(columns)
        cost, result = cost.T, owner
    n, m = cost.shape
    distance = np.full((n + m + 1, n + m + 1), np.inf)
    np.fill_diagonal(distance, 0)
    distance[:n, n : n + m] = cost
    for column, row in enumerate(result):
        if row >= 0:
            distance[n + column, row] = -cost[row, column]
            distance[row, n + column] = np.inf
            distance[-1, n + column] = 0  # give the column up ...
        else:
            distance[n + column, -1] = 0  # ... after having taken a free one
    for k in range(n + m + 1):
        distance = np.minimum(distance, distance[:, k : k + 1] + distance[k : k + 1])
    assert (np.diag(distance) >= 0).all()


def check_dual_certificate(cost: np.ndarray, row_of: np.ndarray) -> None:
    """Prove the result optimal by potentials u, v found from it alone: shortest paths in its residual graph.

    u[i] + v[j] <= cost[i, j] everywhere, with equality on the chosen pairs; v <= 0, and 0 on the columns left out. Then
    any other assignment costs at least sum(u) + sum(v), which is what this one costs.
    """
    if cost.shape[0] > cost.shape[1]:
        column_of, cost = row_of, cost.T
    else:
        column_of = np.full(len(cost), -1)
        column_of[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    assert (column_of >= 0).all()
    chosen = cost[np.arange(len(cost)), column_of]
    assert np.isfinite(chosen).all()
    v = np.zeros(cost.shape[1])
    for _ in range(len(cost) + 1):  # Bellman-Ford: settled by then, or there is a negative cycle
        before = v
        v = np.minimum(v, (cost - chosen[:, None] + v[column_of][:, None]).min(0))
    np.testing.assert_allclose(v, before, atol=1e-9, err_msg="an exchange improves the assignment")
    u = chosen - v[column_of]
    scale = max(1.0, np.abs(chosen).max())
    assert (u[:, None] + v <= cost + 1e-9 * scale).all()
    left_out = np.setdiff1d(np.arange(cost.shape[1]), column_of)
    assert (np.abs(v[left_out]) <= 1e-9 * scale).all()
    assert math.isclose(u.sum() + v.sum(), chosen.sum(), rel_tol=1e-9, abs_tol=1e-8 * scale)


@pytest.mark.parametrize("make", [uniform, tied, forbidden, structured])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(100, 20), (20, 100), (70, 70), (131, 9), (9, 131), (1, 50), (50, 1), (96, 95)])
def test_dual_certificate(shape: tuple[int, int], dtype: torch.dtype, make) -> None:
    rng = np.random.default_rng(shape[0])
    cost = torch.from_numpy(make(rng, (4, *shape)))
    cost[:, torch.arange(min(shape)), torch.arange(min(shape))] = 2.0  # an assignment exists with forbidden pairs too
    cost = cost.to(dtype)
    for problem, result in zip(cost, linear_sum_assignment(cost), strict=True):
        check_dual_certificate(problem.double().numpy(), result.numpy())


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    levels=st.sampled_from([1, 2, 7, 10**6]),
    strange=st.lists(st.sampled_from([math.inf, math.inf, math.inf, -math.inf, math.nan]), max_size=3),
    forbid=st.sampled_from([0.0, 0.1, 0.5, 0.95]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_costs(rows, columns, scale, levels, strange, forbid, seed) -> None:
    """Forbidden pairs, NaN and -inf anywhere: SciPy's cost with a certificate, or nothing where SciPy refuses."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, levels, (rows, columns)) * scale
    cost[rng.random(cost.shape) < forbid] = np.inf
    for value in strange:
        cost[rng.integers(rows), rng.integers(columns)] = value
    result = linear_sum_assignment(torch.from_numpy(cost)).numpy()
    check_assignment(cost, result)
    if (result >= 0).any():
        check_dual_certificate(cost / scale, result)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_potentials_do_not_change_the_choice(seed: int, rows: int, columns: int) -> None:
    """A constant on every cost moves the total by as much for each pair, and transposing swaps the roles."""
    rng = np.random.default_rng(seed)
    cost = torch.from_numpy(rng.permutation(rows * columns).reshape(rows, columns).astype(float))
    chosen = linear_sum_assignment(cost)
    shifted = linear_sum_assignment(cost + 128.0)
    swapped = linear_sum_assignment(cost.T)

    def total(matrix: Tensor, result: Tensor) -> float:
        used = result >= 0
        return matrix[result[used], used.nonzero().squeeze(1)].sum().item()

    assert total(cost, chosen) == total(cost, shifted) == total(cost.T, swapped)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_invalid_cost_empties_its_problem_only(bad: float) -> None:
    cost = torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = linear_sum_assignment(cost)
    cost[2, 5, 4] = bad
    expected[2] = -1
    assert torch.equal(linear_sum_assignment(cost), expected)
    assert torch.equal(linear_sum_assignment_eager(cost), expected)
    all_bad = torch.full((2, 4, 3), bad)
    assert (linear_sum_assignment(all_bad) == -1).all()


def test_no_finite_assignment() -> None:
    inf = math.inf
    only_inf = torch.full((5, 3), inf)
    empty_column = torch.tensor([[1.0, inf], [2.0, inf], [0.0, inf]])
    contested = torch.tensor([[1.0, 2.0, 3.0], [inf, inf, 0.0], [inf, inf, 0.0]])  # two rows, one column
    for cost in (only_inf, empty_column, contested):
        assert (linear_sum_assignment(cost) == -1).all()
    assert linear_sum_assignment(torch.tensor([[inf, 1.0], [1.0, inf]])).tolist() == [1, 0]


@pytest.mark.parametrize("value", [1e38, -1e38, 1e308, -1e308, 1e-300, 0.0])
def test_extreme_magnitudes_end(value: float) -> None:
    """Sums may overflow, also to nothing assigned, but every problem ends and no row is used twice."""
    rng = np.random.default_rng(0)
    cost = torch.from_numpy(rng.choice([value, -value, value / 2, 1.0], (8, 12, 12)))
    for result in linear_sum_assignment(cost):
        used = result[result >= 0]
        assert len(used) in (0, 12) and len(used.unique()) == len(used)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((0, 5, 3), (0, 3)), ((2, 0, 3), (2, 3)), ((2, 5, 0), (2, 0)), ((0, 0), (0,)), ((2, 0, 4, 5), (2, 0, 5))],
)
def test_empty(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    for solve in (linear_sum_assignment, linear_sum_assignment_eager):
        result = solve(torch.zeros(shape))
        assert result.shape == expected and (result == -1).all()


def test_counts_of_zero() -> None:
    cost = torch.rand(3, 4, 2)
    assert (linear_sum_assignment(cost, torch.zeros(3, dtype=torch.int64)) == -1).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(-1, -2),
        lambda x: x[:, ::2, 1::3],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.unflatten(0, (2, 3)).transpose(0, 1),
        lambda x: x.flip(2)[..., 3:],
    ],
)
def test_strides(view) -> None:
    cost = view(torch.rand(6, 10, 14, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(linear_sum_assignment(cost), linear_sum_assignment(cost.contiguous()))


def test_input_is_not_changed() -> None:
    cost = torch.rand(3, 9, 7)
    before = cost.clone()
    linear_sum_assignment(cost)
    assert torch.equal(cost, before)


def test_threads_give_the_same_result() -> None:
    cost = torch.rand(64, 60, 40, generator=torch.Generator().manual_seed(2))
    counts = torch.arange(64) % 41
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear_sum_assignment(cost, counts)
        torch.set_num_threads(5)
        assert torch.equal(linear_sum_assignment(cost, counts), one)
    finally:
        torch.set_num_threads(threads)


def test_eager_twin_agrees() -> None:
    cost = torch.rand(5, 12, 9, generator=torch.Generator().manual_seed(3))  # no ties: one optimum
    counts = torch.tensor([0, 9, 4, 1, 7])
    assert torch.equal(linear_sum_assignment(cost, counts), linear_sum_assignment_eager(cost, counts))
    assert torch.equal(linear_sum_assignment(cost), linear_sum_assignment_eager(cost))


def test_hand_computed() -> None:
    cost = torch.tensor([[4.0, 1.0], [2.0, 0.0], [9.0, 2.0]])  # rows 1 and 0 cost 2 + 1; the greedy 0 costs 4 more
    assert linear_sum_assignment(cost).tolist() == [1, 0]
    assert linear_sum_assignment(cost.T).tolist() == [1, 0, -1]
    assert linear_sum_assignment(cost, torch.tensor(1)).tolist() == [1, -1]


def test_gradients_are_ignored() -> None:
    cost = torch.rand(4, 3, requires_grad=True)
    result = linear_sum_assignment(cost)
    assert not result.requires_grad
    assert torch.equal(result, linear_sum_assignment(cost.detach()))


@pytest.mark.parametrize(
    ("cost", "counts", "error", "message"),
    [
        ([[1.0]], None, TypeError, "cost: expected a Tensor, got list"),
        (torch.zeros(2, 2, dtype=torch.int64), None, TypeError, "cost: expected torch.float32 or torch.float64"),
        (torch.zeros(2, 2, dtype=torch.bfloat16), None, TypeError, "got torch.bfloat16"),
        (torch.zeros(3), None, ValueError, r"cost: expected shape \[..., N, M\], got \(3,\)"),
        (torch.zeros(2, 3, 4), [1, 2], TypeError, "counts: expected a Tensor or None, got list"),
        (torch.zeros(2, 3, 4), torch.zeros(2), TypeError, "counts: expected torch.int64, got torch.float32"),
        (torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64), ValueError, r"counts: expected shape \(2,\)"),
        (torch.zeros(2, 3, 4), torch.tensor([1, 5]), ValueError, r"counts: expected 0..4 .*, got 5"),
        (torch.zeros(2, 3, 4), torch.tensor([-1, 2]), ValueError, r"counts: expected 0..4 .*, got -1"),
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "counts: expected on cpu"),
    ],
)
def test_bad_input(cost, counts, error: type[Exception], message: str) -> None:
    for solve in (linear_sum_assignment, linear_sum_assignment_eager):
        with pytest.raises(error, match=message):
            solve(cost, counts)


@pytest.mark.parametrize("counts", [None, torch.tensor([[2, 0, 5], [4, 1, 3]])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, counts: Tensor | None) -> None:
    cost = torch.rand(2, 3, 4, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.maskformer_fast.linear_sum_assignment.default, (cost, counts))
    torch.library.opcheck(torch.ops.maskformer_fast.linear_sum_assignment.default, (cost.transpose(2, 3),))


@pytest.mark.no_cover
def test_compiles_without_graph_break() -> None:
    def normalised(cost: Tensor, counts: Tensor) -> Tensor:
        return linear_sum_assignment(cost * 2 - 1, counts) + 1

    compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, columns in ((6, 4), (5, 9)):
        cost, counts = torch.rand(3, rows, columns), torch.tensor([2, 0, 4])
        assert torch.equal(compiled(cost, counts), normalised(cost, counts))


def test_missing_extension_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    extension.load_extension.cache_clear()
    monkeypatch.setitem(sys.modules, "maskformer_fast._C", None)
    with pytest.raises(ImportError, match=r"cannot be loaded: .*Build it .* pip install -e \."):
        linear_sum_assignment(torch.zeros(2, 2))
    monkeypatch.undo()
    assert linear_sum_assignment(torch.zeros(1, 1)).tolist() == [0]


@pytest.mark.no_cover
def test_scipy_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['scipy'] = None; import torch\n"
        "from maskformer_fast.ops import linear_sum_assignment\n"
        "assert linear_sum_assignment(torch.eye(3)[:2]).tolist().count(-1) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bindings_refuse_nonsense() -> None:
    assign = extension.load_extension().linear_sum_assignment_f32
    good = torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64)
    arguments = [good[0].data_ptr(), (1, 2, 3), (6, 3, 1), 0, good[1].data_ptr(), 1]
    for index, value, message in (
        (0, 0, "cost"),
        (1, (1, -2, 3), "sizes"),
        (1, (1, 2**40, 3), "cost: expected fewer"),
        (4, 0, "row_of"),
        (5, 0, "threads"),
    ):
        bad = arguments.copy()
        bad[index] = value
        with pytest.raises(ValueError, match=message):
            assign(*bad)


def test_extension_without_cuda_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load_extension", lambda: SimpleNamespace(has_cuda=False))
    with pytest.raises(ImportError, match=r"without its CUDA operators. .*nvcc .*: MF_CUDA=ON pip install -e \."):
        _linear_sum_assignment_cuda(_Arguments(torch.zeros(2, 2)))


@pytest.mark.no_cover
def test_loads_without_a_driver() -> None:
    """The CUDA runtime is linked in, and asks for the driver only when it is first used."""
    code = (
        "import maskformer_fast._C as C\n"
        "if C.has_cuda:\n"
        "    print(C.assignment_scratch_bytes_f32(0, (0, 5, 3), (15, 3, 1), 0, 0, 0))\n"
        "    try:\n"
        "        C.linear_sum_assignment_cuda_f32(64, (1, 5, 3), (15, 3, 1), 0, 64, 0, 0, 0, 0)\n"
        "    except RuntimeError as error:\n"
        "        print(error)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    if load_extension().has_cuda:
        assert result.stdout.startswith("0\nlinear_sum_assignment on CUDA: "), result.stdout
