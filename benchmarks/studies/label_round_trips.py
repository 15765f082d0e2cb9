"""Round trips of labels: masks written as label files, and read by this project and by the tools' own readers.

    python -m benchmarks.studies.label_round_trips [--images 12] [--root FOLDER] [--output FILE]

Masks are the segments of synthetic scenes of 384 x 512 pixels, with holes and parts where objects lie before them, or
the instances of a COCO data set. A reader that is not installed is left out. Results go to
benchmarks/output/label_round_trips.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness.case import Row
from benchmarks.harness.label_tools import labelme_tools, yolo_masks
from benchmarks.studies import OUTPUT
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import DataConfig, ShapesConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.exchange import pack
from maskformer_fast.core.files import write_json
from maskformer_fast.core.label_formats import with_fewer_corners
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult
from maskformer_fast.data import build_dataset
from maskformer_fast.output.label_files import LABEL_FORMATS, LabelWriter

TOLERANCES = (0.0, 0.5, 1.0, 2.0)
"""Pixels of `LabelWriter`'s tolerance."""
SIZE = (384, 512)


@dataclass(frozen=True)
class RoundTripOptions:
    """Write masks as label files and compare what readers make of them."""

    images: int = 12
    """Most images."""
    root: str | None = None
    """Folder of a COCO instance data set; by default synthetic scenes."""
    output: Path = OUTPUT / "label_round_trips.json"
    """JSON file."""

    def __post_init__(self) -> None:
        check(self.images > 0, "images", "a positive number", self.images)


Masks = list[np.ndarray]
"""Masks [N, H, W] of each image, in the order of their objects."""
Read = Callable[[Path, int], np.ndarray]
"""Reader of the label folder: masks of an image, in the order of their objects."""


def true_masks(options: RoundTripOptions) -> Masks:
    """Masks of the scenes or of the data set."""
    data = DataConfig(shapes=ShapesConfig(4, 4, SIZE, 8, train_images=options.images))
    if options.root is not None:
        data = DataConfig(dataset="coco_instances", root=options.root)
    dataset = build_dataset(data, "train")
    examples = (dataset[index] for index in range(min(options.images, len(dataset))))
    return [example.segment_masks(example.segments) for example in examples]


def write_labels(folder: Path, masks: Masks, tolerance: float) -> int:
    """Write all formats; each object is of a class of its own, which names it in every reader -> number of corners."""
    most = max(map(len, masks))
    metadata = Metadata("m", tuple(f"o{i:03d}" for i in range(most)), (True,) * most, tuple(range(most)),
                        ((0, 0, 1),) * most)  # fmt: skip
    names = [f"{number}.png" for number in range(len(masks))]
    for name, found in zip(names, masks, strict=True):
        Image.new("RGB", found.shape[:0:-1]).save(folder / name)
    writer = LabelWriter(folder / "labels", metadata, LABEL_FORMATS, names, [folder / name for name in names],
                         tolerance=tolerance)  # fmt: skip
    corners, entries = 0, []
    for number, found in enumerate(masks):
        size = (found.shape[1], found.shape[2])
        labels, scores = np.arange(len(found)), np.ones(len(found), np.float32)
        objects = InstanceResult(labels, scores, pack(found), np.zeros((len(found), 4), np.float32), size).to_objects()
        entries.append(writer.write(number, number + 1, size, objects))
        fewer = with_fewer_corners(objects, tolerance)
        corners += sum(len(ring) for one in fewer for polygon in one.polygons
                       for ring in (polygon.exterior, *polygon.holes))  # fmt: skip
    writer.close(lambda: entries)
    return corners


def by_our_reader(dataset: str, folder: str) -> Read:
    """Reader of this project."""

    def read(labels: Path, number: int) -> np.ndarray:
        config = DataConfig(dataset=dataset, root=str(labels / folder), val_split="train")
        opened = build_dataset(config, "val")
        example = opened[opened.file_names.index(next(n for n in opened.file_names if Path(n).stem == str(number)))]
        order = np.argsort([segment.category for segment in example.segments])
        return example.segment_masks(example.segments)[order]

    return read


def by_pycocotools(labels: Path, number: int) -> np.ndarray:
    """COCO's own API: polygons of `annToMask`."""
    from pycocotools.coco import COCO

    coco = COCO(str(labels / "coco" / "annotations" / "instances_train.json"))
    annotations = sorted(coco.loadAnns(coco.getAnnIds([number + 1])), key=lambda one: one["category_id"])
    return np.array([coco.annToMask(one) for one in annotations], bool)


def by_ultralytics(labels: Path, number: int) -> np.ndarray:
    """`verify_image_label` and `polygon2mask` of ultralytics."""
    folder = labels / "yolo"
    classes, masks = yolo_masks(folder / "images/train" / f"{number}.png", folder / "labels/train" / f"{number}.txt",
                                10_000)  # fmt: skip
    return masks[np.argsort(classes)]


def by_labelme(labels: Path, number: int) -> np.ndarray:
    """`read_label_file` and `shapes_to_label` of labelme."""
    read_label_file, shapes_to_label = labelme_tools()
    path = labels / "labelme" / "train" / f"{number}.json"
    content = json.loads(path.read_text())
    size = (content["imageHeight"], content["imageWidth"])
    shapes = read_label_file(str(path)).shapes
    names = sorted({shape["label"] for shape in shapes})
    found = (shapes_to_label(size, [shape for shape in shapes if shape["label"] == name], {name: 1}) for name in names)
    return np.array([classes > 0 for classes, _ in found])


def by_shapely(labels: Path, number: int) -> np.ndarray:
    """Pixels whose centre is in the geometry that geopandas reads."""
    import geopandas
    import shapely

    with Image.open(labels / "coco" / "train" / f"{number}.png") as image:
        width, height = image.size
    frame = geopandas.read_file(labels / "geojson" / "train" / f"{number}.geojson").sort_values("class_id")
    y, x = np.mgrid[:height, :width] + 0.5
    return np.array([shapely.contains_xy(geometry, x, y) for geometry in frame.geometry])


READERS: dict[tuple[str, str], Read] = {
    ("COCO", "maskformer_fast"): by_our_reader("coco_instances", "coco"),
    ("COCO", "pycocotools"): by_pycocotools,
    ("YOLO", "maskformer_fast"): by_our_reader("yolo", "yolo"),
    ("YOLO", "ultralytics"): by_ultralytics,
    ("labelme", "maskformer_fast"): by_our_reader("labelme", "labelme"),
    ("labelme", "labelme"): by_labelme,
    ("GeoJSON", "geopandas, shapely"): by_shapely,
}
"""Reader of each format and tool."""


def compare(masks: Masks, read: Read, labels: Path) -> Row:
    """Objects, how many have every pixel, and intersection over union with the truth."""
    overlaps: list[float] = []
    for number, truth in enumerate(masks):
        got = read(labels, number)
        check(len(got) == len(truth), "objects", str(len(truth)), len(got))
        overlaps += [float((one & other).sum() / (one | other).sum()) for one, other in zip(got, truth, strict=True)]
    values = np.array(overlaps)
    return {"objects": len(values), "exact": int((values == 1).sum()), "mean_iou": float(values.mean()),
            "min_iou": float(values.min())}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(RoundTripOptions, arguments, prog="python -m benchmarks.studies.label_round_trips")
    coco_tools()
    masks, rows = true_masks(options), []
    for tolerance in TOLERANCES:
        with tempfile.TemporaryDirectory() as name:
            corners = write_labels(Path(name), masks, tolerance)
            for (form, tool), read in READERS.items():
                try:
                    row = compare(masks, read, Path(name, "labels"))
                except ImportError as error:
                    print(f"{form} by {tool}: left out, {error}", file=sys.stderr)
                    continue
                rows.append({"tolerance": tolerance, "format": form, "reader": tool, "corners": corners, **row})
    write_json(options.output, {"data": options.root and Path(options.root).name, "rows": rows})
    print(f"{'tolerance':>9} {'corners':>8} {'format':8} {'reader':19} {'objects':>7} {'exact':>6} {'mean IoU':>9} "
          f"{'least':>7}")
    for row in rows:
        print(f"{row['tolerance']:9} {row['corners']:8} {row['format']:8} {row['reader']:19} {row['objects']:7} "
              f"{row['exact']:6} {row['mean_iou']:9.4f} {row['min_iou']:7.4f}")
    return 0


if __name__ == "__main__":
    run_command(main)
