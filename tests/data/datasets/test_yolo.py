"""YOLO's labels: layouts of several tools, outlines in pixels, malformed files."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.config import DataConfig
from maskformer_fast.data import BrokenExampleError, build_dataset

SQUARE = "1 0.25 0.5 0.75 0.5 0.75 1 0.25 1"
WHOLE = "0 0 0 1 0 1 1 0 1"


def write(root: Path, labels: dict[str, str | None], images: str, texts: str, size: tuple[int, int] = (40, 20)) -> None:
    for name, text in labels.items():
        image, label = root / images / f"{name}.png", root / texts / f"{name}.txt"
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(image)
        if text is not None:
            label.write_text(text)


def read(root: Path, split: str = "train", **options):
    return build_dataset(DataConfig(dataset="yolo", root=str(root), **options), split)


@pytest.mark.parametrize(
    "description, images, labels",
    [
        ("names: [car, bus]\ntrain: images/train\nval: images/val", "images/{}", "labels/{}"),  # ultralytics
        ("names: {0: car, 1: bus}\npath: .\ntrain: images/train\nval: images/val", "images/{}", "labels/{}"),
        ("names: [car, bus]\ntrain: ../train/images\nval: ../valid/images", "{}/images", "{}/labels"),  # Roboflow
        ("names: [car, bus]", "images/{}", "labels/{}"),
    ],
)
def test_layouts_of_tools(tmp_path: Path, description: str, images: str, labels: str) -> None:
    (tmp_path / "data.yaml").write_text(description)
    for split in ("train", "val"):
        folder = "valid" if "valid" in description and split == "val" else split
        write(tmp_path, {"b": SQUARE, "a": f"{WHOLE}\n\n{SQUARE}\n"}, images.format(folder), labels.format(folder))
        dataset = read(tmp_path, split)
        assert dataset.metadata.class_names == ("car", "bus") and all(dataset.metadata.is_thing)
        first, second = dataset[0], dataset[1]
        assert [segment.category for segment in first.segments] == [0, 1]
        expected = np.zeros((20, 40), bool)
        expected[10:, 10:30] = True
        assert first.masks is not None and first.masks[0].all() and (first.masks[1] == expected).all()
        assert second.masks is not None and (second.masks == expected).all()


def test_a_list_of_images_and_images_without_labels(tmp_path: Path) -> None:
    write(tmp_path, {"a": SQUARE, "b": None, "c": "", "d": SQUARE}, "images", "labels")
    (tmp_path / "train.txt").write_text("./images/a.png\nimages/b.png\n\nimages/c.png\n")
    (tmp_path / "set.yml").write_text("names: [car, bus]\ntrain: train.txt\nval: images")
    assert [len(read(tmp_path)[index].segments) for index in range(3)] == [1, 0, 0]
    assert len(read(tmp_path, keep_empty=False)) == 1 and len(read(tmp_path, "val")) == 4


def test_an_export_of_cvat(tmp_path: Path) -> None:
    """Names of parts with a capital letter, and lists whose paths begin with a folder that is not there."""
    for part in ("Train", "Validation"):
        write(tmp_path, {f"{part}1": SQUARE, f"{part}2": WHOLE}, f"images/{part}", f"labels/{part}")
        lines = [f"data/images/{part}/{part}{number}.png\n" for number in (1, 2)]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    (tmp_path / "data.yaml").write_text("Train: Train.txt\nValidation: Validation.txt\nnames: [car, bus]\npath: .")
    for split, part in (("train", "Train"), ("val", "Validation")):
        dataset = read(tmp_path, split)
        assert dataset.file_names == [f"images/{part}/{part}{number}.png" for number in (1, 2)]
        assert [dataset[index].segments[0].category for index in (0, 1)] == [1, 0]


def test_boxes_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data.yaml").write_text("names: [car, bus]\ntrain: images\nval: images")
    write(tmp_path, {"a": f"{SQUARE}\n0 0.5 0.5 0.2 0.2"}, "images", "labels")
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path)[0].segments) == 1
    assert "1 with no outline" in caplog.text


def test_turned_images_have_turned_labels(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("names: [car, bus]\ntrain: images\nval: images")
    write(tmp_path, {"a": SQUARE}, "images", "labels")
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images/a.png").unlink()
    Image.new("RGB", (40, 20)).save(tmp_path / "images/a.jpg", exif=exif)
    example = read(tmp_path)[0]
    assert example.size == (40, 20) and example.masks is not None and example.masks[0].sum() == 20 * 10
    assert read(tmp_path, exif=False)[0].size == (20, 40)


@pytest.mark.parametrize(
    "line, message",
    [
        ("2 0 0 1 0 1 1", "class: expected 0 to 1, got 2"),
        ("0.5 0 0 1 0 1 1", "class: expected 0 to 1"),
        ("0 0 0 1 0 1", "got 5 numbers"),
        ("0 0 0 1", "got 3 numbers"),
        ("0 0 0 30 0 30 20", "between 0 and 1"),
        ("0 0 0 nan 0 1 1", "between 0 and 1"),
        ("car 0 0 1 0 1 1", "expected numbers"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text("names: [car, bus]\ntrain: images\nval: images")
    write(tmp_path, {"a": f"{SQUARE}\n{line}"}, "images", "labels")
    with pytest.raises(ValueError, match=rf"a\.txt:2: .*{message}"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("names: 3", "names"), ("train: images", "names"), ("names: {0: a, 2: b}", "numbers 0 to 1"),
        ("[1, 2]", "expected keys"), ("names: [a\n", "malformed YAML"), ("!!python/object:os.system {}", "malformed"),
    ],
)  # fmt: skip
def test_a_malformed_description_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.yaml"):
        read(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [car, bus]\ntrain: pictures")
    with pytest.raises(FileNotFoundError, match="pictures"):
        read(tmp_path)
    write(tmp_path, {"a": SQUARE}, "pictures", "pictures")
    (tmp_path / "pictures/b.png").write_bytes(b"no picture")
    with pytest.raises(BrokenExampleError, match=r"b\.png"):
        read(tmp_path)
    assert len(read(tmp_path, skip_broken=True)) == 1


def test_an_image_whose_labels_are_malformed_can_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data.yaml").write_text("names: [car, bus]\ntrain: images\nval: images")
    write(tmp_path, {"a": SQUARE, "b": f"{SQUARE}\n7 0 0 1 0 1 1", "c": WHOLE}, "images", "labels")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, skip_broken=True).file_names == ["images/a.png", "images/c.png"]
    assert "left out" in caplog.text and "b.txt:2: class: expected 0 to 1, got 7" in caplog.text
