"""Metrics of a trained network by tiles of several sizes beside those of images as a whole.

    python -m maskformer_fast.train --config demo --output run
    python -m benchmarks.studies.tile_quality run --tiles 128 --mosaic 2

Nothing is trained. The images must be such that the network can segment them as a whole, too. A mosaic puts some of the
data set's images together, so that objects have the size that the network knows. Differences are in points.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tyro

from benchmarks.studies.precision_metrics import HEADLINES, NAMES
from maskformer_fast.cli import leading_path, parse, run_command
from maskformer_fast.config import DataConfig, Task, TestConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.metadata import VOID, SegmentInfo
from maskformer_fast.data import SegmentationDataset, build_dataset
from maskformer_fast.evaluation.measure import check_classes, check_measurable, measure
from maskformer_fast.inference.load import load, stored_options
from maskformer_fast.structures import Example

MARGIN = 0.5
"""Points of PQ by which tiles may be worse, the goal."""

logger = logging.getLogger("benchmarks.studies.tile_quality")


@dataclass(frozen=True)
class TileQualityOptions:
    """Measure a checkpoint with and without tiles. Data and test settings default to those of its training."""

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder, or weights file."""
    tiles: tuple[int, ...] = (96, 128)
    """Sides of the tiles in pixels."""
    mosaic: int = 1
    """Number of the data set's images along each side of a measured one; all must have one size."""
    task: tuple[Task, ...] = ("semantic", "panoptic", "instance")
    """Tasks to measure."""
    limit: int | None = None
    """Number of images to measure, the first ones; default: all."""
    data: DataConfig = field(default_factory=DataConfig)
    test: TestConfig = field(default_factory=TestConfig)

    def __post_init__(self) -> None:
        check(len(self.task) > 0, "task", "at least one", self.task)
        check(len(self.tiles) > 0, "tiles", "at least one", self.tiles)
        check(self.mosaic > 0, "mosaic", "> 0", self.mosaic)


class Mosaic:
    """Squares of a data set's images, whose truth is an id map; stuff of a class is one segment."""

    def __init__(self, dataset: SegmentationDataset, side: int) -> None:
        self.metadata, self.task = dataset.metadata, dataset.task
        self._dataset, self._side = dataset, side

    @property
    def file_names(self) -> list[str]:
        return [f"{index}.png" for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._dataset) // self._side**2

    def __getitem__(self, index: int) -> Example:
        parts = [self._dataset[index * self._side**2 + number] for number in range(self._side**2)]
        segments: list[SegmentInfo] = []
        stuff: dict[int, int] = {}
        maps = []
        for part in parts:
            assert part.id_map is not None
            ids = np.full_like(part.id_map, VOID)
            for segment in part.segments:
                number = len(segments) + 1
                if not segment.is_thing:
                    number = stuff.setdefault(segment.category, number)
                if number > len(segments):
                    segments.append(replace(segment, id=number, area=0))
                ids[part.id_map == segment.id] = number
                segments[number - 1] = replace(segments[number - 1], area=segments[number - 1].area + segment.area)
            maps.append(ids)
        image, id_map = (
            np.concatenate([
                np.concatenate(pieces[first : first + self._side], 1) for first in range(0, len(pieces), self._side)
            ])
            for pieces in ([part.image for part in parts], maps)
        )  # fmt: skip
        return Example(image, segments, id_map=id_map, image_id=index, path=f"mosaic/{index}")


def rows(options: TileQualityOptions) -> Iterator[tuple[int | None, dict[str, float]]]:
    """Side of the tiles, None for images as a whole, and metrics as fractions of 1."""
    dataset: SegmentationDataset = build_dataset(options.data, "val")
    if options.mosaic > 1:
        dataset = Mosaic(dataset, options.mosaic)
    check_measurable(dataset, options.task)
    for tile in (None, *options.tiles):
        predictor = load(options.checkpoint, "cpu", replace(options.test, tile=tile))
        check_classes(predictor.metadata, dataset.metadata)
        logger.info("tiles of %s", tile)
        metrics, _ = measure(predictor, dataset, options.task, workers=0, limit=options.limit)
        yield tile, {HEADLINES[task]: metrics[HEADLINES[task]] for task in options.task}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, 1 where tiles lose more PQ than the goal allows."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = leading_path(arguments)
    stored = stored_options(path) if path else None
    options = parse(
        TileQualityOptions,
        arguments,
        prog="python -m benchmarks.studies.tile_quality",
        default=TileQualityOptions(tyro.MISSING, data=stored[0], test=stored[1]) if stored else None,
    )
    names = [HEADLINES[task] for task in options.task]
    print(f"| tiles | {' | '.join(NAMES[name] for name in names)} |\n|{' --- |' * (len(names) + 1)}")
    whole: dict[str, float] = {}
    missed = False
    for tile, metrics in rows(options):
        cells = [f"{100 * metrics[name]:.2f}" for name in names]
        if tile is None:
            whole = metrics
        else:
            lost = {name: 100 * (metrics[name] - whole[name]) for name in names}
            cells = [f"{cell} ({lost[name]:+.2f})" for cell, name in zip(cells, names, strict=True)]
            missed |= lost.get("pq", 0.0) < -MARGIN
        print(f"| {'none' if tile is None else f'{tile} x {tile}'} | {' | '.join(cells)} |", flush=True)
    return int(missed)


if __name__ == "__main__":
    run_command(main)
