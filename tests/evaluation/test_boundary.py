"""Boundary IoU and boundary AP against a naive implementation by SciPy's erosion."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.core.results import InstanceResult, SemanticResult
from maskformer_fast.evaluation.boundary import (
    BoundaryInstanceEvaluator,
    BoundarySemanticEvaluator,
    _boundary_rle,
    boundary_width,
    interior,
)
from maskformer_fast.evaluation.instance import InstanceEvaluator
from maskformer_fast.structures import Example, pack_masks

METADATA = Metadata("m", ("sky", "car", "bus", "cat"), (False, True, True, True), (0, 1, 2, 3), ((0, 0, 0),) * 4)


def naive_boundary(mask, width):
    """Part of a mask that ``width`` erosions by a 3x3 square take away; beyond the image there is no mask."""
    eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=width, border_value=0)
    return mask & ~eroded


def blobs(rng, size, classes, smooth=2.0):
    """Random label map of smooth regions."""
    fields = ndimage.gaussian_filter(rng.standard_normal((classes, *size)), (0, smooth, smooth))
    return fields.argmax(0)


def test_the_width_is_two_percent_of_the_diagonal():
    assert boundary_width((480, 640)) == 16 and boundary_width((5, 5)) == 1
    assert boundary_width((1000, 2000)) == round(0.02 * math.sqrt(5e6))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (7, 7), (31, 47), (64, 33)])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 16])
def test_interiors_are_those_of_erosion_by_class(size, width):
    labels = blobs(np.random.default_rng(width), size, 4, smooth=4.0)
    expected = np.zeros(size, dtype=bool)
    for label in range(4):
        expected |= (labels == label) & ~naive_boundary(labels == label, width)
    np.testing.assert_array_equal(interior(labels, width), expected)
    np.testing.assert_array_equal(interior(labels == 1, width) & (labels == 1),
                                  (labels == 1) & ~naive_boundary(labels == 1, width))


def semantic_examples(count, size=(90, 130)):
    rng = np.random.default_rng(5)
    for _ in range(count):
        truth = blobs(rng, size, 3, 9.0).astype(np.int32)
        labels = np.where(rng.random(size) < 0.02, rng.integers(0, 4, size), np.roll(truth, 1, 1))
        truth[blobs(rng, size, 6, 8.0) == 0] = VOID
        segments = [SegmentInfo(label, label, is_thing=bool(label)) for label in range(3)]
        image = np.zeros((*size, 3), dtype=np.uint8)
        yield Example(image, segments, truth), SemanticResult(torch.from_numpy(labels.astype(np.int64)))


def test_semantic_boundary_iou_is_that_of_erosion_and_merges():
    evaluator, first, second = (BoundarySemanticEvaluator(METADATA) for _ in range(3))
    both, either = np.zeros(4), np.zeros(4)
    for number, (example, result) in enumerate(semantic_examples(5)):
        evaluator.process(example, result)
        (first if number < 2 else second).process(example, result)
        truth, labels = example.id_map, result.labels.numpy()
        width = max(1, round(0.02 * math.hypot(90, 130)))
        for label in range(4):
            a = naive_boundary(truth == label, width)
            b = naive_boundary(labels == label, width) & (truth != VOID)
            both[label] += (a & b).sum()
            either[label] += (a | b).sum()
    got = evaluator.evaluate()
    expected = both / either
    assert list(got["per_class_boundary_iou"].values()) == pytest.approx(expected.tolist())
    assert got["boundary_iou"] == pytest.approx(expected.mean()) and 0.05 < got["boundary_iou"] < 0.95
    first.merge(second)
    assert first.evaluate() == got
    evaluator.reset()
    assert evaluator.evaluate()["boundary_iou"] is None


def test_the_boundary_of_an_encoded_mask_is_that_of_erosion():
    rng = np.random.default_rng(2)
    masks = [blobs(rng, (40, 61), 2, 3.0) > 0, np.ones((40, 61), bool), np.zeros((40, 61), bool)]
    masks.append(np.zeros((40, 61), bool))
    masks[-1][0:9, 50:61] = True  # in a corner of the image
    tools = coco_tools()
    for mask in masks:
        for width in (1, 3):
            rle = tools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            got = tools.mask.decode(_boundary_rle(rle, width)).astype(bool)
            np.testing.assert_array_equal(got, naive_boundary(mask, width))


def instance_examples(count, size=(70, 90)):
    rng = np.random.default_rng(8)
    for _ in range(count):
        number = int(rng.integers(1, 6))
        masks = np.stack([blobs(rng, size, 3, 7.0) == 0 for _ in range(number)])
        segments = [SegmentInfo(n, int(rng.integers(1, 4)), is_crowd=rng.random() < 0.15) for n in range(number)]
        results = [ndimage.binary_dilation(np.roll(mask, int(rng.integers(3)), 0), iterations=int(rng.integers(1, 3)))
                   for mask in masks] + [blobs(rng, size, 3, 7.0) == 0]
        labels = [segment.category if rng.random() < 0.8 else int(rng.integers(1, 4)) for segment in segments] + [1]
        order = torch.randperm(len(results), generator=torch.Generator().manual_seed(number))
        packed = pack_masks(torch.from_numpy(np.stack(results))[order])
        scores = torch.from_numpy(rng.random(len(results))).float()
        boxes = torch.zeros(len(results), 4)  # of no importance to AP
        result = InstanceResult(torch.tensor(labels)[order], scores.sort(descending=True)[0], packed, boxes, size)
        yield Example(np.zeros((*size, 3), np.uint8), segments, masks=masks), result


def test_boundary_ap_is_coco_ap_with_the_lesser_iou(monkeypatch):
    evaluator, plain, first, second = (BoundaryInstanceEvaluator(METADATA), InstanceEvaluator(METADATA),
                                       BoundaryInstanceEvaluator(METADATA), BoundaryInstanceEvaluator(METADATA))
    for number, (example, result) in enumerate(instance_examples(8)):
        for target in (evaluator, plain, first if number < 3 else second):
            target.process(example, result)
    got = evaluator.evaluate()
    tools = coco_tools()
    original = tools.mask.iou

    def lesser(results, truth, crowd):
        """The oracle replaces pycocotools' IoU: boundaries of decoded masks by SciPy, and areas counted."""
        ious = np.zeros((len(results), len(truth)))
        width = max(1, round(0.02 * math.hypot(70, 90)))
        for row, a in enumerate(results):
            for column, b in enumerate(truth):
                pairs = [tools.mask.decode(rle).astype(bool) for rle in (a, b)]
                values = []
                for one, other in (pairs, [naive_boundary(mask, width) for mask in pairs]):
                    union = one.sum() if crowd[column] else (one | other).sum()
                    values.append((one & other).sum() / max(union, 1))
                ious[row, column] = min(values)
        return ious

    assert got["boundary_ap"] != pytest.approx(plain.evaluate()["ap"])
    monkeypatch.setattr(tools.cocoeval.maskUtils, "iou", lesser)
    expected = copy.deepcopy(plain).evaluate()
    monkeypatch.setattr(tools.cocoeval.maskUtils, "iou", original)
    for key in ("ap", "ap50", "ap75", "per_class_ap"):
        name = f"boundary_{key}" if key != "per_class_ap" else "per_class_boundary_ap"
        assert got[name] == pytest.approx(expected[key]), key
    assert 0.0 < got["boundary_ap"] < plain.evaluate()["ap"]
    first.merge(second)
    assert first.evaluate() == got
