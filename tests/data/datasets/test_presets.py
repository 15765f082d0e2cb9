"""Each preset with a few files in the layout of the real data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.config import DataConfig
from maskformer_fast.core.metadata import VOID
from maskformer_fast.data import BrokenExampleError, build_dataset, dataset_metadata
from maskformer_fast.data.datasets.presets import INDEX_PRESETS, PRESETS
from tests.support.paths import SHARED

SHARED_DATA = SHARED / "data"
SIZE = (5, 8)

# Preset -> number of classes, number of things, some names by index.
CLASSES = {
    "ade20k_150": (150, 100, {0: "wall", 12: "person", 19: "chair", 149: "flag"}),
    "ade20k_full_847": (847, 0, {0: "wall", 12: "grass", 846: "adding machine, totalizer, totaliser"}),
    "ade20k_instances": (100, 100, {0: "bed", 3: "person", 4: "door", 99: "flag"}),
    "ade20k_panoptic": (150, 100, {0: "wall", 7: "bed", 149: "flag"}),
    "camvid": (11, 3, {0: "sky", 3: "road", 10: "bicyclist"}),
    "cityscapes": (19, 8, {0: "road", 11: "person", 18: "bicycle"}),
    "cityscapes_instances": (8, 8, {0: "person", 2: "car", 7: "bicycle"}),
    "cityscapes_panoptic": (19, 8, {0: "road", 13: "car"}),
    "coco_panoptic_133": (133, 80, {0: "person", 79: "toothbrush", 80: "banner", 132: "rug-merged"}),
    "coco_stuff_10k": (171, 80, {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"}),
    "mapillary_vistas": (65, 37, {0: "bird", 27: "sky", 55: "car", 64: "ego vehicle"}),
}


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (10, 20, 30)).save(path)


def index_image(path: Path, *values: int, kind: type = np.uint8, palette: bool = False) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = np.resize(np.array(values, kind), SIZE)
    picture = Image.fromarray(raw)
    if palette:
        picture = Image.frombytes("P", SIZE[::-1], raw.tobytes())
        picture.putpalette([7, 7, 7] * 66)
    picture.save(path)
    return raw


def build(name, root, split="train", **options):
    return build_dataset(DataConfig(dataset=name, root=None if root is None else str(root), **options), split)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_classes(name):
    count, things, names = CLASSES[name]
    metadata = dataset_metadata(DataConfig(dataset=name))
    assert (metadata.name, metadata.num_classes, sum(metadata.is_thing)) == (name, count, things)
    assert {index: metadata.class_names[index] for index in names} == names
    assert len(set(metadata.class_names)) == len(set(metadata.category_ids)) == count
    assert all(text == text.strip() for text in metadata.class_names)


def test_index_presets_are_presets():
    assert set(INDEX_PRESETS) == {name for name in PRESETS if "panoptic" not in name and "instances" not in name}


# Preset -> {split: (image, annotation)}, pixel values, their classes, options of `index_image`.
SEMANTIC = {
    "ade20k_150": (
        {"train": ("images/training/ADE_train_1.jpg", "annotations/training/ADE_train_1.png"),
         "val": ("images/validation/ADE_val_1.jpg", "annotations/validation/ADE_val_1.png")},
        (0, 1, 13, 150), (VOID, 0, 12, 149), {},
    ),
    "ade20k_full_847": (
        {"train": ("images_detectron2/training/a.jpg", "annotations_detectron2/training/a.tif"),
         "val": ("images_detectron2/validation/b.jpg", "annotations_detectron2/validation/b.tif")},
        (0, 255, 846, 65535), (0, 255, 846, VOID), {"kind": np.uint16},
    ),
    "camvid": (
        {"train": ("images/train/a.png", "annotations/train/a.png"),
         "val": ("images/val/b.png", "annotations/val/b.png")},
        (0, 10, 11), (0, 10, VOID), {},
    ),
    "cityscapes": (
        {split: (f"leftImg8bit/{split}/ulm/ulm_000000_000019_leftImg8bit.png",
                 f"gtFine/{split}/ulm/ulm_000000_000019_gtFine_labelIds.png") for split in ("train", "val")},
        (0, 3, 7, 9, 11, 26, 29, 33), (VOID, VOID, 0, VOID, 2, 13, VOID, 18), {},
    ),
    "coco_stuff_10k": (
        {"train": ("images_detectron2/train/a.jpg", "annotations_detectron2/train/a.png"),
         "val": ("images_detectron2/test/b.jpg", "annotations_detectron2/test/b.png")},
        (0, 80, 170, 255), (0, 80, 170, VOID), {},
    ),
    "mapillary_vistas": (
        {"train": ("training/images/a.jpg", "training/labels/a.png"),
         "val": ("validation/images/b.jpg", "validation/labels/b.png")},
        (0, 64, 65), (0, 64, VOID), {"palette": True},
    ),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", SEMANTIC)
def test_semantic_presets_read_their_layout(tmp_path, name, split):
    files, values, expected, options = SEMANTIC[name]
    for image_file, annotation in files.values():
        image(tmp_path / image_file)
        raw = index_image(tmp_path / annotation, *values, **options)
    # Other files of the real folders must not be read as annotations.
    if name == "cityscapes":
        index_image(tmp_path / f"gtFine/{split}/ulm/ulm_000000_000019_gtFine_instanceIds.png", 7)
    dataset = build(name, tmp_path, split)
    assert (len(dataset), dataset.task, dataset.metadata.name) == (1, "semantic", name)
    assert dataset.metadata == dataset_metadata(DataConfig(dataset=name))
    example = dataset[0]
    assert example.path == str(tmp_path / files[split][0])
    np.testing.assert_array_equal(example.id_map, np.vectorize(dict(zip(values, expected, strict=True)).get)(raw))


@pytest.mark.parametrize("name", SEMANTIC)
def test_unknown_values_are_errors(tmp_path, name):
    files, _, _, options = SEMANTIC[name]
    image_file, annotation = files["train"]
    image(tmp_path / image_file)
    index_image(tmp_path / annotation, 200 if name != "ade20k_full_847" else 847, **options)
    with pytest.raises(BrokenExampleError, match="got (200|847) "):
        build(name, tmp_path)[0]
    assert (build(name, tmp_path, ignore_index=200 if name != "ade20k_full_847" else 847)[0].id_map == VOID).all()


def test_cityscapes_reads_train_ids_if_there_are_no_label_ids(tmp_path):
    image(tmp_path / "leftImg8bit/val/ulm/ulm_1_2_leftImg8bit.png")
    raw = index_image(tmp_path / "gtFine/val/ulm/ulm_1_2_gtFine_labelTrainIds.png", 0, 18, 255)
    dataset = build("cityscapes", tmp_path, "val")
    np.testing.assert_array_equal(dataset[0].id_map, np.where(raw == 255, VOID, raw.astype(int)))
    assert dataset[0].image_id == "ulm/ulm_1_2"


def categories(name, contiguous):
    metadata = dataset_metadata(DataConfig(dataset=name))
    ids = range(metadata.num_classes) if contiguous else metadata.category_ids
    columns = zip(ids, metadata.class_names, metadata.is_thing, strict=True)
    return [{"id": i, "name": text, "isthing": int(thing)} for i, text, thing in columns]


def panoptic(root, json_path, image_id, listed, image_file, name, contiguous=False, png="x_panoptic.png"):
    cats = categories(name, contiguous)
    ids = np.resize(np.array([0, 26_001, 300]), SIZE)
    folder = root / Path(json_path).with_suffix("")
    folder.mkdir(parents=True)
    Image.fromarray(np.stack([ids % 256, ids // 256, ids * 0], -1).astype(np.uint8)).save(folder / png)
    segments = [{"id": 26_001, "category_id": cats[-1]["id"]}, {"id": 300, "category_id": cats[0]["id"]}]
    (root / json_path).write_text(json.dumps({
        "images": [{"id": image_id, "file_name": listed, "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"image_id": image_id, "file_name": png, "segments_info": segments}],
        "categories": cats,
    }))
    image(root / image_file)
    return np.where(ids == 0, VOID, ids)


CITY = ("gtFine/cityscapes_panoptic_val{}.json", "ulm_1_2", "ulm_1_2_gtFine_leftImg8bit.png",
        "leftImg8bit/val/ulm/ulm_1_2_leftImg8bit.png", "cityscapes_panoptic")
PANOPTIC = [
    ((CITY[0].format(""), *CITY[1:]), False),
    ((CITY[0].format("_trainId"), *CITY[1:]), True),
    (("ade20k_panoptic_val.json", "ADE_val_1", "ADE_val_1.jpg", "images/validation/ADE_val_1.jpg", "ade20k_panoptic"),
     True),
    (("annotations/panoptic_val2017.json", 7, "7.jpg", "val2017/7.jpg", "coco_panoptic_133"), False),
]


@pytest.mark.parametrize(("arguments", "contiguous"), PANOPTIC, ids=lambda value: str(value)[:30])
def test_panoptic_presets_read_their_layout(tmp_path, arguments, contiguous):
    name = arguments[-1]
    expected = panoptic(tmp_path, *arguments, contiguous)
    dataset = build(name, tmp_path, "val")
    assert (dataset.task, dataset.metadata.name) == ("panoptic", name)
    assert dataset.metadata.is_thing == dataset_metadata(DataConfig(dataset=name)).is_thing
    example = dataset[0]
    np.testing.assert_array_equal(example.id_map, expected)
    assert [s.category for s in example.segments] == [dataset.metadata.num_classes - 1, 0]
    assert example.path == str(tmp_path / arguments[3])
    assert build(name, tmp_path, "val", task="semantic").task == "semantic"


def test_cityscapes_instances_are_the_things_of_the_panoptic_truth(tmp_path):
    ids = panoptic(tmp_path, *PANOPTIC[0][0])  # 26,001 is a bicycle, 300 is road
    dataset = build("cityscapes_instances", tmp_path, "val")
    published = dataset_metadata(DataConfig(dataset="cityscapes_instances"))  # the file has no colours
    for field in ("class_names", "category_ids", "is_thing"):
        assert getattr(dataset.metadata, field) == getattr(published, field)
    assert (dataset.task, len(dataset), len(dataset.file_names)) == ("instance", 1, 1)
    example = dataset[0]
    np.testing.assert_array_equal(example.id_map, np.where(ids == 26_001, ids, VOID))
    (bicycle,) = example.segments
    assert (bicycle.id, bicycle.category, bicycle.is_thing, bicycle.area) == (26_001, 7, True, (ids == 26_001).sum())
    with pytest.raises(ValueError, match=r"data\.task: expected one of 'instance'"):
        build("cityscapes_instances", tmp_path, "val", task="panoptic")


@pytest.mark.parametrize("split", ["train", "val"])
def test_ade20k_instances_read_their_layout(tmp_path, split):
    pytest.importorskip("pycocotools")
    metadata = dataset_metadata(DataConfig(dataset="ade20k_instances"))
    folder = {"train": "training", "val": "validation"}[split]
    image(tmp_path / f"images/{folder}/ADE_1.jpg")
    content = {
        "images": [{"id": 1, "file_name": "ADE_1.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": metadata.category_ids[4], "iscrowd": 0,
                         "segmentation": [[0, 0, 4, 0, 4, 5, 0, 5]]}],
        "categories": [{"id": number, "name": name}
                       for number, name in zip(metadata.category_ids, metadata.class_names, strict=True)],
    }
    path = tmp_path / f"ade20k_instance_{split}.json"
    path.write_text(json.dumps(content))
    dataset = build("ade20k_instances", tmp_path, split)
    assert (dataset.task, dataset.metadata.num_classes) == ("instance", 100)
    assert dataset.metadata.class_names == metadata.class_names
    example = dataset[0]
    assert [segment.category for segment in example.segments] == [4] and example.masks[0, :, :4].all()
    del content["categories"][0]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="categories: expected the 100 of ade20k_instances, got 99"):
        build("ade20k_instances", tmp_path, split)


def test_panoptic_presets_check_the_number_of_classes(tmp_path):
    panoptic(tmp_path, *PANOPTIC[3][0])
    path = tmp_path / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    del content["categories"][100]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json: categories: expected the 133 .*, got 132"):
        build("coco_panoptic_133", tmp_path, "val")
    assert build("coco_panoptic", tmp_path, "val").metadata.num_classes == 132


@pytest.mark.parametrize("name", PRESETS)
def test_the_error_of_a_wrong_root_lists_the_searched_paths(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="looked for") as caught:
        build(name, tmp_path)
    assert str(caught.value).count(str(tmp_path)) >= (1 if name in ("ade20k_panoptic", "ade20k_instances") else 2)


@pytest.mark.parametrize("name", PRESETS)
def test_the_root_may_come_from_the_environment(tmp_path, name, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    with pytest.raises(ValueError, match=rf"data\.root: .*'{name}' \(or \$DETECTRON2_DATASETS"):
        build(name, None)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"\$DETECTRON2_DATASETS: .*{PRESETS[name].folder}"):
        build(name, None)
    (tmp_path / PRESETS[name].folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="looked for"):
        build(name, None)


def test_semantic_presets_refuse_other_tasks(tmp_path):
    for name in INDEX_PRESETS:
        with pytest.raises(ValueError, match=r"data\.task"):
            build(name, tmp_path, task="panoptic")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the samples of real data sets")
def test_presets_read_real_samples():
    camvid = build("camvid", SHARED_DATA / "camvid")
    assert (len(camvid), len(build("camvid", SHARED_DATA / "camvid", "val"))) == (367, 101)
    assert camvid[0].id_map.max() <= 10
    coco = build("coco_panoptic_133", SHARED_DATA / "coco_panoptic_sample", "val")
    assert coco.metadata == dataset_metadata(DataConfig(dataset="coco_panoptic_133"))
    assert len(coco[1].segments) > 10
