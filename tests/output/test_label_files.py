"""Label files: what is written comes back, by our readers and by those of the tools; copies, names, hostile names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.harness.label_tools import labelme_tools, ultralytics_utils, yolo_masks
from maskformer_fast.config import DataConfig
from maskformer_fast.core.exchange import Polygon, mask_of_polygons, pack
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult
from maskformer_fast.data import build_dataset
from maskformer_fast.data.large_pictures import read_georeference
from maskformer_fast.output.label_files import LABEL_FORMATS, LabelWriter
from tests.core.test_rings import random_mask

NAMES = ("cat", "dog: a 'b'", "ü")
METADATA = Metadata("d", NAMES, (True, False, True), (7, 3, 9), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
SIZE = (37, 45)


def results(count: int, seed: int = 0) -> list[InstanceResult]:
    """Instances with holes and parts, of three classes; the last of each has a low score."""
    found = []
    for number in range(count):
        masks = np.zeros((4, *SIZE), bool)
        for row in range(4):
            small = random_mask(100 * seed + 10 * number + row)
            masks[row, : small.shape[0], : small.shape[1]] = small[: SIZE[0], : SIZE[1]]
        labels, scores = np.array([0, 1, 2, 0]), np.array([0.9, 0.8, 0.75, 0.1])
        found.append(InstanceResult(labels, scores, pack(masks), np.zeros((4, 4), np.float32), SIZE))
    return found


def write(tmp_path: Path, found: list[InstanceResult], **options) -> Path:
    names = [f"deep/{number}.png" for number in range(len(found))]
    for number, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1], (number, 0, 0)).save(path)
    images = [tmp_path / "images" / name for name in names]
    writer = LabelWriter(tmp_path / "out", METADATA, LABEL_FORMATS, names, images, **options)
    entries = [writer.write(number, number + 1, SIZE, result.to_objects()) for number, result in enumerate(found)]
    writer.close(lambda: entries)
    return tmp_path / "out"


def expected(result: InstanceResult, kept: int = 3) -> list[tuple[int, bytes]]:
    masks = np.unpackbits(result.masks, axis=-1, count=SIZE[1], bitorder="little").astype(bool)
    return sorted((int(label), mask.tobytes()) for label, mask in zip(result.labels[:kept], masks, strict=False))


@pytest.mark.parametrize("dataset, folder", [("coco_instances", "coco"), ("yolo", "yolo"), ("labelme", "labelme")])
def test_every_pixel_comes_back_by_our_readers(tmp_path: Path, dataset: str, folder: str) -> None:
    found = results(3)
    root = write(tmp_path, found) / folder
    read = build_dataset(DataConfig(dataset=dataset, root=str(root)), "train")
    assert read.metadata.class_names == NAMES and len(read) == 3
    for index, result in enumerate(found):
        example = read[index]
        assert example.image[0, 0, 0] == index and example.masks is not None
        got = sorted((s.category, mask.tobytes()) for s, mask in zip(example.segments, example.masks, strict=True))
        assert got == expected(result)


def test_geojson_has_every_pixel(tmp_path: Path) -> None:
    shapely = pytest.importorskip("shapely")
    found = results(2)
    root = write(tmp_path, found) / "geojson" / "train" / "deep"
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    for number, result in enumerate(found):
        features = json.loads((root / f"{number}.geojson").read_text())["features"]
        shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
        assert all(shape.is_valid for shape in shapes)
        got = sorted((feature["properties"]["class_id"], shapely.contains_xy(shape, x, y).tobytes())
                     for feature, shape in zip(features, shapes, strict=True))  # fmt: skip
        assert got == expected(result)


def test_pycocotools_reads_every_pixel(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    found = results(2, 1)
    read = coco.COCO(str(write(tmp_path, found) / "coco" / "annotations" / "instances_train.json"))
    assert [category["name"] for category in read.loadCats(read.getCatIds())] == list(NAMES)
    for number, result in enumerate(found):
        annotations = read.loadAnns(read.getAnnIds([number + 1]))
        got = sorted((METADATA.category_ids.index(a["category_id"]), read.annToMask(a).astype(bool).tobytes())
                     for a in annotations)  # fmt: skip
        assert got == expected(result)
        for annotation in annotations:
            mask = read.annToMask(annotation)
            ys, xs = np.nonzero(mask)
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def grown(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels to its right and below, on which tools draw the outline as a line."""
    padded = np.pad(mask, ((1, 0), (1, 0)))
    return padded[1:, 1:] | padded[:-1, 1:] | padded[1:, :-1] | padded[:-1, :-1]


def test_ultralytics_reads_the_classes_and_pixels_but_draws_a_line_around_them(tmp_path: Path) -> None:
    try:
        ultralytics_utils()
    except ImportError as error:
        pytest.skip(str(error))
    found = results(2, 2)
    root = write(tmp_path, found) / "yolo"
    for number, result in enumerate(found):
        image = root / "images" / "train" / "deep" / f"{number}.png"
        labels, masks = yolo_masks(image, root / "labels" / "train" / "deep" / f"{number}.txt", 3)
        truth = np.unpackbits(result.masks[:3], axis=-1, count=SIZE[1], bitorder="little").astype(bool)
        assert sorted(labels) == [0, 1, 2]
        for label, mask in zip(labels, masks, strict=True):
            assert mask[truth[label]].mean() > 0.9 and mask.sum() <= grown(grown(truth[label])).sum() + 3 * sum(SIZE)


def test_labelme_reads_the_shapes_and_draws_a_line_around_them(tmp_path: Path) -> None:
    try:
        read_label_file, shapes_to_label = labelme_tools()
    except ImportError as error:
        pytest.skip(str(error))
    found = results(2, 3)
    root = write(tmp_path, found) / "labelme"
    for number, result in enumerate(found):
        data = read_label_file(str(root / "train" / "deep" / f"{number}.json"))
        assert data.image_path == f"{number}.png"
        truth = np.unpackbits(result.masks[:3], axis=-1, count=SIZE[1], bitorder="little").astype(bool)
        for label, name in enumerate(NAMES):
            shapes = [shape for shape in data.shapes if shape["label"] == name]
            classes, instances = shapes_to_label(SIZE, shapes, {name: 1})
            mask = classes > 0
            assert instances.max() == 1, "parts are one object"
            assert mask[truth[label]].all() and mask.sum() <= grown(truth[label]).sum() + 3 * sum(SIZE)


def test_geopandas_reads_the_picture_s_coordinates(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas")
    rasterio = pytest.importorskip("rasterio")
    rasterize = pytest.importorskip("rasterio.features").rasterize
    path, (result,) = tmp_path / "a.tif", results(1)
    transform = rasterio.transform.from_origin(500000, 5200000, 0.5, 0.25)
    with rasterio.open(path, "w", driver="GTiff", height=SIZE[0], width=SIZE[1], count=3, dtype="uint8",
                       crs="EPSG:32633", transform=transform) as file:  # fmt: skip
        file.write(np.zeros((3, *SIZE), np.uint8))
    writer = LabelWriter(tmp_path / "out", METADATA, ("geojson",), ["a.tif"], [path], georeference=read_georeference)
    writer.write(0, 1, SIZE, result.to_objects())
    read = geopandas.read_file(tmp_path / "out" / "geojson" / "train" / "a.geojson")
    assert read.crs.to_epsg() == 32633 and read["class"].tolist() == list(NAMES) and read.geometry.is_valid.all()
    truth = np.unpackbits(result.masks[:3], axis=-1, count=SIZE[1], bitorder="little").astype(bool)
    for geometry, mask in zip(read.geometry, truth, strict=True):
        filled = rasterize([geometry], SIZE, transform=transform).astype(bool)
        assert np.array_equal(filled, mask)
    plain = tmp_path / "b.png"
    Image.new("RGB", (4, 4)).save(plain)
    assert read_georeference(plain) is None


def test_low_scores_are_left_out_and_fewer_corners_lose_little(tmp_path: Path) -> None:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    mask = np.hypot(y - 18, x - 20) < 15
    result = InstanceResult(np.array([0, 0]), np.array([0.9, 0.4]), pack(np.stack([mask, mask])), None, SIZE)
    root = write(tmp_path, [result], tolerance=1.0)
    (shape,) = json.loads((root / "labelme" / "train" / "deep" / "0.json").read_text())["shapes"]
    (polygon,) = result.to_objects()[0].polygons
    assert len(shape["points"]) < len(polygon.exterior) / 2
    back = mask_of_polygons([Polygon(np.array(shape["points"]), [])], SIZE)
    assert (back & mask).sum() / (back | mask).sum() > 0.93


def test_names_stay_inside_the_folder_and_classes_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.PNG"
    Image.new("RGB", SIZE[::-1]).save(path, format="PNG")
    (result,) = results(1)
    names = Metadata("d", ("a\nb", "c", "<script>"), (True,) * 3, (1, 2, 3), ((0, 0, 1),) * 3)
    writer = LabelWriter(tmp_path / "out" / "in", names, LABEL_FORMATS, ["../../evil.png"], [path])
    entries = writer.write(0, 1, SIZE, result.to_objects())
    writer.close(lambda: [entries])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "x.PNG"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["in"]
    assert (tmp_path / "out" / "in" / "labelme" / "labels.txt").read_text() == "a b\nc\n<script>\n"
    assert (tmp_path / "out" / "in" / "yolo" / "images" / "train" / "evil.png").is_file()
    equal = Metadata("d", ("a\nb", "a b"), (True,) * 2, (1, 2), ((0, 0, 1),) * 2)
    with pytest.raises(ValueError, match="labels: expected distinct names of classes"):
        LabelWriter(tmp_path, equal, ("yolo",), ["a"], [path])
    with pytest.raises(ValueError, match="labels: expected one of 'coco'"):
        LabelWriter(tmp_path, METADATA, ("voc",), ["a"], [path])  # type: ignore[arg-type]
