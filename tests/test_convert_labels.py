"""Data sets in other tools' formats: pixels and corners that come back, parts that overlap, splits, broken files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast import convert_labels
from maskformer_fast.config import DataConfig
from maskformer_fast.data import build_dataset
from tests.docs.world import coco_folder, labelme_folder, scenes, yolo_folder

FOLDERS = {"coco": "coco_instances", "yolo": "yolo", "labelme": "labelme"}
W, H = 50, 41


def coco(root: Path, outlines: list[object]) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        Image.new("RGB", (W, H)).save(root / split / "a.png")
        annotations = [{"id": number, "image_id": 1, "category_id": 5 + number % 2, "segmentation": outline}
                       for number, outline in enumerate(outlines)]  # fmt: skip
        content = {"images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}], "annotations": annotations,
                   "categories": [{"id": 5, "name": "a"}, {"id": 6, "name": "b"}]}  # fmt: skip
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def masks_of(dataset: str, root: Path, split: str = "train") -> list[tuple[int, bytes]]:
    example = build_dataset(DataConfig(dataset=dataset, root=str(root)), split)[0]  # type: ignore[arg-type]
    assert example.masks is not None
    return sorted((s.category, mask.tobytes()) for s, mask in zip(example.segments, example.masks, strict=True))


def outlines() -> list[object]:
    generator = np.random.default_rng(2)
    center = np.array([25.0, 20.0])
    angles = np.sort(generator.uniform(0, 2 * np.pi, 30))
    star = center + np.stack([np.cos(angles), np.sin(angles)], 1) * generator.uniform(4, 18, (30, 1))
    blob = np.zeros((H, W), bool)
    blob[5:30, 5:40] = True
    blob[10:20, 12:20] = False
    runs = np.diff([0, *np.flatnonzero(np.diff(blob.T.ravel().astype(int))) + 1, blob.size]).tolist()
    return [
        [star.round(2).ravel().tolist()],
        [[2, 2, 20, 2, 20, 20, 2, 20], [10, 10, 30, 10, 30, 30, 10, 30]],  # parts that overlap
        [[1, 1, 4, 1, 4, 4], [40, 30, 48, 30, 48, 39.5, 40, 39.5]],
        {"size": [H, W], "counts": runs},
    ]


@pytest.mark.parametrize("kind", FOLDERS)
def test_masks_come_back_in_every_format(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco(tmp_path / "in", outlines())
    assert convert_labels.main([str(root), str(tmp_path / "out"), "--to", kind]) == 0
    assert "(coco_instances) written as" in capsys.readouterr().out
    for split in ("train", "val"):
        expected, got = masks_of("coco_instances", root, split), masks_of(FOLDERS[kind], tmp_path / "out" / kind, split)
        assert [category for category, _ in got] == [category for category, _ in expected] == [0, 0, 1, 1]
        assert [mask for _, mask in got] == [mask for _, mask in expected]
    again = tmp_path / "again"
    assert convert_labels.main([str(tmp_path / "out" / kind), str(again), "--to", "coco"]) == 0
    assert masks_of("coco_instances", again / "coco", "val") == masks_of("coco_instances", root, "val")


def test_segments_of_index_and_panoptic_images_become_outlines(tmp_path: Path) -> None:
    coco_folder(tmp_path / "in", scenes())
    assert convert_labels.main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "yolo", "geojson"]) == 0
    truth = build_dataset(DataConfig(dataset="coco_panoptic", root=str(tmp_path / "in")), "train")[0]
    got = build_dataset(DataConfig(dataset="yolo", root=str(tmp_path / "out" / "yolo")), "train")[0]
    assert got.masks is not None
    pairs = sorted((s.category, mask.tobytes()) for s, mask in zip(got.segments, got.masks, strict=True))
    wanted = [(s.category, truth.segment_masks([s])[0].tobytes()) for s in truth.segments]
    assert pairs == sorted(wanted) and len(list((tmp_path / "out" / "geojson" / "val").iterdir())) == 4


def test_broken_files_are_listed_and_a_full_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelme_folder(tmp_path / "in", scenes())
    (tmp_path / "in" / "train" / "1.jpg").write_bytes(b"no image")
    assert convert_labels.main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "coco"]) == 1
    assert "1.jpg: cannot be decoded" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "coco" / "annotations" / "instances_train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["0.jpg", "2.jpg", "3.jpg"]
    with pytest.raises(ValueError, match="output: expected a new or empty folder"):
        convert_labels.main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "coco"])
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no data set recognised"):
        (tmp_path / "empty").mkdir()
        convert_labels.main([str(tmp_path / "empty"), str(tmp_path / "out"), "--to", "coco"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["labelme", "yolo"])
def test_what_cannot_be_opened_is_listed_too(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "yolo":
        yolo_folder(tmp_path / "in", scenes())
        broken = tmp_path / "in" / "labels" / "train" / "1.txt"
    else:
        labelme_folder(tmp_path / "in", scenes())
        broken = tmp_path / "in" / "train" / "1.json"
    broken.write_text("{")
    assert convert_labels.main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "coco"]) == 1
    assert f"left out {broken}" in capsys.readouterr().err
    assert len(build_dataset(DataConfig(dataset="coco_instances", root=str(tmp_path / "out" / "coco")), "train")) == 3
