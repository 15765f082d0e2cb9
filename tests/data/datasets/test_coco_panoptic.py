"""COCO panoptic: ids, void, areas, and errors where JSON and PNG disagree."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from maskformer_fast.config import DataConfig
from maskformer_fast.core.metadata import VOID
from maskformer_fast.data import BrokenExampleError, build_dataset
from maskformer_fast.data.datasets.coco_panoptic import segment_areas
from tests.support.paths import SHARED

SAMPLE = SHARED / "data/coco_panoptic_sample"
H, W = 12, 17
CAR, CROWD, SKY = 1 + 256 * 2 + 65536 * 3, 70_000, 9


def id_map() -> np.ndarray:
    ids = np.full((H, W), SKY)
    ids[4:, 2:9] = CAR
    ids[8:, 9:14] = CROWD
    ids[:, 16] = 0
    return ids


def save_ids(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def content():
    segments = [
        {"id": CAR, "category_id": 3, "iscrowd": 0, "area": 1},
        {"id": SKY, "category_id": 187},
        {"id": CROWD, "category_id": 3, "iscrowd": 1},
    ]
    return {
        "images": [{"id": "x", "file_name": "x.jpg", "height": H, "width": W}],
        "categories": [
            {"id": 187, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
            {"id": 3, "name": "car", "isthing": 1},
        ],
        "annotations": [{"image_id": "x", "file_name": "x.png", "segments_info": segments}],
    }


def store(root: Path, data=None, ids=None, stem="panoptic_train", folder="train") -> Path:
    save_ids(root / "annotations" / stem / "x.png", id_map() if ids is None else ids)
    (root / "annotations" / f"{stem}.json").write_text(json.dumps(content() if data is None else data))
    (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (W, H), (200, 100, 50)).save(root / folder / "x.jpg")
    return root


def build(root, split="train", **options):
    return build_dataset(DataConfig(dataset="coco_panoptic", root=str(root), **options), split)


def test_an_example_has_the_annotated_ids_and_segments(tmp_path):
    dataset = build(store(tmp_path))
    assert (len(dataset), dataset.task) == (1, "panoptic")
    assert dataset.metadata.class_names == ("sky", "car")
    assert dataset.metadata.is_thing == (False, True)
    assert dataset.metadata.category_ids == (187, 3)
    assert dataset.metadata.colors[0] == (70, 130, 180)
    example = dataset[0]
    expected = id_map()
    np.testing.assert_array_equal(example.id_map, np.where(expected == 0, VOID, expected))
    assert example.id_map.dtype == np.int32
    assert [(s.id, s.category, s.is_thing, s.is_crowd, s.area) for s in example.segments] == [
        (CAR, 1, True, False, (expected == CAR).sum()),
        (SKY, 0, False, False, (expected == SKY).sum()),
        (CROWD, 1, True, True, (expected == CROWD).sum()),
    ]
    assert (example.image_id, example.path) == ("x", str(tmp_path / "train/x.jpg"))


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_panoptic_truth_allows_every_task(tmp_path, task):
    dataset = build(store(tmp_path), task=task)
    assert dataset.task == task
    assert len(dataset[0].segments) == 3


@pytest.mark.parametrize("stem", ["panoptic_train", "panoptic_train2017"])
@pytest.mark.parametrize("folder", ["train", "train2017", "images/train"])
def test_images_are_found_in_every_layout(tmp_path, stem, folder):
    assert build(store(tmp_path, stem=stem, folder=folder))[0].image_id == "x"


def test_categories_may_be_in_a_file_of_their_own(tmp_path):
    data = content()
    categories = data.pop("categories")
    store(tmp_path, data)
    with pytest.raises(ValueError, match=r'panoptic_train\.json: expected a list "categories", got none'):
        build(tmp_path)
    (tmp_path / "annotations/panoptic_coco_categories.json").write_text(json.dumps(categories))
    assert build(tmp_path).metadata.class_names == ("sky", "car")


def test_json_and_png_that_disagree_are_an_error(tmp_path):
    ids = id_map()
    ids[0, :3] = 77
    with pytest.raises(BrokenExampleError, match=r"x\.png: expected ids listed in .*, got \[77\] \(3 pixels"):
        build(store(tmp_path, ids=ids))[0]
    with pytest.raises(BrokenExampleError, match=r"x\.png: .*12 x 17, got 11 x 17"):
        build(store(tmp_path, ids=id_map()[1:]))[0]


def test_listed_segments_without_pixels_are_left_out_with_a_warning(tmp_path, caplog):
    ids = id_map()
    ids[ids == CAR] = SKY
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        example = build(store(tmp_path, ids=ids))[0]
    assert {segment.id for segment in example.segments} == {SKY, CROWD}
    assert f"x.png: left out segments [{CAR}]" in caplog.text


def test_an_image_may_be_all_void_but_not_every_image(tmp_path, caplog):
    data = content()
    data["images"].append({"id": "v", "file_name": "v.jpg", "height": H, "width": W})
    data["annotations"].append({"image_id": "v", "file_name": "v.png", "segments_info": []})
    store(tmp_path, data)
    save_ids(tmp_path / "annotations/panoptic_train/v.png", np.zeros((H, W), int))
    Image.new("RGB", (W, H)).save(tmp_path / "train/v.jpg")
    with caplog.at_level(logging.INFO, "maskformer_fast.data"):
        example = build(tmp_path)[1]
    assert example.segments == []
    assert (example.id_map == VOID).all()
    assert "1 of 2 images have no segment: all of their pixels are void (v.jpg)" in caplog.text
    assert "1 of 3 segments are crowds, which are not trained" in caplog.text
    data["annotations"][0]["segments_info"] = [{"id": CROWD, "category_id": 3, "iscrowd": 2**40}]
    with pytest.raises(ValueError, match="expected segments for task 'panoptic', got none among 1 segments, 1 of them"):
        build(store(tmp_path, data))
    assert build(tmp_path, task="semantic").metadata.num_classes == 2


def test_errors_name_missing_files(tmp_path):
    store(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"panoptic_val\.json, .*panoptic_val2017\.json"):
        build(tmp_path, "val")
    dataset = build(tmp_path)
    (tmp_path / "annotations/panoptic_train/x.png").unlink()
    with pytest.raises(BrokenExampleError, match=r"x\.png: no such file"):
        dataset[0]
    (tmp_path / "annotations/panoptic_train").rmdir()
    with pytest.raises(FileNotFoundError, match=r"panoptic_train: expected the folder of panoptic PNGs"):
        build(tmp_path)


def test_images_without_annotation_are_listed_or_skipped(tmp_path, caplog):
    data = content()
    data["images"].append({"id": 2, "file_name": "y.jpg", "height": H, "width": W})
    message = r"(?s)1 images without annotation in .*panoptic_train\.json.*image 2 \(y\.jpg\)"
    with pytest.raises(ValueError, match=message):
        build(store(tmp_path, data))
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        assert len(build(tmp_path, skip_broken=True)) == 1
    assert "y.jpg" in caplog.text


def segment(index, **keys):
    return lambda data: data["annotations"][0]["segments_info"][index].update(keys)


@pytest.mark.parametrize(("edit", "message"), [
    (segment(1, id=CAR), r"annotations\[0\]: segments_info: id: expected distinct ids"),
    (segment(1, id=0), r"annotations\[0\]: segments_info\[1\]: id: expected an integer of at least 1, got 0"),
    (segment(1, id=2**24), r"segments_info\[1\]: id: expected an integer up to 16777215"),
    (segment(0, category_id=4), r"segments_info\[0\]: category_id: .*got 4"),
    (lambda data: data["annotations"][0].pop("segments_info"), r'annotations\[0\]: expected a list "segments_info"'),
    (lambda data: data["annotations"][0].pop("file_name"), r"annotations\[0\]: file_name: .*no such key"),
    (lambda data: data["annotations"][0].update(file_name="../../x.png"), "file name below"),
    (lambda data: data["annotations"][0].update(image_id="z"), r"1 images without annotation in "),
    (lambda data: data["annotations"].append(data["annotations"][0]), r"annotations\[1\]: image_id: .*'x' twice"),
    (lambda data: data["categories"][0].pop("isthing"), r"categories\[0\]: isthing: .*no such key"),
    (lambda data: data["images"][0].update(width="x7"), r"images\[0\]: width: .*got 'x7'"),
])
def test_errors_name_file_and_key(tmp_path, edit, message):
    data = content()
    edit(data)
    with pytest.raises(ValueError, match=message) as caught:
        build(store(tmp_path, data))
    assert "panoptic_train.json" in str(caught.value)


def test_annotations_of_images_that_are_not_listed_are_left_out_and_counted(tmp_path, caplog):
    data = content()
    data["annotations"].append({**data["annotations"][0], "image_id": "z", "file_name": "z.png"})
    with caplog.at_level(logging.WARNING):
        assert len(build(store(tmp_path, data))) == 1
    assert '1 with an image that is not listed under "images": z.png' in caplog.text


@settings(max_examples=60, deadline=None)
@given(ids=hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=15),
                      elements=st.sampled_from([0, 1, 2, 255, 256, 2**24 - 1])))
def test_areas_equal_the_counts_of_numpy(ids):
    distinct, counts = np.unique(ids, return_counts=True)
    assert segment_areas(ids) == dict(zip(distinct.tolist(), counts.tolist(), strict=True))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs the COCO panoptic sample")
def test_real_images_agree_with_their_json_and_with_their_instance_annotations():
    data = json.loads((SAMPLE / "annotations/panoptic_val2017.json").read_text())
    areas = {s["id"]: s["area"] for a in data["annotations"] for s in a["segments_info"]}
    dataset = build(SAMPLE, train_split="val")
    assert (len(dataset), dataset.metadata.num_classes, sum(dataset.metadata.is_thing)) == (2, 133, 80)
    examples = [dataset[0], dataset[1]]
    assert {s.id: s.area for example in examples for s in example.segments} == areas

    from maskformer_fast.data.datasets.coco_instances import CocoInstances

    path = SAMPLE / "annotations/instances_val2017_from_panoptic.json"
    instances = CocoInstances(path, SAMPLE, "val", training=False, name="same")
    for index, example in enumerate(examples):
        other = instances[index]
        assert other.image_id == example.image_id
        np.testing.assert_array_equal(other.image, example.image)
        expected = {mask.tobytes() for mask in example.segment_masks(example.segments)}
        assert {mask.tobytes() for mask in other.masks} == expected
