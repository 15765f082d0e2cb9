"""COCO instances: masks and segments, folder layouts, and errors with file and key."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from maskformer_fast.config import DataConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data import BrokenExampleError, build_dataset
from maskformer_fast.data.datasets import coco_instances
from tests.support.coco_files import SQUARE, H, W, ann, build, content, store
from tests.support.paths import SHARED

SHARED_DATA = SHARED / "data"


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


def image_ids(dataset):
    return [dataset[index].image_id for index in range(len(dataset))]


def test_images_without_objects_are_trained_as_background_unless_left_out(tmp_path, caplog):
    store(tmp_path)  # image 2 has only a crowd, which is no background; image 3 has no annotation
    with caplog.at_level(logging.INFO, "maskformer_fast.data"):
        assert image_ids(build(tmp_path)) == [1, 3]
    assert f"1 with {coco_instances._ONLY_CROWDS}: 2.png" in caplog.text
    assert "1 of 3 images have no object" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        assert image_ids(build(tmp_path, keep_empty=False)) == [1]
    assert "1 with no object (--data.keep-empty trains them): 3.png" in caplog.text
    validation = build(tmp_path, "val", val_split="train", keep_empty=False)
    assert image_ids(validation) == [1, 2, 3]
    assert validation[2].masks.shape == (0, H, W)
    assert validation[2].segments == []


def test_crowds_alone_are_an_error_in_training(tmp_path):
    data = content()
    del data["annotations"][0], data["images"][2]
    with pytest.raises(ValueError, match=r"(?s)images with objects.*only crowds.*iscrowd to 0.*: 1\.png, 2\.png"):
        build(store(tmp_path, data))


def test_a_file_without_annotations_is_an_error_in_training_with_the_number_of_images(tmp_path):
    with pytest.raises(ValueError, match=r"none of 3:\n  3 with no annotation: 1\.png, 2\.png, 3\.png"):
        build(store(tmp_path, content() | {"annotations": []}))


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


def test_files_are_found_whose_names_the_disk_spells_otherwise(tmp_path):
    data = content()
    data["images"][0]["file_name"] = "\u00e4\\1.png"
    data["images"][1]["file_name"] = "2.PNG"
    data["images"][2]["file_name"] = "3" * 300 + ".png"
    store(tmp_path, data)
    (tmp_path / "train/a\u0308").mkdir()
    (tmp_path / "train/1.png").rename(tmp_path / "train/a\u0308/1.PNG")
    dataset = build(tmp_path)
    assert dataset[0].path == f"{tmp_path}/train/a\u0308/1.PNG"
    validation = build(tmp_path, "val", val_split="train")
    assert validation[1].path == f"{tmp_path}/train/2.png"
    with pytest.raises(BrokenExampleError, match="name too long"):
        validation[2]


def test_letters_with_accents_are_found_in_both_forms_of_unicode(tmp_path):
    data = content()
    data["images"] = [data["images"][0] | {"file_name": "\u00e4.jpg"}]
    data["annotations"] = data["annotations"][:1]
    store(tmp_path, data)
    (tmp_path / "train/1.png").rename(tmp_path / "train/a\u0308.JPG")
    assert build(tmp_path)[0].path == f"{tmp_path}/train/a\u0308.JPG"


def test_an_error_names_the_annotation_files_that_are_there(tmp_path):
    store(tmp_path, name="instances_first.json")
    with pytest.raises(FileNotFoundError, match=r"there is .*/instances_first\.json: see data\.train_split"):
        build(tmp_path)


@pytest.mark.parametrize("name", ["annotations/instances_default.json", "result.json"])
def test_of_a_single_part_every_tenth_image_is_for_validation(tmp_path, name):
    data = content()
    data["images"] = [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in range(1, 22)]
    data["annotations"] = [ann(i, image=i) for i in range(1, 22)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / name).write_text(json.dumps(data))
    for i in range(1, 22):
        Image.new("RGB", (W, H)).save(tmp_path / "images" / f"{i}.png")
    assert build(tmp_path, "val").file_names == ["10.png", "20.png"] and len(build(tmp_path)) == 19
    assert len(build(tmp_path)[0].segments) == len(build(tmp_path, "val")[1].segments) == 1
    data["images"] = data["images"][:2]
    (tmp_path / name).write_text(json.dumps(data))
    assert build(tmp_path).file_names == ["1.png"] and build(tmp_path, "val").file_names == ["2.png"]


@pytest.mark.parametrize(
    "stored, listed",
    [
        ("images/3/a b.png", "/data/local-files/?d=images%5C3%5Ca%20b.png"),
        ("images/ab-1.png", "/data/upload/7/ab-1.png"),
        ("images/ab-1.png", "http://localhost:8080/data/upload/7/ab-1.png"),
        ("images/a b.png", "images/a%20b.png"),
        ("images/a.png", "C:\\work\\set\\images\\a.png"),
        ("images/a.png", "../../set/images/a.png"),
        ("images/x%20y.png", "x%20y.png"),
    ],
)
def test_file_names_of_other_machines_and_addresses_are_found(tmp_path, stored, listed):
    data = content()
    data["images"] = [data["images"][0] | {"file_name": listed}]
    data["annotations"] = data["annotations"][:1]
    store(tmp_path, data)
    for number in (1, 2, 3):
        (tmp_path / "train" / f"{number}.png").unlink()
    (tmp_path / stored).parent.mkdir(parents=True)
    Image.new("RGB", (W, H)).save(tmp_path / stored)
    assert build(tmp_path)[0].path == str(tmp_path / stored)


def test_no_file_outside_of_the_folders_is_read_by_a_name_of_another_machine(tmp_path):
    Image.new("RGB", (W, H)).save(tmp_path / "secret.png")
    data = content()
    for name in ("../secret.png", str(tmp_path / "secret.png"), "file:///" + str(tmp_path / "secret.png")):
        data["images"][0]["file_name"] = name
        with pytest.raises((ValueError, FileNotFoundError), match="file_name: expected|not found"):
            one = {"images": data["images"][:1], "annotations": data["annotations"][:1]}
            build(store(tmp_path / "set", {**data, **one}))


def test_a_file_that_is_listed_under_several_ids_is_named(tmp_path, caplog):
    data = content()
    data["images"].append(data["images"][0] | {"id": 9})
    assert len(build(store(tmp_path, data))) == 3
    assert "1 files are listed under several ids, such as 1.png" in caplog.text


def test_names_that_are_there_twice_become_distinct(tmp_path):
    data = content()
    data["categories"] = [{"id": 20, "name": "b"}, {"id": 10, "name": "b"}, {"id": 3, "name": "b (20)"}]
    assert build(store(tmp_path, data)).metadata.class_names == ("b (20) (20)", "b (10)", "b (20) (3)")


def test_a_file_of_another_encoding_is_named_with_a_way_out(tmp_path):
    store(tmp_path)
    path = tmp_path / "annotations/instances_train.json"
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"\xe4"'))
    with pytest.raises(ValueError, match=r"instances_train\.json: malformed JSON: .*save it as UTF-8"):
        build(tmp_path)


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



@pytest.mark.parametrize("outline", [
    [[1, 2, 3, 4, 5, float("nan")]],
    [[1, 2, 3, 4, 5, float("inf")]],
    [[1, 2, 3, 4, 5, 10**400]],
    [[1, 2, 3, 4, 5, 6, 7]],
    [[1, 2, 3, 4, "x", 6]],
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


def test_objects_without_pixels_are_left_out_and_counted_by_reason(tmp_path, caplog):
    data = content()
    nothing = coco_mask.encode(np.zeros((H, W), np.uint8, "F"))
    small = [[0.1, 0.1, 0.4, 0.1, 0.4, 0.4]]
    data["annotations"] = [
        ann(1, outline=[[1, 2, 3, 4], *SQUARE]),  # one part of two points, one usable
        ann(2, outline=[[1, 2, 3, 4]]),  # pycocotools would take four numbers for a box
        ann(3, outline=[]),
        ann(4, outline=[[5, 5, 5, 5, 5, 5]]),
        ann(8, outline=small),
        ann(9, outline=[[W + 1, 3, W + 9, 3, W + 9, 8]]),
        ann(10, outline={"size": [H, W], "counts": [H * W]}),
        ann(11, outline={"size": [H, W], "counts": nothing["counts"].decode()}),
        ann(12, outline=None),
        ann(13, image=3, outline=[[1, 2, 3, 4]]),
    ]
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        dataset = build(store(tmp_path, data))
        assert image_ids(dataset) == [1, 2]  # image 2 is background, the objects of image 3 are unknown
    example = dataset[0]
    assert [s.id for s in example.segments] == [1]
    assert example.masks.sum() == 60
    for line in ("left out 9 annotations",
                 "2 with no outline (only a box?): annotation 3 of 1.png, annotation 12 of 1.png",
                 "2 with an outline of fewer than three points: annotation 2 of 1.png, annotation 13 of 3.png",
                 "3 with an outline without a pixel: annotation 4 of 1.png, annotation 10 of 1.png, annotation 11 of",
                 "1 with an outline with coordinates between 0 and 1 (relative to the image? pixels are expected): "
                 "annotation 8 of 1.png", "1 with an outline outside of the image: annotation 9 of 1.png",
                 "left out 1 of 3 images", "1 with objects without a usable outline only: 3.png"):
        assert line in caplog.text
    assert caplog.text.count("left out") == 2


def test_an_outline_that_returns_on_itself_is_left_out_with_a_warning(tmp_path, caplog):
    data = content()
    data["annotations"][1]["segmentation"] = [[2, 2, 15, 2, 15, 2.01, 2, 2.01], [20, 9, 25, 9, 25, 9.01, 20, 9.01]]
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        example = build(store(tmp_path, data))[0]
    assert [s.id for s in example.segments] == [5]
    assert "annotation 6 of 1.png, with an outline without a pixel" in caplog.text


@pytest.mark.parametrize(("outline", "reason"), [
    ([], "only a box"),
    (None, "only a box"),
    ([[0.1, 0.1, 0.4, 0.1, 0.4, 0.4]], "between 0 and 1"),
    ([[0, 0, 1, 0, 1, 1, 0, 1]], "between 0 and 1"),  # the complete image: one pixel, if these were pixels
    ([[W, 0, W + 5, 0, W + 5, 5]], "outside of the image"),
])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_without_any_usable_outline_is_an_error_with_the_reason(tmp_path, outline, reason, split):
    data = content()
    data["annotations"] = [ann(1, outline=outline), ann(2, image=2, outline=outline)]
    with pytest.raises(ValueError, match=rf"(?s)instances_train\.json: .*{reason}"):
        build(store(tmp_path, data), split, val_split="train")


@pytest.mark.parametrize("outline", [
    [4, 3, 14, 3, 14, 9, 4, 9],
    [[4, 3], [14, 3], [14, 9], [4, 9]],
    [[[4, 3], [14, 3], [14, 9], [4, 9]]],
])
def test_flat_numbers_and_pairs_of_coordinates_are_polygons(tmp_path, outline):
    data = content()
    data["annotations"] = [ann(1, outline=outline)]
    mask = build(store(tmp_path, data))[0].masks[0]
    square = np.zeros((H, W), bool)
    square[3:9, 4:14] = True
    np.testing.assert_array_equal(mask, square)


@pytest.mark.parametrize("ids", [(0, 0, 0), (None, None, None), (..., ..., ...), ("u1", "u2", "u1"), (3, "3", -1)])
def test_annotation_ids_that_are_absent_repeated_or_text_get_distinct_numbers(tmp_path, ids):
    data = content()
    for record, number in zip(data["annotations"], ids, strict=True):
        record["id"] = number
        if number is ...:
            del record["id"]
    data["annotations"][2]["image_id"] = 1
    example = build(store(tmp_path, data))[0]
    assert len({segment.id for segment in example.segments}) == 3
    if ids[0] in (0, 3):
        assert example.segments[0].id == ids[0]  # a good id stays
    assert [int(mask.sum()) for mask in example.segment_masks(example.segments)] == [60, 20, 20]


def test_numbers_are_compared_as_numbers_and_null_is_absent(tmp_path):
    data = content()
    data["images"] = [{"id": 1.0, "file_name": "1.png", "height": None},
                      {"id": "2", "file_name": "2.png", "width": "30"}]
    data["categories"] = [{"id": 20.0, "name": "b"}, {"id": "10", "name": "a"}, {"id": 20.0, "name": "b"}]
    data["annotations"] = [ann(1, image="1", category="20", iscrowd=None), ann(2, image=2, category=10, iscrowd=2**40),
                           ann(3, image=2.0, category=10.0)]
    dataset = build(store(tmp_path, data))
    assert dataset.metadata.category_ids == (20, 10)
    segments = [segment for index in (0, 1) for segment in dataset[index].segments]
    assert [(s.category, s.is_crowd) for s in segments] == [(0, False), (1, True), (1, False)]


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = store(tmp_path) / "annotations/instances_train.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(content()), encoding)
        assert len(build(tmp_path)) == 2


def test_backslashes_are_slashes_unless_a_file_has_them_in_its_name(tmp_path):
    data = content()
    data["images"][0]["file_name"] = "sub\\1.png"
    store(tmp_path, data, folder="train/sub")
    assert build(tmp_path)[0].path == str(tmp_path / "train/sub/1.png")
    (tmp_path / "train/sub/1.png").rename(tmp_path / "train/sub\\1.png")
    assert build(tmp_path)[0].path == str(tmp_path / "train/sub\\1.png")


def test_the_error_of_a_name_that_leads_out_lists_the_folders_that_are_searched(tmp_path):
    data = content()
    data["images"][0]["file_name"] = "..\\images\\9.png"
    with pytest.raises(ValueError, match=r"images\[0\]: file_name: .*train or .*train2017 or .*images/train"):
        build(store(tmp_path, data))


def test_an_export_of_roboflow_is_read_without_its_grouping_category(tmp_path, caplog):
    data = content()
    data["categories"].insert(0, {"id": 0, "name": "s", "supercategory": "none"})
    for split in ("train", "valid"):
        store(tmp_path, data, folder=split)
        (tmp_path / "annotations/instances_train.json").rename(tmp_path / split / "_annotations.coco.json")
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        dataset = build(tmp_path)
    assert (len(dataset), dataset[0].path) == (2, str(tmp_path / "train/1.png"))
    assert dataset.metadata.class_names == ("b", "a") and dataset.metadata.category_ids == (20, 10)
    assert [segment.category for segment in dataset[0].segments] == [0, 1]
    assert caplog.text.count("left out the categories 's', which group others and have no annotation") == 1
    assert build(tmp_path, "val")[1].path == str(tmp_path / "valid/2.png")
    assert build(tmp_path, "val", val_split="valid")[1].path == str(tmp_path / "valid/2.png")


@pytest.mark.parametrize(
    ("categories", "trained", "names"),
    [
        ([(20, "s", "none"), (10, "a", "s")], None, ("s", "a")),  # it has annotations
        ([(20, "b", "s"), (10, "a", "s"), (7, "s", None)], ("b", "a", "s"), ("b", "a", "s")),
        ([(20, "b", "s"), (10, "a", "s"), (7, "s", None)], ("b", "a"), ("b", "a")),
        ([(20, "b", "b"), (10, "a", None), (7, "c", "c")], None, ("b", "a", "c")),  # c groups itself alone
        ([(7, "a", "none"), (20, "a", "a"), (10, "b", "a")], None, ("a", "b")),  # an export named like its class
        ([(7, "a", "none"), (20, "a", "a"), (10, "b", "a")], ("a (7)", "a (20)", "b"), ("a (7)", "a (20)", "b")),
        ([(7, "a", "none"), (20, "a", "a"), (10, "b", "a")], ("a", "b"), ("a", "b")),
        ([(6, "t", "s"), (7, "s", None), (20, "b", "t"), (10, "a", "t")], None, ("b", "a")),  # groups of groups
    ],
)
def test_a_category_that_only_groups_others_is_left_out_unless_a_network_has_it(tmp_path, categories, trained, names):
    data = content()
    data["categories"] = [{"id": i, "name": name, "supercategory": above} for i, name, above in categories]
    store(tmp_path, data)
    count = len(trained or ())
    of_network = trained and Metadata("n", trained, (True,) * count, tuple(range(count)), ((0, 0, 0),) * count)
    config = DataConfig(dataset="coco_instances", root=str(tmp_path))
    dataset = build_dataset(config, "train", of_network)
    assert dataset.metadata.class_names == names
    assert [dataset.metadata.category_ids[segment.category] for segment in dataset[0].segments] == [20, 10]


def test_masks_of_more_than_the_limit_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_instances, "_MASK_LIMIT", 2 * H * W)
    dataset = build(store(tmp_path))
    assert len(dataset[0].masks) == 2
    monkeypatch.setattr(coco_instances, "_MASK_LIMIT", 2 * H * W - 1)
    with pytest.raises(BrokenExampleError, match="got 2 objects of 20 x 30 pixels in 1.png"):
        dataset[0]


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
    (change("images", 2, height=-1), r"images\[2\]: height"),
    (change("images", 0, file_name="../9.png"), r"file name below .*'\.\./9\.png'"),
    (change("images", 1, file_name="/9.png"), "file name below"),
    (change("categories", 0, id=10), r"categories\[1\]: id: expected distinct ids, got 10"),
    (change("categories", 0, name=...), r"categories\[0\]: name"),
    (change("annotations", 0, image_id=[9]), r"annotations\[0\]: image_id: .*got \[9\]"),
    (change("annotations", 0, category_id=9), r"annotations\[0\]: category_id: .*got 9"),
    (change("annotations", 0, category_id=...), r"annotations\[0\]: category_id: .*no such key"),
    (change("annotations", 0, segmentation=[1, 2, 3, 4, "x"]), r"annotations\[0\]: segmentation: expected a list of"),
    (change("annotations", 0, segmentation="x"), r"annotations\[0\]: segmentation: expected polygons or"),
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


def test_annotations_of_images_that_are_not_listed_are_left_out_and_counted(tmp_path, caplog):
    data = content()
    data["annotations"][1]["image_id"] = 9
    with caplog.at_level(logging.WARNING):
        dataset = build(store(tmp_path, data))
    assert len(dataset[0].segments) == 1
    assert 'left out 1 annotations:\n  1 with an image that is not listed under "images": annotation 6' in caplog.text
    for record in data["annotations"]:
        record["image_id"] = 9
    with pytest.raises(ValueError, match=r'instances_train.json: (?s:.*)3 with an image that is not listed under "im'):
        build(store(tmp_path, data))


def test_segments_keep_the_listed_area(tmp_path):
    data = content()
    data["annotations"][0]["area"] = 55.5
    data["annotations"][1]["area"] = 0
    segments = build(store(tmp_path, data))[0].segments
    assert [segment.area for segment in segments] == [55, 20]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
    | st.sampled_from([0, 1, "1", 1e300, 10**400, "../x", "a\\b"]),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner),
    max_leaves=12,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_values_in_a_file_give_examples_or_an_error_with_its_name(tmp_path, data):
    parsed = content()
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(["images", "categories", "annotations", "annotations"]))
        record = data.draw(st.sampled_from(parsed[section]))
        key = data.draw(st.sampled_from([*record, "supercategory", "area", "color"]))
        record[key] = data.draw(VALUES)
    store(tmp_path, parsed)
    for split in ("train", "val"):
        try:
            dataset = build(tmp_path, split, val_split="train")
            for index in range(len(dataset)):
                assert dataset[index].masks.dtype == np.bool_
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)
