"""mIoU and its companions against hand-computed values and a pixel loop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.core.results import PanopticResult, SemanticResult
from maskformer_fast.evaluation import SemanticEvaluator, build_evaluator, format_table
from maskformer_fast.structures import Example


def metadata(k: int) -> Metadata:
    return Metadata("t", tuple(f"c{i}" for i in range(k)), (True,) * k, tuple(range(k)), default_colors(k))


def example(labels: np.ndarray) -> Example:
    classes = [int(c) for c in np.unique(labels) if c != VOID]
    image = np.zeros((*labels.shape, 3), dtype=np.uint8)
    return Example(image, [SegmentInfo(c, c) for c in classes], id_map=labels.astype(np.int32))


def result(labels: np.ndarray, dtype: torch.dtype = torch.uint8) -> SemanticResult:
    return SemanticResult(torch.from_numpy(labels).to(dtype))


def naive(pairs: list[tuple[np.ndarray, np.ndarray]], k: int) -> dict[str, float | None]:
    """Metrics from their definitions, by loops over pixels."""
    pixels = [(int(t), int(p)) for truth, predicted in pairs
              for t, p in zip(truth.ravel(), predicted.ravel(), strict=True) if t != VOID]
    iou, recall, weighted = [], [], 0.0
    for c in range(k):
        both = sum(t == c and p == c for t, p in pixels)
        either = sum(t == c or p == c for t, p in pixels)
        of_truth = sum(t == c for t, _ in pixels)
        if either:
            iou.append(both / either)
            weighted += of_truth / len(pixels) * both / either
        if of_truth:
            recall.append(both / of_truth)
    if not pixels:
        return dict.fromkeys(("miou", "mean_accuracy", "pixel_accuracy", "fwiou"))
    return {"miou": sum(iou) / len(iou), "mean_accuracy": sum(recall) / len(recall),
            "pixel_accuracy": sum(t == p for t, p in pixels) / len(pixels), "fwiou": weighted}


def test_metrics_equal_hand_computed_values() -> None:
    evaluator = SemanticEvaluator(metadata(4))
    truth = np.array([[0, 0, 1], [1, VOID, 0]])
    predicted = np.array([[0, 1, 1], [2, 3, 0]])
    evaluator.process(example(truth), result(predicted))
    metrics = evaluator.evaluate()
    # 0: hit 2 of union 3. 1: hit 1 of union 3. 2: predicted once, never true. 3: only on void, so nowhere.
    assert metrics["per_class_iou"] == {"c0": pytest.approx(2 / 3), "c1": pytest.approx(1 / 3), "c2": 0.0, "c3": None}
    assert metrics["miou"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert metrics["mean_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["pixel_accuracy"] == pytest.approx(3 / 5)
    assert metrics["fwiou"] == pytest.approx(3 / 5 * 2 / 3 + 2 / 5 * 1 / 3)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 7), height=st.integers(1, 9), width=st.integers(1, 9),
       images=st.integers(1, 3), void=st.sampled_from([0.0, 0.3, 1.0]))
def test_metrics_equal_pixel_loops_and_merged_parts(
    seed: int, k: int, height: int, width: int, images: int, void: float
) -> None:
    rng = np.random.default_rng(seed)
    single, merged = SemanticEvaluator(metadata(k)), SemanticEvaluator(metadata(k))
    pairs = []
    for _ in range(images):
        truth = rng.integers(0, k, (height, width))
        truth[rng.random(truth.shape) < void] = VOID
        predicted = np.where(rng.random(truth.shape) < 0.5, truth.clip(0), rng.integers(0, k, truth.shape))
        pairs.append((truth, predicted))
        single.process(example(truth), result(predicted, torch.int16))
        part = SemanticEvaluator(metadata(k))
        part.process(example(truth), result(predicted))
        merged.merge(part)
    metrics = single.evaluate()
    assert merged.evaluate() == metrics
    json.dumps(metrics, allow_nan=False)
    for key, expected in naive(pairs, k).items():
        assert metrics[key] == (None if expected is None else pytest.approx(expected)), key


def test_later_masks_cover_earlier_ones_and_classes_go_beyond_255() -> None:
    evaluator = SemanticEvaluator(metadata(300))
    masks = np.zeros((2, 2, 3), dtype=bool)
    masks[0, :, :2] = masks[1, 0] = True  # the later one covers
    truth = Example(np.zeros((2, 3, 3), np.uint8), [SegmentInfo(7, 299), SegmentInfo(3, 256)], masks=masks)
    evaluator.process(truth, result(np.array([[256, 256, 0], [299, 299, 299]]), torch.int16))
    per_class = evaluator.evaluate()["per_class_iou"]
    assert per_class["c256"] == pytest.approx(2 / 3) and per_class["c299"] == 1.0 and per_class["c0"] == 0.0


def test_metrics_are_undefined_without_images_and_after_a_reset() -> None:
    evaluator = build_evaluator("semantic", metadata(2))
    evaluator.process(example(np.array([[0, 1]])), result(np.array([[0, 1]])))
    assert evaluator.evaluate()["miou"] == 1.0
    evaluator.reset()
    metrics = evaluator.evaluate()
    assert metrics["miou"] is None and metrics["per_class_iou"] == {"c0": None, "c1": None}


def test_bad_results_are_refused_and_not_counted_in_part() -> None:
    evaluator, truth = SemanticEvaluator(metadata(2)), example(np.array([[0, 1]]))
    truth.path = "a/b.png"
    with pytest.raises(ValueError, match=r"result: expected size \(1, 2\).*got \(2, 2\).*a/b.png"):
        evaluator.process(truth, result(np.zeros((2, 2))))
    with pytest.raises(ValueError, match=r"classes in 0..1, got 0..2"):
        evaluator.process(truth, result(np.array([[0, 2]])))
    with pytest.raises(ValueError, match=r"got -1..0"):
        evaluator.process(truth, result(np.array([[0, VOID]]), torch.int16))
    with pytest.raises(TypeError, match="expected integers, got float32"):
        evaluator.process(truth, result(np.array([[0, 1]]), torch.float32))
    with pytest.raises(TypeError, match="expected SemanticResult, got PanopticResult"):
        evaluator.process(truth, PanopticResult(torch.full((1, 2), VOID)))
    with pytest.raises(ValueError, match=r"categories in 0..1, got 5"):
        evaluator.process(example(np.array([[0, 5]])), result(np.array([[0, 1]])))
    with pytest.raises(ValueError, match="expected the classes"):
        evaluator.merge(SemanticEvaluator(metadata(3)))
    with pytest.raises(TypeError, match="expected SemanticEvaluator, got PanopticEvaluator"):
        evaluator.merge(build_evaluator("panoptic", metadata(2)))
    with pytest.raises(ValueError, match="task"):
        build_evaluator("depth", metadata(2))  # type: ignore[arg-type]
    assert evaluator.confusion.sum() == 0, "a refused image must not be counted in part"


def test_classes_of_one_name_have_metrics_of_their_own() -> None:
    names = Metadata("t", ("wall", "door", "wall"), (False,) * 3, (0, 1, 2), default_colors(3))
    evaluator = SemanticEvaluator(names)
    evaluator.process(example(np.array([[0, 1, 2]])), result(np.array([[0, 1, 1]])))
    assert evaluator.evaluate()["per_class_iou"] == {"wall #0": 1.0, "door": 0.5, "wall #2": 0.0}


def test_table_has_percentages_and_aligned_rows() -> None:
    evaluator = SemanticEvaluator(metadata(3))
    evaluator.process(example(np.array([[0, 0, 1, 1]])), result(np.array([[0, 0, 1, 0]])))
    lines = format_table("semantic", evaluator.evaluate()).splitlines()
    assert lines[0].split() == ["|", "mIoU", "|", "fwIoU", "|", "mAcc", "|", "pAcc", "|"]
    assert lines[2].split() == ["|", "58.33", "|", "58.33", "|", "75.00", "|", "75.00", "|"]
    assert [line.split() for line in lines[-3:]] == [
        ["|", "c0", "|", "66.67", "|"], ["|", "c1", "|", "50.00", "|"], ["|", "c2", "|", "-", "|"]]
    assert len({len(line) for line in lines[4:]}) == 1, "rows of a table line up"
    with pytest.raises(ValueError, match="'pq'"):
        format_table("panoptic", evaluator.evaluate())
    assert not math.isnan(evaluator.evaluate()["miou"])
