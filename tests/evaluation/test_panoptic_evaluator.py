"""Panoptic quality against hand-computed values and a set-of-pixels implementation of the definition."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.core.results import PanopticResult, SemanticResult
from maskformer_fast.evaluation import PanopticEvaluator, format_table
from maskformer_fast.structures import Example
from tests.support.paths import SHARED

SAMPLE = SHARED / "data/coco_panoptic_sample"
THINGS = (True, False, True, False)
METADATA = Metadata("t", ("cat", "sky", "dog", "sea"), THINGS, (1, 2, 3, 4), default_colors(4))


def example(id_map: np.ndarray, *segments: tuple[int, int] | tuple[int, int, bool]) -> Example:
    """An example of segments (id, class[, crowd])."""
    infos = [SegmentInfo(s[0], s[1], THINGS[s[1]], bool(s[2:] and s[2])) for s in segments]
    return Example(np.zeros((*id_map.shape, 3), np.uint8), infos, id_map=id_map.astype(np.int32))


def result(id_map: np.ndarray, *segments: tuple[int, int]) -> PanopticResult:
    return PanopticResult(torch.from_numpy(id_map.astype(np.int32)),
                          [SegmentInfo(i, c, THINGS[c]) for i, c in segments])


def pixels(id_map: np.ndarray, segment_id: int) -> set[int]:
    return {i for i, value in enumerate(id_map.ravel().tolist()) if value == segment_id}


def naive(pairs: list[tuple[Example, PanopticResult]], metadata: Metadata) -> dict[str, Any]:
    """Panoptic quality by its definition, pair by pair of segments, over sets of pixels."""
    counts = [[0.0, 0, 0, 0] for _ in metadata.class_names]  # IoU sum, TP, FP, FN
    for truth, predicted in pairs:
        assert truth.id_map is not None
        true_sets = {s.id: pixels(truth.id_map, s.id) for s in truth.segments}
        void = set(range(truth.id_map.size)).difference(*true_sets.values())
        predicted_sets = {s.id: pixels(predicted.id_map.numpy(), s.id) for s in predicted.segments}
        matched_true, matched_predicted = set(), set()
        for t, f in itertools.product(truth.segments, predicted.segments):
            if t.is_crowd or t.category != f.category:
                continue
            both = len(true_sets[t.id] & predicted_sets[f.id])
            either = len((true_sets[t.id] | predicted_sets[f.id]) - (void - true_sets[t.id]))
            if either and both / either > 0.5:
                assert t.id not in matched_true and f.id not in matched_predicted
                matched_true.add(t.id)
                matched_predicted.add(f.id)
                counts[t.category][0] += both / either
                counts[t.category][1] += 1
        for t in truth.segments:
            counts[t.category][3] += not (t.is_crowd or t.id in matched_true or not true_sets[t.id])
        for f in predicted.segments:
            crowds = [true_sets[t.id] for t in truth.segments if t.is_crowd and t.category == f.category]
            excused = predicted_sets[f.id] & void.union(*crowds)
            counts[f.category][2] += not (f.id in matched_predicted or len(excused) / len(predicted_sets[f.id]) > 0.5)

    def mean(group: list[list[float]]) -> tuple[float | None, float | None, float | None]:
        used = [(c[0], c[1], c[1] + c[2] / 2 + c[3] / 2) for c in group if sum(c[1:])]
        if not used:
            return None, None, None
        n = len(used)
        return (sum(s / w for s, _, w in used) / n, sum(s / tp if tp else 0.0 for s, tp, _ in used) / n,
                sum(tp / w for _, tp, w in used) / n)

    metrics: dict[str, Any] = {}
    for suffix, keep in (("", (True, False)), ("_things", (True,)), ("_stuff", (False,))):
        group = [c for c, thing in zip(counts, metadata.is_thing, strict=True) if thing in keep]
        metrics.update(zip(("pq" + suffix, "sq" + suffix, "rq" + suffix), mean(group), strict=True))
    metrics["per_class_pq"] = {n: mean([c])[0] for n, c in zip(metadata.class_names, counts, strict=True)}
    return metrics


def check_against_naive(pairs: list[tuple[Example, PanopticResult]], metadata: Metadata = METADATA) -> dict[str, Any]:
    evaluator = PanopticEvaluator(metadata)
    for truth, predicted in pairs:
        evaluator.process(truth, predicted)
    metrics = evaluator.evaluate()
    json.dumps(metrics, allow_nan=False)
    for key, expected in naive(pairs, metadata).items():
        assert metrics[key] == (pytest.approx(expected) if expected is not None else None), key
    return metrics


def test_pq_equals_hand_computed_values() -> None:
    evaluator = PanopticEvaluator(METADATA)
    truth = np.repeat([[1, 1, 1, 1, 2, 2, 2, 2, VOID, VOID]], 2, axis=0)
    predicted = np.repeat([[5, 5, 5, 6, 6, 7, 7, 7, 7, 8]], 2, axis=0)
    # cat 1 - 5: IoU 6/8. 6: a dog nowhere right, FP. sky 2 - 7: void leaves the union, 6/8. 8: all on void, excused.
    evaluator.process(example(truth, (1, 0), (2, 1)), result(predicted, (5, 0), (6, 2), (7, 1), (8, 0)))
    metrics = evaluator.evaluate()
    assert metrics["per_class_pq"] == {"cat": 0.75, "sky": 0.75, "dog": 0.0, "sea": None}
    assert metrics["per_class_rq"] == {"cat": 1.0, "sky": 1.0, "dog": 0.0, "sea": None}
    assert (metrics["pq"], metrics["sq"], metrics["rq"]) == tuple(pytest.approx(v) for v in (0.5, 0.5, 2 / 3))
    assert metrics["pq_things"] == pytest.approx(0.375) and metrics["pq_stuff"] == 0.75


def test_an_iou_of_one_half_is_no_match_and_half_void_is_an_error() -> None:
    truth = np.array([[1, 1, VOID, VOID]])
    exactly_half = check_against_naive([(example(truth, (1, 0)), result(np.array([[3, VOID, VOID, VOID]]), (3, 0)))])
    assert exactly_half["rq"] == 0.0, "IoU of exactly 0.5 is no match"
    evaluator = PanopticEvaluator(METADATA)
    evaluator.process(example(np.array([[1, 1, VOID, VOID]]), (1, 0)), result(np.array([[3, 3, 3, 3]]), (3, 2)))
    assert evaluator.fp.tolist() == [0, 0, 1, 0], "half on void is still an error"


def test_crowds_are_not_missed_and_excuse_results_on_them() -> None:
    truth = np.array([[1, 1, 1, 1, 2, 2, 3, 3]])
    evaluator = PanopticEvaluator(METADATA)
    # 5 lies on its class's crowd: excused. 6 lies on it with another class: an error. Neither crowd is missed.
    evaluator.process(example(truth, (1, 0, True), (2, 2), (3, 1)),
                      result(np.array([[5, 5, 6, 6, VOID, VOID, 7, 7]]), (5, 0), (6, 2), (7, 1)))
    assert evaluator.tp.tolist() == [0, 1, 0, 0]
    assert evaluator.fp.tolist() == [0, 0, 1, 0]
    assert evaluator.fn.tolist() == [0, 0, 1, 0]
    # A perfect cover of a crowd is no match either.
    evaluator.reset()
    evaluator.process(example(np.array([[1, 1]]), (1, 0, True)), result(np.array([[9, 9]]), (9, 0)))
    assert evaluator.evaluate()["pq"] is None


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Example, PanopticResult]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(1, 10), st.integers(1, 12)))
    count = draw(st.integers(0, 6))
    # Blocks of rows give segments large enough to match; ids are far apart, as COCO's.
    ids = np.sort(rng.choice(2**24, count, replace=False)).astype(np.int64)
    if draw(st.booleans()):
        ids = np.arange(count) + draw(st.integers(0, 2))
    values = np.append(ids, VOID)
    truth = values[np.sort(rng.integers(0, count + 1, shape), axis=draw(st.integers(0, 1)))]
    segments = [SegmentInfo(int(i), c := int(rng.integers(4)), THINGS[c], bool(rng.random() < 0.2)) for i in ids]
    order = rng.permutation(count)
    predicted_ids = rng.permutation(np.arange(1, count + 4))
    mapped = {int(i): int(f) for i, f in zip(values, [*predicted_ids[:count], VOID], strict=True)}
    predicted = np.vectorize(mapped.__getitem__, otypes=[np.int64])(truth) if count else truth.copy()
    noise = rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.3, 0.8]))
    predicted[noise] = rng.choice(np.append(predicted_ids, VOID), int(noise.sum()))
    kept = {int(mapped[s.id]): s.category for s in segments}
    classes = [(int(i), kept[int(i)] if int(i) in kept and rng.random() < 0.8 else int(rng.integers(4)))
               for i in np.unique(predicted) if i != VOID]
    image = np.zeros((*shape, 3), np.uint8)
    return Example(image, [segments[i] for i in order], id_map=truth.astype(np.int32)), result(predicted, *classes)


@settings(max_examples=150, deadline=None)
@given(st.lists(pairs(), min_size=1, max_size=3))
def test_pq_equals_the_definition_and_merged_parts(images: list[tuple[Example, PanopticResult]]) -> None:
    metrics = check_against_naive(images)
    merged = PanopticEvaluator(METADATA)
    for truth, predicted in images:
        part = PanopticEvaluator(METADATA)
        part.process(truth, predicted)
        merged.merge(part)
    for key, value in merged.evaluate().items():
        assert value == (pytest.approx(metrics[key]) if value is not None else metrics[key])


@settings(max_examples=30, deadline=None)
@given(pairs())
def test_the_truth_as_a_result_has_a_pq_of_one(pair: tuple[Example, PanopticResult]) -> None:
    truth, _ = pair
    assert truth.id_map is not None
    present = [s for s in truth.segments if not s.is_crowd and (truth.id_map == s.id).any()]
    own = np.where(np.isin(truth.id_map, [s.id for s in present]), truth.id_map, VOID)
    evaluator = PanopticEvaluator(METADATA)
    evaluator.process(truth, PanopticResult(torch.from_numpy(own), present))
    evaluator.process(truth, PanopticResult(torch.from_numpy(own), present))  # the same image twice
    metrics = evaluator.evaluate()
    assert metrics["pq"] == metrics["sq"] == metrics["rq"] == (1.0 if present else None)
    assert evaluator.tp.sum() == 2 * len(present)


def test_empty_segments_and_unlisted_ids_are_void() -> None:
    void = np.full((3, 3), VOID)
    check_against_naive([(example(void), result(void))])
    ones = np.ones((3, 3))
    assert check_against_naive([(example(void), result(ones, (1, 0)))])["pq"] is None  # all on void
    assert check_against_naive([(example(ones, (1, 0)), result(void))])["pq"] == 0.0
    # An id the truth does not list is void; a listed segment without pixels is no segment.
    assert check_against_naive([(example(ones, (2, 0)), result(ones, (1, 0)))])["pq"] is None


def test_bad_results_are_refused_and_not_counted_in_part() -> None:
    evaluator, ones = PanopticEvaluator(METADATA), np.ones((2, 2))
    truth = example(ones, (1, 0))
    with pytest.raises(ValueError, match=r"result: id_map: expected ids of listed segments or -1, got \[1\]"):
        evaluator.process(truth, result(ones))
    with pytest.raises(ValueError, match=r"expected pixels in id_map for every segment, got none for ids \[2\]"):
        evaluator.process(truth, result(ones, (1, 0), (2, 1)))
    with pytest.raises(ValueError, match="distinct ids, got 1 twice"):
        evaluator.process(truth, result(ones, (1, 0), (1, 1)))
    with pytest.raises(ValueError, match=r"expected size \(2, 2\)"):
        evaluator.process(truth, result(np.ones((2, 3)), (1, 0)))
    with pytest.raises(TypeError, match="expected PanopticResult, got SemanticResult"):
        evaluator.process(truth, SemanticResult(torch.zeros(2, 2, dtype=torch.uint8)))
    with pytest.raises(TypeError, match="integer tensor"):
        evaluator.process(truth, PanopticResult(torch.ones(2, 2), [SegmentInfo(1, 0)]))
    with pytest.raises(ValueError, match=r"categories in 0..3, got 4"):
        evaluator.process(truth, PanopticResult(torch.ones(2, 2, dtype=torch.int32), [SegmentInfo(1, 4)]))
    overlapping = Example(truth.image, [SegmentInfo(1, 0)], masks=np.ones((1, 2, 2), bool))
    with pytest.raises(ValueError, match="truth without overlap"):
        evaluator.process(overlapping, result(ones, (1, 0)))
    assert not (evaluator.tp.any() or evaluator.fp.any() or evaluator.fn.any())


def test_table_has_every_figure() -> None:
    evaluator = PanopticEvaluator(METADATA)
    evaluator.process(example(np.ones((2, 2)), (1, 0)), result(np.ones((2, 2)), (1, 0)))
    text = format_table("panoptic", evaluator.evaluate())
    assert text.splitlines()[2].count("100.00") == 6 and "PQ stuff" in text
    assert text.splitlines()[-4].split() == ["|", "cat", *["|", "100.00"] * 3, "|"]


def load_sample() -> tuple[Metadata, list[Example]]:
    folder = SAMPLE / "annotations"
    truth = json.loads((folder / "panoptic_val2017.json").read_text())
    classes = json.loads((folder / "panoptic_coco_categories.json").read_text())
    index = {c["id"]: i for i, c in enumerate(classes)}
    metadata = Metadata("coco", tuple(c["name"] for c in classes), tuple(bool(c["isthing"]) for c in classes),
                        tuple(index), default_colors(len(classes)))
    examples = []
    for annotation in truth["annotations"]:
        rgb = np.array(Image.open(folder / "panoptic_val2017" / annotation["file_name"])).astype(np.int32)
        ids = rgb @ np.array([1, 256, 65536], dtype=np.int32)
        segments = [SegmentInfo(s["id"], (c := index[s["category_id"]]), metadata.is_thing[c], bool(s["iscrowd"]))
                    for s in annotation["segments_info"]]
        examples.append(Example(rgb.astype(np.uint8), segments, id_map=np.where(ids == 0, VOID, ids)))
    return metadata, examples


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"{SAMPLE} is not there")
@pytest.mark.parametrize("shift", [0, 3, 17])
def test_pq_equals_the_definition_on_a_coco_sample(shift: int) -> None:
    metadata, examples = load_sample()
    images = []
    for truth in examples:
        assert truth.id_map is not None
        moved = np.roll(truth.id_map, shift, axis=1)
        kept = [s for s in truth.segments if not s.is_crowd]
        moved[~np.isin(moved, [s.id for s in kept])] = VOID
        images.append((truth, PanopticResult(torch.from_numpy(moved.astype(np.int32)), kept)))
    metrics = check_against_naive(images, metadata)
    assert metrics["pq"] == 1.0 if shift == 0 else 0.05 < metrics["pq"] < 0.95
