"""Results of whole batches, against formulas on F.interpolate and loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference import device_postprocess, postprocess
from maskformer_fast.inference_config import PanopticOrder, PanopticRule, SemanticOrder
from maskformer_fast.ops import semantic_pruned
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import PixelPredictions, Predictions, Projection, unpack_masks
from tests.support.postprocess_cases import INPUT_SIZE, OUTPUT_SIZES, VALID_SIZES, all_results, random_predictions


def upsampled_logits(predictions: Predictions, image: int) -> torch.Tensor:
    """Mask logits at the network's input size, cropped -> [Q, vh, vw]."""
    height, width = predictions.valid_sizes[image].tolist()
    logits = layer_mask_logits(predictions)[image, None]
    masks = F.interpolate(logits, size=INPUT_SIZE, mode="bilinear", align_corners=False)
    return masks[0, :, :height, :width]


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def class_scores(predictions: Predictions, image: int, logits: torch.Tensor) -> torch.Tensor:
    probabilities = predictions.class_logits[-1, image].softmax(-1)[:, :-1]
    return (probabilities[:, :, None, None] * logits.sigmoid()[:, None]).sum(0)


def assert_labels(labels: torch.Tensor, scores: torch.Tensor, margin: float = 1e-4) -> None:
    """Labels are the argmax wherever it leads by more than a margin."""
    top = scores.topk(2, 0).values
    sure = top[0] - top[1] > margin
    assert sure.float().mean() > 0.9
    assert (labels.long() == scores.argmax(0))[sure].all()


def test_semantic_batch_with_padding() -> None:
    predictions = random_predictions()
    results = postprocess.semantic(predictions, OUTPUT_SIZES, with_scores=True)
    scores = postprocess.semantic_scores(predictions, OUTPUT_SIZES)
    for image, size in enumerate(OUTPUT_SIZES):
        assert results[image].labels.shape == size and scores[image].shape == (7, *size)
        torch.testing.assert_close(results[image].scores, scores[image].amax(0), atol=1e-5, rtol=1e-5)
        assert_labels(results[image].labels, scores[image])
        if size == VALID_SIZES[image]:  # there the definition is the official one
            expected = class_scores(predictions, image, upsampled_logits(predictions, image))
            torch.testing.assert_close(scores[image], expected, atol=2e-5, rtol=0)
    assert postprocess.semantic(predictions, OUTPUT_SIZES)[0].scores is None


@pytest.mark.parametrize("order", ["official", "official_panoptic", "huggingface"])
def test_semantic_orders(order: SemanticOrder) -> None:
    predictions = random_predictions(1)
    results = postprocess.semantic(predictions, OUTPUT_SIZES, with_scores=True, order=order)
    scores = postprocess.semantic_scores(predictions, OUTPUT_SIZES, order=order)
    for image, size in enumerate(OUTPUT_SIZES):
        logits = upsampled_logits(predictions, image)
        if order == "official":
            expected = resize(class_scores(predictions, image, logits), size)
        elif order == "official_panoptic":
            expected = class_scores(predictions, image, resize(logits, size))
        else:
            expected = resize(class_scores(predictions, image, layer_mask_logits(predictions)[image]), size)
        torch.testing.assert_close(scores[image], expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(results[image].scores, expected.amax(0), atol=2e-5, rtol=0)
        assert_labels(results[image].labels, expected)
        assert results[image].labels.dtype == torch.uint8


@pytest.mark.parametrize("queries, classes", [(1, 1), (1, 9), (30, 1), (20, 300)])
def test_semantic_extreme_counts(queries: int, classes: int) -> None:
    predictions = random_predictions(2, classes, queries)
    results = postprocess.semantic(predictions, VALID_SIZES)
    for image, result in enumerate(results):
        scores = class_scores(predictions, image, upsampled_logits(predictions, image))
        chosen = scores.gather(0, result.labels.long()[None])[0]
        assert (chosen >= scores.amax(0) - 1e-5).all()
        assert result.labels.dtype == (torch.int16 if classes == 300 else torch.uint8)


@pytest.mark.parametrize("order", ["direct", "official"])
def test_pixel_models(order: SemanticOrder) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(2, 4, 6, 10, 14, generator=generator)
    predictions = PixelPredictions(logits, torch.tensor(VALID_SIZES), INPUT_SIZE)
    results = postprocess.semantic(predictions, OUTPUT_SIZES, with_scores=True, order=order)
    scores = postprocess.semantic_scores(predictions, OUTPUT_SIZES, order=order)
    for image, size in enumerate(OUTPUT_SIZES):
        torch.testing.assert_close(scores[image].sum(0), torch.ones(size))
        torch.testing.assert_close(results[image].scores, scores[image].amax(0), atol=1e-5, rtol=1e-5)
        assert_labels(results[image].labels, scores[image])
        if order == "official" or size == VALID_SIZES[image]:
            height, width = VALID_SIZES[image]
            expected = resize(resize(logits[-1, image], INPUT_SIZE)[:, :height, :width], size).softmax(0)
            torch.testing.assert_close(scores[image], expected, atol=2e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 999), st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.5, 0.8]),
    st.sampled_from(get_args(PanopticRule)),
)  # fmt: skip
def test_panoptic_results_are_consistent(
    seed: int, object_threshold: float, overlap_threshold: float, rule: PanopticRule
) -> None:
    predictions = random_predictions(seed, classes=4, queries=12)
    is_thing = [True, False, True, False]
    results = postprocess.panoptic(
        predictions, OUTPUT_SIZES, is_thing, object_threshold, overlap_threshold, rule=rule
    )
    for image, result in enumerate(results):
        assert result.id_map.shape == OUTPUT_SIZES[image] and result.id_map.dtype == torch.int32
        assert [segment.id for segment in result.segments] == list(range(1, len(result.segments) + 1))
        assert set(result.id_map.unique().tolist()) - {VOID} == {segment.id for segment in result.segments}
        stuff = [segment.category for segment in result.segments if not segment.is_thing]
        assert len(stuff) == len(set(stuff)) and set(stuff) <= {1, 3}
        best = predictions.class_logits[-1, image].softmax(-1).max(-1)
        for segment in result.segments:
            assert segment.area == (result.id_map == segment.id).sum() > 0
            assert segment.is_thing == is_thing[segment.category]
            candidates = best.values[best.indices == segment.category]
            assert any(segment.score == value for value in candidates.tolist()) and segment.score > object_threshold


@pytest.mark.parametrize("first, last", [(3.0, 5.0), (5.0, 3.0)])
def test_merged_stuff_sums_areas_and_takes_the_best_score(first: float, last: float) -> None:
    masks = torch.full((1, 3, 2, 6), -9.0)
    for query in range(3):
        masks[0, query, :, 2 * query : 2 * query + 2] = 9.0
    classes = torch.zeros(1, 1, 3, 3)
    classes[0, 0, 0, 0], classes[0, 0, 1, 1], classes[0, 0, 2, 0] = first, 4.0, last
    predictions = Predictions(classes, torch.eye(3)[None, None], masks, torch.tensor([[2, 6]]), (2, 6))
    result = postprocess.panoptic(predictions, [(2, 6)], [False, True], 0.5, 0.8)[0]
    assert result.id_map[0].tolist() == [1, 1, 2, 2, 1, 1]
    assert [(s.id, s.category, s.area) for s in result.segments] == [(1, 0, 8), (2, 1, 4)]
    best = classes[0, 0].softmax(-1)[:, 0].max().item()
    assert result.segments[0].score == pytest.approx(best)


def test_masks_are_computed_for_kept_queries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    for name in ("panoptic_inference", "instance_inference"):
        original = getattr(device_postprocess, name)

        def spy(logits: torch.Tensor, *rest: object, original: Callable[..., object] = original) -> object:
            shapes.append(tuple(logits.shape[:2]))
            return original(logits, *rest)

        monkeypatch.setattr(device_postprocess, name, spy)
    predictions = random_predictions(16, valid_sizes=[INPUT_SIZE] * 2)
    predictions.class_logits[-1, :, :, -1] = 50.0
    predictions.class_logits[-1, 0, [2, 5], 3] = predictions.class_logits[-1, 1, 4, 1] = 60.0
    postprocess.panoptic(predictions, [INPUT_SIZE] * 2, [True] * 7, 0.8, 0.8)
    postprocess.instances(predictions, [INPUT_SIZE] * 2, [True] * 7, 1)
    assert shapes == [(2, 2), (2, 1)]


@pytest.mark.parametrize("order", ["direct", "official"])
def test_no_query_kept_gives_void_and_no_segments(order: PanopticOrder) -> None:
    predictions = random_predictions(5)
    predictions.class_logits[..., -1] = 50.0
    results = postprocess.panoptic(predictions, OUTPUT_SIZES, [True] * 7, 0.8, 0.8, order)
    for result, size in zip(results, OUTPUT_SIZES, strict=True):
        assert result.segments == [] and torch.equal(result.id_map, torch.full(size, VOID, dtype=torch.int32))


def test_one_image_without_kept_queries_does_not_disturb_the_others() -> None:
    predictions = random_predictions(6)
    alone = postprocess.panoptic(predictions, OUTPUT_SIZES, [True] * 7, 0.5, 0.3)
    predictions.class_logits[-1, 2, :, -1] = 50.0
    together = postprocess.panoptic(predictions, OUTPUT_SIZES, [True] * 7, 0.5, 0.3)
    assert together[2].segments == []
    for image in (0, 1, 3):
        assert torch.equal(together[image].id_map, alone[image].id_map)
        assert together[image].segments == alone[image].segments


def naive_instances(predictions: Predictions, image: int, is_thing: list[bool], top_k: int) -> list[tuple]:
    """[(score, label, mask)] at the network's input size, pair by pair, best first."""
    probabilities = predictions.class_logits[-1, image].softmax(-1)
    logits = upsampled_logits(predictions, image)
    pairs = [
        (probabilities[query, label].item(), query, label)
        for query in range(len(logits))
        for label in range(len(is_thing))
        if is_thing[label]
    ]
    results = []
    for score, query, label in sorted(pairs, reverse=True)[:top_k]:
        mask = logits[query] > 0
        if mask.any():
            results.append((score * logits[query][mask].sigmoid().mean().item(), label, mask))
    return sorted(results, key=lambda result: -result[0])


@pytest.mark.parametrize("is_thing", [[True] * 5, [True, False, True, False, False]])
@pytest.mark.parametrize("top_k", [1, 8, 500])
def test_instances_equal_loops(is_thing: list[bool], top_k: int) -> None:
    predictions = random_predictions(7, classes=5)
    predictions.mask_embeddings[-1, 1, :4] = 0.0  # logits of 0 are not above 0: empty masks
    results = postprocess.instances(predictions, VALID_SIZES, is_thing, top_k)
    for image, result in enumerate(results):
        expected = naive_instances(predictions, image, is_thing, top_k)
        assert result.labels.tolist() == [label for _, label, _ in expected] and result.size == VALID_SIZES[image]
        torch.testing.assert_close(result.scores, torch.tensor([s for s, _, _ in expected]), atol=1e-5, rtol=0)
        masks = unpack_masks(result.masks, VALID_SIZES[image][1])
        for (_, _, mask), got, box in zip(expected, masks, result.boxes.tolist(), strict=True):
            assert (mask != got).float().mean() < 1e-3  # a logit of about 0 may fall on either side
            rows, columns = got.nonzero(as_tuple=True)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("is_thing", [[False] * 7, [True] * 7])
def test_instances_may_be_none(is_thing: list[bool]) -> None:
    predictions = random_predictions(8)
    if all(is_thing):
        predictions.mask_embeddings.zero_()
    results = postprocess.instances(predictions, OUTPUT_SIZES, is_thing, 10)
    for result, size in zip(results, OUTPUT_SIZES, strict=True):
        assert result.masks.shape == (0, size[0], (size[1] + 7) // 8) and result.boxes.shape == (0, 4)
        assert len(result.labels) == len(result.scores) == 0


def test_a_query_with_nan_classes_gives_nothing_and_leaves_the_others() -> None:
    predictions, is_thing, sizes = random_predictions(9), [True] * 7, OUTPUT_SIZES
    predictions.class_logits[-1, :, 3] = torch.nan
    others = [query for query in range(9) if query != 3]
    without = predictions._replace(
        class_logits=predictions.class_logits[:, :, others], mask_embeddings=predictions.mask_embeddings[:, :, others]
    )
    for top_k in (5, 500):
        got, expected = (postprocess.instances(p, sizes, is_thing, top_k) for p in (predictions, without))
        for one, other in zip(got, expected, strict=True):
            assert len(one.labels) and torch.equal(one.labels, other.labels) and torch.equal(one.masks, other.masks)
            torch.testing.assert_close(one.scores, other.scores)
    got, expected = (postprocess.panoptic(p, sizes, is_thing, 0.4, 0.3) for p in (predictions, without))
    assert any(result.segments for result in expected)
    assert all(torch.equal(one.id_map, other.id_map) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("projection", [None, Projection(torch.ones(16, 16, 3, 3), torch.ones(16))])
def test_a_batch_of_no_images_has_no_results(projection: Projection | None) -> None:
    empty = random_predictions(valid_sizes=[])._replace(
        valid_sizes=torch.empty(0, 2, dtype=torch.int64), projection=projection
    )
    assert postprocess.semantic(empty, []) == postprocess.semantic_scores(empty, []) == []
    assert postprocess.panoptic(empty, [], [True] * 7, 0.5, 0.5) == []
    assert postprocess.instances(empty, [], [True] * 7, 10) == []


def assert_same(results: list[list[object]], expected: list[list[object]]) -> None:
    for got, want in zip(results, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
            else:
                assert a == b


def test_batch_equals_images_alone() -> None:
    predictions = random_predictions(11, valid_sizes=[(40, 56), (33, 41), (40, 56)])
    sizes = [(31, 45), (50, 60), (31, 45)]  # the first and the last are worked on together
    together = all_results(predictions, sizes)
    for image in range(3):
        one = slice(image, image + 1)
        alone = Predictions(
            predictions.class_logits[:, one], predictions.mask_embeddings[:, one], predictions.pixel_embeddings[one],
            predictions.valid_sizes[one], INPUT_SIZE,
        )  # fmt: skip
        assert_same([together[image]], all_results(alone, [sizes[image]]))


def test_bfloat16_and_autocast_are_computed_in_float32() -> None:
    full = random_predictions(12)
    half = Predictions(*(t.bfloat16() for t in full[:3]), full.valid_sizes, INPUT_SIZE)
    rounded = Predictions(*(t.float() for t in half[:3]), full.valid_sizes, INPUT_SIZE)
    expected = all_results(rounded, OUTPUT_SIZES)
    assert_same(all_results(half, OUTPUT_SIZES), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(all_results(half, OUTPUT_SIZES), expected)


def test_results_are_equal_before_and_after_the_last_convolution() -> None:
    plain = random_predictions(16)
    weight, bias = torch.randn(16, 6, 3, 3) / 6, torch.randn(16)
    waiting = plain._replace(pixel_features=torch.randn(4, 6, 10, 14), projection=Projection(weight, bias))
    plain = plain._replace(pixel_features=waiting.pixel_embeddings)
    for got, want in zip(all_results(waiting, OUTPUT_SIZES), all_results(plain, OUTPUT_SIZES), strict=True):
        assert (got[0] == want[0]).float().mean() > 0.999 and (got[2] == want[2]).float().mean() > 0.999
        torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5)
        assert [segment.category for segment in got[3]] == [segment.category for segment in want[3]]
        assert torch.equal(got[4], want[4])
        torch.testing.assert_close(got[5], want[5], atol=1e-4, rtol=1e-4)
    nothing = plain.class_logits.new_zeros(2, 4, 9, 8)
    nothing[..., -1] = 9.0
    for result in postprocess.panoptic(waiting._replace(class_logits=nothing), OUTPUT_SIZES, [True] * 7, 0.4, 0.3):
        assert (result.id_map == VOID).all() and not result.segments


def test_semantic_masks_are_pruned_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (96, 128)
    generator = torch.Generator().manual_seed(17)
    class_logits = torch.randn(2, 3, 40, 8, generator=generator)
    class_logits[-1, ::2, range(7), range(7)] += 9.0  # the first and the last image have 7 live queries
    class_logits[-1, ::2, 7:, 7] += 14.0
    waiting = Predictions(
        class_logits,
        2 * torch.randn(2, 3, 40, 16, generator=generator),
        F.interpolate(torch.randn(3, 6, 4, 5, generator=generator), size=(24, 32), mode="bilinear"),
        torch.tensor([size] * 3),
        size,
        Projection(torch.randn(16, 6, 3, 3, generator=generator) / 6, torch.randn(16, generator=generator)),
    )
    pruned: list[bool] = []
    prune = semantic_pruned.pruned_semantic_inference

    def recording(*arguments: Any) -> torch.Tensor | None:
        labels = prune(*arguments)
        pruned.append(labels is not None)
        return labels

    monkeypatch.setattr(semantic_pruned, "MAX_TAPS", 1.0)  # edges take a larger share of small maps
    monkeypatch.setattr(semantic_pruned, "pruned_semantic_inference", recording)
    results = postprocess.semantic(waiting, [size] * 3)
    assert pruned == [True, False, True]
    plain = waiting._replace(pixel_features=waiting.pixel_embeddings, projection=None)
    scores = postprocess.semantic_scores(plain, [size] * 3)
    for result, expected in zip(results, scores, strict=True):
        assert_labels(result.labels, expected)


def test_results_carry_no_gradient_and_leave_predictions_alone() -> None:
    predictions = random_predictions(13)
    before = [t.clone() for t in predictions[:4]]
    for tensor in predictions[:3]:
        tensor.requires_grad_()
    for scores in postprocess.semantic_scores(predictions, OUTPUT_SIZES):
        assert not scores.requires_grad
    all_results(predictions, OUTPUT_SIZES)
    assert all(torch.equal(a, b) for a, b in zip(before, predictions[:4], strict=True))


def test_bad_input_is_named() -> None:
    predictions = random_predictions(15)
    pixels = PixelPredictions(torch.zeros(1, 1, 7, 10, 14), torch.tensor([[40, 56]]), INPUT_SIZE)
    things = [True] * 7
    with pytest.raises(TypeError, match=r"predictions: .* per-pixel models give no panoptic"):
        postprocess.panoptic(pixels, [(9, 9)], things, 0.8, 0.8)
    with pytest.raises(TypeError, match=r"predictions: .* per-pixel models give no instances"):
        postprocess.instances(pixels, [(9, 9)], things, 5)
    with pytest.raises(ValueError, match=r"order: .*got 'huggingface'"):
        postprocess.semantic(pixels, [(9, 9)], order="huggingface")
    with pytest.raises(ValueError, match="output_sizes: expected 4 sizes, got 1"):
        postprocess.semantic(predictions, [(9, 9)])
    with pytest.raises(ValueError, match="output_size: expected positive"):
        postprocess.semantic(predictions, [(9, 9)] * 3 + [(9, 0)])
    with pytest.raises(ValueError, match="is_thing: expected 7 flags, got 6"):
        postprocess.panoptic(predictions, OUTPUT_SIZES, things[1:], 0.8, 0.8)
    with pytest.raises(ValueError, match=r"overlap_threshold: expected 0\.\.1, got 1\.5"):
        postprocess.panoptic(predictions, OUTPUT_SIZES, things, 0.8, 1.5)
    with pytest.raises(ValueError, match="top_k: expected > 0, got 0"):
        postprocess.instances(predictions, OUTPUT_SIZES, things, 0)
    with pytest.raises(ValueError, match="valid_sizes: expected sizes within"):
        postprocess.semantic(predictions._replace(valid_sizes=torch.tensor([[41, 56]] * 4)), OUTPUT_SIZES)
