"""Costs and losses at points on CUDA against float64, and their gradients, which are the same in every run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.ops import draw_points, mask_loss_at_points, matching_cost_at_points
from maskformer_fast.ops.point_loss import choose_points, choose_points_eager
from maskformer_fast.ops.points import PointDraws
from maskformer_fast.structures import Predictions, Targets, pack_masks

pytestmark = pytest.mark.gpu
LOSSES = [LossConfig(2.0, 5.0, 5.0, mask_loss="bce", padding="include", points=12544),
          LossConfig(1.0, 20.0, 1.0, focal_gamma=1.5, points=333)]  # fmt: skip


def case(loss: LossConfig) -> tuple[Predictions, Targets, Tensor, PointDraws]:
    """Three layers of two images with padding, of which one has fewer targets."""
    torch.manual_seed(0)
    size, input_size, valid = (40, 56), (160, 224), torch.tensor([[160, 224], [131, 190]], device="cuda")
    floats = [torch.randn(shape, device="cuda") for shape in ((3, 2, 100, 20), (3, 2, 100, 64), (2, 64, *size))]
    predictions = Predictions(floats[0], floats[1] / 4, floats[2], valid, input_size)
    masks = pack_masks(torch.rand(2, 37, *input_size, device="cuda") < 0.4)
    targets = Targets(torch.randint(19, (2, 37), device="cuda"), torch.tensor([37, 5], device="cuda"), masks, valid,
                      input_size)  # fmt: skip
    query = torch.rand(3, 2, 100, device="cuda").argsort(-1)[..., :37]
    query = query.masked_fill(torch.arange(37, device="cuda") >= targets.counts[:, None], -1)
    return predictions, targets, query, draw_points(loss, [1, 2], "cuda")


def double(predictions: Predictions) -> Predictions:
    names = ("class_logits", "mask_embeddings", "pixel_features")
    return predictions._replace(**{name: getattr(predictions, name).detach().double() for name in names})


def with_gradients(predictions: Predictions, *rest: object) -> list[Tensor]:
    inputs = [tensor.requires_grad_() for tensor in (predictions.mask_embeddings, predictions.pixel_features)]
    mask, dice = mask_loss_at_points(predictions, *rest)  # type: ignore[arg-type]
    return [mask.detach(), dice.detach(), *torch.autograd.grad(5 * mask.sum() + dice.sum(), inputs)]


@pytest.mark.parametrize("loss", LOSSES)
def test_costs_and_losses_equal_float64(loss: LossConfig) -> None:
    predictions, targets, query, draws = case(loss)
    exact = double(predictions)
    got = matching_cost_at_points(predictions, targets, draws.match, loss)
    expected = matching_cost_at_points(exact, targets, draws.match.double(), loss)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    rest = (targets, query, draws, loss)
    for one, other in zip(with_gradients(predictions, *rest), with_gradients(exact, *rest), strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()  # a candidate may be chosen at a tie


def test_every_run_gives_the_same() -> None:
    loss = LOSSES[0]
    predictions, *rest = case(loss)
    runs = [with_gradients(predictions, *rest, loss) for _ in range(3)]
    costs = [matching_cost_at_points(predictions, rest[0], rest[2].match, loss) for _ in range(3)]
    for run, cost in zip(runs[1:], costs[1:], strict=True):
        assert torch.equal(cost, costs[0]) and all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chosen_candidates(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = (3 * torch.randn(300, 40, 33, device="cuda")).to(dtype)
    groups = torch.arange(300, device="cuda") % 4 - 1
    candidates, random = torch.rand(3, 37632, 2, device="cuda"), torch.rand(3, 33, 2, device="cuda")
    got = choose_points(logits, groups, candidates, random, 9408)
    wanted = choose_points_eager(logits, groups, candidates, random, 9408)
    assert torch.equal(got[:, 9408:], wanted[:, 9408:]) and not got[groups < 0].any()
    chosen, others = (points[:, :9408].flatten(1).sort().values for points in (got, wanted))
    assert (chosen == others).float().mean() > 0.99  # but for ties
