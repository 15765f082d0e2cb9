"""labelme's JSON files: kinds of shapes, groups, parts of a data set, malformed files."""

from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.config import DataConfig
from maskformer_fast.data import build_dataset


def shape(label: str, points: list[list[float]], kind: str = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def box(label: str, y: int, x: int, side: int, **more: Any) -> dict[str, Any]:
    return shape(label, [[x, y], [x + side, y], [x + side, y + side], [x, y + side]], **more)


def write(folder: Path, name: str, *shapes: dict[str, Any], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / f"{name}.png")
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png", "imageData": None,
               "imageHeight": 30, "imageWidth": 40, **more}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content))


def read(root: Path, split: str = "train", **options: Any):
    return build_dataset(DataConfig(dataset="labelme", root=str(root), **options), split)


def expected(y: int, x: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((30, 40), bool)
    mask[y : y + height, x : x + width] = True
    return mask


def test_all_kinds_of_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = np.zeros((4, 6), bool)
    small[1:3, 2:] = True
    file = io.BytesIO()
    Image.fromarray(small).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    write(
        tmp_path / "train", "a", box("dog", 2, 3, 5), shape("cat", [[10, 4], [20, 9]], "rectangle"),
        shape("cat", [[30, 15], [30, 25]], "circle"), shape("dog", [[1, 20], [7, 24]], "mask", mask=encoded),
        box("dog", 0, 20, 3, group_id=1), box("dog", 0, 30, 3, group_id=1), shape("cat", [[1, 1], [5, 5]], "line"),
        shape("cat", [[1, 1]], "point"), box("__ignore__", 0, 0, 9),
    )  # fmt: skip
    write(tmp_path / "val", "b", box("cat", 5, 5, 5))
    with caplog.at_level(logging.WARNING):
        example = read(tmp_path)[0]
    assert all(text in caplog.text for text in ("the shape 'line'", "the shape 'point'", "the label __ignore__"))
    assert read(tmp_path).metadata.class_names == read(tmp_path, "val").metadata.class_names == ("cat", "dog")
    masks = {(segment.category, mask.tobytes()) for segment, mask in zip(example.segments, example.masks, strict=True)}
    whole = np.zeros((30, 40), bool)
    whole[20:24, 1:7] = small
    for category, mask in ((1, expected(2, 3, 5, 5)), (0, expected(4, 10, 5, 10)), (1, whole),
                           (1, expected(0, 20, 3, 3) | expected(0, 30, 3, 3))):  # fmt: skip
        assert (category, mask.tobytes()) in masks
    round_ones = [mask for segment, mask in zip(example.segments, example.masks, strict=True) if mask[15, 29]]
    assert len(round_ones) == 1 and abs(int(round_ones[0].sum()) - 302) < 20  # pi * 10^2, cut by the image's edge
    assert len(example.segments) == 5


def test_a_folder_without_parts_has_every_tenth_file_for_validation(tmp_path: Path) -> None:
    for number in range(21):
        write(tmp_path, f"{number:02d}", box("dog", 1, 1, number % 5 + 2))
    assert read(tmp_path, "val").file_names == ["09.png", "19.png"] and len(read(tmp_path)) == 19


def test_classes_are_listed_or_sorted(tmp_path: Path) -> None:
    write(tmp_path / "train", "a", box("dog", 2, 3, 5), box("ant", 2, 3, 5))
    assert read(tmp_path).metadata.class_names == ("ant", "dog")
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ndog\ncat\nant\n")
    assert read(tmp_path).metadata.class_names == ("dog", "cat", "ant")
    write(tmp_path / "train", "b", box("cow", 2, 3, 5))
    with pytest.raises(ValueError, match=r"b\.json: label: expected one of dog, cat, ant, got 'cow'"):
        read(tmp_path)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"imagePath": "../../secret.png", "shapes": [box("dog", 1, 1, 5)]}, "imagePath"),
        ({"imagePath": 3, "shapes": [box("dog", 1, 1, 5)]}, "imagePath"), ({}, "expected labels"),
        ({"shapes": {"a": 1}}, "is it a file of labelme"), ({"shapes": [3]}, "is it a file of labelme"),
        ({"shapes": [shape("dog", [[1, 2], [3]])]}, "points"), ({"shapes": [shape("dog", None)]}, "points"),
        ({"shapes": [shape("dog", [[1, 2]], "mask", mask="???")]}, "PNG in base64"),
    ],
)  # fmt: skip
def test_malformed_files_are_named(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    write(tmp_path / "train", "a", **more)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("path", ["../images/a.png", "..\\images\\a.png", "C:\\data\\a.png", "/home/me/a.png"])
def test_the_image_may_be_in_another_folder_or_have_a_path_of_another_machine(tmp_path: Path, path: str) -> None:
    folder = "images" if "images" in path else "train"
    write(tmp_path / folder, "a", box("dog", 1, 1, 5))
    write(tmp_path / "train", "b", box("dog", 1, 1, 5), imagePath=path)
    (tmp_path / "train/b.png").unlink()
    assert Path(read(tmp_path)[-1 % len(read(tmp_path))].path).name == "a.png"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected labelme's JSON files"):
        read(tmp_path)
