"""Criteria against torch's cross-entropy and Hugging Face's MaskFormerLoss; for official numbers see tests/interop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.metadata import VOID
from maskformer_fast.ops.mask_loss import mask_loss
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import PixelPredictions, Predictions, Targets, pack_masks, unpack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.matcher import match
from maskformer_fast.training.per_pixel_criterion import PerPixelCriterion, semantic_truth

SIZE = (16, 20)


def random_targets(seed: int, counts: list[int], classes: int = 4) -> Targets:
    """Ragged, overlapping targets on 16x20 pixels, of which image b fills all but b rows."""
    rng = torch.Generator().manual_seed(seed)
    batch, slots = len(counts), max(counts)
    present = torch.arange(slots) < torch.tensor(counts)[:, None]
    masks = (torch.rand(batch, slots, *SIZE, generator=rng) < 0.4) & present[..., None, None]
    valid = torch.tensor([[16 - b, 20] for b in range(batch)])
    labels = torch.randint(classes, (batch, slots), generator=rng) * present
    return Targets(labels, torch.tensor(counts), pack_masks(masks), valid, SIZE)


def random_predictions(seed: int, batch: int, queries: int = 5, layers: int = 3, classes: int = 4) -> Predictions:
    rng = torch.Generator().manual_seed(seed)
    return Predictions(
        torch.randn(layers, batch, queries, classes + 1, generator=rng).requires_grad_(),
        torch.randn(layers, batch, queries, 6, generator=rng).requires_grad_(),
        torch.randn(batch, 6, 4, 5, generator=rng).requires_grad_(),
        torch.tensor([[16 - b, 20] for b in range(batch)]),
        SIZE,
    )


@pytest.mark.parametrize("counts", [[3, 1, 2], [2, 7], [0, 2]])
@pytest.mark.parametrize("scale", [1.0, 5.0])  # as initialised, and peaky
def test_equals_hugging_face_on_the_final_layer(counts, scale):
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

    weights = {"cross_entropy": 1.5, "mask": 20.0, "dice": 2.0}
    loss = LossConfig(*weights.values(), no_object_weight=0.2, padding="include")
    targets = random_targets(1, counts)
    predictions = random_predictions(2, len(counts), layers=1)
    factors = zip((scale, scale, 1.0), predictions[:3], strict=True)
    leaves = [(factor * part.detach()).requires_grad_() for factor, part in factors]
    predictions = Predictions(*leaves, *predictions[3:])
    masks = [m[:n].float() for m, n in zip(unpack_masks(targets.masks, 20), counts, strict=True)]
    labels = [labels[:n] for labels, n in zip(targets.labels, counts, strict=True)]
    matcher = MaskFormerHungarianMatcher(cost_class=1.5, cost_dice=2.0, cost_mask=20.0)
    peer = MaskFormerLoss(num_labels=4, matcher=matcher, weight_dict={}, eos_coef=0.2)
    logits = layer_mask_logits(predictions), predictions.class_logits[-1]
    expected = peer(*logits, masks, labels)
    losses = Criterion(4, loss)(predictions, targets)
    for (name, weight), term in zip(weights.items(), ("loss_ce", "loss_mask", "loss_dice"), strict=True):
        assert losses.terms[term].item() == pytest.approx(weight * expected[f"loss_{name}"].item(), rel=1e-5)
    query = match(predictions, targets, loss).query[-1]
    for image, (rows, columns) in enumerate(matcher(*logits, masks, labels)):
        assert torch.equal(query[image, columns], rows) and len(rows) == min(counts[image], 5)
    total = sum(weight * expected[f"loss_{name}"] for name, weight in weights.items())
    gradients = zip(torch.autograd.grad(losses.total, leaves), torch.autograd.grad(total, leaves), strict=True)
    for got, wanted in gradients:
        for row, wanted_row in zip(got.flatten(0, -2), wanted.flatten(0, -2), strict=True):
            torch.testing.assert_close(row, wanted_row, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("no_object", [0.1, 0.7])
def test_terms_are_weighted_layers_of_the_operators(no_object):
    loss = LossConfig(1.5, 7.0, 2.5, no_object_weight=no_object)
    targets, predictions = random_targets(3, [3, 0, 6]), random_predictions(4, 3)
    losses = Criterion(4, loss)(predictions, targets)
    query = match(predictions, targets, loss).query
    mask, dice = mask_loss(predictions, targets, query, loss)
    for layer, suffix in enumerate(("_0", "_1", "")):
        truth = torch.full((3, 5), 4)
        for image, target in (query[layer] >= 0).nonzero().tolist():
            truth[image, query[layer, image, target]] = targets.labels[image, target]
        weights = torch.tensor([1.0] * 4 + [no_object])
        expected = F.cross_entropy(predictions.class_logits[layer].transpose(1, 2), truth, weights)
        torch.testing.assert_close(losses.terms[f"loss_ce{suffix}"], 1.5 * expected)
        torch.testing.assert_close(losses.terms[f"loss_mask{suffix}"], 7.0 * mask[layer] / 9)
        torch.testing.assert_close(losses.terms[f"loss_dice{suffix}"], 2.5 * dice[layer] / 9)
    assert len(losses.terms) == 9
    torch.testing.assert_close(losses.total, torch.stack(list(losses.terms.values())).sum())
    assert losses.num_matched.item() == 3 * (3 + 0 + 5)


def test_without_deep_supervision_only_the_final_layer_counts():
    targets, predictions = random_targets(5, [2, 1]), random_predictions(6, 2)
    every = Criterion(4, LossConfig())(predictions, targets)
    final = Criterion(4, LossConfig(deep_supervision=False))(predictions, targets)
    assert set(final.terms) == {"loss_ce", "loss_mask", "loss_dice"} and final.nonfinite.shape == (1, 2)
    torch.testing.assert_close(final.terms, {name: every.terms[name] for name in final.terms})
    final.total.backward()
    assert not predictions.class_logits.grad[:-1].any() and predictions.class_logits.grad[-1].all()


@given(st.integers(0, 10_000), st.permutations(range(4)), st.sampled_from(["focal", "bce"]))
@settings(max_examples=20, deadline=None)
def test_order_of_the_targets_does_not_matter(seed, order, kind):
    targets, predictions = random_targets(seed, [4, 4]), random_predictions(seed + 1, 2)
    permuted = targets._replace(labels=targets.labels[:, order], masks=targets.masks[:, order])
    criterion = Criterion(4, LossConfig(mask_loss=kind))
    torch.testing.assert_close(criterion(predictions, permuted).terms, criterion(predictions, targets).terms)


@pytest.mark.parametrize("slots", [0, 3])
def test_batch_without_targets_trains_the_classes(slots):
    predictions = random_predictions(7, 2)
    targets = random_targets(8, [slots, slots])._replace(counts=torch.tensor([0, 0]))
    losses = Criterion(4, LossConfig())(predictions, targets)
    assert losses.num_masks.item() == 1 and losses.num_matched.item() == 0
    for suffix in ("", "_0", "_1"):
        assert losses.terms[f"loss_mask{suffix}"].item() == 0 and losses.terms[f"loss_dice{suffix}"].item() == 0
    everything = torch.full((2, 5), 4)
    expected = F.cross_entropy(predictions.class_logits[-1].transpose(1, 2), everything)
    torch.testing.assert_close(losses.terms["loss_ce"], expected)
    losses.total.backward()
    assert predictions.class_logits.grad.any()
    for factor in (predictions.mask_embeddings, predictions.pixel_embeddings):
        assert torch.equal(factor.grad, torch.zeros_like(factor))


def test_weight_of_no_object_may_be_zero():
    losses = Criterion(4, LossConfig(no_object_weight=0.0))(random_predictions(9, 1), random_targets(9, [0]))
    assert losses.terms["loss_ce"].item() == 0


def test_a_nan_is_reported_and_does_not_raise():
    targets, predictions = random_targets(10, [2, 3, 1]), random_predictions(11, 3)
    with torch.no_grad():
        predictions.mask_embeddings[1, 2, 0, 0] = torch.nan
    losses = Criterion(4, LossConfig())(predictions, targets)
    assert losses.nonfinite.tolist() == [[False] * 3, [False, False, True], [False] * 3]
    assert losses.num_matched.item() == 3 * 6 - 1
    with torch.no_grad():
        predictions.class_logits[0, 0, 0, 0] = torch.nan
    losses = Criterion(4, LossConfig())(predictions, targets)
    assert losses.nonfinite[0, 0] and losses.terms["loss_ce_0"].isnan() and losses.terms["loss_ce"].isfinite()


def test_bfloat16_under_autocast_is_float32_inside():
    targets, predictions = random_targets(12, [2, 3]), random_predictions(13, 2)
    half = predictions._replace(**{name: getattr(predictions, name).bfloat16() for name in predictions._fields[:3]})
    rounded = half._replace(**{name: getattr(half, name).float() for name in half._fields[:3]})
    with torch.autocast("cpu", torch.bfloat16):
        losses = Criterion(4, LossConfig())(half, targets)
    expected = Criterion(4, LossConfig())(rounded, targets)
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.terms, expected.terms, rtol=1e-6, atol=0)


COUNTS = [0, 3, 7, 1]  # of 5 queries: one image has more targets


def part_of_a_batch(which: slice) -> tuple[Predictions, Targets]:
    targets, predictions = random_targets(21, COUNTS), random_predictions(20, 4)
    layers = [getattr(predictions, name)[:, which] for name in ("class_logits", "mask_embeddings")]
    part = Predictions(*layers, predictions.pixel_features[which], predictions.valid_sizes[which], SIZE)
    return part, Targets(*(tensor[which] for tensor in targets[:4]), SIZE)


def pixel_part_of_a_batch(which: slice) -> tuple[PixelPredictions, Targets]:
    targets = random_targets(21, COUNTS)
    predictions = pixel_predictions(22, 2, targets)
    part = PixelPredictions(predictions.logits[:, which], predictions.valid_sizes[which], SIZE)
    return part, Targets(*(tensor[which] for tensor in targets[:4]), SIZE)


def _rank_losses(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = slice(2 * rank, 2 * rank + 2)
    terms = Criterion(4, LossConfig())(*part_of_a_batch(part)).terms
    terms |= PerPixelCriterion(4, LossConfig())(*pixel_part_of_a_batch(part)).terms
    torch.save({name: term.detach() for name, term in terms.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_losses_of_ranks_average_to_those_of_the_full_batch(tmp_path):
    multiprocessing.spawn(_rank_losses, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    terms = Criterion(4, LossConfig())(*part_of_a_batch(slice(4))).terms
    terms |= PerPixelCriterion(4, LossConfig())(*pixel_part_of_a_batch(slice(4))).terms
    assert first.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, term.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parts", [2, 4])
def test_losses_of_micro_batches_average_to_those_of_the_full_batch(parts):
    for criterion, part in (
        (Criterion(4, LossConfig(no_object_weight=0.3)), part_of_a_batch),
        (PerPixelCriterion(4, LossConfig()), pixel_part_of_a_batch),
    ):
        expected = criterion(*part(slice(4)))
        size = 4 // parts
        batches = [part(slice(start, start + size)) for start in range(0, 4, size)]
        step_counts = torch.cat([criterion.image_counts(targets) for _, targets in batches])
        losses = [criterion(*batch, step_counts) for batch in batches]
        for name, term in expected.terms.items():
            torch.testing.assert_close(torch.stack([each.terms[name] for each in losses]).mean(), term)
        torch.testing.assert_close(torch.stack([each.total for each in losses]).mean(), expected.total)
        assert sum(each.num_matched for each in losses) == expected.num_matched


def test_wrong_shapes_are_refused():
    targets, predictions = random_targets(14, [1]), random_predictions(15, 1)
    with pytest.raises(ValueError, match=r"predictions\.class_logits: expected 7 classes"):
        Criterion(7, LossConfig())(predictions, targets)
    with pytest.raises(ValueError, match="num_classes"):
        Criterion(0, LossConfig())
    logits = PixelPredictions(torch.zeros(1, 1, 4, 4, 5), predictions.valid_sizes, SIZE)
    with pytest.raises(ValueError, match=r"predictions\.logits: expected 3 classes"):
        PerPixelCriterion(3, LossConfig())(logits, targets)
    with pytest.raises(ValueError, match=r"targets\.input_size"):
        PerPixelCriterion(4, LossConfig())(logits._replace(input_size=(16, 24)), targets)


def test_semantic_truth_paints_masks_in_order():
    targets = random_targets(16, [4, 0, 2])
    masks = unpack_masks(targets.masks, 20)
    masks[2, 2:] = True  # rows beyond the count are not targets
    truth = semantic_truth(targets._replace(masks=pack_masks(masks)))
    for image in range(3):
        expected = torch.full(SIZE, VOID)
        for target in range(int(targets.counts[image])):
            expected[masks[image, target]] = targets.labels[image, target]
        expected[16 - image :] = VOID
        assert torch.equal(truth[image], expected)
    assert (truth[0] == VOID).any() and (truth[1] == VOID).all()


def test_semantic_truth_with_more_than_255_masks():
    # Each mask is one pixel; the last one covers the first.
    masks = torch.eye(300).view(1, 300, 15, 20).bool()
    masks[0, 299, 0, 0] = True
    labels = torch.arange(300)[None]
    valid = torch.tensor([[15, 20]])
    truth = semantic_truth(Targets(labels, torch.tensor([300]), pack_masks(masks), valid, (15, 20)))
    assert truth[0].flatten()[1:].tolist() == list(range(1, 300)) and truth[0, 0, 0] == 299


def pixel_predictions(seed: int, layers: int, targets: Targets) -> PixelPredictions:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, len(targets.counts), 4, 4, 5, generator=rng).requires_grad_()
    return PixelPredictions(logits, targets.valid_sizes, SIZE)


def test_pixel_losses_are_mean_cross_entropies():
    targets = random_targets(17, [2, 1])
    predictions = pixel_predictions(18, 3, targets)
    losses = PerPixelCriterion(4, LossConfig(class_weight=1.5))(predictions, targets)
    truth = semantic_truth(targets)
    assert list(losses.terms) == ["loss_sem_seg_0", "loss_sem_seg_1", "loss_sem_seg"]
    for value, logits in zip(losses.terms.values(), predictions.logits, strict=True):
        pixels = F.interpolate(logits, SIZE, mode="bilinear").movedim(1, -1)[truth != VOID]
        torch.testing.assert_close(value, 1.5 * F.cross_entropy(pixels, truth[truth != VOID]))
    assert all(a != b for a, b in pairwise(losses.terms.values()))
    torch.testing.assert_close(losses.total, torch.stack(list(losses.terms.values())).sum())
    assert losses.num_masks.item() == int((truth != VOID).sum())
    final = PerPixelCriterion(4, LossConfig(class_weight=1.5, deep_supervision=False))(predictions, targets)
    torch.testing.assert_close(final.terms, {"loss_sem_seg": losses.terms["loss_sem_seg"]})


def test_pixel_loss_without_labelled_pixels_is_zero_and_connected():
    targets = random_targets(19, [0, 0])
    predictions = pixel_predictions(20, 1, targets)
    losses = PerPixelCriterion(4, LossConfig())(predictions, targets)
    losses.total.backward()
    assert losses.total.item() == 0 and torch.equal(predictions.logits.grad, torch.zeros_like(predictions.logits))


def test_pixel_criterion_names_the_image_with_a_nan():
    targets = random_targets(22, [1, 2])
    predictions = pixel_predictions(23, 2, targets)
    with torch.no_grad():
        predictions.logits[0, 1, 2, 0, 0] = torch.nan
    losses = PerPixelCriterion(4, LossConfig())(predictions, targets)
    assert losses.nonfinite.tolist() == [[False, True], [False, False]]


def test_pixel_criterion_is_float32_under_autocast():
    targets = random_targets(24, [2, 1])
    predictions = pixel_predictions(25, 1, targets)
    half = predictions._replace(logits=predictions.logits.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        losses = PerPixelCriterion(4, LossConfig())(half, targets)
    expected = PerPixelCriterion(4, LossConfig())(half._replace(logits=half.logits.float()), targets)
    assert losses.total.dtype == torch.float32 and losses.total == expected.total
