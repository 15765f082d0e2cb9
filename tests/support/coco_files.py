"""A small data set of COCO instances: content of its annotation file, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from maskformer_fast.config import DataConfig
from maskformer_fast.data import build_dataset

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
