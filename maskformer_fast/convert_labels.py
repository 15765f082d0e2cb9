"""``python -m maskformer_fast.convert_labels FOLDER OUT --to FORMAT``: a data set in the format of another tool."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from maskformer_fast.cli import parse, report_failures, run_command
from maskformer_fast.config import DataConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.exchange import Polygon
from maskformer_fast.core.files import check_no_windows_path
from maskformer_fast.core.label_formats import LabelledObject, outlines_at
from maskformer_fast.core.rings import joined_ring
from maskformer_fast.data import BrokenExampleError, SegmentationDataset, build_dataset
from maskformer_fast.data.datasets.coco_instances import CocoInstances
from maskformer_fast.data.datasets.outlines import rasterize
from maskformer_fast.data.inspection.layouts import recognise
from maskformer_fast.data.inspection.problems import warnings_of_readers
from maskformer_fast.data.large_pictures import read_georeference
from maskformer_fast.output.label_files import LabelEntries, LabelFormat, LabelWriter
from maskformer_fast.structures import Example

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertOptions:
    """Write a data set's labels in the format of another tool, with copies of its images.

    The format is recognised as by ``maskformer_fast.inspect_data``. Polygons keep their corners; masks become outlines
    along the edges of pixels. Crowds are left out. Exit status 1 if an image or label cannot be used;
    the others are written.
    """

    folder: tyro.conf.Positional[str]
    """Folder of the data set."""
    output: tyro.conf.Positional[str]
    """New or empty folder, in which each format gets a folder of its name."""
    to: tuple[LabelFormat, ...]
    """One or several of coco, yolo, labelme, geojson."""
    tolerance: float = 0.0
    """Pixels by which outlines may differ, to have fewer corners; 0 keeps every corner."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(ConvertOptions, argv, prog="python -m maskformer_fast.convert_labels")
    check_no_windows_path({"folder": options.folder, "output": options.output})
    output = Path(options.output)
    check(not output.exists() or (output.is_dir() and not any(output.iterdir())), "output", "a new or empty folder",
          options.output)
    config = recognise(Path(options.folder))
    failed: list[str] = []
    splits: list[Literal["train", "val"]] = ["train"]
    splits += ["val"] if config.val_split != config.train_split else []
    for split in splits:
        failed += convert_split(config, split, output, options)
    print(f"{options.folder} ({config.dataset}) written as {', '.join(options.to)} to {options.output}")
    return report_failures(failed, "images or labels could not be used")


def convert_split(
    config: DataConfig, split: Literal["train", "val"], output: Path, options: ConvertOptions
) -> list[str]:
    """Write the labels of one split -> file and reason of each example that cannot be used."""
    with warnings_of_readers() as warnings:
        dataset = build_dataset(config, split)
    for line in warnings:
        logger.warning("%s", line)
    failed = [line for line in warnings if line.startswith("left out ")]  # files, and not some objects of a file
    entries: list[LabelEntries] = []
    names = below_common_folder(dataset.file_names)
    writer = LabelWriter(output, dataset.metadata, options.to, names, (), split, 0.0, options.tolerance,
                         read_georeference)  # fmt: skip
    for index in tqdm(range(len(dataset)), unit="img", desc=split, dynamic_ncols=True):
        try:
            example = dataset[index]
        except BrokenExampleError as error:
            failed.append(str(error))
            logger.error("%s", error)
            continue
        objects = objects_of(dataset, index, example)
        entries.append(writer.write(index, index + 1, example.size, objects, Path(example.path)))
    writer.close(lambda: entries)
    return failed


def below_common_folder(names: Sequence[str]) -> list[str]:
    """Relative paths without the folders that all of them begin with."""
    folders = {os.path.dirname(name) for name in names}
    common = os.path.commonpath(folders) if not any(os.path.isabs(folder) for folder in folders) else ""
    return [os.path.relpath(name, common) if common else name for name in names]


def objects_of(dataset: SegmentationDataset, index: int, example: Example) -> list[LabelledObject]:
    """Objects of an example with the polygons of its file, or with the outlines of its masks."""
    if isinstance(dataset, CocoInstances):
        return [
            LabelledObject(category, 1.0, _polygons(outline, example.size))
            for category, outline in dataset.outlines(index)
        ]
    segments = [segment for segment in example.segments if not segment.is_crowd]
    return [
        LabelledObject(segment.category, 1.0, outlines_at(example.segment_masks([segment])[0], (0, 0)))
        for segment in segments
    ]


def _polygons(outline: object, size: tuple[int, int]) -> list[Polygon]:
    if isinstance(outline, dict):
        return outlines_at(rasterize(outline, *size), (0, 0))
    assert isinstance(outline, list)
    parts = [Polygon(np.asarray(part, np.float64).reshape(-1, 2), []) for part in outline]
    if len(parts) > 1:  # parts that overlap are one area in COCO, and not in a single ring
        mask = rasterize(outline, *size)
        if not np.array_equal(rasterize([joined_ring(parts).ravel().tolist()], *size), mask):
            return outlines_at(mask, (0, 0))
    return parts


if __name__ == "__main__":
    run_command(main)
