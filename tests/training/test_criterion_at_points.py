"""Matching and losses at points: equality with Hugging Face's Mask2FormerLoss at its draws, and draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.ops import draw_points, mask_loss_at_points, matching_cost_at_points
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.matching_cost import matching_cost_from_logits
from maskformer_fast.ops.points import PointDraws, sample_maps, within_valid
from maskformer_fast.structures import Predictions, Targets, pack_masks, unpack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.matcher import match

SIZE = (28, 37)
LOSS = LossConfig(2.0, 5.0, 5.0, mask_loss="bce", points=40, padding="include")


def random_targets(seed: int, counts: list[int], classes: int = 4) -> Targets:
    """Overlapping rectangles; image b is valid but for 2 b rows."""
    rng = torch.Generator().manual_seed(seed)
    batch, slots = len(counts), max(counts, default=0)
    masks = torch.zeros(batch, slots, *SIZE, dtype=torch.bool)
    for image, count in enumerate(counts):
        for mask in masks[image, :count]:
            top, left = (int(torch.randint(size // 2, (), generator=rng)) for size in SIZE)
            mask[top : top + 11, left : left + 14] = True
    labels = torch.randint(classes, (batch, slots), generator=rng)
    labels *= torch.arange(slots) < torch.tensor(counts)[:, None]
    valid = torch.tensor([[SIZE[0] - 2 * image, SIZE[1]] for image in range(batch)])
    return Targets(labels, torch.tensor(counts), pack_masks(masks), valid, SIZE)


def random_predictions(seed: int, batch: int, dtype: Any = torch.float32) -> Predictions:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((3, batch, 6, 5), (3, batch, 6, 8), (batch, 8, 7, 10))
    tensors = [torch.randn(shape, generator=rng).to(dtype).requires_grad_() for shape in shapes]
    return Predictions(*tensors, torch.tensor([SIZE] * batch), SIZE)


class RecordedRand:
    """`torch.rand` of their loss, with what it returned."""

    def __init__(self) -> None:
        self.draws: list[Tensor] = []
        self.rand = torch.rand

    def __call__(self, *size: Any, **keywords: Any) -> Tensor:
        self.draws.append(self.rand(*size, **keywords))
        return self.draws[-1]


@pytest.mark.parametrize("counts", [[3, 1], [2, 9], [4, 0]])
def test_losses_gradients_and_matchings_equal_hugging_face_at_its_points(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    predictions, targets = random_predictions(1, 2), random_targets(2, counts)
    config = transformers.Mask2FormerConfig(num_labels=4, train_num_points=LOSS.points)
    theirs = Mask2FormerLoss(config, {})
    rows: list[Any] = []
    theirs.matcher.register_forward_hook(lambda _, __, result: rows.append(result))
    masks = [m[:n].float() for m, n in zip(unpack_masks(targets.masks, SIZE[1]), counts, strict=True)]
    labels = [row[:n] for row, n in zip(targets.labels, counts, strict=True)]
    layers = [
        {"masks_queries_logits": layer_mask_logits(predictions, layer), "class_queries_logits": classes}
        for layer, classes in enumerate(predictions.class_logits)
    ]
    recorded = RecordedRand()
    monkeypatch.setattr(torch, "rand", recorded)
    torch.manual_seed(0)
    expected = theirs(*layers[-1].values(), masks, labels, layers[:-1])
    monkeypatch.undo()

    order = [2, 0, 1]  # they draw for the final layer first
    draws = PointDraws(
        torch.empty(3, 2, 40, 2), torch.zeros(3, 2, max(counts), 120, 2), torch.zeros(3, 2, max(counts), 10, 2)
    )
    for layer, pairs, (first, second, candidates, random) in zip(
        order, rows, zip(*[iter(recorded.draws)] * 4, strict=True), strict=True
    ):
        draws.match[layer] = torch.cat([first, second])
        image = torch.cat([torch.full_like(columns, index) for index, (_, columns) in enumerate(pairs)])
        column = torch.cat([columns for _, columns in pairs])
        draws.candidates[layer, image, column], draws.random[layer, image, column] = candidates, random

    query = match(predictions, targets, LOSS, draws.match).query
    for layer, pairs in zip(order, rows, strict=True):
        for image, (queries, columns) in enumerate(pairs):
            assert torch.equal(query[layer, image, columns], queries)
            assert (query[layer, image] >= 0).sum() == len(columns) == min(counts[image], 6)
    losses = Criterion(4, LOSS)(predictions, targets, draws=draws)
    total = torch.zeros(())
    for layer, suffix in enumerate(("_0", "_1", "")):
        for name, short, weight in (("cross_entropy", "ce", 2.0), ("mask", "mask", 5.0), ("dice", "dice", 5.0)):
            value = weight * expected[f"loss_{name}{suffix}"]
            assert losses.terms[f"loss_{short}{suffix}"].item() == pytest.approx(value.item(), rel=1e-4), (layer, name)
            total = total + value
    leaves = predictions[:3]
    for got, wanted in zip(torch.autograd.grad(losses.total, leaves), torch.autograd.grad(total, leaves), strict=True):
        for row, wanted_row in zip(got.flatten(0, -2), wanted.flatten(0, -2), strict=True):
            torch.testing.assert_close(row, wanted_row, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_shared_points_equal_the_same_points_given_to_each_layer_and_pair() -> None:
    predictions, targets = random_predictions(3, 2), random_targets(4, [3, 2])
    for padding in ("include", "exclude"):
        loss = replace(LOSS, padding=padding)
        shared = draw_points(loss, [5, 6], "cpu")
        assert [tuple(points.shape) for points in shared] == [(2, 40, 2), (2, 120, 2), (2, 10, 2)]
        each = PointDraws(
            shared.match.expand(3, -1, -1, -1),
            *(points[None, :, None].expand(3, -1, 3, -1, -1) for points in shared[1:]),
        )
        torch.testing.assert_close(
            matching_cost_at_points(predictions, targets, shared.match, loss),
            matching_cost_at_points(predictions, targets, each.match, loss),
        )
        query = match(predictions, targets, loss, shared.match).query
        for a, b in zip(
            mask_loss_at_points(predictions, targets, query, shared, loss),
            mask_loss_at_points(predictions, targets, query, each, loss),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_the_most_uncertain_candidates_are_compared() -> None:
    """With logits that rise over the image, the loss is that of the candidates nearest to the edge, by hand."""
    pixels = torch.linspace(-4, 4, 10).expand(1, 1, 7, 10)
    predictions = Predictions(torch.zeros(1, 1, 1, 5), torch.ones(1, 1, 1, 1), pixels, torch.tensor([SIZE]), SIZE)
    mask = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    mask[..., 20:] = True
    zero = torch.zeros(1, 1, dtype=torch.int64)
    targets = Targets(zero, torch.tensor([1]), pack_masks(mask), torch.tensor([SIZE]), SIZE)
    draws = draw_points(LOSS, [3], "cpu")
    x = sample_maps(pixels, draws.candidates)[0, 0]
    chosen = torch.cat([draws.candidates[0, x.abs().argsort()[:30]], draws.random[0]])[None]
    logits = sample_maps(pixels, chosen)[0, 0]
    truth = sample_maps(mask.float(), chosen)[0, 0]
    expected = F.binary_cross_entropy_with_logits(logits, truth)
    got, _ = mask_loss_at_points(predictions, targets, zero[None], draws, LOSS)
    torch.testing.assert_close(got[0], expected)
    assert logits[:30].abs().max() < 1.2 < logits[30:].abs().max()


def test_many_points_estimate_the_cost_of_every_pixel() -> None:
    predictions, targets = random_predictions(7, 2), random_targets(8, [3, 2])
    logits = [F.interpolate(layer_mask_logits(predictions, layer), SIZE, mode="bilinear") for layer in range(3)]
    for padding in ("include", "exclude"):
        loss = replace(LOSS, points=200_000, padding=padding)
        got = matching_cost_at_points(predictions, targets, draw_points(loss, [1, 2], "cpu").match, loss)
        exact = matching_cost_from_logits(predictions.class_logits, torch.stack(logits), targets, loss)
        assert (got - exact).abs().max() < 0.05 * exact.abs().max()
        assert not got[:, 1, :, 2:].any()


def test_points_depend_on_the_images_seed_alone() -> None:
    together = draw_points(LOSS, [11, 12, 13], "cpu")
    for image, seed in enumerate((11, 12, 13)):
        for a, b in zip(together, draw_points(LOSS, [seed], "cpu"), strict=True):
            assert torch.equal(a[image], b[0])
    assert not torch.equal(together.match[0], together.match[1])
    assert all(bool(((points >= 0) & (points < 1)).all()) for points in together)
    all_random = draw_points(replace(LOSS, importance=0.0), [1], "cpu")
    assert all_random.candidates.shape[1] == 0 and all_random.random.shape[1] == 40


def test_excluded_padding_gets_no_point_and_has_no_effect() -> None:
    loss = replace(LOSS, padding="exclude")
    targets, predictions = random_targets(9, [2, 2]), random_predictions(10, 2)
    draws = draw_points(loss, [1, 2], "cpu")
    moved = within_valid(draws.match, targets, loss)
    assert torch.equal(moved[0], draws.match[0]) and moved[1, :, 1].max() <= 26 / 28
    bits = unpack_masks(targets.masks, SIZE[1])
    bits[1, :, 27:] = ~bits[1, :, 27:]  # row 26 is read by points in the last half pixel
    changed = targets._replace(masks=pack_masks(bits))
    criterion = Criterion(4, loss)
    torch.testing.assert_close(
        criterion(predictions, targets, draws=draws).terms, criterion(predictions, changed, draws=draws).terms
    )


@pytest.mark.parametrize("slots", [0, 2])
def test_a_batch_without_targets_trains_the_classes(slots: int) -> None:
    targets = random_targets(1, [0, 0])._replace(
        labels=torch.zeros(2, slots, dtype=torch.int64), masks=torch.zeros(2, slots, 28, 5, dtype=torch.uint8)
    )
    predictions = random_predictions(2, 2)
    losses = Criterion(4, LOSS)(predictions, targets, draws=draw_points(LOSS, [1, 2], "cpu"))
    losses.total.backward()
    assert losses.terms["loss_mask"] == losses.terms["loss_dice"] == 0 and losses.num_matched == 0
    assert predictions.class_logits.grad.all() and not predictions.mask_embeddings.grad.any()


def test_half_precision_is_computed_in_float32_and_float64_stays() -> None:
    targets, draws = random_targets(3, [2, 1]), draw_points(LOSS, [1, 2], "cpu")
    half = random_predictions(4, 2, dtype=torch.bfloat16)
    wide = Predictions(*(tensor.detach().float() for tensor in half[:3]), *half[3:])
    got, expected = (Criterion(4, LOSS)(predictions, targets, draws=draws) for predictions in (half, wide))
    torch.testing.assert_close(got.total, expected.total)
    double = Predictions(*(tensor.double() for tensor in wide[:3]), *half[3:])
    assert Criterion(4, LOSS)(double, targets, draws=draws).total.dtype == torch.float64


def test_the_criterion_compiles_as_one_graph() -> None:
    targets, draws, predictions = random_targets(3, [2, 1]), draw_points(LOSS, [1, 2], "cpu"), random_predictions(4, 2)
    torch._dynamo.reset()
    criterion = Criterion(4, LOSS)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(predictions, targets, None, draws).terms, criterion(predictions, targets, None, draws).terms
    )


def test_points_that_do_not_fit_are_refused_by_name() -> None:
    targets, predictions, draws = random_targets(3, [2, 1]), random_predictions(4, 2), draw_points(LOSS, [1, 2], "cpu")
    with pytest.raises(ValueError, match=r"draws: expected points exactly where loss\.points > 0, here 40"):
        Criterion(4, LOSS)(predictions, targets)
    with pytest.raises(ValueError, match=r"draws: expected .* here 0"):
        Criterion(4, LossConfig())(predictions, targets, draws=draws)
    with pytest.raises(ValueError, match=r"points: expected shape \[2, P, 2\]"):
        matching_cost_at_points(predictions, targets, draws.match[:1], LOSS)
    with pytest.raises(ValueError, match=r"loss\.oversample"):
        LossConfig(oversample=0.5)
    with pytest.raises(ValueError, match=r"loss\.importance"):
        LossConfig(importance=1.5)
