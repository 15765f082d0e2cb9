"""The batched replacement of SciPy's call, against SciPy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.ops import assign_pairs, linear_sum_assignment

scipy = pytest.importorskip("scipy.optimize")
SHAPES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), SHAPES, st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_ragged_batches_equal_scipy(seed: int, shapes: list, maximize: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    for cost, (rows, columns) in zip(costs, assign_pairs(costs, maximize), strict=True):
        expected = scipy.linear_sum_assignment(cost.numpy(), maximize)
        assert rows.dtype == columns.dtype == torch.int64
        assert rows.tolist() == expected[0].tolist() and columns.tolist() == expected[1].tolist()


def test_batches_of_one_size() -> None:
    cost = torch.randn(2, 3, 7, 5)
    pairs = assign_pairs(cost)
    assert len(pairs) == 6 and assign_pairs(cost[:0]) == []
    for problem, (rows, columns) in zip(cost.flatten(0, 1), pairs, strict=True):
        assert columns.tolist() == scipy.linear_sum_assignment(problem.numpy())[1].tolist()
        assert problem[rows, columns].sum() == pytest.approx(problem[scipy.linear_sum_assignment(problem)].sum())
    assert torch.equal(linear_sum_assignment(cost, maximize=True), linear_sum_assignment(-cost))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (3, 4)])
def test_the_errors_are_scipys(maximize: bool, shape: tuple[int, int]) -> None:
    sign = -1 if maximize else 1
    for values in ([float("nan")], [-sign * torch.inf], [sign * torch.inf] * 12, [sign * torch.inf]):
        cost = torch.zeros(shape)
        cost.flatten()[: len(values)] = torch.tensor(values)
        try:
            scipy.linear_sum_assignment(cost.numpy(), maximize)
        except ValueError as error:
            with pytest.raises(ValueError, match=rf"cost\[1\]: {error}"):
                assign_pairs([torch.zeros(2, 2), cost], maximize)
        else:
            assign_pairs([cost], maximize)
    with pytest.raises(ValueError, match="expected a matrix"):
        assign_pairs([torch.zeros(3)])
    with pytest.raises(TypeError, match=r"cost\[0\]: expected a Tensor, got list"):
        assign_pairs([[1.0]])  # type: ignore[list-item]
    for cost in ([torch.zeros(2, 2), torch.zeros(2, 2) + 1j], torch.zeros(3, 2, 2) + 1j):
        with pytest.raises(TypeError, match=r"cost\[\d\]: expected real numbers, got torch.complex64"):
            assign_pairs(cost)


@pytest.mark.parametrize("maximize", [False, True])
def test_matrices_of_any_type_and_layout(maximize: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    costs = [torch.rand(9, 7, generator=generator) for _ in range(8)]
    others = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    changed = [(100 * cost).to(dtype) for cost, dtype in zip(costs, others, strict=False)]
    changed[-1] = costs[5] < 0.2
    changed += [costs[6].T, costs[7][::2, 1:].requires_grad_(), 2**40 + torch.arange(12).view(3, 4)]
    found = [*assign_pairs(changed, maximize), *(assign_pairs([cost], maximize)[0] for cost in changed)]
    for cost, (rows, columns) in zip(2 * changed, found, strict=True):
        exact = cost.detach().to(torch.float64)
        expected = exact[scipy.linear_sum_assignment(exact, maximize)].sum()
        assert len(rows) == min(cost.shape) and torch.equal(rows, rows.unique()) and len(columns.unique()) == len(rows)
        assert exact[rows, columns].sum() == pytest.approx(expected)
    stacked = torch.randint(50, (3, 6, 4), generator=generator)
    for problem, (rows, columns) in zip(stacked, assign_pairs(stacked, maximize), strict=True):
        assert problem[rows, columns].sum() == problem[scipy.linear_sum_assignment(problem, maximize)].sum()
