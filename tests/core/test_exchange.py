"""Results to and from supervision, COCO and polygons."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.core.exchange import boxes_of, mask_of_polygons, pack, polygons_of, unpack
from maskformer_fast.core.metadata import SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.structures import pack_masks

SIZE = (13, 19)


def instances(count: int = 4, empty: bool = False) -> InstanceResult[torch.Tensor]:
    masks = torch.rand(count, *SIZE) < 0.3
    if empty:
        masks[0] = False
    boxes = torch.from_numpy(boxes_of(pack(masks.numpy()), SIZE[1]))
    return InstanceResult(torch.arange(count) + 2, torch.rand(count), pack_masks(masks), boxes, SIZE)


def check_same(ours: InstanceResult[Any], theirs: InstanceResult[Any], scores: bool = True) -> None:
    for name in ("labels", "masks", "boxes", *(["scores"] if scores else [])):
        np.testing.assert_array_equal(np.asarray(getattr(ours, name)), np.asarray(getattr(theirs, name)))
    assert tuple(ours.size) == tuple(theirs.size)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 14), st.integers(1, 14))
def test_polygons_are_exact_and_come_back(seed: int, height: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    mask = generator.random((height, width)) < generator.random()
    polygons = polygons_of(mask)
    assert np.array_equal(mask_of_polygons(polygons, mask.shape), mask)
    area = 0.0
    for polygon in polygons:
        for sign, rings in ((1, [polygon.exterior]), (-1, polygon.holes)):
            for ring in rings:
                x, y = ring.T.astype(float)
                area += sign * abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
                steps = np.abs(np.roll(ring, -1, 0) - ring)
                assert (steps.min(1) == 0).all() and (steps.max(1) > 0).all()
    assert area == mask.sum()


def test_holes_belong_to_the_part_around_them() -> None:
    mask = np.zeros((12, 12), bool)
    mask[0:9, 0:9] = True
    mask[2:7, 2:7] = False
    mask[4, 4] = True  # a part inside the hole
    mask[10, 10] = mask[11, 11] = True  # two that touch at a corner
    polygons = polygons_of(mask)
    assert [len(polygon.holes) for polygon in polygons] == [1, 0, 0, 0]
    assert sorted(polygons[0].holes[0].tolist()) == [[2, 2], [2, 7], [7, 2], [7, 7]]
    shape = mask_of_polygons([type(polygons[0])(np.array([[0, 0], [4, 0], [0, 4]]), [])], (5, 5))
    assert shape.sum() == 6  # pixel centres of a triangle whose long side crosses centres, which are outside


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 20), st.integers(1, 150), st.sampled_from(["int32", "int64", "float32"]))
def test_annotations_of_a_map_are_those_of_its_masks(seed: int, height: int, width: int, dtype: str) -> None:
    tools = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(seed)
    side = int(generator.integers(1, 9))
    id_map = generator.integers(-1, 5, (-(-height // side), -(-width // side))).repeat(side, 0).repeat(side, 1)
    id_map = id_map[:height, :width].astype(dtype)
    id_map = np.asfortranarray(id_map) if seed % 2 else id_map
    ids = [3, 0, 9, 3, 1]  # one without pixels, one of two segments, and values that are no segment's
    result = PanopticResult(torch.from_numpy(id_map), [SegmentInfo(i, i + 1, score=0.5) for i in ids])
    annotations = result.to_coco(5)
    assert annotations == result.to_instances().to_coco(5)
    for annotation, number in zip(annotations, ids, strict=True):
        expected = tools.encode(np.asfortranarray(id_map == number, np.uint8))
        assert annotation["segmentation"]["counts"].encode() == expected["counts"]
        assert annotation["area"] == tools.area(expected) and annotation["bbox"] == list(tools.toBbox(expected))


def test_annotations_of_other_maps() -> None:
    far = PanopticResult(np.array([[1 << 40, 7, 7]]), [SegmentInfo(7, 1), SegmentInfo(1 << 40, 2)])
    assert [a["area"] for a in far.to_coco()] == [2, 1]  # ids too far apart for a table
    assert PanopticResult(np.zeros((2, 3), np.int32), []).to_coco() == []
    nothing = PanopticResult(np.full((1, 4), np.nan, np.float32), [SegmentInfo(0, 1)])
    assert nothing.to_coco()[0]["area"] == 0
    classes = SemanticResult(np.array([[2, 2, 255], [0, 2, 0]], np.uint8)).to_coco()
    assert [(a["category_id"], a["area"]) for a in classes] == [(0, 2), (2, 3), (255, 1)]


def test_coco_annotations() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    result = instances(empty=True)
    categories = [10 * label for label in range(9)]
    annotations = result.to_coco("a", categories)
    masks = unpack(np.asarray(result.masks), SIZE[1])
    for annotation, mask, label, box in zip(
        annotations, masks, result.labels.tolist(), result.boxes.tolist(), strict=True
    ):
        expected = tools.encode(np.asfortranarray(mask, np.uint8))
        assert annotation["segmentation"] == {"size": [*SIZE], "counts": expected["counts"].decode()}
        assert annotation["area"] == mask.sum() and annotation["category_id"] == 10 * label
        assert annotation["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        assert annotation["image_id"] == "a" and annotation["iscrowd"] == 0
    check_same(InstanceResult.from_coco(annotations, SIZE, categories), result)
    plain = {"category_id": 1, "segmentation": [[2, 3, 7, 3, 7, 8, 2, 8]]}
    back = InstanceResult.from_coco([plain], SIZE)
    assert back.boxes.tolist() == [[2, 3, 7, 8]] and back.scores.tolist() == [1.0]
    assert InstanceResult.from_coco([], SIZE).to_coco() == []


def test_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    result = instances()
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError):
        result.to_supervision()

    class Detections:
        def __init__(self, xyxy: Any, mask: Any, confidence: Any, class_id: Any) -> None:
            assert xyxy.shape == (len(mask), 4) and mask.dtype == np.bool_
            self.xyxy, self.mask, self.confidence, self.class_id = xyxy, mask, confidence, class_id

    stand_in = ModuleType("supervision")
    stand_in.Detections = Detections  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    detections = result.to_supervision()
    check_same(InstanceResult.from_supervision(detections), result)
    detections.mask = None
    with pytest.raises(ValueError, match="detections.mask: expected masks"):
        InstanceResult.from_supervision(detections)


def test_the_real_supervision_takes_detections() -> None:
    supervision = pytest.importorskip("supervision")
    result = instances()
    detections = result.to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 4
    check_same(InstanceResult.from_supervision(detections), result)


def test_polygons_of_results() -> None:
    result = instances(empty=True)
    polygons = result.to_polygons()
    assert polygons[0] == []
    back = InstanceResult.from_polygons(polygons, result.labels.tolist(), SIZE, result.scores.tolist())
    check_same(back, result)
    with pytest.raises(ValueError, match="labels: expected 4 classes"):
        InstanceResult.from_polygons(polygons, [1], SIZE)


def test_semantic_maps() -> None:
    labels = torch.randint(0, 5, SIZE, dtype=torch.uint8)
    result = SemanticResult(labels)
    assert result.to_instances().labels.tolist() == [0, 1, 2, 3, 4]
    back = SemanticResult.from_coco(result.to_coco(), SIZE)
    np.testing.assert_array_equal(back.labels, labels.numpy())
    polygons = result.to_polygons()
    np.testing.assert_array_equal(SemanticResult.from_polygons(polygons, range(5), SIZE).labels, labels.numpy())
    void = SemanticResult(np.full(SIZE, -1, np.int16))
    assert void.to_coco() == [] and (SemanticResult.from_coco([], SIZE).labels == -1).all()


def test_panoptic_maps() -> None:
    id_map = torch.randint(1, 4, SIZE, dtype=torch.int32)
    id_map[:3] = -1
    segments = [SegmentInfo(n, n + 5, score=n / 4, area=int((id_map == n).sum())) for n in (1, 2, 3)]
    result = PanopticResult(id_map, segments)
    back = PanopticResult.from_coco(result.to_coco(), SIZE)
    np.testing.assert_array_equal(back.id_map, id_map.numpy())
    assert back.segments == segments
    covered = instances(3)
    covered.masks[2] = covered.masks[1]
    assert [segment.id for segment in PanopticResult.from_instances(covered).segments] == [1, 2]


def test_packing_is_that_of_tensors() -> None:
    masks = torch.rand(2, 5, 11) < 0.5
    np.testing.assert_array_equal(pack(masks.numpy()), pack_masks(masks).numpy())
    assert boxes_of(np.zeros((1, 4, 1), np.uint8), 5).tolist() == [[0, 0, 0, 0]]
