"""The command that looks at a folder: every format, what is suspicious, the page, and a line that trains."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast import inspect_data, train
from maskformer_fast.config import DataConfig
from maskformer_fast.data.inspection.layouts import recognise
from maskformer_fast.data.inspection.measure import quartiles
from tests.data.datasets import test_voc as voc
from tests.docs.world import coco_folder, index_folder, labelme_folder, scenes, yolo_folder

STEPS = ("--solver.max-steps", "1", "--solver.batch-size", "2", "--data.workers", "0", "--log.checkpoint-every", "1",
         "--log.validate-every", "0", "--log.pictures", "0", "--device", "cpu")  # fmt: skip
W, H = 17, 12


def inspected(folder: Path, output: Path, *options: str) -> dict:
    assert inspect_data.main([str(folder), "-o", str(output), *options]) == 0
    return json.loads((output / "inspection.json").read_text())


def voc_folder(root: Path) -> None:
    names = [f"{number:02d}" for number in range(12)]
    voc.write(root, names, {"train": names[:9], "val": names[9:]})


def panoptic_folder(root: Path) -> None:
    coco_folder(root, scenes())


def instance_folder(root: Path) -> None:
    coco_folder(root, scenes(), ("instances",))


def label_studio_folder(root: Path) -> None:
    instance_folder(root)
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    shutil.rmtree(root / "annotations")
    found = {path.name: path for path in root.rglob("*.jpg")}
    (root / "images").mkdir(exist_ok=True)
    for image in content["images"]:
        name = Path(image["file_name"]).name
        shutil.copy(found[name], root / "images" / f"a b-{name}")
        image["file_name"] = f"/data/upload/3/a%20b-{name}"
    (root / "result.json").write_text(json.dumps(content))


MAKERS = {
    "coco_panoptic": panoptic_folder,
    "coco_instances": instance_folder,
    "yolo": lambda root: yolo_folder(root, scenes()),
    "labelme": lambda root: labelme_folder(root, scenes()),
    "voc": voc_folder,
    "folder": lambda root: index_folder(root, scenes(), 255),
    "label studio": label_studio_folder,
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in ("voc", "coco_panoptic")
                                               else []) for kind in MAKERS])  # fmt: skip
def test_the_line_trains_on_what_was_found(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "my data; rm -rf"
    root.mkdir()
    MAKERS[kind](root)
    report = inspected(root, tmp_path / "report")
    assert report["format"] == kind.replace("label studio", "coco_instances")
    assert report["parts"][0]["objects"] > 0 and sum(row["train: objects"] for row in report["classes"]) > 0
    assert (tmp_path / "report" / "inspection.png").stat().st_size > 1000
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == report["recipe"]
    words = shlex.split(printed)
    assert words[:3] == ["python", "-m", "maskformer_fast.train"]
    place = words.index("--output") + 1
    words[place] = str(tmp_path / words[place])
    assert train.main([*words[3:], *STEPS]) == 0


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    images, labels = [], []
    for number in range(3):
        image = generator.integers(0, 256, (H + number, W, 3)).astype(np.uint8)
        values = generator.choice([0, 1, 255], (H + number, W)).astype(np.uint8)
        for folder, array in (("images", image), ("annotations", values)):
            (tmp_path / folder / "train").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / "train" / f"{number}.png")
        images.append(image.reshape(-1, 3))
        labels.append(values)
    report = inspected(tmp_path, tmp_path / "out")
    pixels = np.concatenate(images).astype(np.float64)
    for number, row in enumerate(report["channels"]):
        assert row["mean"] == pytest.approx(pixels[:, number].mean(), abs=1e-3)
        assert row["deviation"] == pytest.approx(pixels[:, number].std(), abs=1e-3)
    assert [row["train: pixels"] for row in report["classes"]] == [sum((v == c).sum() for v in labels) for c in (0, 1)]
    assert report["parts"][0]["picture's height"] == {"min": 12, "25%": 12.5, "median": 13, "75%": 13.5, "max": 14}
    assert report["parts"][0]["files"] == {"PNG, 3 x 8 bits": 3}
    assert any("no validation part" in line for line in report["problems"])
    assert "--data.val-split train" in report["recipe"]


def test_what_is_suspicious_is_told(tmp_path: Path) -> None:
    root = tmp_path / "yolo"
    yolo_folder(root, scenes())
    images, labels = root / "images" / "train", root / "labels" / "train"
    shutil.copy(images / "1.jpg", root / "images" / "val" / "0.jpg")  # a picture of training in validation
    shutil.copy(images / "1.jpg", images / "same.jpg")
    (labels / "same.txt").write_text("0 0.5 0.5 0.51 0.5 0.51 0.52\n0 0.1 0.1 0.2 0.2\n")
    (labels / "alone.txt").write_text("0 0.1 0.1 0.4 0.1 0.4 0.5\n")
    (labels / "2.txt").unlink()
    content = (images / "3.jpg").read_bytes()
    (images / "3.jpg").write_bytes(content[: len(content) // 2])
    text = "\n".join(inspected(root, tmp_path / "out")["problems"])
    for expected in (
        "1 files of train cannot be used: ", "3.jpg", "1 pictures of train without an object: ", "2.jpg",
        "objects of train of at most 16 pixels, in: ", "groups of equal pictures in train", "1.jpg = ",
        "pictures of validation that are in training, too", "1 pictures without a label file", "2.txt",
        "1 label files without a picture: ", "alone.txt", "no outline (only a box?)",
        "classes with fewer than 10 objects in training", "classes without an object in val: car",
    ):  # fmt: skip
        assert expected in text, expected
    assert "--data.skip-broken" in json.loads((tmp_path / "out" / "inspection.json").read_text())["recipe"]


@pytest.mark.parametrize("kind", ["yolo", "folder"])
def test_what_only_opening_finds_is_skipped_by_the_line(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "set"
    MAKERS[kind](root)
    assert "skip-broken" not in inspected(root, tmp_path / "before")["recipe"]
    (root / "images" / "train" / "x.jpg").write_bytes(b"no image")  # without a label, and without a header
    report = inspected(root, tmp_path / "after")
    assert "--data.skip-broken" in report["recipe"] and "x.jpg" in "\n".join(report["problems"])


def test_outlines_that_leave_the_picture_and_many_objects(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    instance_folder(root)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    one = content["annotations"][0] | {"segmentation": [[-9, 2, 12, 2, 12, 12, -9, 12]]}
    content["annotations"] += [one | {"id": 1000 + number} for number in range(120)]
    path.write_text(json.dumps(content))
    report = inspected(root, tmp_path / "out")
    assert any(line.startswith("120 objects of train with an outline that leaves") for line in report["problems"])
    most = int(report["parts"][0]["objects a picture"]["max"])
    assert f"--model.decoder.num-queries {-(-most // 10) * 10} --test.top-k" in report["recipe"]


def test_texts_of_files_are_escaped_on_the_page(tmp_path: Path) -> None:
    root = tmp_path / "<b>x"
    labelme_folder(root, scenes())
    for path in root.rglob("*.json"):
        path.write_text(path.read_text().replace('"car"', '"<script>alert(1)</script>"'))
    inspected(root, tmp_path / "out")
    page = (tmp_path / "out" / "inspection.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "<b>x" not in page
    assert 'src="data:image/jpeg;base64,' in page and "http" not in page.replace("http-equiv", "")


def test_a_folder_of_nothing_known_has_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(FileNotFoundError, match="no data set recognised; looked for COCO .*YOLO .*labelme .*VOC"):
        inspect_data.main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="folder: expected a folder of images and labels"):
        inspect_data.main([str(tmp_path / "none")])
    with pytest.raises(ValueError, match="limit: expected a positive number"):
        inspect_data.main([str(tmp_path), "--limit", "0"])


@pytest.mark.parametrize(
    "files, expected",
    [
        (["train/_annotations.coco.json", "valid/_annotations.coco.json"], ("coco_instances", "train", "val")),
        (["annotations/instances_default.json"], ("coco_instances", "train", "val")),
        (["annotations/instances_a.json", "annotations/instances_b.json"], ("coco_instances", "a", "a")),
        (["annotations/instances_train2017.json", "annotations/instances_val2017.json"],
         ("coco_instances", "train", "val")),
        (["result.json", "images/a.jpg"], ("coco_instances", "train", "val")),
        (["annotations/instances_Train.json", "annotations/instances_Validation.json",
          "annotations/instances_Test.json"], ("coco_instances", "Train", "Validation")),  # CVAT's names of parts
        (["JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/Train.txt",
          "ImageSets/Segmentation/Test.txt"], ("voc", "Train", "Test")),
        (["leftImg8bit/train/a/a.png", "gtFine/train/a/a.png"], ("cityscapes", "train", "val")),
        (["training/images/a.jpg", "training/labels/a.png"], ("mapillary_vistas", "train", "val")),
        (["objectInfo150.txt", "images/training/a.jpg", "annotations/training/a.png"], ("ade20k_150", "train", "val")),
        (["images/training/a.jpg", "annotations/training/a.png", "images/validation/a.jpg",
          "annotations/validation/a.png"], ("folder", "training", "validation")),
        (["images/a.jpg", "annotations/a.png"], ("folder", ".", ".")),
        (["train/_classes.csv", "valid/_classes.csv"], ("folder", "train", "val")),
        (["JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/default.txt"],
         ("voc", "train", "val")),
    ],
)  # fmt: skip
def test_layouts_are_recognised(tmp_path: Path, files: list[str], expected: tuple[str, str, str]) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found: DataConfig = recognise(tmp_path)
    assert (found.dataset, found.train_split, found.val_split) == expected


def test_an_export_of_cvat_with_its_names_of_parts_trains(tmp_path: Path) -> None:
    root = tmp_path / "cvat"
    instance_folder(root)
    (root / "images").mkdir()
    for split, name in (("train", "Train"), ("val", "Validation")):
        (root / "annotations" / f"instances_{split}.json").rename(root / "annotations" / f"instances_{name}.json")
        (root / split).rename(root / "images" / name)
    report = inspected(root, tmp_path / "out")
    assert [part["split"] for part in report["parts"]] == ["Train", "Validation"]
    assert all(part["read"] == 4 and part["objects"] > 0 for part in report["parts"])
    options = shlex.split(report["recipe"])[3:]
    options[options.index("--output") + 1] = str(tmp_path / "run")
    assert train.main([*options, *STEPS]) == 0


def test_yolo_without_its_names_says_what_to_write(tmp_path: Path) -> None:
    yolo_folder(tmp_path, scenes())
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"texts in labels look like YOLO's.*data\.yaml.*names: \[car, bus\]"):
        recognise(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [car, bus]")
    assert recognise(tmp_path).dataset == "yolo"


def test_labelme_files_that_cannot_be_used_are_told_and_the_line_skips_them(tmp_path: Path) -> None:
    root = tmp_path / "set"
    labelme_folder(root, scenes())
    for number, path in enumerate(sorted(root.rglob("*.json"))):  # keys in another order: the image comes first
        content = json.loads(path.read_text())
        path.write_text(json.dumps({"imageData": "eA==" * 30_000 if number < 6 else None, **content}))
    (root / "train" / "1.json").write_text('{"shapes": [{"label": "car", "points": [[1,')
    (root / "val" / "2.json").write_text((root / "val" / "2.json").read_text().replace('"car"', '"van"'))
    (root / "val" / "3.jpg").unlink()
    report = inspected(root, tmp_path / "out")
    assert [part["read"] for part in report["parts"]] == [3, 2]
    text = "\n".join(report["problems"])
    for expected in ("1.json: malformed JSON", "2.json: label: expected one of car, got 'van'", "labels.txt",
                     "1 files of val cannot be used", "3.jpg: no such file"):  # fmt: skip
        assert expected in text, expected
    options = shlex.split(report["recipe"])[3:]
    assert "--data.skip-broken" in options
    options[options.index("--output") + 1] = str(tmp_path / "run")
    assert train.main([*options, *STEPS]) == 0


def test_quartiles_of_few_numbers() -> None:
    assert quartiles([]) == {} and quartiles([3.0])["max"] == 3
