"""Average precision against hand-computed values and a plain implementation of COCO's 101-point AP."""

from __future__ import annotations

import json
import pickle
import sys

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.core.results import InstanceResult, SemanticResult
from maskformer_fast.evaluation import InstanceEvaluator, format_table
from maskformer_fast.output.formats import instances_to_coco
from maskformer_fast.structures import Example, pack_masks

coco_mask = pytest.importorskip("pycocotools.mask")
COCO = pytest.importorskip("pycocotools.coco").COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval
METADATA = Metadata("t", ("cat", "sky", "dog"), (True, False, True), (1, 2, 3), default_colors(3))
SIZE = (40, 50)


def box(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def example(*segments: tuple[int, np.ndarray] | tuple[int, np.ndarray, bool]) -> Example:
    """An example of segments (class, mask[, crowd])."""
    infos = [SegmentInfo(10 + i, s[0], METADATA.is_thing[s[0]], bool(s[2:] and s[2])) for i, s in enumerate(segments)]
    size = segments[0][1].shape if segments else SIZE
    return Example(np.zeros((*size, 3), np.uint8), infos,
                   masks=np.stack([s[1] for s in segments]) if segments else np.zeros((0, *SIZE), bool))


def result(*instances: tuple[int, float, np.ndarray]) -> InstanceResult:
    size = instances[0][2].shape if instances else SIZE
    masks = torch.from_numpy(np.stack([i[2] for i in instances]) if instances else np.zeros((0, *SIZE), bool))
    return InstanceResult(torch.tensor([i[0] for i in instances], dtype=torch.int64),
                          torch.tensor([i[1] for i in instances], dtype=torch.float32), pack_masks(masks),
                          torch.zeros(len(instances), 4), (size[0], size[1]))


def evaluate(*pairs: tuple[Example, InstanceResult]) -> dict:
    evaluator = InstanceEvaluator(METADATA)
    for truth, instances in pairs:
        evaluator.process(truth, instances)
    metrics = evaluator.evaluate()
    json.dumps(metrics, allow_nan=False)
    assert evaluator.evaluate() == metrics, "evaluating must not change the state"
    return metrics


def naive_ap(images: list[tuple[list[np.ndarray], list[tuple[float, np.ndarray]]]], threshold: float) -> float:
    """AP of one class: greedy matching by falling score, precision made monotone, mean over 101 recalls."""
    hits: list[tuple[float, bool]] = []
    total = 0
    for truth, instances in images:
        total += len(truth)
        free = list(range(len(truth)))
        for score, mask in sorted(instances, key=lambda f: -f[0]):
            overlaps = [((mask & truth[i]).sum() / (mask | truth[i]).sum(), i) for i in free]
            best = max(overlaps, default=(0.0, -1))
            hits.append((score, best[0] >= threshold))
            if best[0] >= threshold:
                free.remove(best[1])
    hits.sort(key=lambda h: -h[0])
    tp = np.cumsum([hit for _, hit in hits])
    points = []
    for recall in np.linspace(0, 1, 101):
        reached = [tp[j] / (j + 1) for j in range(len(hits)) if tp[j] / total >= recall]
        points.append(max(reached, default=0.0))
    return float(np.mean(points))


def test_perfect_results_have_an_ap_of_one() -> None:
    cats = [box(0, 0, 10, 10), box(5, 5, 45, 40)]  # 100 and 1400 pixels: small and medium, and they overlap
    dog = box(30, 0, 40, 5)
    metrics = evaluate((example((0, cats[0]), (0, cats[1]), (2, dog), (1, box(0, 30, 50, 40))),
                        result((0, 0.9, cats[0]), (0, 0.8, cats[1]), (2, 0.3, dog))))
    for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium"):
        assert metrics[key] == pytest.approx(1.0), key
    assert metrics["ap_large"] is None
    assert metrics["per_class_ap"] == {"cat": pytest.approx(1.0), "dog": pytest.approx(1.0)}, "stuff has no AP"


def test_ap_equals_hand_computed_values() -> None:
    # IoU 70/100 = 0.7 passes the thresholds 0.50 to 0.70, five of the ten. The dog is missed.
    truth = example((0, box(0, 0, 10, 10)), (2, box(20, 20, 30, 30)))
    metrics = evaluate((truth, result((0, 0.9, box(0, 0, 10, 7)))))
    assert metrics["per_class_ap"] == {"cat": pytest.approx(0.5), "dog": 0.0}
    assert (metrics["ap"], metrics["ap50"], metrics["ap75"]) == (pytest.approx(0.25), pytest.approx(0.5), 0.0)
    # A better scored false positive halves the precision everywhere.
    metrics = evaluate((example((0, box(0, 0, 10, 10))), result((0, 0.9, box(30, 30, 40, 40)),
                                                              (0, 0.5, box(0, 0, 10, 10)))))
    assert metrics["ap"] == pytest.approx(0.5)


def test_crowds_and_results_on_them_are_ignored() -> None:
    cat, crowd = box(0, 0, 10, 10), box(20, 0, 50, 40)
    inside = result((0, 0.9, box(22, 5, 30, 12)), (0, 0.5, cat))
    assert evaluate((example((0, cat), (0, crowd, True)), inside))["ap"] == pytest.approx(1.0)
    assert evaluate((example((0, cat), (0, crowd)), inside))["ap"] < 0.6
    assert evaluate((example((0, crowd, True)), inside))["ap"] is None


def test_images_without_objects_or_without_results() -> None:
    mask = box(0, 0, 10, 10)
    assert InstanceEvaluator(METADATA).evaluate()["ap"] is None
    metrics = evaluate((example(), result((0, 0.9, mask))))
    assert metrics["ap"] is None and metrics["per_class_ap"] == {"cat": None, "dog": None}
    metrics = evaluate((example((0, mask)), result()), (example(), result()))
    assert metrics["ap"] == metrics["ap50"] == metrics["ap_small"] == 0.0 and metrics["ap_large"] is None
    stuff = Metadata("t", ("sky",), (False,), (1,), default_colors(1))
    assert InstanceEvaluator(stuff).evaluate()["per_class_ap"] == {}


def test_area_of_the_data_set_decides_the_size_class() -> None:
    mask = box(0, 0, 10, 10)
    truth = example((0, mask))
    truth.segments = [SegmentInfo(10, 0, area=100_000)]
    metrics = evaluate((truth, result((0, 0.9, mask))))
    assert metrics["ap_small"] is None and metrics["ap_large"] == pytest.approx(1.0)


def test_truth_may_be_an_id_map() -> None:
    id_map = np.full(SIZE, VOID, dtype=np.int32)
    id_map[:10, :10], id_map[20:, 20:], id_map[:10, 20:] = 70_000, 3, 9
    truth = Example(np.zeros((*SIZE, 3), np.uint8),
                    [SegmentInfo(3, 2), SegmentInfo(70_000, 0), SegmentInfo(9, 1, is_thing=False)], id_map=id_map)
    metrics = evaluate((truth, result((0, 0.9, id_map == 70_000), (2, 0.9, id_map == 3))))
    assert metrics["ap"] == pytest.approx(1.0)


@settings(max_examples=25, deadline=None)
@hypothesis.example(seed=622309, images=4)  # a recall that equals a threshold but for rounding
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 4))
def test_ap_equals_a_plain_implementation_and_merged_parts(seed: int, images: int) -> None:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(12, 40)), int(rng.integers(12, 40)))
    scores = iter(rng.permutation(1000) / 1000)  # distinct: the order of ties is not defined
    single, merged = InstanceEvaluator(METADATA), InstanceEvaluator(METADATA)
    plain: dict[int, list] = {0: [], 2: []}
    for _ in range(images):
        truth, instances = [], []
        for _ in range(rng.integers(1, 5)):
            label, y, x = int(rng.choice([0, 2])), int(rng.integers(size[0] - 6)), int(rng.integers(size[1] - 6))
            truth.append((label, box(x, y, x + 6, y + 6, size)))
            for _ in range(rng.integers(0, 3)):
                dy, dx = (int(v) for v in rng.integers(0, 4, 2))
                wrong = int(rng.choice([0, 2])) if rng.random() < 0.2 else label
                instances.append((wrong, float(next(scores)), box(x + dx, y + dy, x + 6, y + 6, size)))
        instances.sort(key=lambda f: -f[1])
        predicted = result(*instances) if instances else InstanceResult(
            torch.zeros(0, dtype=torch.int64), torch.zeros(0),
            torch.zeros(0, size[0], (size[1] + 7) // 8, dtype=torch.uint8), torch.zeros(0, 4), size)
        for label, items in plain.items():
            items.append(([m for c, m in truth if c == label], [(s, m) for c, s, m in instances if c == label]))
        part = InstanceEvaluator(METADATA)
        for evaluator in (single, part):
            evaluator.process(example(*truth), predicted)
        merged.merge(pickle.loads(pickle.dumps(part)))
    metrics = single.evaluate()
    assert merged.evaluate() == metrics
    by_class = []
    for label, items in plain.items():
        present = any(masks for masks, _ in items)
        expected = float(np.mean([naive_ap(items, 0.5 + 0.05 * i) for i in range(10)])) if present else None
        got = metrics["per_class_ap"][METADATA.class_names[label]]
        assert got == (expected if expected is None else pytest.approx(expected, abs=1e-6))
        by_class += [] if expected is None else [expected]
    assert metrics["ap"] == pytest.approx(float(np.mean(by_class)), abs=1e-6)


def test_pycocotools_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    mask = box(0, 0, 10, 10)
    evaluate((example((0, mask)), result((0, 0.9, mask))))
    assert capsys.readouterr().out == ""


def test_bad_results_are_refused_and_not_counted_in_part() -> None:
    evaluator, mask = InstanceEvaluator(METADATA), box(0, 0, 10, 10)
    truth = example((0, mask))
    with pytest.raises(ValueError, match="expected thing classes, got 1"):
        evaluator.process(truth, result((1, 0.9, mask)))
    with pytest.raises(ValueError, match="expected thing classes, got 3"):
        evaluator.process(truth, result((3, 0.9, mask)))
    with pytest.raises(ValueError, match="finite"):
        evaluator.process(truth, result((0, float("nan"), mask)))
    with pytest.raises(ValueError, match=r"expected size \(40, 50\)"):
        evaluator.process(truth, result((0, 0.9, mask[:-1])))
    with pytest.raises(TypeError, match="expected InstanceResult"):
        evaluator.process(truth, SemanticResult(torch.zeros(SIZE, dtype=torch.uint8)))
    short = result((0, 0.9, mask))
    short.scores = short.scores[:0]
    with pytest.raises(ValueError, match="as many labels as scores"):
        evaluator.process(truth, short)
    narrow = result((0, 0.9, mask))
    narrow.masks = narrow.masks[..., :-1]
    with pytest.raises(ValueError, match="packed: expected"):
        evaluator.process(truth, narrow)
    assert not (evaluator.sizes or evaluator.truth or evaluator.results)


def test_missing_pycocotools_is_named_before_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycocotools", "pycocotools.coco", "pycocotools.cocoeval", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install pycocotools"):
        InstanceEvaluator(METADATA)


def test_table_has_a_dash_for_undefined_values() -> None:
    text = format_table("instance", evaluate((example((0, box(0, 0, 10, 10))), result())))
    assert text.splitlines()[0].split()[1] == "AP" and text.splitlines()[2].split().count("-") == 2
    assert text.splitlines()[-1].split() == ["|", "dog", "|", "-", "|"]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_pycocotools_gives_the_same_numbers_for_the_files_that_are_written(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:160, :160]
    truth = COCO()
    truth.dataset = {"images": [], "categories": [{"id": i} for i in METADATA.category_ids], "annotations": []}
    evaluator, written = InstanceEvaluator(METADATA), []
    for image in (1, 2, 3):
        masks = []  # diagonal strips, whose boxes have many times their area
        for _ in range(6):
            middle, half, width = rng.integers(20, 140, 2), rng.integers(8, 80), rng.integers(2, 12)
            near = np.abs(rows - middle[0] - (columns - middle[1])) < width
            masks.append(near & (np.abs(rows - middle[0]) <= half))
        objects = [(int(rng.choice([0, 2])), mask) for mask in masks]
        found = [(label, float(rng.random()), np.roll(mask, rng.integers(0, 3), 0)) for label, mask in objects]
        instances = result(*found)
        evaluator.process(example(*objects), instances)
        written += instances_to_coco(instances, image, METADATA)
        truth.dataset["images"].append({"id": image, "height": 160, "width": 160})
        for label, mask in objects:
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            number = len(truth.dataset["annotations"]) + 1
            truth.dataset["annotations"].append({
                "id": number, "image_id": image, "category_id": METADATA.category_ids[label], "segmentation": rle,
                "area": int(mask.sum()), "iscrowd": 0,
            })
    truth.createIndex()
    counted = COCOeval(truth, truth.loadRes(json.loads(json.dumps(written))), "segm")
    counted.evaluate()
    counted.accumulate()
    counted.summarize()
    ours = evaluator.evaluate()
    keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    assert [ours[key] for key in keys] == [None if value < 0 else pytest.approx(value) for value in counted.stats[:6]]
