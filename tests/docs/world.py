"""The folder in which the documentation's commands run: small data, pictures and checkpoints of the names it uses."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maskformer_fast.config import Config, DataConfig, ShapesConfig
from maskformer_fast.core.metadata import VOID, Metadata
from maskformer_fast.data import dataset_metadata
from maskformer_fast.data.datasets.shapes import ShapesDataset
from maskformer_fast.inference.load import with_classes
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import WEIGHTS_NAME, save_weights
from maskformer_fast.recipes import load_recipe, save_config
from maskformer_fast.structures import Example
from tests.support.clips import write_clip
from tests.support.paths import TINY_RECIPE

TINY = TINY_RECIPE
IMAGES = 4  # of each data set
RUNS = ("runs/demo", "runs/mine")
"""Folders of untrained runs."""


def scenes(size: tuple[int, int] = (72, 96)) -> list[Example]:
    """Make the synthetic examples of which all data sets are made."""
    dataset = ShapesDataset(ShapesConfig(2, 2, size, 3, train_images=IMAGES), "train")
    return [dataset[index] for index in range(IMAGES)]


def make_world(folder: Path) -> None:
    """Fill an empty folder with data sets, pictures and runs."""
    examples = scenes()
    save_picture(folder / "photo.jpg", examples[0])
    save_picture(folder / "folder" / "deep" / "a.png", examples[1])
    save_picture(folder / "more" / "b.png", examples[2])
    index_folder(folder / "data", examples, 255)
    names = ["sky", "field", {"name": "car", "isthing": 1}, {"name": "bus", "isthing": 1, "color": [0, 60, 100]}]
    (folder / "data" / "classes.json").write_text(json.dumps(names))
    index_folder(folder / "camvid", examples, 11)
    coco_folder(folder / "coco", examples)
    coco_folder(folder / "fruits_nuts", examples, ("instances",))
    yolo_folder(folder / "yolo", examples)
    labelme_folder(folder / "labelme", examples)
    voc_folder(folder / "voc", examples)
    if importlib.util.find_spec("av") is not None:  # else docs/video.md alone fails
        write_clip(folder / "clip.mp4", 10)
    shards(folder / "shards", examples)
    band_folder(folder / "bands", examples)
    band_run(folder / "runs" / "multispectral", folder / "bands")
    for run in RUNS:
        untrained_run(folder / run)


def shards(folder: Path, examples: list[Example]) -> None:
    """Write two tar files of images with labels, as WebDataset has them."""
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as shard:
            for index, example in enumerate(examples):
                content = io.BytesIO()
                Image.fromarray(example.image).save(content, "PNG")
                for name, data in ((f"{index:04d}.png", content.getvalue()), (f"{index:04d}.cls", b"7")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    shard.addfile(entry, io.BytesIO(data))


def band_folder(root: Path, examples: list[Example]) -> None:
    """Write pictures of four bands of 12 bits with index PNGs, in the layout of the plain folder."""
    index_folder(root, examples, 255)
    for number, path in enumerate(sorted(root.glob("images/*/*.jpg"))):
        image = np.asarray(Image.open(path)).astype(np.uint16) * 16
        np.save(path.with_suffix(".npy"), np.concatenate([image, image[..., :1] // 2 + number], axis=2))
        path.unlink()
    (root / "classes.json").write_text(json.dumps(["sky", "field", "car", "bus"]))


def save_picture(path: Path, example: Example) -> None:
    """Write an example's image; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(example.image).save(path)


def index_folder(root: Path, examples: list[Example], unlabelled: int) -> None:
    """Write images with index PNGs, in the layout of the plain folder and of CamVid."""
    for split in ("train", "val"):
        for number, example in enumerate(examples):
            save_picture(root / "images" / split / f"{number}.jpg", example)
            labels = example.semantic_map()
            path = root / "annotations" / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.where(labels == VOID, unlabelled, labels).astype(np.uint8)).save(path)


def coco_folder(root: Path, examples: list[Example], kinds: Sequence[str] = ("panoptic", "instances")) -> None:
    """Write annotations of COCO's two kinds; the polygons of instances are boxes."""
    metadata = ShapesDataset(ShapesConfig(2, 2), "val").metadata
    categories = [
        {"id": 10 * (index + 1), "name": name, "isthing": int(thing)}
        for index, (name, thing) in enumerate(zip(metadata.class_names, metadata.is_thing, strict=True))
    ]
    things = [category for category in categories if category["isthing"]]
    for split in ("train", "val"):
        images, panoptic, instances = [], [], []
        for number, example in enumerate(examples, start=1):
            save_picture(root / split / f"{number}.jpg", example)
            height, width = example.size
            images.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
            assert example.id_map is not None
            ids = np.where(example.id_map == VOID, 0, example.id_map + 1).astype(np.uint8)
            if "panoptic" in kinds:
                path = root / "annotations" / f"panoptic_{split}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1)).save(path)
            segments = [
                {"id": segment.id + 1, "category_id": categories[segment.category]["id"], "iscrowd": 0}
                for segment in example.segments
            ]
            panoptic.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
            instance = {"id": number, "image_id": number, "category_id": things[0]["id"], "area": 400.0, "iscrowd": 0}
            instances.append(instance | {"bbox": [8, 8, 20, 20], "segmentation": [[8, 8, 28, 8, 28, 28, 8, 28]]})
        found = {"panoptic": (panoptic, categories), "instances": (instances, things)}
        (root / "annotations").mkdir(exist_ok=True)
        for kind in kinds:
            content = {"images": images, "annotations": found[kind][0], "categories": found[kind][1]}
            (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


def yolo_folder(root: Path, examples: list[Example]) -> None:
    """Write images with YOLO's label files; the outlines are boxes."""
    for split in ("train", "val"):
        for number, example in enumerate(examples):
            save_picture(root / "images" / split / f"{number}.jpg", example)
            path = root / "labels" / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("1 0.1 0.1 0.4 0.1 0.4 0.5 0.1 0.5\n")
    (root / "data.yaml").write_text("names: [car, bus]\ntrain: images/train\nval: images/val\n")


def labelme_folder(root: Path, examples: list[Example]) -> None:
    """Write images with labelme's files beside them; the shapes are rectangles."""
    for split in ("train", "val"):
        for number, example in enumerate(examples):
            save_picture(root / split / f"{number}.jpg", example)
            shape = {"label": "car", "points": [[8, 8], [28, 28]], "shape_type": "rectangle", "group_id": None}
            height, width = example.size
            content = {"shapes": [shape], "imagePath": f"{number}.jpg", "imageHeight": height, "imageWidth": width}
            (root / split / f"{number}.json").write_text(json.dumps(content))


def voc_folder(root: Path, examples: list[Example]) -> None:
    """Write images with Pascal VOC's palette PNGs of classes and objects; the objects are boxes."""
    for number, example in enumerate(examples):
        save_picture(root / "JPEGImages" / f"{number}.jpg", example)
        classes = np.zeros(example.size, np.uint8)
        classes[8:28, 8:28], classes[30:50, 40:70] = 1, 2
        for name, values in (("SegmentationClass", classes), ("SegmentationObject", classes)):
            image = Image.fromarray(values)
            image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            (root / name).mkdir(parents=True, exist_ok=True)
            image.save(root / name / f"{number}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("".join(f"{number}\n" for number in range(len(examples))))


def untrained_run(folder: Path) -> None:
    """Write a run with a checkpoint of random weights, whose tiny network Hugging Face's implementation has as well."""
    config = load_recipe(TINY)
    decoder = replace(config.model.pixel_decoder, conv_dim=32, norm_groups=32)
    config = replace(config, model=replace(config.model, pixel_decoder=decoder))
    write_run(folder, config, ShapesDataset(config.data.shapes, "val").metadata)


def band_run(folder: Path, root: Path) -> None:
    """Write a run with a checkpoint of random weights for the pictures of `band_folder`."""
    config = load_recipe(TINY)
    data = DataConfig(dataset="folder", root=str(root), channels=4)
    model = replace(config.model, pixel_mean=(2048.0,) * 4, pixel_std=(1182.0,) * 4)
    write_run(folder, replace(config, data=data, model=model), dataset_metadata(data))


def write_run(folder: Path, config: Config, metadata: Metadata) -> None:
    """Write a run with a checkpoint of random weights."""
    config = with_classes(replace(config, output=str(folder)), metadata)
    torch.manual_seed(0)
    checkpoint = folder / "checkpoints" / "last"
    checkpoint.mkdir(parents=True)
    save_weights(checkpoint / WEIGHTS_NAME, build_model(config.model), config, metadata, 0)
    save_config(config, folder / "config.yaml")
