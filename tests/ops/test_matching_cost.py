"""Matching cost against loops over every pair and numbers worked out by hand; official costs: tests/interop."""

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
from maskformer_fast.core import extension
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.matching_cost import (
    _Arguments,
    _matching_cost_cuda,
    matching_cost,
    matching_cost_eager,
    matching_cost_from_logits,
)
from maskformer_fast.structures import Predictions, Targets, pack_masks, unpack_masks
from tests.support.missing_modules import hide_triton

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
    x = layer_mask_logits(predictions._replace(
        mask_embeddings=predictions.mask_embeddings.double(), pixel_features=predictions.pixel_embeddings.double()
    ), layer)[image, query]
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
    torch.testing.assert_close(matching_cost_eager(predictions, targets, loss), cost, rtol=1e-5, atol=1e-5)
    assert cost.shape == (2, len(counts), 5, max(counts)) and cost.dtype == torch.float32
    assert cost.isfinite().all()
    compared = 0
    for layer, image, query in torch.cartesian_prod(torch.arange(2), torch.arange(len(counts)), torch.arange(5)):
        for target in range(counts[image]):
            place = (int(layer), int(image), int(query), target)
            assert float(cost[place]) == pytest.approx(pair_cost(predictions, targets, loss, place), rel=1e-5, abs=1e-5)
            compared += 1
    assert compared == 10 * sum(counts)


def assert_equals_oracle(cost: Tensor, predictions: Predictions, targets: Targets, loss: LossConfig) -> None:
    """Equal to the eager twin in float64, which other tests compare with the definition."""
    names = ("class_logits", "mask_embeddings", "pixel_features")
    exact = predictions._replace(**{name: getattr(predictions, name).double() for name in names})
    expected = matching_cost(exact, targets, loss)
    assert expected.dtype == torch.float64 and cost.dtype == torch.float32 and cost.shape == expected.shape
    absent = torch.arange(cost.shape[3]) >= targets.counts[:, None]
    assert (cost.masked_select(absent[None, :, None]) == 0).all()
    torch.testing.assert_close(cost.double(), expected, rtol=0, atol=2e-6 * max(1.0, float(expected.abs().amax())))


# Tiles hold 96 pixels and 32 queries, words of a pixel's targets 64: below, at and beyond each.
@pytest.mark.parametrize(
    ("size", "counts", "layers", "queries"),
    [((32, 48), [3, 0], 1, 32), ((33, 49), [66, 1, 64], 2, 17), ((76, 80), [1], 3, 11), ((4, 4), [2], 1, 1),
     ((130, 200), [9, 20], 1, 100)],
)
@pytest.mark.parametrize(("mask_loss", "gamma"), [("focal", 2.0), ("focal", 0.7), ("bce", 2.0)])
def test_every_instruction_set_equals_float64(isa, size, counts, layers, queries, mask_loss, gamma):
    loss = LossConfig(mask_loss=mask_loss, focal_gamma=gamma)
    predictions, targets = random_batch(11, size, counts, layers, queries, classes=37)
    assert_equals_oracle(matching_cost(predictions, targets, loss), predictions, targets, loss)


@given(
    st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 60), st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 2, 4, 7]), st.sampled_from(["exclude", "include"]),
    st.floats(0.1, 30),
)
@settings(max_examples=50, deadline=None)
def test_random_shapes_equal_float64(seed, height, width, counts, layers, queries, stride, padding, steepness):
    loss = LossConfig(padding=padding)
    predictions, targets = random_batch(seed, (height, width), [*counts, 1], layers, queries, stride=stride)
    predictions = predictions._replace(mask_embeddings=predictions.mask_embeddings * steepness)
    assert_equals_oracle(matching_cost(predictions, targets, loss), predictions, targets, loss)


@pytest.mark.parametrize("padding", ["exclude", "include"])
def test_from_logits_equals_from_embeddings(isa, padding):
    predictions, targets = random_batch(9, (50, 90), [4, 0, 7], queries=41)
    logits = torch.stack([layer_mask_logits(predictions, layer) for layer in range(2)])
    loss = LossConfig(padding=padding)
    cost = matching_cost_from_logits(predictions.class_logits, logits, targets, loss)
    assert_equals_oracle(cost, predictions, targets, loss)
    strided = logits.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(matching_cost_from_logits(predictions.class_logits, strided, targets, loss), cost)
    exact = matching_cost_from_logits(predictions.class_logits, logits.double(), targets, loss)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), cost, rtol=1e-5, atol=1e-5)


def test_any_strides_and_threads_give_the_same_costs():
    predictions, targets = random_batch(10, (61, 83), [5, 2], queries=19)
    cost = matching_cost(predictions, targets, LossConfig())
    strided = predictions._replace(
        class_logits=predictions.class_logits.transpose(0, 1).contiguous().transpose(0, 1),
        mask_embeddings=predictions.mask_embeddings.mT.contiguous().mT,
        pixel_features=predictions.pixel_features.contiguous(memory_format=torch.channels_last),
    )
    assert not strided.pixel_embeddings.is_contiguous()
    wide = targets._replace(masks=targets.masks.mT.contiguous().mT, labels=targets.labels.mT.contiguous().mT)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(matching_cost(strided, wide, LossConfig()), cost)
    finally:
        torch.set_num_threads(threads)


def test_gradients_are_ignored():
    predictions, targets = random_batch(10, (16, 16), [2])
    predictions.mask_embeddings.requires_grad_()
    assert not matching_cost(predictions, targets, LossConfig()).requires_grad


@pytest.mark.parametrize(("layers", "counts", "queries"), [(0, [2], 5), (2, [0, 0], 5), (2, [2, 1], 0), (1, [], 3)])
def test_no_layers_targets_queries_or_images_give_empty_costs(layers, counts, queries):
    predictions, targets = random_batch(1, (16, 16), counts or [0], layers, queries)
    if not counts:
        predictions = predictions._replace(
            class_logits=predictions.class_logits[:, :0],
            mask_embeddings=predictions.mask_embeddings[:, :0],
            pixel_features=predictions.pixel_features[:0],
        )
        targets = targets._replace(**{
            name: getattr(targets, name)[:0] for name in ("labels", "counts", "masks", "valid_sizes")
        })
    for function in (matching_cost, matching_cost_eager):
        cost = function(predictions, targets, LossConfig())
        assert cost.shape == (layers, len(counts), queries, max(counts, default=0))


def test_an_image_of_padding_only():
    predictions, targets = random_batch(2, (16, 16), [2, 2])
    targets.valid_sizes[1] = 0
    for function in (matching_cost, matching_cost_eager):
        cost = function(predictions, targets, LossConfig(class_weight=0.0))
        assert (cost[:, 1] == 0).all() and cost.isfinite().all()


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
    unpadded = targets._replace(valid_sizes=torch.tensor([[20, 28]] * 2))
    exclude, include = (
        matching_cost(predictions, unpadded, LossConfig(mask_loss=mask_loss, padding=p)) for p in ("exclude", "include")
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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["class_logits", "mask_embeddings", "pixel_features"])
def test_broken_predictions_have_no_finite_cost(isa, field, value):
    predictions, targets = random_batch(4, (16, 16), [2, 0, 3], queries=35)
    clean = matching_cost(predictions, targets, LossConfig())
    assert clean.isfinite().all()
    place = (2, 1, 0, 1) if field == "pixel_features" else (1, 2, 33, 3)
    getattr(predictions, field)[place] = value
    cost = matching_cost(predictions, targets, LossConfig())
    broken = torch.zeros(2, 3, 35, dtype=torch.bool)
    if field == "pixel_features":
        broken[:, 2] = True
    elif value != -torch.inf or field != "class_logits":  # a class logit of -inf is a probability of 0
        broken[1, 2, 33] = True
    assert not cost[broken].isfinite().any()
    assert torch.equal(cost[~broken][:, :2], clean[~broken][:, :2]) or field == "class_logits"
    assert cost[~broken].isfinite().all()
    assert torch.equal(matching_cost_eager(predictions, targets, LossConfig()).isfinite(), cost.isfinite())


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


@pytest.mark.no_cover
def test_compiles_in_one_graph():
    predictions, targets = random_batch(8, (16, 24), [3, 2])
    compiled = torch.compile(matching_cost, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(predictions, targets, LossConfig()), matching_cost(predictions, targets, LossConfig())
    )


def operator_arguments(dtype: torch.dtype, padding: str, factored: bool) -> tuple:
    predictions, targets = random_batch(12, (16, 24), [3, 0, 2])
    floats = [predictions.class_logits, predictions.mask_embeddings, predictions.pixel_embeddings]
    if not factored:
        floats[1:] = [torch.stack([layer_mask_logits(predictions, layer) for layer in range(2)])]
    valid = targets.valid_sizes if padding == "exclude" else None
    converted = [tensor.to(dtype) for tensor in floats] + ([] if factored else [None])
    return *converted, *targets[:3], valid, [16, 24], [1.0, 20.0, 1.0], [0.25, 0.75, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", ["exclude", "include"])
@pytest.mark.parametrize("factored", [True, False])
def test_opcheck(dtype, padding, factored):
    operator = torch.ops.maskformer_fast.matching_cost.default
    torch.library.opcheck(operator, operator_arguments(dtype, padding, factored))


def test_cuda_has_an_implementation():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("maskformer_fast::matching_cost", "CUDA")


def test_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_triton(monkeypatch)
    floats = (torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4), torch.zeros(1, 4, 2, 2))
    packed = (torch.zeros(1, 1).long(), torch.ones(1).long(), torch.zeros(1, 1, 4, 1, dtype=torch.uint8))
    arguments = _Arguments(*floats, *packed, None, (4, 4), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    with pytest.raises(ImportError, match=r"No module named 'triton'.*pip install triton"):
        _matching_cost_cuda(arguments)


def test_missing_extension_says_how_to_build(monkeypatch):
    predictions, targets = random_batch(14, (16, 16), [1])
    extension.load_extension.cache_clear()
    monkeypatch.setitem(sys.modules, "maskformer_fast._C", None)
    with pytest.raises(ImportError, match=r"cannot be loaded: .*Build it .* pip install -e \."):
        matching_cost(predictions, targets, LossConfig())
    monkeypatch.undo()
    assert matching_cost(predictions, targets, LossConfig()).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_logits": torch.zeros(2, 5, 5)}, r"predictions\.class_logits.*\[L, B, Q, K\+1\].*\(2, 5, 5\)"),
        ({"class_logits": torch.zeros(2, 1, 5, 5, dtype=torch.int64)}, r"predictions\.class_logits.*torch\.int64"),
        ({"mask_embeddings": torch.zeros(2, 1, 4, 6)}, r"mask_embeddings.*\[2, 1, 5, D\].*\(2, 1, 4, 6\)"),
        ({"pixel_features": torch.zeros(1, 7, 4, 4)}, r"pixel_embeddings.*\[1, 6, h, w\].*\(1, 7, 4, 4\)"),
        ({"pixel_features": torch.zeros(1, 6, 4, 4, device="meta")}, r"pixel_embeddings.*on cpu.*meta"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"targets\.labels.*\(1, 2\).*\(2, 2\)"),
        ({"labels": torch.tensor([[5, 0]])}, r"labels: expected 0\.\.4 .*got 5 at image 0"),
        ({"labels": torch.tensor([[-1, 0]])}, r"labels: expected 0\.\.4 .*got -1 at image 0"),
        ({"counts": torch.tensor([3])}, r"counts: expected 0\.\.2 .*got 3 at image 0"),
        ({"counts": torch.tensor([-1])}, r"counts: expected 0\.\.2 .*got -1 at image 0"),
        ({"counts": torch.tensor([1.0])}, r"targets\.counts.*torch\.int64.*torch\.float32"),
        ({"masks": torch.zeros(1, 2, 16, 3, dtype=torch.uint8)}, r"targets\.masks.*\(1, 2, 16, 2\)"),
        ({"valid_sizes": torch.zeros(2, 2, dtype=torch.int64)}, r"targets\.valid_sizes.*\(1, 2\)"),
    ],
)
def test_bad_input_is_named(changes, message):
    predictions, targets = random_batch(15, (16, 16), [2])
    if set(changes) <= {"class_logits", "mask_embeddings", "pixel_features"}:
        predictions = predictions._replace(**changes)
    else:
        targets = targets._replace(**changes)
    with pytest.raises(ValueError, match=message):
        matching_cost(predictions, targets, LossConfig())


def test_bindings_check_pointers_and_sizes():
    compute = extension.load_extension().matching_cost
    memory = torch.zeros(64)
    address = memory.data_ptr()
    sizes = [1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    pointers = [address] * 3
    good = [*pointers, (1, 1, 1, 1), *pointers, 0, sizes, (1, 1, 1), (1, 1, 0), address, 1]
    for index, value, message in (
        (0, 0, "class_logits: expected a pointer"),
        (6, 0, "masks: expected a pointer"),
        (8, [-1, *sizes[1:]], "sizes: expected >= 0, got -1"),
        (8, [*sizes[:5], 0, *sizes[6:]], "sizes: expected pixels and classes"),
        (11, 0, "cost: expected a pointer"),
        (12, 0, "threads: expected >= 1, got 0"),
    ):
        bad = good.copy()
        bad[index] = value
        with pytest.raises(ValueError, match=message):
            compute(*bad)
