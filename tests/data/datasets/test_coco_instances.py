"""COCO instances: rasterised outlines against oracles, folder layouts, and errors with file and key."""

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
from pycocotools import mask as coco_mask

from maskformer_fast.config import DataConfig
from maskformer_fast.data import BrokenExampleError, build_dataset
from maskformer_fast.data.datasets.coco_instances import rasterize
from tests.support.paths import SHARED

SHARED_DATA = SHARED / "data"
H, W = 20, 30
SQUARE = [[4, 3, 14, 3, 14, 9, 4, 9]]  # x 4..13, y 3..8


def uncompressed(mask: np.ndarray) -> list[int]:
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def ann(number, image=1, category=20, outline=SQUARE, **more):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": outline, "iscrowd": 0, **more}


def content():
    blob = np.zeros((H, W), bool)
    blob[2:7, 5:9] = True
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in (1, 2, 3)],
        "categories": [{"id": 20, "name": "b"}, {"id": 10, "name": "a", "supercategory": "s"}],
        "annotations": [
            ann(5),
            ann(6, category=10, outline={"size": [H, W], "counts": uncompressed(blob)}, iscrowd=1),
            ann(7, image=2, outline={"size": [H, W], "counts": uncompressed(blob)}, iscrowd=1),
        ],
    }


def store(root: Path, data=None, folder="train", name="instances_train.json") -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / name).write_text(json.dumps(content() if data is None else data))
    (root / folder).mkdir(parents=True, exist_ok=True)
    for i in (1, 2, 3):
        Image.new("RGB", (W, H), (i, i, i)).save(root / folder / f"{i}.png")
    return root


def build(root, split="train", **options):
    return build_dataset(DataConfig(dataset="coco_instances", root=str(root), **options), split)


def test_an_example_has_the_annotated_masks_and_segments(tmp_path):
    dataset = build(store(tmp_path))
    assert (dataset.task, dataset.metadata.class_names) == ("instance", ("b", "a"))
    assert dataset.metadata.category_ids == (20, 10)
    assert all(dataset.metadata.is_thing)
    example = dataset[0]
    square = np.zeros((H, W), bool)
    square[3:9, 4:14] = True
    blob = np.zeros((H, W), bool)
    blob[2:7, 5:9] = True
    np.testing.assert_array_equal(example.masks, [square, blob])
    assert example.masks.dtype == np.bool_
    assert [(s.id, s.category, s.is_crowd, s.area) for s in example.segments] == [(5, 0, False, 60), (6, 1, True, 20)]
    assert (example.image_id, example.image[0, 0, 0], example.path) == (1, 1, str(tmp_path / "train/1.png"))


def test_images_without_objects_are_left_out_of_training_only(tmp_path):
    store(tmp_path)
    assert [build(tmp_path)[i].image_id for i in range(len(build(tmp_path)))] == [1]  # image 2 has only a crowd
    validation = build(tmp_path, "val", val_split="train")
    assert [validation[i].image_id for i in range(3)] == [1, 2, 3]
    assert validation[2].masks.shape == (0, H, W)
    assert validation[2].segments == []


@pytest.mark.parametrize("name", ["instances_train.json", "instances_train2017.json"])
@pytest.mark.parametrize("folder", ["train", "train2017", "images/train", "images/train2017", "images", "."])
def test_images_are_found_in_every_layout(tmp_path, name, folder):
    assert build(store(tmp_path, folder=folder, name=name))[0].image[0, 0, 0] == 1


@pytest.mark.parametrize("name", ["_annotations.coco.json", "result.json", "annotations.json"])
@pytest.mark.parametrize("inner", ["", "images/"])
def test_annotations_may_lie_beside_the_images_as_tools_export_them(tmp_path, name, inner):
    for folder in ("train", "valid"):
        store(tmp_path, folder=f"{folder}/{inner}")
        data = content()
        for image in data["images"]:
            image["file_name"] = inner + image["file_name"]
        (tmp_path / folder / name).write_text(json.dumps(data))
    (tmp_path / "annotations/instances_train.json").unlink()
    train, validation = build(tmp_path), build(tmp_path, "val")
    assert train[0].path == f"{tmp_path}/train/{inner}1.png" and validation[0].path == f"{tmp_path}/valid/{inner}1.png"
    assert validation.file_names == [f"{inner}{number}.png" for number in (1, 2, 3)]


def test_file_names_may_begin_with_a_folder(tmp_path):
    data = content()
    for image in data["images"]:
        image["file_name"] = "train2017/" + image["file_name"]
    assert build(store(tmp_path, data, folder="train2017"))[0].image_id == 1


def test_errors_name_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances_val\.json, .*instances_val2017\.json"):
        build(store(tmp_path), "val")
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"image 1\.png not found; looked in .*train2017.*images"):
        build(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "train")
    (tmp_path / "train/1.png").write_bytes(b"")
    with pytest.raises(BrokenExampleError, match=r"train/1\.png: cannot be decoded"):
        build(tmp_path)[0]
    Image.new("RGB", (W, H + 1)).save(tmp_path / "train/1.png")
    with pytest.raises(BrokenExampleError, match=r"train/1\.png: .*20 x 30, got 21 x 30"):
        build(tmp_path)[0]


masks = hnp.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@settings(max_examples=150, deadline=None)
@given(mask=masks)
def test_run_lengths_agree_with_pycocotools(mask):
    height, width = mask.shape
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [height, width], "counts": compressed["counts"].decode()}
    np.testing.assert_array_equal(rasterize(text, height, width), mask)
    listed = {"size": [height, width], "counts": uncompressed(mask)}
    np.testing.assert_array_equal(rasterize(listed, height, width), mask)


def test_runs_of_several_characters_are_decoded():
    mask = np.zeros((700, 900), bool)  # differences of both signs, encoded in several characters
    mask[100:650, 30:800] = True
    mask[300:310] = False
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [700, 900], "counts": compressed["counts"].decode()}
    np.testing.assert_array_equal(rasterize(text, 700, 900), mask)


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12), height=st.integers(1, 9))
def test_any_encoded_text_gives_a_mask_or_a_value_error(text, height):
    try:
        mask = rasterize({"size": [height, 7], "counts": text}, height, 7)
    except ValueError as error:
        assert "segmentation" in str(error)
    else:
        assert mask.shape == (height, 7)


@pytest.mark.parametrize("outline", [
    [[1, 2, 3, 4, 5, float("nan")]],
    [[1, 2, 3, 4, 5, float("inf")]],
    [[1, 2, 3, 4, 5, 10**400]],
    [[1, 2, 3, 4, 5, 6, 7]],
    [[1, 2, 3, 4, "5", 6]],
    [[1, 2, 3, 4, None, 6]],
    [[1, 2, 1e8, 2, 1e8, 9]],
    [[1, -50, 9, 2, 8, 9]],
    {"size": [H, W], "counts": [5, 5]},
    {"size": [H, W], "counts": [H * W + 5, -5]},
    {"size": [H, W], "counts": ["a"]},
    {"size": [H, W]},
    {"size": [W, H], "counts": [H * W]},
    {"counts": [H * W]},
    {"size": [H, W], "counts": "~~"},
    {"size": [H, W], "counts": "o" * 100_000},
])
def test_errors_of_bad_outlines_name_the_annotation(tmp_path, outline):
    data = content()
    data["annotations"] = [ann(77, outline=outline)]
    dataset = build(store(tmp_path, data))
    message = r"instances_train\.json: annotation 77 of 1\.png: segmentation"
    with pytest.raises(BrokenExampleError, match=message) as caught:
        dataset[0]
    assert len(str(caught.value)) < 1000


def test_degenerate_outlines_are_dropped_and_logged(tmp_path, caplog):
    data = content()
    data["annotations"] = [
        ann(1, outline=[[1, 2, 3, 4], *SQUARE]),  # one part of two points, one usable
        ann(2, outline=[[1, 2, 3, 4]]),  # pycocotools would take four numbers for a box
        ann(3, outline=[]),
        ann(4, outline=[[5, 5, 5, 5, 5, 5]]),  # no pixel
    ]
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        example = build(store(tmp_path, data))[0]
    assert [s.id for s in example.segments] == [1]
    assert example.masks.shape[0] == 1
    assert example.masks[0].sum() == 60
    assert "dropped 2 annotations" in caplog.text
    assert "[2, 3]" in caplog.text
    data["annotations"] = [ann(1, outline=[])]
    with pytest.raises(ValueError, match="only boxes"):
        build(store(tmp_path, data))


def change(section, index, **keys):
    def apply(data):
        data[section][index].update(keys)
        for key, value in keys.items():
            if value is ...:
                del data[section][index][key]
    return apply


@pytest.mark.parametrize(("edit", "message"), [
    (change("images", 1, id=1), r"images\[1\]: id: expected distinct ids, got 1 twice"),
    (change("images", 0, id=...), r"images\[0\]: id: .*no such key"),
    (change("images", 0, file_name=3), r"images\[0\]: file_name"),
    (change("images", 2, height=0), r"images\[2\]: height"),
    (change("images", 0, file_name="../1.png"), r"file name below .*'\.\./1\.png'"),
    (change("images", 1, file_name="/1.png"), "file name below"),
    (change("categories", 0, id=10), r"categories\[1\]: id: expected distinct ids, got 10"),
    (change("categories", 0, name=...), r"categories\[0\]: name"),
    (change("annotations", 1, id=5), r"annotations\[1\]: id: expected distinct ids, got 5 twice"),
    (change("annotations", 0, image_id=9), r"annotations\[0\]: image_id: .*got 9"),
    (change("annotations", 0, category_id=9), r"annotations\[0\]: category_id: .*got 9"),
    (change("annotations", 0, category_id=...), r"annotations\[0\]: category_id: .*no such key"),
    (change("annotations", 0, segmentation=...), r"annotations\[0\]: segmentation: .*no such key"),
    (change("annotations", 0, segmentation=[1, 2, 3, 4, 5, 6]), r"annotations\[0\]: segmentation: expected a list of"),
    (lambda data: data.pop("images"), 'expected a list "images", got none'),
    (lambda data: data.update(images=[]), 'expected at least one entry in "images"'),
    (lambda data: data.update(annotations={}), 'expected a list "annotations", got dict'),
    (lambda data: data["annotations"].append(3), r"annotations\[3\]: expected an object"),
    (lambda data: data["annotations"].clear(), "expected images with objects"),
])
def test_errors_name_file_and_key(tmp_path, edit, message):
    data = content()
    edit(data)
    with pytest.raises(ValueError, match=message) as caught:
        build(store(tmp_path, data))
    assert "instances_train.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", '{"images": ', "\udcff"])
def test_errors_name_files_that_are_not_json(tmp_path, text):
    store(tmp_path)
    (tmp_path / "annotations/instances_train.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"instances_train\.json: (malformed JSON|expected a JSON object)"):
        build(tmp_path)


def test_repeated_category_names_get_their_ids_appended(tmp_path):
    data = content()
    data["categories"] = [{"id": 20, "name": "fruit"}, {"id": 10, "name": "fruit"}]
    assert build(store(tmp_path, data)).metadata.class_names == ("fruit (20)", "fruit (10)")


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_other_tasks_are_refused(tmp_path, task):
    with pytest.raises(ValueError, match=r"data\.task: expected one of 'instance'"):
        build(store(tmp_path), task=task)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the samples of real data sets")
def test_real_polygons_have_the_listed_areas():
    data = json.loads((SHARED_DATA / "fruits_nuts/annotations/instances_train.json").read_text())
    areas = {item["id"]: item["area"] for item in data["annotations"]}
    dataset = build(SHARED_DATA / "fruits_nuts")
    assert (len(dataset), len(build(SHARED_DATA / "fruits_nuts", "val"))) == (12, 3)
    count = 0
    for index in range(len(dataset)):
        example = dataset[index]
        for segment, mask in zip(example.segments, example.masks, strict=True):
            assert mask.sum() == pytest.approx(areas[segment.id], rel=0.05)
            assert segment.area == int(areas[segment.id])
            count += 1
    assert count == len(areas)


def test_segments_keep_the_listed_area(tmp_path):
    data = content()
    data["annotations"][0]["area"] = 55.5
    data["annotations"][1]["area"] = 0
    segments = build(store(tmp_path, data))[0].segments
    assert [segment.area for segment in segments] == [55, 20]
