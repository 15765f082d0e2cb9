"""The plain folder: pairs of files, classes with and without classes.json, ignored and unknown values."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from maskformer_fast.config import DataConfig
from maskformer_fast.core.metadata import VOID
from maskformer_fast.data import BrokenExampleError, build_dataset
from tests.support.paths import SHARED

CAMVID = SHARED / "data/camvid"
SIZE = (6, 9)


def write(root: Path, split: str, name: str, values: np.ndarray, size: tuple[int, int] | None = None) -> None:
    stem = Path(name).with_suffix("")
    image, annotation = root / "images" / split / name, root / "annotations" / split / f"{stem}.png"
    for path in (image, annotation):
        path.parent.mkdir(parents=True, exist_ok=True)
    shape = size or values.shape
    Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (*shape, 3)).astype(np.uint8)).save(image)
    Image.fromarray(values).save(annotation)


def values(*present: int, dtype: type = np.uint8) -> np.ndarray:
    return np.resize(np.array(present, dtype), SIZE)


def build(root: Path, split="train", **options):
    return build_dataset(DataConfig(dataset="folder", root=str(root), **options), split)


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "train", "b.jpg", values(0, 2, 255))
    write(tmp_path, "train", "a/one.two.PNG", values(1, 3))
    write(tmp_path, "val", "v.webp", values(0, 1))
    return tmp_path


def test_suffixes_may_have_capital_letters_and_folders_may_be_links(root, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    write(disk, "x", "1.jpg", values(0, 1))
    for kind in ("images", "annotations"):
        (root / kind / "train/linked").symlink_to(disk / kind / "x")
    (disk / "annotations/x/1.png").rename(disk / "annotations/x/1.PNG")
    (root / "images/train/._b.jpg").write_bytes(b"macOS")
    (root / "annotations/train/._b.png").write_bytes(b"macOS")
    dataset = build(root)
    assert dataset.file_names == ["a/one.two.PNG", "b.jpg", "linked/1.jpg"]
    assert [example.image_id for example in (dataset[0], dataset[1], dataset[2])] == ["a/one.two", "b", "linked/1"]


@pytest.mark.parametrize(
    ("listed", "present", "warns"),
    [(["bg", "fg"], (0, 255), True), (["bg", {"name": "fg", "id": 255}], (0, 255), False),
     (["a", "b"], (0, 1, 255), False), (["a", "b"], (0,), False), (["a"], (0, 255), False)],
)
def test_listed_classes_that_are_unlabelled_pixels_are_named(tmp_path, caplog, listed, present, warns):
    write(tmp_path, "train", "a.png", values(*present))
    (tmp_path / "classes.json").write_text(json.dumps(listed))
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        build(tmp_path)
    assert ("only the values 0, 255, of which 255 means unlabelled" in caplog.text) == warns == bool(caplog.records)


def test_a_folder_for_synthetic_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root: expected None for .*'shapes'.*--data\.dataset folder"):
        build_dataset(DataConfig(root=str(tmp_path)), "train")


def test_exif_orientation_can_be_left_out(tmp_path):
    """Annotations drawn over the pixels as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, "train", "a.jpg", values(0, 1))
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "images/train/a.jpg", exif=exif)
    with pytest.raises(BrokenExampleError, match="--data.no-exif"):
        build(tmp_path)[0]
    assert build(tmp_path, exif=False)[0].size == SIZE


def test_an_example_has_the_annotated_classes(root):
    dataset = build(root)
    assert (len(dataset), dataset.task, dataset.metadata.name) == (2, "semantic", root.name)
    first, second = dataset[0], dataset[1]
    assert (first.image_id, second.image_id) == ("a/one.two", "b")
    assert second.path == str(root / "images/train/b.jpg")
    truth = values(0, 2, 255).astype(int)
    np.testing.assert_array_equal(second.id_map, np.where(truth == 255, VOID, truth))
    assert second.id_map.dtype == np.int32
    expected = [(c, c, (truth == c).sum()) for c in (0, 2)]
    assert [(s.id, s.category, s.area) for s in second.segments] == expected
    assert second.image.shape == (*SIZE, 3)
    with pytest.raises(IndexError):
        dataset[2]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[0].id_map, first.id_map)


def test_both_splits_have_the_classes_of_the_training_annotations(root):
    for split in ("train", "val"):
        assert build(root, split).metadata.class_names == ("class 0", "class 1", "class 2", "class 3")
    (root / "annotations/train").rename(root / "annotations/elsewhere")
    with pytest.raises(FileNotFoundError, match=r"annotations/train: .*classes\.json"):
        build(root, "val")


def test_the_ignored_value_is_not_a_class(root):
    write(root, "train", "b.jpg", values(0, 2, 3))
    dataset = build(root, ignore_index=0)
    assert dataset.metadata.category_ids == (1, 2, 3)
    raw = values(0, 2, 3).astype(int)
    np.testing.assert_array_equal(dataset[1].id_map, np.where(raw == 0, VOID, raw - 1))


def test_values_that_cannot_be_classes_are_refused(root):
    write(root, "train", "b.jpg", values(5, 30_000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"b\.png: expected class indices below 4096, got 30000"):
        build(root)
    for name in ("b.jpg", "a/one.two.PNG"):
        write(root, "train", name, values(255))
    with pytest.raises(ValueError, match="only ignored ones"):
        build(root)


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_from_classes_json(root, wrapped):
    classes = ["sky", {"name": "car", "isthing": 1, "color": [1, 2, 3]}, {"name": "x", "is_thing": True}, {"name": "y"}]
    (root / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": [255]} if wrapped else classes))
    metadata = build(root).metadata
    assert metadata.class_names == ("sky", "car", "x", "y")
    assert metadata.is_thing == (False, True, True, False)
    assert metadata.colors[1] == (1, 2, 3)
    assert [s.is_thing for s in build(root)[0].segments] == [True, False]


def test_pixel_values_from_classes_json(root):
    classes = [{"name": "late", "id": 300}, {"name": "early", "id": 7}]
    (root / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": [0, 1]}))
    raw = values(300, 7, 1, 0, dtype=np.uint16)
    write(root, "train", "b.jpg", raw)
    dataset = build(root)
    expected = np.select([raw == 300, raw == 7], [0, 1], VOID)
    np.testing.assert_array_equal(dataset[1].id_map, expected)
    assert dataset.metadata.category_ids == (300, 7)


@pytest.mark.parametrize(("content", "message"), [
    ("{", "malformed JSON"),
    ("[]", "expected a list of classes"),
    ('{"0": "a"}', r"expected a list of classes.* got \{'0': 'a'\}"),
    ('{"names": ["a"]}', "expected a list of classes"),
    ('["a", "a"]', "name: expected distinct values, got 'a' twice"),
    ('["a", 3]', r"classes\[1\]: expected a name or an object"),
    ('[{"id": 1}]', r"classes\[0\]: name"),
    ('[{"name": "a", "id": -1}]', "id: expected an integer"),
    ('[{"name": "a", "id": true}]', "id: expected an integer"),
    ('[{"name": "a", "thing": 1}]', "got 'thing'"),
    ('[{"name": "a", "isthing": 2}]', "isthing"),
    ('[{"name": "a", "color": [1, 2]}]', "color: expected three integers"),
    ('{"classes": ["a"], "ignore_index": "no"}', "ignore_index: expected integers"),
    ('{"classes": ["a"], "ignore_index": 0}', "no class's, got 0"),
    ('{"classes": ["a"], "ignore_index": 9, "void": 1}', "got 'void'"),
    ("9" * 5000, "malformed JSON"),
    ("[" * 100_000, "malformed JSON"),
])
def test_errors_in_classes_json_name_the_file(root, content, message):
    (root / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        build(root)
    assert str(root / "classes.json") in str(caught.value)


def test_the_error_of_unknown_values_counts_their_pixels(root):
    (root / "classes.json").write_text('["a", "b"]')
    with pytest.raises(BrokenExampleError, match=r"b\.png: expected values of the 2 classes.* got 2 \(18 pixels\)"):
        build(root)[1]
    assert build(root, "val")[0].id_map.max() == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
                   elements=st.sampled_from([0, 1, 2, 3, 40, 255, 256, 65535])),
    ids=st.lists(st.sampled_from([0, 2, 40, 256, 65535]), min_size=1, unique=True),
    ignore=st.sampled_from([1, 3, 255]),
)
def test_pixel_values_map_to_classes_like_a_dictionary(tmp_path, raw, ids, ignore):
    write(tmp_path, "train", "x.png", raw)
    classes = [{"name": f"n{i}", "id": i} for i in ids]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": ignore}))
    meaning = {ignore: VOID, **{value: index for index, value in enumerate(ids)}}
    dataset = build(tmp_path)
    if set(raw.ravel().tolist()) <= set(meaning):
        example = dataset[0]
        np.testing.assert_array_equal(example.id_map, np.vectorize(meaning.get)(raw))
        np.testing.assert_array_equal(example.semantic_map(), example.id_map)
        assert {s.id: s.area for s in example.segments} == {
            index: int((raw == value).sum()) for index, value in enumerate(ids) if (raw == value).any()
        }
    else:
        with pytest.raises(BrokenExampleError):
            dataset[0]


def test_an_annotation_of_another_size_is_refused(root):
    write(root, "train", "b.jpg", values(0, 2), size=(7, 9))
    with pytest.raises(BrokenExampleError, match=r"b\.png: .*size of its image, 7 x 9, got 6 x 9"):
        build(root)[1]
    write(root, "train", "b.jpg", values(0, 2), size=(9, 6))
    with pytest.raises(BrokenExampleError, match="EXIF"):
        build(root)[1]


def test_missing_annotations_are_listed_or_skipped(root, caplog):
    for index in range(12):
        write(root, "train", f"m{index}.jpg", values(0))
        (root / f"annotations/train/m{index}.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)12 images without annotation.*m0\.jpg.*and 4 more") as caught:
        build(root)
    assert str(root / "annotations/train/m0.png") in str(caught.value)
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        assert len(build(root, skip_broken=True)) == 2
    assert all(f"m{index}.jpg" in caplog.text for index in range(12))


def test_a_broken_annotation_is_an_error_unless_skipped(root):
    (root / "annotations/train/b.png").write_bytes(b"no image")
    with pytest.raises(BrokenExampleError, match=r"b\.png"):
        build(root)
    dataset = build(root, skip_broken=True)
    assert dataset.metadata.num_classes == 4
    with pytest.raises(BrokenExampleError, match=r"b\.png"):
        dataset[1]


def test_annotations_that_are_all_broken_are_an_error_that_says_so(root):
    for path in (root / "annotations/train").rglob("*.*"):
        path.write_bytes(b"x") if path.is_file() else None
    with pytest.raises(ValueError, match=r"2 that cannot be read, such as .*one\.two\.png: cannot be decoded"):
        build(root, skip_broken=True)


def test_names_are_matched_in_both_forms_of_unicode(root):
    write(root, "train", "\u00e4.png", values(0, 1))
    (root / "annotations/train/\u00e4.png").rename(root / "annotations/train/a\u0308.png")
    assert build(root)[2].segments[1].id == 1


def test_errors_name_missing_folders_and_files(root):
    with pytest.raises(FileNotFoundError, match=r"(?s)no folder .*images/test.*annotations/test"):
        build(root, train_split="test")
    (root / "images/empty").mkdir()
    (root / "annotations/empty").mkdir()
    (root / "images/empty/notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"images/empty: expected images .*\.jpg"):
        build(root, train_split="empty")
    Image.new("RGB", (3, 3)).save(root / "images/empty/x.jpg")
    with pytest.raises(FileNotFoundError, match=r"annotations/empty/x\.png"):
        build(root, train_split="empty", skip_broken=True)
    with pytest.raises(FileNotFoundError, match=r"data\.root: .*nowhere"):
        build(root / "nowhere")


def test_two_images_for_one_annotation_are_refused(root):
    write(root, "train", "b.png", values(0))
    with pytest.raises(ValueError, match=r"b\.png: expected one image for each annotation, got b\.jpg"):
        build(root)


@pytest.mark.parametrize(("options", "message"), [
    ({"dataset": "nope"}, r"data\.dataset: expected one of 'shapes', 'folder'"),
    ({"dataset": "folder"}, r"data\.root: expected the folder of data set 'folder', got None"),
    ({"dataset": "folder", "root": ".", "task": "panoptic"}, r"data\.task: expected one of 'semantic'"),
    ({"dataset": "shapes", "ignore_index": 3}, r"data\.ignore_index: expected None"),
])
def test_errors_name_the_configured_field(options, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(DataConfig(**options), "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        build_dataset(DataConfig(), "test")


def test_the_task_of_shapes_is_configurable():
    assert build_dataset(DataConfig(), "val").task == "panoptic"
    assert build_dataset(DataConfig(task="semantic"), "val").task == "semantic"
    assert build_dataset(DataConfig(), "val").task == "panoptic"


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs the CamVid sample")
def test_camvid_is_read_with_and_without_its_ignored_value():
    dataset = build(CAMVID, "val", ignore_index=11)
    assert (len(dataset), dataset.metadata.num_classes) == (101, 11)
    example = dataset[0]
    raw = np.asarray(Image.open(CAMVID / "annotations/val" / f"{example.image_id}.png")).astype(int)
    np.testing.assert_array_equal(example.id_map, np.where(raw == 11, VOID, raw))
    assert build(CAMVID, "val").metadata.num_classes == 12


def test_masks_of_0_and_255_need_a_class_list_or_an_ignored_value(root):
    for split, name in (("train", "b.jpg"), ("train", "a/one.two.PNG"), ("val", "v.webp")):
        write(root, split, name, values(0, 255))
    with pytest.raises(ValueError, match=r"only 0 and 255.*classes\.json.*data\.ignore_index"):
        build(root)
    assert build(root, ignore_index=255).metadata.num_classes == 1
    (root / "classes.json").write_text(
        json.dumps({"classes": [{"name": "ground", "id": 0}, {"name": "thing", "id": 255}], "ignore_index": []})
    )
    assert build(root).metadata.class_names == ("ground", "thing")


def mask_values(*parts: tuple[int, int]) -> np.ndarray:
    """Pixels of each (value, count), in rows of 20."""
    return np.concatenate([np.full(count, value, np.uint8) for value, count in parts]).reshape(-1, 20)


@pytest.mark.parametrize(("raw", "classes", "message"), [
    (mask_values((0, 100), (254, 100)), 255, "255 classes are inferred from the largest value, 254, but only 2 values "
                                            "occur: 0, 254. If they are no class indices, list the classes"),
    (mask_values((0, 100), (128, 50), (255, 50)), 129, "only 2 values occur: 0, 128."),
    (mask_values((0, 940), (255, 40), *((value, 20) for value in range(1, 255, 20))), 242, "only 14 values occur"),
    (mask_values((0, 40_000), (254, 40_000), *((value, 20) for value in range(1, 254))), 255,
     "255 classes are inferred, but 0, 254 have 90 % of the pixels: are the edges of masks smoothed"),
    (mask_values((3, 40)), 4, "only 1 values occur: 3"),
])
def test_values_that_are_no_indices_are_named_with_a_way_out(tmp_path, caplog, raw, classes, message):
    write(tmp_path, "train", "x.png", raw)
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        assert build(tmp_path).metadata.num_classes == classes
        build(tmp_path, "val", val_split="train")
    assert message in caplog.text
    assert "classes.json" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("raw", [
    mask_values((0, 10), (2, 10)),  # of 3 classes 2 occur
    mask_values(*((value, 40) for value in range(40))),
    mask_values(*((value, 20 * (value + 1)) for value in range(150))),
])
def test_indices_with_a_few_gaps_or_rare_classes_cause_no_warning(tmp_path, caplog, raw):
    write(tmp_path, "train", "x.png", raw)
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        build(tmp_path)
    assert not caplog.records


def test_255_stays_unlabelled_beside_another_ignored_value_unless_classes_are_so_many(root, caplog):
    write(root, "train", "b.jpg", values(0, 2, 255))
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        dataset = build(root, ignore_index=0)
    assert dataset.metadata.category_ids == (1, 2, 3)
    assert "pixels of value 255 stay unlabelled beside data.ignore_index 0" in caplog.text
    np.testing.assert_array_equal(dataset[1].id_map, np.where(values(0, 2, 255) == 2, 1, VOID))
    for more, dtype in ((254, np.uint8), (300, np.uint16)):
        write(root, "train", "b.jpg", values(0, 2, 255, more, dtype=dtype))
        assert 255 in build(root, ignore_index=0).metadata.category_ids


def test_annotations_without_labelled_pixels_are_logged(root, caplog):
    write(root, "train", "b.jpg", values(255))
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        build(root)
    assert "1 of 2 annotations have only unlabelled pixels (255): b.png" in caplog.text
