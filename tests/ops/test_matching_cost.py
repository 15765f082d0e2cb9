"""Matching cost against loops over every pair and numbers worked out by hand; official costs: tests/interop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.ops.matching_cost import matching_cost
from maskformer_fast.structures import Predictions, Targets, pack_masks, unpack_masks

KINDS = [("focal", 0.25, 2.0), ("focal", 0.6, 1.5), ("focal", 0.3, 0.0), ("bce", 0.25, 2.0)]


def random_batch(
    seed: int,
    input_size: tuple[int, int],
    counts: list[int],
    layers: int = 2,
    queries: int = 5,
    classes: int = 4,
    stride: int = 4,
) -> tuple[Predictions, Targets]:
    """Ragged float32 batch; image b is shorter than the padded input by b rows and 2b columns."""
    rng = torch.Generator().manual_seed(seed)
    batch, slots, (height, width) = len(counts), max(counts), input_size
    valid = torch.tensor([[height - b, width - 2 * b] for b in range(batch)])
    present = torch.arange(slots) < torch.tensor(counts)[:, None]
    masks = (torch.rand(batch, slots, height, width, generator=rng) < 0.4) & present[..., None, None]
    labels = torch.randint(classes, (batch, slots), generator=rng) * present
    targets = Targets(labels, torch.tensor(counts), pack_masks(masks), valid, input_size)
    predictions = Predictions(
        torch.randn(layers, batch, queries, classes + 1, generator=rng),
        torch.randn(layers, batch, queries, 6, generator=rng),
        torch.randn(batch, 6, math.ceil(height / stride), math.ceil(width / stride), generator=rng),
        valid,
        input_size,
    )
    return predictions, targets


def pair_cost(predictions: Predictions, targets: Targets, loss: LossConfig, place: tuple[int, int, int, int]) -> float:
    """Cost of one (layer, image, query, target) in float64, straight from the definitions."""
    layer, image, query, target = place
    x = predictions._replace(
        mask_embeddings=predictions.mask_embeddings.double(), pixel_features=predictions.pixel_embeddings.double()
    ).mask_logits(layer)[image, query]
    mask = unpack_masks(targets.masks, targets.input_size[1])[image, target].double()
    counted = torch.zeros_like(mask)
    height, width = targets.valid_sizes[image] if loss.padding == "exclude" else targets.input_size
    counted[:height, :width] = 1
    t, keep = (F.interpolate(m[None, None], x.shape, mode="nearest")[0, 0] for m in (mask, counted))
    x, t = x[keep > 0], t[keep > 0]
    p = x.sigmoid()
    pixel = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    if loss.mask_loss == "focal":
        agreement = p * t + (1 - p) * (1 - t)
        pixel = pixel * (1 - agreement) ** loss.focal_gamma
        pixel = pixel * (loss.focal_alpha * t + (1 - loss.focal_alpha) * (1 - t))
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    chosen = predictions.class_logits[layer, image, query].double().softmax(0)[targets.labels[image, target]]
    return float(loss.mask_weight * pixel.mean() + loss.dice_weight * dice - loss.class_weight * chosen)


@pytest.mark.parametrize("padding", ["exclude", "include"])
@pytest.mark.parametrize(("mask_loss", "alpha", "gamma"), KINDS)
@pytest.mark.parametrize(("size", "counts"), [((19, 26), [3, 1, 2]), ((8, 33), [4, 0])])
def test_equals_the_definition(padding, mask_loss, alpha, gamma, size, counts):
    loss = LossConfig(1.5, 7.0, 2.5, mask_loss=mask_loss, focal_alpha=alpha, focal_gamma=gamma, padding=padding)
    predictions, targets = random_batch(len(counts), size, counts)
    cost = matching_cost(predictions, targets, loss)
    assert cost.shape == (2, len(counts), 5, max(counts)) and cost.dtype == torch.float32
    assert cost.isfinite().all()
    compared = 0
    for layer, image, query in torch.cartesian_prod(torch.arange(2), torch.arange(len(counts)), torch.arange(5)):
        for target in range(counts[image]):
            place = (int(layer), int(image), int(query), target)
            assert float(cost[place]) == pytest.approx(pair_cost(predictions, targets, loss, place), rel=1e-5, abs=1e-5)
            compared += 1
    assert compared == 10 * sum(counts)


def test_worked_out_by_hand():
    # Two classes and no-object, equally likely; logits 0 on 2x2 pixels; the target covers one of them.
    mask = torch.tensor([[1, 0], [0, 0]], dtype=torch.bool)
    valid = torch.tensor([[2, 2]])
    predictions = Predictions(torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 2, 2), valid, (2, 2))
    targets = Targets(torch.tensor([[1]]), torch.tensor([1]), pack_masks(mask[None, None]), valid, (2, 2))
    dice = 1 - (2 * 0.5 + 1) / (2 + 1 + 1)
    focal = (0.25 * 0.25 + 3 * 0.75 * 0.25) * math.log(2) / 4
    cost = matching_cost(predictions, targets, LossConfig())
    assert cost.item() == pytest.approx(20 * focal + dice - 1 / 3, rel=1e-6)
    cost = matching_cost(predictions, targets, LossConfig(mask_loss="bce"))
    assert cost.item() == pytest.approx(20 * math.log(2) + dice - 1 / 3, rel=1e-6)
    # Only the upper row is image: one of two counted pixels is target.
    cut = targets._replace(valid_sizes=torch.tensor([[1, 2]]))
    focal, dice = (0.25 + 0.75) * 0.25 * math.log(2) / 2, 1 - 2 / (1 + 1 + 1)
    cost = matching_cost(predictions, cut, LossConfig())
    assert cost.item() == pytest.approx(20 * focal + dice - 1 / 3, rel=1e-6)


@given(st.integers(1, 70), st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_samples_the_pixels_interpolate_would(out, size):
    # A mask embedding of zero leaves the dice cost to the number of sampled target pixels.
    row = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    sampled = F.interpolate(row[None, None, None].float(), (1, out), mode="nearest").sum()
    valid, embedding, cells = torch.tensor([[1, size]]), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, out)
    predictions = Predictions(torch.zeros(1, 1, 1, 2), embedding, cells, valid, (1, size))
    targets = Targets(torch.tensor([[0]]), torch.tensor([1]), pack_masks(row[None, None, None]), valid, (1, size))
    cost = matching_cost(predictions, targets, LossConfig(class_weight=0, mask_weight=0))
    assert cost.item() == pytest.approx(float(1 - (sampled + 1) / (0.5 * out + sampled + 1)), abs=1e-6)


@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(0, 3), st.sampled_from(["focal", "bce"]))
@settings(max_examples=25, deadline=None)
def test_more_padding_changes_nothing_when_excluded(seed, below, beside, mask_loss):
    loss = LossConfig(mask_loss=mask_loss)
    predictions, targets = random_batch(seed, (16, 24), [3, 2])
    size = (16 + 4 * below, 24 + 4 * beside)
    pixels = F.pad(predictions.pixel_embeddings, (0, beside, 0, below), value=3.7)
    masks = unpack_masks(targets.masks, 24)
    masks = F.pad(masks, (0, 4 * beside, 0, 4 * below), value=True)  # rubbish in the padding is not looked at
    wider = predictions._replace(pixel_features=pixels, input_size=size)
    padded = targets._replace(masks=pack_masks(masks), input_size=size)
    torch.testing.assert_close(matching_cost(wider, padded, loss), matching_cost(predictions, targets, loss))


@pytest.mark.parametrize("mask_loss", ["focal", "bce"])
def test_paddings_agree_without_padding(mask_loss):
    predictions, targets = random_batch(3, (20, 28), [3, 2])
    whole = targets._replace(valid_sizes=torch.tensor([[20, 28]] * 2))
    exclude, include = (
        matching_cost(predictions, whole, LossConfig(mask_loss=mask_loss, padding=p)) for p in ("exclude", "include")
    )
    torch.testing.assert_close(exclude, include)


def test_a_nan_stays_in_its_layer_and_image():
    predictions, targets = random_batch(4, (16, 16), [2, 2, 2])
    clean = matching_cost(predictions, targets, LossConfig())
    predictions.mask_embeddings[1, 2, 0, 0] = torch.nan
    cost = matching_cost(predictions, targets, LossConfig())
    broken = torch.zeros(2, 3, 5, dtype=torch.bool)
    broken[1, 2, 0] = True
    assert cost[broken].isnan().all()
    assert torch.equal(cost[~broken], clean[~broken])


def test_extreme_logits_stay_finite():
    predictions, targets = random_batch(5, (16, 16), [3, 1])
    steep = predictions._replace(mask_embeddings=predictions.mask_embeddings * 1e4)
    for mask_loss in ("focal", "bce"):
        assert matching_cost(steep, targets, LossConfig(mask_loss=mask_loss)).isfinite().all()


def test_half_precision_is_computed_in_float32_under_autocast():
    predictions, targets = random_batch(6, (32, 48), [3, 2])
    half = predictions._replace(**{
        name: getattr(predictions, name).bfloat16() for name in ("class_logits", "mask_embeddings", "pixel_features")
    })
    rounded = predictions._replace(**{
        name: getattr(half, name).float() for name in ("class_logits", "mask_embeddings", "pixel_features")
    })
    with torch.autocast("cpu", torch.bfloat16):
        cost = matching_cost(half, targets, LossConfig())
    assert torch.equal(cost, matching_cost(rounded, targets, LossConfig()))


def test_other_input_size_is_refused():
    predictions, targets = random_batch(7, (16, 16), [1])
    with pytest.raises(ValueError, match=r"targets\.input_size.*\(16, 16\).*\(16, 24\)"):
        matching_cost(predictions, targets._replace(input_size=(16, 24)), LossConfig())


def test_compiles_in_one_graph():
    predictions, targets = random_batch(8, (16, 24), [3, 2])
    compiled = torch.compile(matching_cost, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(predictions, targets, LossConfig()), matching_cost(predictions, targets, LossConfig())
    )
