"""Pictures of bands in the layouts of labelling tools: read as they are stored, found by `inspect_data`, trained."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast import inspect_data, train
from maskformer_fast.config import DataConfig
from maskformer_fast.data import build_dataset
from maskformer_fast.data.bands import read_layout
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.inspection.layouts import recognise
from tests.data.datasets import test_voc as voc
from tests.docs.world import coco_folder, index_folder, labelme_folder, scenes, yolo_folder
from tests.support.bands import write_tiff

STEPS = ("--solver.max-steps", "1", "--solver.batch-size", "2", "--data.workers", "0", "--log.checkpoint-every", "1",
         "--log.validate-every", "0", "--log.pictures", "0", "--device", "cpu")  # fmt: skip
CHANNELS = 6


def panoptic_folder(root: Path) -> None:
    coco_folder(root, scenes())


def instance_folder(root: Path) -> None:
    coco_folder(root, scenes())
    for path in (root / "annotations").glob("panoptic*.json"):
        path.unlink()


def voc_folder(root: Path) -> None:
    names = [f"{number:02d}" for number in range(12)]
    voc.write(root, names, {"train": names[:9], "val": names[9:]})


MAKERS = {
    "coco_panoptic": panoptic_folder,
    "coco_instances": instance_folder,
    "yolo": lambda root: yolo_folder(root, scenes()),
    "labelme": lambda root: labelme_folder(root, scenes()),
    "voc": voc_folder,
    "folder": lambda root: index_folder(root, scenes(), 255),
}


def as_bands(root: Path) -> list[np.ndarray]:
    """Put pictures of bands of 16 bits, half of them arrays [C, H, W], in the place of the files -> the pictures."""
    rng = np.random.default_rng(4)
    pictures = []
    for number, path in enumerate(sorted([*root.rglob("*.jpg"), *root.rglob("JPEGImages/*.png")])):
        with Image.open(path) as image:
            height, width = image.height, image.width
        scale = 10.0 ** np.arange(-1, CHANNELS - 1)
        pixels = np.clip(rng.random((height, width, CHANNELS)) * scale + 3 * scale, 0, 65535).astype(np.uint16)
        pictures.append(pixels)
        if number % 2:
            np.save(path.with_suffix(".npy"), pixels.transpose(2, 0, 1))
        else:
            write_tiff(path.with_suffix(".tif"), pixels)
        path.unlink()
        ending = ".npy" if number % 2 else ".tif"
        for text in root.rglob("*.json"):
            text.write_text(text.read_text().replace(path.name, path.stem + ending))
    return pictures


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in ("folder", "labelme") else [pytest.mark.slow])
                                  for kind in MAKERS])  # fmt: skip
def test_the_line_of_inspect_data_trains_on_bands(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rasterio")
    root = tmp_path / "set"
    root.mkdir()
    MAKERS[kind](root)
    pictures = as_bands(root)
    every = np.concatenate([picture.reshape(-1, CHANNELS) for picture in pictures]).astype(np.float64)
    assert inspect_data.main([str(root), "-o", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "inspection.json").read_text())
    printed = capsys.readouterr().out
    assert f"NPY, {CHANNELS} x 16 bits" in printed and f"TIFF, {CHANNELS} x 16 bits" in printed
    words = shlex.split(report["recipe"])
    assert words[words.index("--data.dataset") + 1] == kind
    assert words[words.index("--data.channels") + 1] == str(CHANNELS)
    place = words.index("--model.pixel-mean") + 1
    np.testing.assert_allclose([float(word) for word in words[place : place + CHANNELS]], every.mean(0), rtol=1e-5)
    place = words.index("--model.pixel-std") + 1
    deviation = np.where(every.std(0) > 0, every.std(0), 1)  # that of a constant band
    np.testing.assert_allclose([float(word) for word in words[place : place + CHANNELS]], deviation, rtol=1e-5)
    assert (every.std(0) == 0).any()
    np.testing.assert_allclose([row["mean"] for row in report["channels"]], every.mean(0), atol=1e-3)
    assert not any("without a label" in line or "cannot be used" in line for line in report["problems"])
    words[words.index("--output") + 1] = str(tmp_path / "run")
    assert train.main([*words[3:], *STEPS]) == 0


@pytest.mark.parametrize("kind", MAKERS)
def test_examples_have_the_stored_values(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("rasterio")
    MAKERS[kind](tmp_path)
    pictures = {array.tobytes() for array in as_bands(tmp_path)}
    found = recognise(tmp_path)
    assert (found.dataset, found.channels) == (kind, CHANNELS)
    for split in ("train", "val"):
        dataset = build_dataset(found, split)  # type: ignore[arg-type]
        for index in range(len(dataset)):
            image = dataset[index].image
            assert image.dtype == np.uint16 and image.tobytes() in pictures


def test_pixels_without_data_do_not_count(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    index_folder(tmp_path, scenes(), 255)
    for path in tmp_path.rglob("*.jpg"):
        pixels = np.full((*Image.open(path).size[::-1], 4), 700, np.uint16)
        pixels[:3] = 9
        pixels[3:5, :, 2] = 900
        write_tiff(path.with_suffix(".tif"), pixels, nodata=9)
        path.unlink()
    report, _ = inspect_data.inspect(tmp_path, None)
    means = [row["mean"] for row in report["channels"]]
    assert means[:2] == [700, 700] and means[3] == 700 and 700 < means[2] < 900


@pytest.mark.parametrize(
    ("name", "mode", "channels"),
    [("a.png", "L", 0), ("a.png", "RGBA", 0), ("a.png", "P", 0), ("a.png", "I;16", 1), ("a.tif", "RGB", 0),
     ("a.tif", "I;16", 1), ("a.tif", "CMYK", 0), ("a.webp", "RGBA", 0), ("a.jpg", "L", 0)],
)  # fmt: skip
def test_only_what_rgb_would_lose_is_bands(tmp_path: Path, name: str, mode: str, channels: int) -> None:
    index_folder(tmp_path, scenes(), 255)
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as image:
            values = np.asarray(image.convert("L"))
        changed = Image.fromarray(values.astype(np.uint16) * 99) if mode == "I;16" else Image.fromarray(values)
        path.unlink()
        (changed if mode in ("L", "I;16") else changed.convert(mode)).save(path.with_suffix(Path(name).suffix))
    assert recognise(tmp_path).channels == channels


def test_bands_of_most_pictures_count_and_the_others_are_named(tmp_path: Path) -> None:
    index_folder(tmp_path, scenes(), 255)
    as_arrays = sorted(tmp_path.rglob("*.jpg"))
    for number, path in enumerate(as_arrays):
        size = Image.open(path).size[::-1]
        np.save(path.with_suffix(".npy"), np.full((*size, 3 if number == 0 else 2), number, np.uint8))
        path.unlink()
    report, _ = inspect_data.inspect(tmp_path, None)
    assert "--data.channels 2" in report["recipe"] and "--data.skip-broken" in report["recipe"]
    assert any("expected 2 bands" in line for line in report["problems"])


def test_headers_tell_size_and_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((30, 40, 5), np.uint16))
    np.save(tmp_path / "b.npy", np.zeros((5, 300, 400), np.uint8))
    np.save(tmp_path / "c.npy", np.zeros((30, 40), np.float32))
    np.save(tmp_path / "d.npy", np.zeros((5, 30, 6), np.uint8))
    assert read_layout(tmp_path / "a.npy")[:4] == ("NPY", (30, 40), 5, 16)
    assert read_layout(tmp_path / "b.npy")[:4] == ("NPY", (300, 400), 5, 8)
    assert read_layout(tmp_path / "c.npy")[:4] == ("NPY", (30, 40), 1, 32)
    assert not read_layout(tmp_path / "c.npy").has_bands
    assert read_layout(tmp_path / "d.npy").size == (30, 6) and read_layout(tmp_path / "d.npy", 6).size == (5, 30)
    Image.fromarray(np.zeros((7, 9), np.uint16)).save(tmp_path / "e.png")
    assert read_layout(tmp_path / "e.png")[:4] == ("PNG", (7, 9), 1, 16) and read_layout(tmp_path / "e.png").has_bands
    np.save(tmp_path / "flat.npy", np.zeros(4, np.uint8))
    (tmp_path / "text.png").write_bytes(b"text")
    for name in ("flat.npy", "text.png", "none.npy", "none.png"):
        with pytest.raises(BrokenExampleError):
            read_layout(tmp_path / name)


def test_known_data_sets_are_of_rgb(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0 for data set 'camvid'; pictures of bands are read by folder, .*, voc"):
        build_dataset(DataConfig(dataset="camvid", root=str(tmp_path), channels=4), "train")
