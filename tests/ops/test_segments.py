"""Eager panoptic and instance inference against loops; both ways against rules by hand and official outputs.

test_segments_cpu.py compares the compiled operators with a float64 oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference_config import PanopticRule
from maskformer_fast.ops import resample as resample_module
from maskformer_fast.ops.resample import resample
from maskformer_fast.ops.segments import (
    PanopticSegments,
    instance_inference,
    instance_inference_eager,
    panoptic_inference,
    panoptic_inference_eager,
)
from tests.support.paths import ORACLES

ORACLE = ORACLES / "r50_coco_panoptic_tiny"
RULES = get_args(PanopticRule)
Panoptic = Callable[..., PanopticSegments]


@pytest.fixture(params=[panoptic_inference, panoptic_inference_eager])
def panoptic(request: pytest.FixtureRequest) -> Panoptic:
    return request.param


def naive_panoptic(masks, scores, categories, is_thing, threshold, rule="maskformer"):
    """One image, one query after the other: masks [N, H, W] probabilities -> id map, [(id, category, area)]."""
    id_map = np.full(masks.shape[1:], VOID)
    present = [q for q in range(len(masks)) if categories[q] != VOID]
    if not present:
        return id_map, []
    winner = np.array(present)[(np.float32(scores[present])[:, None, None] * masks[present]).argmax(0)]
    segments, merged = [], {}
    for query in present:
        won = winner == query
        own = (masks[query] * np.float32(scores[query]) if rule == "huggingface" else masks[query]) >= 0.5
        segment = won & own if rule == "mask2former" else won
        if segment.sum() == 0 or own.sum() == 0:
            continue
        ratio = won.sum() / own.sum()
        if not (ratio > threshold if rule == "huggingface" else ratio >= threshold):
            continue
        category = int(categories[query])
        if not is_thing[category] and category in merged:
            number = merged[category]
            segments[number - 1][2] += segment.sum()
        else:
            number = merged[category] = len(segments) + 1
            segments.append([number, category, segment.sum()])
        id_map[segment] = number
    return id_map, segments


def segments_of(actual, categories):
    """[(id, category, area)] of the first image."""
    table = {}
    columns = (actual.ids, categories, actual.areas)
    for number, category, area in zip(*(column[0].tolist() for column in columns), strict=True):
        if number != VOID:
            table.setdefault(number, [number, category, 0])[2] += area
    return [table[number] for number in sorted(table)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_panoptic_equals_loops(data: st.DataObject) -> None:
    h, w = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    size = (data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)))
    queries, classes = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = 4 * torch.randn(1, queries, h, w, generator=generator) - data.draw(st.sampled_from([0.0, 3.0]))
    scores = torch.rand(1, queries, generator=generator)
    categories = torch.randint(-1, classes, (1, queries), generator=generator)
    is_thing = torch.rand(classes, generator=generator) < 0.5
    threshold, rule = data.draw(st.sampled_from([0.0, 0.25, 0.8, 1.0])), data.draw(st.sampled_from(RULES))
    extent = (h * data.draw(st.floats(0.3, 1.0)), float(w))
    actual = panoptic_inference_eager(logits, scores, categories, is_thing, extent, size, threshold, rule)
    masks = resample(logits[0], extent, size).sigmoid().numpy()
    table = (scores[0].numpy(), categories[0].numpy(), is_thing.numpy())
    id_map, segments = naive_panoptic(masks, *table, threshold, rule)
    np.testing.assert_array_equal(actual.id_map[0].numpy(), id_map)
    assert segments_of(actual, categories) == segments
    assert actual.id_map.dtype == torch.int32
    if rule != "mask2former":
        assert actual.areas.sum() == (size[0] * size[1] if (categories >= 0).any() else 0)


@pytest.mark.skipif(not ORACLE.exists(), reason="official outputs are not here")
@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("thresholds", [(0.8, 0.8), (0.5, 0.8), (0.3, 0.0), (0.999999, 0.8)])
def test_panoptic_equals_official(panoptic: Panoptic, case: int, thresholds: tuple[float, float]) -> None:
    post = torch.load(ORACLE / "synth.pt", weights_only=True)["post"][case]
    things = torch.load(ORACLE / "case.pt", weights_only=True)["thing_ids"]
    is_thing = torch.zeros(post["mask_cls"].shape[1] - 1, dtype=torch.bool)
    is_thing[things] = True
    scores, categories = post["mask_cls"].softmax(-1).max(-1)
    kept = (categories < len(is_thing)) & (scores > thresholds[0])
    categories = categories.masked_fill(~kept, VOID)[None]
    extent = tuple(float(side) for side in post["mask_pred"].shape[1:])
    actual = panoptic(
        post["mask_pred"][None], scores[None], categories, is_thing, extent, tuple(post["size"]), thresholds[1]
    )
    official, info = post[f"panoptic@{thresholds[0]},{thresholds[1]}"]
    torch.testing.assert_close(actual.id_map[0], official.masked_fill(official == 0, VOID), rtol=0, atol=0)
    expected = [[s["id"], s["category_id"], int((official == s["id"]).sum())] for s in info]
    assert segments_of(actual, categories) == expected
    assert [s["isthing"] for s in info] == [bool(is_thing[s[1]]) for s in expected]


def test_ratio_equal_to_the_threshold_keeps_the_segment(panoptic: Panoptic) -> None:
    logits = torch.full((1, 2, 1, 10), -9.0)
    logits[0, 0, 0, :10], logits[0, 1, 0, :2] = 2.0, 8.0  # the first keeps 8 of 10 pixels
    arguments = (logits, torch.ones(1, 2), torch.tensor([[0, 1]]), torch.tensor([True, True]), (1, 10), (1, 10))
    assert panoptic(*arguments, 0.8).ids.tolist() == [[1, 2]]
    assert panoptic(*arguments, 0.81).ids.tolist() == [[VOID, 1]]
    assert panoptic(*arguments, 0.81).id_map[0, 0].tolist() == [1, 1] + [VOID] * 8


@pytest.mark.parametrize(
    "rule, threshold, expected",
    [
        # the first query wins 6 pixels: 4 of the 5 that it owns, and the last 2, which nobody owns; the second 4 of 4
        ("maskformer", 1.0, [1, 1, 1, 1, 2, 2, 2, 2, 1, 1]),
        ("mask2former", 1.0, [1, 1, 1, 1, 2, 2, 2, 2, VOID, VOID]),
        # 0.6 x sigmoid reaches 0.5 on 2 pixels, so 6 / 2; and 4 / 4 is not above 1
        ("huggingface", 1.0, [1, 1, 1, 1, VOID, VOID, VOID, VOID, 1, 1]),
        ("huggingface", 0.99, [1, 1, 1, 1, 2, 2, 2, 2, 1, 1]),
        ("maskformer", 1.25, [VOID] * 10),
    ],
)
def test_rules_by_hand(panoptic: Panoptic, rule: PanopticRule, threshold: float, expected: list[int]) -> None:
    """Rules as in the behaviour of both papers' published inference and of transformers' `compute_segments`."""
    logits = torch.tensor([[4.0, 4.0, 0.5, 0.5, 0.5, -9, -9, -9, -1, -1], [-9.0] * 4 + [5.0] * 4 + [-9.0] * 2])
    actual = panoptic(
        logits[None, :, None], torch.tensor([[0.6, 0.9]]), torch.tensor([[0, 1]]), torch.tensor([True, True]),
        (1, 10), (1, 10), threshold, rule,
    )  # fmt: skip
    assert actual.id_map[0, 0].tolist() == expected
    for number in set(expected) - {VOID}:
        assert actual.areas[actual.ids == number].tolist() == [expected.count(number)]


def test_mask2former_drops_a_segment_that_owns_nothing_of_what_it_won(panoptic: Panoptic) -> None:
    logits = torch.tensor([[[[-1.0, 1.0]], [[-9.0, 9.0]]]])  # the first wins where it has no mask, owns what it lost
    arguments = (logits, torch.ones(1, 2), torch.tensor([[0, 1]]), torch.tensor([True, True]), (1, 2), (1, 2), 0.8)
    assert panoptic(*arguments, "maskformer").id_map.tolist() == [[[1, 2]]]
    actual = panoptic(*arguments, "mask2former")
    assert actual.id_map.tolist() == [[[VOID, 1]]] and actual.ids.tolist() == [[VOID, 1]]


def test_stuff_merges_into_the_first_segment_and_things_do_not(panoptic: Panoptic) -> None:
    logits = torch.full((1, 4, 1, 4), -9.0)
    logits[0, range(4), 0, range(4)] = 9.0
    categories, is_thing = torch.tensor([[1, 0, 1, 0]]), torch.tensor([True, False])
    actual = panoptic(logits, torch.ones(1, 4), categories, is_thing, (1, 4), (1, 4), 0.5)
    assert actual.id_map.tolist() == [[[1, 2, 1, 3]]] and actual.ids.tolist() == [[1, 2, 1, 3]]


@pytest.mark.parametrize("queries", [0, 3])
def test_no_query_kept_is_all_void(panoptic: Panoptic, queries: int) -> None:
    actual = panoptic(
        torch.randn(2, queries, 4, 5), torch.rand(2, queries), torch.full((2, queries), VOID), torch.tensor([True]),
        (4, 5), (9, 7), 0.8,
    )  # fmt: skip
    assert actual.id_map.shape == (2, 9, 7) and (actual.id_map == VOID).all() and (actual.ids == VOID).all()
    assert actual.areas.shape == (2, queries)


def naive_instance(logits, extent, size):
    up = resample(logits, extent, size).numpy()
    for plane in up:
        mask = plane > 0
        packed = np.packbits(mask, axis=1, bitorder="little")
        if not mask.any():
            yield packed, 0, [0, 0, 0, 0], 0.0
            continue
        y, x = np.nonzero(mask)
        score = (1 / (1 + np.exp(-plane[mask].astype(np.float64)))).sum() / (mask.sum() + 1e-6)
        yield packed, mask.sum(), [x.min(), y.min(), x.max() + 1, y.max() + 1], score


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_instances_equal_loops(data: st.DataObject) -> None:
    h, w = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 10))
    size = (data.draw(st.integers(1, 35)), data.draw(st.integers(1, 35)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    batch, queries = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 6))
    logits = 3 * torch.randn(batch, queries, h, w, generator=generator) - data.draw(st.sampled_from([0.0, 5.0]))
    extent = (h * 0.77, float(w))
    actual = instance_inference_eager(logits, extent, size)
    assert actual.masks.shape == (batch, queries, size[0], (size[1] + 7) // 8)
    for image in range(batch):
        for query, (packed, area, box, score) in enumerate(naive_instance(logits[image], extent, size)):
            np.testing.assert_array_equal(actual.masks[image, query].numpy(), packed)
            assert actual.areas[image, query] == area
            assert actual.boxes[image, query].tolist() == box
            assert actual.scores[image, query].item() == pytest.approx(score, abs=1e-5)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 6, 9, 8, generator=generator)
    scores, categories = torch.rand(2, 6, generator=generator), torch.randint(0, 3, (2, 6), generator=generator)
    things = torch.tensor([True, False, True])

    def run():
        yield from panoptic_inference_eager(logits, scores, categories, things, (8.2, 7.9), (31, 29), 0.3)
        yield from instance_inference_eager(logits, (8.2, 7.9), (31, 29))

    whole = list(run())
    monkeypatch.setattr(resample_module, "CPU_TILE_BYTES", 1)
    for expected, got in zip(whole, run(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_half_precision_masks_are_resampled_in_float32() -> None:
    logits = torch.randn(1, 5, 8, 8).bfloat16()
    expected = F.interpolate(logits.float(), size=(32, 32), mode="bilinear", align_corners=False)[0] > 0
    actual = instance_inference(logits, (8, 8), (32, 32))
    bits = np.unpackbits(actual.masks[0].numpy(), axis=-1, bitorder="little")
    assert (bits != expected.numpy()).mean() < 1e-3


@pytest.mark.parametrize(
    "change, error, name",
    [
        ({"mask_logits": torch.zeros(2, 4, 4)}, ValueError, "mask_logits"),
        ({"scores": torch.zeros(1, 3)}, ValueError, "scores"),
        ({"categories": torch.zeros(1, 2)}, TypeError, "categories"),
        ({"is_thing": torch.zeros(3)}, TypeError, "is_thing"),
        ({"extent": (9, 4)}, ValueError, "extent"),
        ({"output_size": (0, 4)}, ValueError, "output_size"),
        ({"rule": "detectron2"}, ValueError, "rule"),
    ],
)
def test_bad_input_is_named(panoptic: Panoptic, change, error, name) -> None:
    arguments = {
        "mask_logits": torch.zeros(1, 2, 4, 4), "scores": torch.ones(1, 2), "extent": (4, 4), "output_size": (8, 8),
        "categories": torch.zeros(1, 2, dtype=torch.int64), "is_thing": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    with pytest.raises(error, match=rf"{name}: expected .*, got "):
        panoptic(**{**arguments, **change}, overlap_threshold=0.8)
