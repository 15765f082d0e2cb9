"""``predict --labels``: label files of results, of whole images and in tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast import predict
from maskformer_fast.config import DataConfig
from maskformer_fast.core.image_files import list_files
from maskformer_fast.data import build_dataset
from tests.docs.world import untrained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "run"
    untrained_run(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (37, 50)), ("deep/b.png", (64, 83))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_predict_writes_labels_to_correct_and_train_on(run: Path, photos: Path, tmp_path: Path, task: str) -> None:
    """The data sets of labels have the pixels of the results, whole and in tiles, and are left out of searches."""
    for tiles in ([], ["--test.tile", "64"]):
        out = tmp_path / f"out{len(tiles)}"
        line = [str(run), str(photos), "-o", str(out), "--task", task, "--labels", "coco", "yolo", "labelme", "geojson",
                "--label-min-score", "0", "--test.object-mask-threshold", "0", *tiles]  # fmt: skip
        assert predict.main(line) == 0
        listed = json.loads((out / "images.json").read_text())["images"]
        images = {entry["result"]: entry for entry in listed}
        contents = []
        for kind, folder in (("coco_instances", "coco"), ("yolo", "yolo"), ("labelme", "labelme")):
            dataset = build_dataset(DataConfig(dataset=kind, root=str(out / "labels" / folder)), "train")
            assert len(dataset) <= len(images)
            contents.append({
                Path(dataset.file_names[index]).stem: sorted(
                    (segment.category, mask.tobytes()) for segment, mask in
                    zip(dataset[index].segments, dataset[index].masks, strict=True))
                for index in range(len(dataset))
            })  # fmt: skip
        assert contents[0] == contents[1] == contents[2] and any(contents[0].values())
        features = json.loads((out / "labels" / "geojson" / "train" / "a.geojson").read_text())["features"]
        assert features and {"class", "class_id", "score"} == set(features[0]["properties"])
        if task == "semantic":
            for name, objects in contents[0].items():
                labels = np.asarray(Image.open(next((out / "semantic").rglob(f"{name}.png"))))
                assert objects == [(int(c), (labels == c).tobytes()) for c in np.unique(labels)]
        assert list_files(out) == []


def test_labels_are_of_one_task_and_known_formats(run: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task: expected one task with labels"):
        predict.main([str(run), str(photos), "-o", str(tmp_path), "--task", "semantic", "panoptic", "--labels", "yolo"])
    with pytest.raises(ValueError, match="min_score: expected 0 to 1, got 2"):
        predict.main([str(run), str(photos), "-o", str(tmp_path), "--labels", "yolo", "--label-min-score", "2"])
