"""Pascal VOC's folders: index and colour PNGs, objects, lists of names, CVAT's and labelme2voc's exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.config import DataConfig
from maskformer_fast.data import BrokenExampleError, build_dataset

H, W = 12, 17
PALETTE = np.random.default_rng(0).permutation(256**2)[:256]
COLORS = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 255: (224, 224, 192)}


def label_map(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([0, 0, 1, 2, 255], (H // 3, W)).repeat(3, 0).astype(np.uint8)


def save_indices(path: Path, values: np.ndarray) -> None:
    image = Image.fromarray(values)
    image.putpalette([int(value) for code in PALETTE for value in (code >> 8, code & 255, 7)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_colors(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.zeros((256, 3), np.uint8)
    for value, color in COLORS.items():
        table[value] = color
    Image.fromarray(table[values]).save(path)


def write(root: Path, names: list[str], lists: dict[str, list[str]], save=save_indices, objects: bool = False) -> None:
    for seed, name in enumerate(names):
        path = root / "JPEGImages" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (W, H), (seed, 0, 0)).save(path, quality=100)
        save(root / "SegmentationClass" / f"{name}.png", label_map(seed))
        if objects:
            save(root / "SegmentationObject" / f"{name}.png", object_map(seed))
    for split, listed in lists.items():
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in listed))


def object_map(seed: int) -> np.ndarray:
    """Objects are the left and the right half of a class."""
    labels = label_map(seed)
    side = np.where(np.arange(W) < W // 2, 1, 2).astype(np.uint8)
    return np.where((labels == 0) | (labels == 255), labels, side).astype(np.uint8)


def read(root: Path, split: str = "train", **options):
    return build_dataset(DataConfig(dataset="voc", root=str(root), **options), split)


def test_indices_are_the_classes_of_voc(tmp_path: Path) -> None:
    write(tmp_path, ["2007_a", "b", "c"], {"train": ["b", "2007_a"], "val": ["c"]})
    dataset = read(tmp_path)
    assert dataset.task == "semantic" and dataset.file_names == ["b.jpg", "2007_a.jpg"]
    assert dataset.metadata.class_names[:3] == ("background", "aeroplane", "bicycle")
    assert dataset.metadata.num_classes == 21 and dataset.metadata.is_thing == (False, *[True] * 20)
    expected = np.where(label_map(1) == 255, -1, label_map(1).astype(int))
    assert np.array_equal(dataset[0].semantic_map(), expected)
    assert sum(segment.area for segment in dataset[0].segments) == (expected >= 0).sum()
    assert read(tmp_path, "val").file_names == ["c.jpg"]


@pytest.mark.parametrize("by_color", [False, True])
def test_objects_are_instances_and_panoptic_segments(tmp_path: Path, by_color: bool) -> None:
    save = save_colors if by_color else save_indices
    write(tmp_path, ["a", "b"], {"train": ["a", "b"], "val": ["b"]}, save, objects=True)
    if by_color:
        (tmp_path / "labelmap.txt").write_text("# label:color:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\n"
                                               "dog:0,128,0::\n")  # fmt: skip
    for task in ("panoptic", "instance"):
        dataset = read(tmp_path, task=task)
        assert dataset.task == task
        for seed in (0, 1):
            example, labels, objects = dataset[seed], label_map(seed), object_map(seed)
            assert np.array_equal(example.semantic_map(), np.where(labels == 255, -1, labels.astype(int)))
            both = zip(labels.ravel().tolist(), objects.ravel().tolist(), strict=True)
            pairs = {(category, number) for category, number in both if category not in (0, 255)}
            things = [segment for segment in example.segments if segment.is_thing]
            assert len(things) == len(pairs) > 2 and len(example.segments) == len(pairs) + 1
            for segment in things:
                mask = example.id_map == segment.id
                assert set(labels[mask]) == {segment.category} and len(set(objects[mask])) == 1
                assert segment.area == mask.sum()


def test_colours_of_cvat_s_label_map_are_classes_and_one_part_is_cut(tmp_path: Path) -> None:
    names = [f"{number:02d}" for number in range(20)]
    write(tmp_path, names, {"default": names}, save_colors)
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\ndog:0,128,0::\nbackground:0,0,0::\n"
                                           "cat:128,0,0::\n")  # fmt: skip
    dataset = read(tmp_path, "val")
    assert dataset.file_names == ["09.jpg", "19.jpg"] and len(read(tmp_path)) == 18
    assert dataset.metadata.class_names == ("dog", "background", "cat")
    labels = label_map(9)
    expected = np.select([labels == 2, labels == 0, labels == 1], [0, 1, 2], -1)
    assert np.array_equal(dataset[0].semantic_map(), expected)
    (tmp_path / "labelmap.txt").write_text("dog:0,128,0::\nbackground:0,0,0::\n")
    with pytest.raises(BrokenExampleError, match=r"09\.png: .*got \(128, 0, 0\).*labelmap\.txt"):
        read(tmp_path, "val")[0]


def test_names_of_labelme2voc_and_folders_without_lists(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b", "c"], {})
    (tmp_path / "class_names.txt").write_text("__ignore__\n_background_\nx\ny\n")
    assert read(tmp_path).file_names == ["a.jpg", "b.jpg"] and read(tmp_path, "val").file_names == ["c.jpg"]
    assert read(tmp_path).metadata.class_names == ("_background_", "x", "y")
    assert read(tmp_path).metadata.is_thing == (False, True, True)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("labelmap.txt", "cat:1,2", r"labelmap\.txt:1: expected NAME:R,G,B"),
        ("labelmap.txt", "cat:1,2,300::", r"labelmap\.txt:1: expected NAME:R,G,B"),
        ("labelmap.txt", "cat:1,2,3::\ndog:1,2,3::", "distinct colours"),
        ("labelmap.txt", "", "expected 1 to 255 distinct names"),
        ("labelmap.txt", "cat:1,2,3::\ncat:1,2,4::", "1 of them distinct"),
        ("class_names.txt", "__ignore__\n", "expected 1 to 255 distinct names"),
        ("ImageSets/Segmentation/train.txt", "../../etc/passwd", "expected a file name below"),
        ("ImageSets/Segmentation/train.txt", " \n", r"train\.txt: expected names of images, got none"),
        ("ImageSets/Segmentation/train.txt", "zz", "names without an image"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    write(tmp_path, ["a"], {"train": ["a"]})
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_errors_of_missing_parts_and_wrong_sizes(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"], {"trainval": ["a", "b"]})
    with pytest.raises(FileNotFoundError, match=r"train\.txt: no such list of images; there is trainval\.txt"):
        read(tmp_path)
    dataset = read(tmp_path, train_split="trainval")
    with pytest.raises(ValueError, match="data.task: expected one of 'semantic'"):
        read(tmp_path, train_split="trainval", task="instance")
    save_indices(tmp_path / "SegmentationClass" / "a.png", label_map(0)[:-1])
    with pytest.raises(BrokenExampleError, match="expected the size of its image"):
        dataset[0]
    save_indices(tmp_path / "SegmentationClass" / "b.png", np.full((H, W), 77, np.uint8))
    with pytest.raises(BrokenExampleError, match=r"b\.png: expected values of the 21 classes .* got 77 \(204 pixels\)"):
        dataset[1]


def test_roboflow_s_masks_beside_the_images_are_a_plain_folder(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        for seed in (0, 1):
            Image.new("RGB", (W, H)).save(tmp_path / split / f"{seed}.jpg")
            Image.fromarray(label_map(seed)).save(tmp_path / split / f"{seed}_mask.png")
        (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, a, b\n")
    config = DataConfig(dataset="folder", root=str(tmp_path))
    for split in ("train", "val"):
        dataset = build_dataset(config, split)
        assert dataset.file_names == ["0.jpg", "1.jpg"]
        assert dataset.metadata.class_names == ("background", "cat", "a, b")
        assert np.array_equal(dataset[1].semantic_map(), np.where(label_map(1) == 255, -1, label_map(1).astype(int)))
    for text in ("Pixel Value, Class\n", "x\n300, a", "x\na, 1", "x\n1, a\n1, b"):
        (tmp_path / "train" / "_classes.csv").write_text(text)
        with pytest.raises(ValueError, match=r"_classes\.csv"):
            build_dataset(config, "train")
