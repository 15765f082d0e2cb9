"""The kernels of points against the eager twins in double precision, on ragged sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.kernels import point_loss
from maskformer_fast.kernels.point_cost import point_cost_forward
from maskformer_fast.kernels.points import sample_masks_forward
from maskformer_fast.ops.point_cost import _made_arguments, _point_cost_cuda, _point_cost_torch
from maskformer_fast.ops.point_loss import (
    PointPairs,
    PointPairsBackward,
    _backward_cuda,
    _Choice,
    _choose_points_cuda,
    _point_sums_cuda,
    point_sums_backward_eager,
    point_sums_eager,
)
from maskformer_fast.ops.points import _Arguments as Masks
from maskformer_fast.ops.points import _sample_masks_cuda, _sample_masks_torch, sample_maps
from maskformer_fast.structures import pack_masks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FOCAL = {"bce": (1.0, 1.0, 0.0), "focal": (0.25, 0.75, 2.0), "linear": (0.3, 0.7, 1.0), "any": (0.6, 0.4, 1.5)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """In -0.1 to 1.1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.1


@pytest.mark.parametrize("form", ["float32", "bool", "packed"])
@pytest.mark.parametrize(("extent", "size", "count"), [((13, 21), (13, 21), 700), ((7, 9), (13, 21), 5),
                                                       ((31, 40), (1, 1), 9), ((5, 8), (5, 8), 513)])
def test_masks(form: str, extent: tuple[int, int], size: tuple[int, int], count: int) -> None:
    masks = normal(4, *size) < 0
    rows, groups = torch.tensor([2, 0, -1, 3, 3]), torch.tensor([0, 1, -1, 2, 0])
    given = {"float32": masks.float() * 3, "bool": masks, "packed": pack_masks(masks)}[form]
    arguments = Masks(given, size[1], rows, uniform(3, count, 2), groups, extent)
    got = sample_masks_forward(*arguments)
    torch.testing.assert_close(got, _sample_masks_torch(arguments), rtol=1e-5, atol=1e-5)
    assert got[2].abs().max() == 0


def test_points_that_are_nowhere_and_nothing_to_do() -> None:
    points = torch.tensor([0.5, math.nan, math.inf, -math.inf, 1e30]).repeat_interleave(2).view(1, 5, 2)
    one = torch.zeros(1, dtype=torch.int64)
    assert sample_masks_forward(torch.ones(1, 8, 8), 8, one, points, one, (8, 8)).tolist() == [[1, 0, 0, 0, 0]]
    assert sample_masks_forward(torch.ones(0, 8, 8), 8, one, points, one, (8, 8)).tolist() == [[0.0] * 5]
    assert sample_masks_forward(torch.ones(1, 8, 8), 8, one[:0], points, one[:0], (8, 8)).shape == (0, 5)
    with pytest.raises(ValueError, match="masks: expected float32, bool or uint8, got torch.float64"):
        sample_masks_forward(torch.ones(1, 8, 8).double(), 8, one, points, one, (8, 8))


@pytest.mark.parametrize(("dtype", "size", "uncertain", "count"), [
    (torch.float32, (12, 19), 700, 2500), (torch.float16, (40, 3), 1, 1025), (torch.bfloat16, (1, 1), 2500, 2500),
    (torch.float32, (5, 5), 0, 40), (torch.float32, (5, 5), 0, 0),
])  # fmt: skip
def test_the_least_certain_candidates_are_chosen(dtype: torch.dtype, size: Any, uncertain: int, count: int) -> None:
    logits = (3 * normal(4, *size)).to(dtype)
    candidates, random = uniform(3, count, 2), uniform(3, 33, 2, seed=1)
    groups = torch.tensor([1, 0, -1, 2])
    got = point_loss.choose_points_forward(logits, groups, candidates, random, uncertain)
    assert got.shape == (4, uncertain + 33, 2) and got[2].abs().max() == 0
    for row in (0, 1, 3):
        own, group = logits[row].float(), int(groups[row])
        assert torch.equal(got[row, uncertain:], random[group])
        if not uncertain:
            continue
        nearness, chosen = (
            sample_maps(own[None, None], points)[0, 0].abs().sort().values
            for points in (candidates[group][None], got[row, :uncertain][None])
        )
        torch.testing.assert_close(chosen, nearness[:uncertain], rtol=1e-5, atol=1e-6)
        known = {tuple(point) for point in candidates[group].tolist()}
        found = [tuple(point) for point in got[row, :uncertain].tolist()]
        assert known.issuperset(found) and len(set(found)) == uncertain


def test_equal_candidates_are_chosen_in_order_and_nan_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(point_loss, "MAPS", 1)  # a launch for each map
    logits = torch.zeros(3, 1, 4)
    logits[1, 0, 1:] = torch.tensor([math.nan, math.inf, -2.0])
    logits[2] = math.nan
    candidates = torch.tensor([[0.375, 0.5], [0.625, 0.5], [0.875, 0.5], [0.125, 0.5]])[None]  # centres of the cells
    groups = torch.zeros(3, dtype=torch.int64)
    got = point_loss.choose_points_forward(logits, groups, candidates, candidates[:, :0], 3)
    assert torch.equal(got[0], candidates[0, :3]) and torch.equal(got[2], candidates[0, :3])
    # shares of the neighbours are 0, and 0 times NaN or infinity is NaN, as in the eager twin: only the first is sure
    assert torch.equal(point_loss.choose_points_forward(logits, groups, candidates, candidates[:, :0], 1)[1, 0],
                       candidates[0, 2])  # fmt: skip


def pairs(dtype: torch.dtype, size: tuple[int, int], count: int, focal: str) -> PointPairs:
    logits = (4 * normal(4, *size)).to(dtype)
    return PointPairs(logits, torch.tensor([0, 5, -1, 2]), uniform(4, count, 2), normal(4, count).sigmoid(),
                      FOCAL[focal])  # fmt: skip


def double(given: PointPairs) -> PointPairs:
    return given._replace(logits=given.logits.double(), points=given.points.double(), truth=given.truth.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("focal", FOCAL)
@pytest.mark.parametrize(("size", "count"), [((12, 19), 1100), ((3, 40), 37), ((1, 1), 1)])
def test_sums_and_gradients(dtype: torch.dtype, focal: str, size: tuple[int, int], count: int) -> None:
    given = pairs(dtype, size, count, focal)
    sums = point_loss.point_sums_forward(*given)
    torch.testing.assert_close(sums.double(), point_sums_eager(double(given)), rtol=2e-5, atol=2e-5)
    assert sums[2].abs().max() == 0
    upstream = normal(4, 4, seed=5)
    got = point_loss.point_sums_backward(upstream, *given)
    expected = point_sums_backward_eager(PointPairsBackward(upstream.double(), double(given)))
    assert got.dtype == dtype and got[2].abs().max() == 0
    limit = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for row in (0, 1, 3):
        torch.testing.assert_close(got[row].double(), expected[row], rtol=limit,
                                   atol=limit * expected[row].abs().max().item())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradients_do_not_depend_on_the_order_of_points(scale: float) -> None:
    """Rounding of sums in float32 would: thousands of points are in one cell. Chunks of maps are joined, too."""
    given = pairs(torch.float32, (2, 3), 3000, "bce")
    upstream = scale * normal(4, 4)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    shuffled = given._replace(points=given.points[:, order].contiguous(), truth=given.truth[:, order].contiguous())
    got = point_loss.point_sums_backward(upstream, *given)
    assert torch.equal(got, point_loss.point_sums_backward(upstream, *shuffled))
    expected = point_sums_backward_eager(PointPairsBackward(upstream.double(), double(given)))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_spoils_its_own_pair_only(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(point_loss, "MAPS", 3)
    given = pairs(torch.float32, (6, 6), 200, "bce")
    clean = point_loss.point_sums_backward(torch.ones(4, 4), *given)
    given.logits[1, 3, 3] = value
    given.logits[2] = value  # left out
    sums = point_loss.point_sums_forward(*given)
    assert not sums[1, 0].isfinite() and sums[[0, 2, 3]].isfinite().all() and sums[2].abs().max() == 0
    gradient = point_loss.point_sums_backward(torch.ones(4, 4), *given)
    assert gradient[1].isnan().all() and torch.equal(gradient[[0, 2, 3]], clean[[0, 2, 3]])
    upstream = torch.ones(4, 4)
    upstream[3, 0] = math.inf
    assert not point_loss.point_sums_backward(upstream, *given)[3].isfinite().any()


@pytest.mark.parametrize("mask_loss", ["bce", "focal", "any"])
@pytest.mark.parametrize(("dtype", "sizes"), [
    (torch.float32, (2, 2, 35, 7, 150)), (torch.bfloat16, (3, 1, 4, 33, 20)), (torch.float16, (1, 1, 1, 1, 1)),
])  # fmt: skip
def test_costs(dtype: torch.dtype, mask_loss: str, sizes: tuple[int, ...]) -> None:
    layers, shared, queries, slots, count = sizes
    gamma = 1.5 if mask_loss == "any" else 2.0
    loss = LossConfig(1.0, 5.0, 3.0, mask_loss="bce" if mask_loss == "bce" else "focal", focal_gamma=gamma)
    classes, maps = normal(layers, 2, queries, 71), (3 * normal(layers, 2, queries, 11, 9)).to(dtype)
    points, truth = uniform(shared, 2, count, 2), normal(shared, 2, slots, count).sigmoid()
    labels = torch.arange(2 * slots).view(2, slots) % 71
    others = (truth, labels, torch.tensor([slots, slots // 2]), loss)
    values = (3 * normal(layers, 2, queries, count)).to(dtype)
    for logits, places in ((maps, points), (values, None)):
        given = _made_arguments(classes, logits, places, *others)
        exact = _made_arguments(classes.double(), logits.double(), None if places is None else places.double(), *others)
        expected = _point_cost_torch(exact)
        got = point_cost_forward(given.class_logits, logits, *given[2:])
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_query_with_a_logit_that_is_not_finite_has_no_finite_cost(value: float) -> None:
    logits = normal(1, 1, 6, 8, 8)
    logits[0, 0, 2, 4, 4] = value
    arguments = _made_arguments(
        normal(1, 1, 6, 4), logits, uniform(1, 1, 500, 2), normal(1, 1, 3, 500).sigmoid(),
        torch.tensor([[0, 1, 9]]), torch.tensor([3]), LossConfig(mask_loss="bce"),
    )  # fmt: skip
    cost = point_cost_forward(*arguments)
    assert not cost[0, 0, 2].isfinite().any() and cost[0, 0, :, 2].isnan().all()  # there is no label 9
    assert cost[0, 0, [0, 1, 3, 4, 5], :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_call_the_kernels(dtype: torch.dtype) -> None:
    """The CUDA implementations; double precision goes to the eager twins. Strides are those of a view."""
    exact = dtype == torch.float64
    given = pairs(torch.float32, (6, 7), 40, "focal")
    given = double(given) if exact else given
    given = given._replace(logits=given.logits.mT)
    flat = PointPairs(given.logits.contiguous(), *given[1:])
    sums = _point_sums_cuda(given)
    assert torch.equal(sums, point_sums_eager(given) if exact else point_loss.point_sums_forward(*flat))
    back = _backward_cuda(PointPairsBackward(sums, given))
    expected = point_sums_backward_eager(PointPairsBackward(sums, given))
    assert torch.equal(back, expected if exact else point_loss.point_sums_backward(sums, *flat))
    groups = torch.zeros(4, dtype=torch.int64)
    chosen = _choose_points_cuda(_Choice(given.logits, groups, given.points, given.points, 7))
    assert chosen.dtype == dtype and chosen.shape == (4, 47, 2)
    masks = Masks(given.truth[None].float(), 40, groups, given.points, groups, (4, 40))
    torch.testing.assert_close(_sample_masks_cuda(masks), _sample_masks_torch(masks), rtol=1e-5, atol=1e-5)
    arguments = _made_arguments(
        normal(1, 4, 6, 4).to(dtype), normal(1, 4, 6, 5, 5).to(dtype), given.points[None], given.truth[None, :, None],
        torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, dtype=torch.int64), LossConfig(mask_loss="bce"),
    )  # fmt: skip
    torch.testing.assert_close(_point_cost_cuda(arguments), _point_cost_torch(arguments), rtol=1e-5, atol=1e-5)


def test_wrong_types_are_named_and_nothing_is_done_for_nothing() -> None:
    given = pairs(torch.float32, (6, 7), 40, "bce")
    with pytest.raises(ValueError, match="logits: expected float16, bfloat16 or float32, got torch.float64"):
        point_loss.point_sums_forward(*double(given))
    none = PointPairs(*(tensor[:0] for tensor in given[:4]), given.focal)
    assert point_loss.point_sums_forward(*none).shape == (0, 4)
    assert point_loss.point_sums_backward(torch.ones(0, 4), *none).shape == (0, 6, 7)
    empty = torch.zeros(1, 2, 0, 5)
    cost = point_cost_forward(empty, torch.zeros(1, 2, 0, 9), None, torch.zeros(1, 2, 3, 9),
                              torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), (1, 1, 1),
                              (1.0, 1.0, 0.0))  # fmt: skip
    assert cost.shape == (1, 2, 0, 3)
    with pytest.raises(ValueError, match="logits: expected"):
        point_cost_forward(empty, torch.zeros(1, 2, 0, 9).double(), None, torch.zeros(1, 2, 3, 9),
                           torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), (1, 1, 1),
                           (1.0, 1.0, 0.0))  # fmt: skip
