"""Masks and maps at points, costs and losses there, against `grid_sample` and plain formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.ops.point_cost import point_cost, point_cost_eager
from maskformer_fast.ops.point_loss import (
    PointPairs,
    PointPairsBackward,
    choose_points,
    choose_points_eager,
    losses_of_pairs,
    point_sums_backward_eager,
    point_sums_eager,
)
from maskformer_fast.ops.points import sample_masks, sample_masks_eager
from maskformer_fast.structures import pack_masks

pytestmark = pytest.mark.usefixtures("isa")
LOSSES = [
    LossConfig(2.0, 5.0, 3.0, mask_loss="bce"),
    LossConfig(1.0, 20.0, 1.0, mask_loss="focal", focal_alpha=0.25, focal_gamma=2.0),
    LossConfig(1.0, 20.0, 1.0, mask_loss="focal", focal_alpha=0.6, focal_gamma=1.5),
]
OPERATORS = torch.ops.maskformer_fast
TOLERANCE = 2e-5  # also of bfloat16 logits, which are read exactly


def samples(maps: Tensor, points: Tensor) -> Tensor:
    """Maps [N, h, w] at points [N, P, 2], in float64."""
    grid = (2 * points.double() - 1).unsqueeze(2)
    maps = maps.double().unsqueeze(1)
    return F.grid_sample(maps, grid, "bilinear", "zeros", align_corners=False).flatten(1)


def terms(x: Tensor, loss: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Probability, and the loss with the target on and off."""
    p = x.sigmoid()
    on, off = -F.logsigmoid(x), -F.logsigmoid(-x)
    if loss.mask_loss == "focal":
        on = loss.focal_alpha * (1 - p) ** loss.focal_gamma * on
        off = (1 - loss.focal_alpha) * p**loss.focal_gamma * off
    return p, on, off


@pytest.mark.parametrize("form", ["float32", "bool", "packed"])
@pytest.mark.parametrize(("extent", "size"), [(None, (13, 21)), ((7, 9), (13, 21)), ((31, 40), (1, 1)), (None, (5, 8))])
def test_masks_are_sampled_as_maps_padded_or_cropped(form: str, extent: Any, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    masks = torch.rand(4, *size) < 0.5
    points = torch.rand(3, 1100, 2) * 1.2 - 0.1
    rows, groups = torch.tensor([2, 0, -1, 3, 3]), torch.tensor([0, 1, 0, 2, 0])
    height, width = extent or size
    framed = F.pad(masks.float(), (0, width - size[1], 0, height - size[0]))  # negative numbers crop
    if extent == (7, 9):  # what is behind the extent is still sampled, close to its edge
        points = points.clamp(0, 0.9)
    expected = samples(framed[rows.clamp(min=0)], points[groups]) * (rows >= 0).unsqueeze(1)
    given = {"float32": masks.float(), "bool": masks, "packed": pack_masks(masks)}[form]
    for call in (sample_masks, sample_masks_eager):
        got = call(given, size[1], rows, points, groups, extent)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
        assert got[2].abs().max() == 0
    exact = sample_masks(given, size[1], rows, points.double(), groups, extent)
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_points_that_are_nowhere_give_zeros(value: float) -> None:
    points = torch.full((1, 3, 2), 0.5)
    points[0, 1, 0], points[0, 2, 1] = value, value
    one = torch.zeros(1, dtype=torch.int64)
    assert sample_masks(torch.ones(1, 8, 8), 8, one, points, one).tolist() == [[1, 0, 0]]
    sums = OPERATORS.point_sums(torch.full((1, 8, 8), 4.0), one, points, torch.ones(1, 3), [1.0, 1.0, 0.0])
    assert sums[0, 2].item() == pytest.approx(torch.tensor([4.0, 0, 0]).sigmoid().sum().item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "size", "uncertain"), [
    (torch.float32, (12, 19), 700), (torch.bfloat16, (40, 3), 1), (torch.float32, (1, 1), 2500),
    (torch.float32, (5, 5), 0),
])
def test_the_least_certain_candidates_are_chosen(dtype: torch.dtype, size: tuple[int, int], uncertain: int) -> None:
    torch.manual_seed(1)
    logits = (3 * torch.randn(5, *size)).to(dtype)
    candidates, random = torch.rand(3, 2500, 2), torch.rand(3, 33, 2)
    groups = torch.tensor([1, 0, 2, -1, 1])
    nearness = samples(logits, candidates[groups.clamp(min=0)]).abs()
    for call in (choose_points, choose_points_eager):
        got = call(logits, groups, candidates, random, uncertain)
        assert got.shape == (5, uncertain + 33, 2) and got[3].abs().max() == 0
        for row, group in enumerate(groups.tolist()):
            if group < 0:
                continue
            assert torch.equal(got[row, uncertain:], random[group])
            chosen = samples(logits[row : row + 1], got[row : row + 1, :uncertain])[0].abs()
            least = nearness[row].sort().values[:uncertain]
            torch.testing.assert_close(chosen.sort().values, least, rtol=1e-4, atol=1e-5)
            known = {tuple(point) for point in candidates[group].tolist()}
            found = [tuple(point) for point in got[row, :uncertain].tolist()]
            assert known.issuperset(found) and len(set(found)) == uncertain


def test_equal_candidates_and_nan() -> None:
    logits = torch.zeros(2, 4, 4)
    logits[1] = torch.nan
    groups = torch.zeros(2, dtype=torch.int64)
    got = choose_points(logits, groups, torch.rand(1, 9, 2), torch.rand(1, 0, 2), 4)
    assert got.shape == (2, 4, 2) and len({tuple(point) for point in got[0].tolist()}) == 4


def pairs(seed: int, dtype: torch.dtype, size: tuple[int, int], points: int, loss: LossConfig) -> PointPairs:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(4, *size, generator=generator)).to(dtype)
    alpha = loss.focal_alpha if loss.mask_loss == "focal" else None
    focal = (1.0, 1.0, 0.0) if alpha is None else (alpha, 1 - alpha, loss.focal_gamma)
    places = torch.rand(4, points, 2, generator=generator) * 1.1 - 0.05
    truth = torch.rand(4, points, generator=generator)
    return PointPairs(logits, torch.tensor([0, 5, -1, 2]), places, truth, focal)


@pytest.mark.parametrize(("dtype", "size", "points"), [
    (torch.float32, (12, 19), 2100), (torch.bfloat16, (3, 40), 37), (torch.float32, (1, 1), 1),
])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients(dtype: torch.dtype, size: tuple[int, int], points: int, loss: LossConfig) -> None:
    given = pairs(0, dtype, size, points, loss)
    exact = given.logits.double().requires_grad_()
    p, on, off = terms(samples(exact, given.points), loss)
    t = given.truth.double()
    mask = (t * on + (1 - t) * off).mean(1)
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    present = (given.rows >= 0).double()
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5]).double()
    (weight * present * (mask + 3 * dice)).sum().backward()
    logits = given.logits.clone().requires_grad_()
    got_mask, got_dice = losses_of_pairs(logits, given.rows, given.points, given.truth, loss)
    torch.testing.assert_close(got_mask.double(), mask * present, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got_dice.double(), dice * present, rtol=2e-5, atol=2e-5)
    (weight * (got_mask + 3 * got_dice)).sum().backward()
    assert logits.grad.dtype == dtype and logits.grad[2].abs().max() == 0
    limit = 3e-5 if dtype == torch.float32 else 5e-3
    for row in (0, 1, 3):
        scale = exact.grad[row].abs().max().item()
        torch.testing.assert_close(logits.grad[row].double(), exact.grad[row], rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("loss", LOSSES)
def test_eager_twins_and_gradients_in_float64(loss: LossConfig) -> None:
    given = pairs(3, torch.float32, (9, 7), 50, loss)
    sums = OPERATORS.point_sums(*given[:4], list(given.focal))
    torch.testing.assert_close(sums, point_sums_eager(given), rtol=2e-5, atol=2e-5)
    upstream = torch.randn(4, 4)
    gradient = OPERATORS.point_sums_backward(upstream, *given[:4], list(given.focal))
    expected = point_sums_backward_eager(PointPairsBackward(upstream, given))
    torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=1e-4)
    exact = given.logits.double().requires_grad_()
    others = (given.rows, given.points.double(), given.truth.double(), list(given.focal))
    assert torch.autograd.gradcheck(lambda x: OPERATORS.point_sums(x, *others), (exact,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_spoils_its_own_pair_only(value: float) -> None:
    given = pairs(0, torch.float32, (6, 6), 200, LOSSES[0])
    given.logits[1, 3, 3] = value
    given.logits[2] = value  # left out
    sums = OPERATORS.point_sums(*given[:4], list(given.focal))
    assert sums[1, 0].isnan() and sums[[0, 2, 3]].isfinite().all() and sums[2].abs().max() == 0
    gradient = OPERATORS.point_sums_backward(torch.ones(4, 4), *given[:4], list(given.focal))
    assert not gradient[1].isfinite().all() and gradient[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "sizes"), [
    (torch.float32, (2, 2, 9, 7, 1500)), (torch.bfloat16, (3, 1, 4, 3, 20)), (torch.float32, (1, 1, 1, 1, 1)),
])
def test_costs(dtype: Any, loss: LossConfig, sizes: tuple[int, ...]) -> None:
    layers, shared, queries, slots, points = sizes
    torch.manual_seed(2)
    classes = torch.randn(layers, 2, queries, 6)
    logits = (3 * torch.randn(layers, 2, queries, 11, 9)).to(dtype)
    places, truth = torch.rand(shared, 2, points, 2), torch.rand(shared, 2, slots, points)
    labels, counts = torch.randint(5, (2, slots)), torch.tensor([slots, slots // 2])
    expected = torch.zeros(layers, 2, queries, slots, dtype=torch.float64)
    values = torch.zeros(layers, 2, queries, points)
    for layer in range(layers):
        for image in range(2):
            group = layer if shared > 1 else 0
            own = places[group, image].expand(queries, -1, -1)
            x = samples(logits[layer, image], own)  # [Q, P]
            values[layer, image] = x
            p, on, off = (value.unsqueeze(1) for value in terms(x, loss))
            t = truth[group, image].double()
            mask = (t * on + (1 - t) * off).mean(2)
            dice = 1 - (2 * (p * t).sum(2) + 1) / (p.sum(2) + t.sum(1) + 1)
            chosen = classes[layer, image].double().softmax(1)[:, labels[image]]
            cost = loss.mask_weight * mask + loss.dice_weight * dice - loss.class_weight * chosen
            expected[layer, image, :, : counts[image]] = cost[:, : counts[image]]
    scale = expected.abs().max().item()
    others = (labels, counts, loss)
    for call in (point_cost, point_cost_eager):
        got = call(classes, logits, places, truth, *others)
        torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)
        got = call(classes, values, None, truth, *others)
        torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)
    exact = point_cost(classes.double(), logits.double(), places.double(), truth.double(), *others)
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_query_with_a_logit_that_is_not_finite_has_no_finite_cost(value: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 6, 8, 8)
    logits[0, 0, 2, 4, 4] = value
    cost = point_cost(
        torch.randn(1, 1, 6, 4), logits, torch.rand(1, 1, 500, 2), torch.rand(1, 1, 3, 500),
        torch.zeros(1, 3, dtype=torch.int64), torch.tensor([3]), LOSSES[0],
    )  # fmt: skip
    assert not cost[0, 0, 2].isfinite().any()
    assert cost[0, 0, [0, 1, 3, 4, 5]].isfinite().all()


def test_results_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    given = pairs(0, torch.float32, (12, 19), 1300, LOSSES[0])
    cost = (
        torch.randn(2, 2, 13, 5), torch.randn(2, 2, 13, 9, 9), torch.rand(1, 2, 1200, 2), torch.rand(1, 2, 4, 1200),
        torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 3]), LOSSES[0],
    )  # fmt: skip
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            backward = OPERATORS.point_sums_backward(torch.ones(4, 4), *given[:4], list(given.focal))
            results.append([OPERATORS.point_sums(*given[:4], list(given.focal)), backward, point_cost(*cost)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_operators_are_registered_correctly() -> None:
    given = pairs(0, torch.float32, (4, 5), 9, LOSSES[0])
    logits = given.logits.requires_grad_()
    torch.library.opcheck(OPERATORS.point_sums.default, (logits, *given[1:4], list(given.focal)))
    rows = torch.zeros(4, dtype=torch.int64)
    torch.library.opcheck(OPERATORS.choose_points.default, (logits.detach(), rows, torch.rand(1, 9, 2),
                                                            torch.rand(1, 2, 2), 3))
    torch.library.opcheck(OPERATORS.sample_masks.default, (torch.ones(1, 4, 5), 5, rows, torch.rand(1, 9, 2), rows,
                                                           [4, 5]))
    torch.library.opcheck(OPERATORS.point_cost.default, (
        torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 7, 7), torch.rand(1, 2, 9, 2), torch.rand(1, 2, 2, 9),
        torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 0]), [1.0, 2.0, 3.0], [1.0, 1.0, 0.0],
    ))  # fmt: skip


def test_arguments_out_of_range_are_refused() -> None:
    one, points = torch.zeros(1, dtype=torch.int64), torch.rand(1, 3, 2)
    with pytest.raises(ValueError, match="rows: expected -1..0, got 1"):
        sample_masks(torch.ones(1, 4, 4), 4, one + 1, points, one)
    with pytest.raises(ValueError, match="groups: expected"):
        sample_masks(torch.ones(1, 4, 4), 4, one, points, one + 1)
    with pytest.raises(TypeError, match="masks: expected torch.float32, torch.bool or packed torch.uint8"):
        sample_masks(torch.ones(1, 4, 4, dtype=torch.int32), 4, one, points, one)
    with pytest.raises(ValueError, match=r"uncertain: expected 0\.\.3"):
        choose_points(torch.ones(1, 4, 4), one, points, points, 4)
    arguments = [torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 4, 4), points[None], torch.ones(1, 1, 2, 3)]
    with pytest.raises(ValueError, match="labels: expected 0..2, got 3"):
        point_cost(*arguments, torch.full((1, 2), 3), one + 2, LOSSES[0])
    with pytest.raises(ValueError, match="counts: expected 0..2, got 3"):
        point_cost(*arguments, torch.zeros(1, 2, dtype=torch.int64), one + 3, LOSSES[0])
    with pytest.raises(ValueError, match="points: expected"):
        point_cost(arguments[0], arguments[1], torch.rand(1, 1, 4, 2), arguments[3],
                   torch.zeros(1, 2, dtype=torch.int64), one + 2, LOSSES[0])
