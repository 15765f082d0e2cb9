"""Annotations and images of any content: no traceback, bounded memory, and the file's name in every error."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from maskformer_fast import inspect_data
from maskformer_fast.config import DataConfig
from maskformer_fast.core.image_files import IMAGE_FORMATS
from maskformer_fast.data import build_dataset
from maskformer_fast.data.images import read_image, read_index_png, read_panoptic_png
from tests.data.datasets import test_coco_panoptic as panoptic
from tests.data.datasets import test_voc as voc
from tests.docs.world import labelme_folder, scenes, yolo_folder
from tests.support import coco_files
from tests.support.images import photo
from tests.support.memory import at_most
from tests.test_hostile_files import changed_bytes, changed_value, every_target, fuzz, nested


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def read_all(kind: str, root: Path) -> None:
    """Open a data set and read its examples; errors may be of any of its files."""
    config = DataConfig(dataset=kind, root=str(root), keep_empty=True)  # type: ignore[arg-type]
    try:
        dataset = build_dataset(config, "train")
        for index in range(len(dataset)):
            dataset[index]
    except (ValueError, OSError) as error:
        assert str(root) in str(error), error


@st.composite
def documents(draw: st.DrawFn, value: Any) -> bytes:
    """JSON with values or bytes changed, or nested deep."""
    kind = draw(st.sampled_from(["values", "values", "bytes", "deep"]))
    if kind == "values":
        return json.dumps(draw(changed_value(value))).encode()
    if kind == "bytes":
        return draw(changed_bytes(json.dumps(value).encode()))
    return nested(draw, *draw(st.sampled_from([("[", "]"), ('{"images":', "}")]))).encode()


@st.composite
def png_headers(draw: st.DrawFn, content: bytes) -> bytes:
    """A PNG with another size, depth or kind of colours in its header."""
    changed = bytearray(content)
    size = st.sampled_from([0, 1, 7, 300, 9000, 65535, 2**31 - 1, 2**32 - 1])
    changed[16:20], changed[20:24] = draw(size).to_bytes(4, "big"), draw(size).to_bytes(4, "big")
    changed[24], changed[25] = draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.sampled_from([0, 2, 3, 4, 6]))
    return bytes(changed)


@every_target
def test_panoptic_json(tmp_path: Path, examples: int) -> None:
    root = panoptic.store(tmp_path / "panoptic")
    path = root / "annotations" / "panoptic_train.json"
    fuzz(examples, documents(panoptic.content()), path, lambda path: read_all("coco_panoptic", root))


@every_target
def test_panoptic_pngs(tmp_path: Path, examples: int) -> None:
    root = panoptic.store(tmp_path / "panoptic")
    path = root / "annotations" / "panoptic_train" / "x.png"
    content = path.read_bytes()
    ids = st.integers(0, 2**24 - 1).map(lambda number: np.where(panoptic.id_map() == panoptic.SKY, number, 9))
    colors = ids.map(lambda found: np.stack([found % 256, found // 256 % 256, found // 65536], -1).astype(np.uint8))
    other = st.sampled_from(["1", "L", "P", "LA", "RGBA", "I;16"]).map(
        lambda mode: encoded(Image.new(mode, (panoptic.W, panoptic.H), 1 if len(mode) < 2 else None), "PNG")
    )
    strategy = st.one_of(
        changed_bytes(content), png_headers(content), other,
        colors.map(lambda pixels: encoded(Image.fromarray(pixels), "PNG")),
    )  # fmt: skip
    fuzz(examples, strategy, path, lambda path: read_all("coco_panoptic", root))


CLASSES = {"classes": [{"name": "a", "id": 1, "isthing": 1, "color": [1, 2, 3]}, "b"], "ignore_index": [0, 255]}


@every_target
def test_class_lists(tmp_path: Path, examples: int) -> None:
    for folder in ("images/train", "annotations/train"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(photo()[..., 0] % 3).save(tmp_path / folder / "x.png")
    fuzz(examples, documents(CLASSES), tmp_path / "classes.json", lambda path: read_all("folder", tmp_path))


@every_target
def test_coco_instances(tmp_path: Path, examples: int) -> None:
    root = coco_files.store(tmp_path / "coco")
    path = root / "annotations" / "instances_train.json"
    fuzz(examples, documents(coco_files.content()), path, lambda path: read_all("coco_instances", root))


@st.composite
def lines(draw: st.DrawFn, text: str) -> bytes:
    """A text with bytes changed, or lines and words repeated, replaced or very long."""
    if draw(st.booleans()):
        return draw(changed_bytes(text.encode()))
    others = ["-1", "nan", "1e300", "9" * 400, "..", "/", "a:b:c", ",,", "\n"]
    words = draw(st.lists(st.sampled_from([*text.split(), *others]), max_size=40))
    return draw(st.sampled_from([" ", "\n", ","])).join(words).encode()


def inspect(root: Path) -> None:
    """Look at a data set; errors may be of any of its files."""
    try:
        inspect_data.inspect(root, None)
    except (ValueError, OSError) as error:
        assert str(root) in str(error), error


YOLO_LINES = "1 0.1 0.1 0.4 0.1 0.4 0.5 0.1 0.5\n0 0.2 0.2 0.9 0.3 0.4 0.8\n"


@every_target
@pytest.mark.parametrize("name", ["labels/train/0.txt", "data.yaml"])
def test_yolo(tmp_path: Path, name: str, examples: int) -> None:
    yolo_folder(tmp_path / "yolo", scenes()[:2])
    path = tmp_path / "yolo" / name
    text = YOLO_LINES if name.endswith("txt") else path.read_text()
    fuzz(examples, lines(text), path, lambda path: read_all("yolo", tmp_path / "yolo"))
    inspect(tmp_path / "yolo")


@every_target
def test_labelme(tmp_path: Path, examples: int) -> None:
    labelme_folder(tmp_path / "labelme", scenes()[:2])
    path = tmp_path / "labelme" / "train" / "0.json"
    content = json.loads(path.read_text())
    mask = encoded(Image.new("L", (5, 4), 255), "PNG")
    content["shapes"].append({"label": "car", "points": [[3, 4], [7, 7]], "shape_type": "mask",
                              "mask": base64.b64encode(mask).decode()})  # fmt: skip
    fuzz(examples, documents(content), path, lambda path: read_all("labelme", tmp_path / "labelme"))
    inspect(tmp_path / "labelme")


@every_target
@pytest.mark.parametrize(
    "name", ["labelmap.txt", "class_names.txt", "ImageSets/Segmentation/train.txt", "SegmentationClass/a.png"]
)
def test_voc(tmp_path: Path, name: str, examples: int) -> None:
    save = voc.save_colors if name == "labelmap.txt" else voc.save_indices
    voc.write(tmp_path / "voc", ["a", "b"], {"train": ["a", "b"], "val": ["b"]}, save)
    path = tmp_path / "voc" / name
    text = "background:0,0,0::\ncat:128,0,0::\ndog:0,128,0::\n" if name == "labelmap.txt" else "a\nb\n"
    content = path.read_bytes() if path.exists() else b""
    strategy = lines(text) if name.endswith("txt") else changed_bytes(content) | png_headers(content)
    fuzz(examples, strategy, path, lambda path: read_all("voc", tmp_path / "voc"))
    inspect(tmp_path / "voc")


@every_target
def test_roboflow_s_list_of_classes(tmp_path: Path, examples: int) -> None:
    (tmp_path / "train").mkdir()
    for name in ("x.png", "x_mask.png"):
        Image.fromarray(photo()[..., 0] % 3).save(tmp_path / "train" / name)
    path = tmp_path / "train" / "_classes.csv"
    text = "Pixel Value, Class\n0, a\n1, b\n2, c\n"
    fuzz(examples, lines(text), path, lambda path: read_all("folder", tmp_path))


@every_target
def test_a_folder_of_any_files_is_inspected_or_refused_by_its_name(tmp_path: Path, examples: int) -> None:
    root = coco_files.store(tmp_path / "coco")
    path = root / "annotations" / "instances_train.json"
    fuzz(examples // 4, documents(coco_files.content()), path, lambda path: inspect(root))


@every_target
@pytest.mark.parametrize("suffix", sorted(set(IMAGE_FORMATS) - {".jpeg", ".tif"}))
def test_images(tmp_path: Path, suffix: str, examples: int) -> None:
    content = encoded(Image.fromarray(photo()), IMAGE_FORMATS[suffix])
    grey = encoded(Image.fromarray(photo()[..., 0]), "WEBP" if suffix == ".webp" else IMAGE_FORMATS[suffix])
    strategy = changed_bytes(content) | changed_bytes(grey)
    if suffix == ".png":
        deep = encoded(Image.fromarray(photo()[..., 0].astype(np.uint16) * 16), "PNG")
        strategy |= png_headers(content) | changed_bytes(deep)

    def read(path: Path) -> None:
        for reader in (read_image, read_index_png, read_panoptic_png):
            try:
                reader(path)
            except ValueError as error:
                assert path.name in str(error)

    fuzz(examples, strategy, tmp_path / f"file{suffix}", read)


def test_a_png_whose_data_claims_gigabytes_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.png"
    content = bytearray(encoded(Image.fromarray(photo()[..., 0]), "PNG"))
    content[content.index(b"IDAT") - 4] = 0x7F
    path.write_bytes(content)
    for reader in (read_image, read_index_png, read_panoptic_png):
        with at_most(400):
            try:
                reader(path)
            except ValueError as error:
                assert path.name in str(error)
