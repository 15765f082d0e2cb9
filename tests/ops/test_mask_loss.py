"""Mask losses against torch's own operators on complete masks, by hand, and by finite differences."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.ops.mask_loss import mask_loss
from maskformer_fast.structures import Predictions, Targets, pack_masks, unpack_masks

KINDS = [("focal", 0.25, 2.0), ("focal", 0.6, 1.5), ("focal", 0.3, 0.0), ("bce", 0.25, 2.0)]


def random_case(
    seed: int,
    size: tuple[int, int] = (19, 26),
    counts: tuple[int, ...] = (3, 0, 2),
    layers: int = 2,
    queries: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[Predictions, Targets, Tensor]:
    """Ragged batch with a random assignment in which some targets got no query."""
    rng = torch.Generator().manual_seed(seed)
    batch, slots, (height, width) = len(counts), max(counts), size
    valid = torch.tensor([[height - b, width - 2 * b] for b in range(batch)])
    present = torch.arange(slots) < torch.tensor(counts)[:, None]
    masks = (torch.rand(batch, slots, height, width, generator=rng) < 0.4) & present[..., None, None]
    labels = torch.zeros(batch, slots, dtype=torch.int64)
    targets = Targets(labels, torch.tensor(counts), pack_masks(masks), valid, size)
    cells = (math.ceil(height / 4), math.ceil(width / 4))
    predictions = Predictions(
        torch.zeros(layers, batch, queries, 2, dtype=dtype),
        torch.randn(layers, batch, queries, 6, generator=rng, dtype=dtype).requires_grad_(),
        torch.randn(batch, 6, *cells, generator=rng, dtype=dtype).requires_grad_(),
        valid,
        size,
    )
    order = torch.rand(layers, batch, queries, generator=rng).argsort(2)[..., :slots]
    assigned = present & (torch.rand(layers, batch, slots, generator=rng) < 0.8)
    return predictions, targets, order.where(assigned, -1)


def reference(
    predictions: Predictions, targets: Targets, query: Tensor, loss: LossConfig
) -> tuple[Tensor, Tensor]:
    """Losses by a loop over pairs, each on the cropped image in float64, differentiable."""
    masks = unpack_masks(targets.masks, targets.input_size[1])
    sums = []
    for layer, queries in enumerate(query):
        logits = torch.einsum(
            "bqd,bdhw->bqhw", predictions.mask_embeddings[layer].double(), predictions.pixel_embeddings.double()
        )
        totals = [logits.sum() * 0, logits.sum() * 0]
        for image, target in (queries >= 0).nonzero().tolist():
            low = logits[image, queries[image, target]][None, None]
            height, width = targets.valid_sizes[image] if loss.padding == "exclude" else targets.input_size
            x = F.interpolate(low, targets.input_size, mode="bilinear", align_corners=False)[0, 0, :height, :width]
            t = masks[image, target, :height, :width].double()
            p = x.sigmoid()
            pixel = F.binary_cross_entropy_with_logits(x, t, reduction="none")
            if loss.mask_loss == "focal":
                pixel = pixel * (1 - (p * t + (1 - p) * (1 - t))) ** loss.focal_gamma
                pixel = pixel * (loss.focal_alpha * t + (1 - loss.focal_alpha) * (1 - t))
            totals[0] = totals[0] + pixel.mean()
            totals[1] = totals[1] + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        sums.append(torch.stack(totals))
    mask, dice = torch.stack(sums).unbind(1)
    return mask, dice


def gradients(predictions: Predictions, losses: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of a sum in which every layer and both losses have a weight of their own."""
    weights = torch.arange(1, len(losses[0]) + 1, dtype=losses[0].dtype)
    total = (losses[0] * weights).sum() + (losses[1] * weights.flip(0) * 0.3).sum()
    return torch.autograd.grad(total, (predictions.mask_embeddings, predictions.pixel_embeddings))


@pytest.mark.parametrize("padding", ["exclude", "include"])
@pytest.mark.parametrize(("kind", "alpha", "gamma"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_equals_complete_masks(padding, kind, alpha, gamma, dtype, tolerance):
    loss = LossConfig(mask_loss=kind, focal_alpha=alpha, focal_gamma=gamma, padding=padding)
    predictions, targets, query = random_case(1, dtype=dtype)
    assert (query >= 0).any(2)[:, 0].all() and ((query < 0) & (targets.counts[None, :, None] > 2)).any()
    ours = mask_loss(predictions, targets, query, loss)
    theirs = reference(predictions, targets, query, loss)
    for value, expected in zip(ours, theirs, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    for got, expected in zip(gradients(predictions, ours), gradients(predictions, theirs), strict=True):
        for row, expected_row in zip(got.flatten(0, -3), expected.flatten(0, -3), strict=True):
            torch.testing.assert_close(row, expected_row, rtol=20 * tolerance, atol=20 * tolerance)


def test_worked_out_by_hand():
    # Logits 0 at one low-resolution cell, 2x2 pixels of which one is target.
    mask = torch.tensor([[1, 0], [0, 0]], dtype=torch.bool)
    valid = torch.tensor([[2, 2]])
    predictions = Predictions(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), valid, (2, 2))
    targets = Targets(torch.tensor([[0]]), torch.tensor([1]), pack_masks(mask[None, None]), valid, (2, 2))
    query = torch.zeros(1, 1, 1, dtype=torch.int64)
    focal, dice = mask_loss(predictions, targets, query, LossConfig())
    assert focal.item() == pytest.approx((0.25 + 3 * 0.75) * 0.25 * math.log(2) / 4, rel=1e-6)
    assert dice.item() == pytest.approx(1 - 2 / 4, rel=1e-6)
    left = targets._replace(valid_sizes=torch.tensor([[2, 1]]))
    focal, dice = mask_loss(predictions, left, query, LossConfig())
    assert focal.item() == pytest.approx((0.25 + 0.75) * 0.25 * math.log(2) / 2, rel=1e-6)
    assert dice.item() == pytest.approx(1 - 2 / 3, rel=1e-6)


@pytest.mark.parametrize("padding", ["exclude", "include"])
@pytest.mark.parametrize(("kind", "alpha", "gamma"), KINDS)
def test_gradient_by_finite_differences(padding, kind, alpha, gamma):
    loss = LossConfig(mask_loss=kind, focal_alpha=alpha, focal_gamma=gamma, padding=padding)
    predictions, targets, query = random_case(2, size=(9, 6), counts=(2, 1), queries=3, dtype=torch.float64)
    assert (query >= 0).any()

    def losses(embeddings: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        given = predictions._replace(mask_embeddings=embeddings, pixel_features=pixels)
        return mask_loss(given, targets, query, loss)

    assert torch.autograd.gradcheck(losses, (predictions.mask_embeddings, predictions.pixel_embeddings))


def test_only_matched_queries_get_gradients():
    predictions, targets, query = random_case(3)
    embeddings, _ = gradients(predictions, mask_loss(predictions, targets, query, LossConfig()))
    matched = torch.zeros(2, 3, 6, dtype=torch.bool).scatter(2, query.where(query >= 0, 5), True)[..., :5]
    assert torch.equal(embeddings.abs().sum(3) > 0, matched)


@pytest.mark.parametrize("counts", [(0, 0), (2, 1)])
def test_nothing_matched_is_zero_and_connected(counts):
    predictions, targets, query = random_case(4, counts=counts)
    losses = mask_loss(predictions, targets, torch.full_like(query, -1), LossConfig())
    assert all(torch.equal(value, torch.zeros(2)) for value in losses)
    for gradient in gradients(predictions, losses):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_chunks_make_no_difference(monkeypatch):
    predictions, targets, query = random_case(5, counts=(3, 3, 2))
    losses = mask_loss(predictions, targets, query, LossConfig())
    expected = gradients(predictions, losses)
    for pixels in (1, 2 * 19 * 26 + 5):
        monkeypatch.setattr(sys.modules[mask_loss.__module__], "CPU_CHUNK", pixels)
        chunked = mask_loss(predictions, targets, query, LossConfig())
        torch.testing.assert_close(chunked, losses)
        torch.testing.assert_close(gradients(predictions, chunked), expected)


def test_compiles_in_one_graph_with_padded_pairs():
    predictions, targets, query = random_case(6)
    compiled = torch.compile(mask_loss, fullgraph=True, backend="aot_eager")
    ours = compiled(predictions, targets, query, LossConfig())
    expected = mask_loss(predictions, targets, query, LossConfig())
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(predictions, ours), gradients(predictions, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [True, False])
def test_opcheck(dtype, padding):
    logits = torch.randn(5, 4, 3, dtype=dtype, requires_grad=True)
    masks = torch.randint(0, 256, (3, 13, 2), dtype=torch.uint8)
    sizes = torch.tensor([[13, 11], [9, 4], [0, 7]]) if padding else None
    arguments = (masks, torch.tensor([2, -1, 0, 0, 1]), sizes, 11, [0.3, 0.7, 2.0])
    torch.library.opcheck(torch.ops.maskformer_fast.mask_sums.default, (logits, *arguments))
    gradient = torch.randn(5, 4, dtype=dtype)
    torch.library.opcheck(
        torch.ops.maskformer_fast.mask_sums_backward.default, (gradient, logits.detach(), *arguments)
    )


def test_pairs_without_target_are_left_alone_whatever_their_logits():
    logits = torch.full((2, 2, 2), math.nan).index_fill(0, torch.tensor([1]), 0.5).requires_grad_()
    rows = torch.tensor([-1, 0])
    sums = torch.ops.maskformer_fast.mask_sums(
        logits, torch.ones(1, 2, 1, dtype=torch.uint8), rows, None, 2, [1.0, 1.0, 0.0]
    )
    assert torch.equal(sums[0], torch.zeros(4)) and sums[1].isfinite().all()
    (gradient,) = torch.autograd.grad(sums.sum(), logits)
    assert torch.equal(gradient[0], torch.zeros(2, 2)) and (gradient[1] != 0).any()


@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(0, 3), st.sampled_from(["focal", "bce"]))
@settings(max_examples=25, deadline=None)
def test_more_padding_changes_nothing_when_excluded(seed, below, beside, kind):
    loss = LossConfig(mask_loss=kind)
    predictions, targets, query = random_case(seed, size=(16, 24))
    size = (16 + 4 * below, 24 + 4 * beside)
    # Upsampling reads one cell past the last pixel, so the cells added repeat the border, as upsampling itself does.
    pixels = F.pad(predictions.pixel_embeddings, (0, beside, 0, below), mode="replicate")
    masks = F.pad(unpack_masks(targets.masks, 24), (0, 4 * beside, 0, 4 * below), value=True)
    wider = predictions._replace(pixel_features=pixels, input_size=size)
    padded = targets._replace(masks=pack_masks(masks), input_size=size)
    torch.testing.assert_close(
        mask_loss(wider, padded, query, loss), mask_loss(predictions, targets, query, loss)
    )


@pytest.mark.parametrize("kind", ["focal", "bce"])
def test_paddings_agree_without_padding(kind):
    predictions, targets, query = random_case(7)
    unpadded = targets._replace(valid_sizes=torch.tensor([targets.input_size] * 3))
    exclude, include = (
        mask_loss(predictions, unpadded, query, LossConfig(mask_loss=kind, padding=padding))
        for padding in ("exclude", "include")
    )
    torch.testing.assert_close(exclude, include)


@pytest.mark.parametrize("kind", ["focal", "bce"])
def test_extreme_logits_have_finite_losses_and_gradients(kind):
    predictions, targets, query = random_case(8)
    steep = predictions._replace(mask_embeddings=(predictions.mask_embeddings.detach() * 1e4).requires_grad_())
    losses = mask_loss(steep, targets, query, LossConfig(mask_loss=kind))
    assert all(value.isfinite().all() for value in losses)
    assert all(gradient.isfinite().all() for gradient in gradients(steep, losses))


def test_half_precision_is_computed_in_float32_under_autocast():
    predictions, targets, query = random_case(9)
    half, rounded = (
        predictions._replace(**{name: kind(getattr(predictions, name)) for name in predictions._fields[1:3]})
        for kind in (lambda x: x.bfloat16(), lambda x: x.bfloat16().float())
    )
    with torch.autocast("cpu", torch.bfloat16):
        losses = mask_loss(half, targets, query, LossConfig())
    expected = mask_loss(rounded, targets, query, LossConfig())
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(losses, expected, strict=True))


def test_no_gradient_is_kept_where_none_is_wanted():
    predictions, targets, query = random_case(10)
    with torch.no_grad():
        plain = mask_loss(predictions, targets, query, LossConfig())
    torch.testing.assert_close(plain, mask_loss(predictions, targets, query, LossConfig()))
    assert not any(value.requires_grad for value in plain)


def test_other_input_size_is_refused():
    predictions, targets, query = random_case(11)
    with pytest.raises(ValueError, match=r"targets\.input_size.*\(19, 26\).*\(19, 30\)"):
        mask_loss(predictions, targets._replace(input_size=(19, 30)), query, LossConfig())


@pytest.mark.parametrize(("rows", "columns", "slots"), [(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_of_another_height_width_or_number_are_refused(rows, columns, slots, dtype):
    predictions, targets, query = random_case(0, dtype=dtype)
    batch, count, height, width = targets.masks.shape
    masks = torch.zeros(batch, count + slots, height + rows, width + columns, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"targets\.masks: expected shape \(3, 3, 19, 4\), got \(3, "):
        mask_loss(predictions, targets._replace(masks=masks), query, LossConfig())
