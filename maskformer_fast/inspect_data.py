"""``python -m maskformer_fast.inspect_data FOLDER``: what a folder of images and labels has, and how to train on it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import DataConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write, check_no_windows_path, write_json
from maskformer_fast.data import BrokenExampleError, SegmentationDataset, build_dataset
from maskformer_fast.data.inspection.layouts import recognise
from maskformer_fast.data.inspection.measure import Part, measure_part, part_numbers
from maskformer_fast.data.inspection.problems import problems_of, warnings_of_readers
from maskformer_fast.data.statistics import BandStatistics
from maskformer_fast.output import visualize
from maskformer_fast.output.inspection_page import inspection_page
from maskformer_fast.recipes import load_recipe

RECIPE = "small"
"""Recipe of the line that is recommended."""
_SAMPLES = 12
_SAMPLE_SIDE = 512  # pixels of the longest side of a sample
_SHEET_COLUMNS = 3


@dataclass(frozen=True)
class InspectOptions:
    """Look at a data set: its format, classes, sizes, channels and samples, what is suspicious, and a line to train.

    Recognises COCO instances and panoptic (with the exports of Roboflow, CVAT and Label Studio), YOLO, labelme, Pascal
    VOC, ADE20K, Cityscapes, Mapillary Vistas, and plain folders of images and index PNGs. Prints a summary and writes
    ``inspection.html`` (one page without other files), ``inspection.png`` (samples) and ``inspection.json``.
    """

    folder: tyro.conf.Positional[str]
    """Folder of the data set."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "inspection"
    """Folder for the report."""
    limit: int | None = None
    """Most pictures of each part that are read, evenly spaced; by default all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(InspectOptions, argv, prog="python -m maskformer_fast.inspect_data")
    check_no_windows_path({"folder": options.folder, "output": options.output})
    check(options.limit is None or options.limit > 0, "limit", "a positive number of pictures", options.limit)
    with warnings_of_readers() as warnings:
        report, pictures = inspect(Path(options.folder), options.limit)
    report["problems"] += dict.fromkeys(warnings)
    output = Path(options.output)
    write_json(output / "inspection.json", report)
    with atomic_write(output / "inspection.html") as file:
        file.write(inspection_page(report, pictures).encode(errors="backslashreplace"))
    if pictures:
        with atomic_write(output / "inspection.png") as file:
            Image.fromarray(_sheet([picture for _, picture in pictures])).save(file, format="PNG")
    print(_summary(report, output))
    return 0


def inspect(folder: Path, limit: int | None) -> tuple[dict[str, Any], list[tuple[str, np.ndarray]]]:
    """Read a data set -> its report, and samples with their labels drawn.

    Raises:
        FileNotFoundError: nothing that is known is in the folder.
        ValueError: its files are malformed, or no picture can be read.
    """
    config = recognise(folder)
    has_val = config.val_split != config.train_split
    datasets = [build_dataset(config, "train"), *([build_dataset(config, "val")] if has_val else [])]
    statistics, parts = BandStatistics(config.channels or 3), []
    for dataset, split in zip(datasets, (config.train_split, config.val_split), strict=False):
        count = min(limit or len(dataset), len(dataset))
        indices = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist() if count else []
        parts.append(measure_part(dataset, split, indices, statistics))
    if not parts[0].paths:
        reasons = "\n  ".join(parts[0].broken[:8])
        raise ValueError(f"{folder}: expected pictures that can be read, got none:\n  {reasons}")
    if not any(part.broken for part in parts) and _opens_without_skipping(config, has_val):
        config = replace(config, skip_broken=False)
    metadata = datasets[0].metadata
    is_complete = all(len(part.paths) + len(part.broken) == part.listed for part in parts)
    report = {
        "folder": str(folder), "format": config.dataset, "task": datasets[0].task,
        "recipe": recipe_line(config, datasets[0], parts, statistics),
        "parts": [part_numbers(part) for part in parts],
        "classes": [
            {"class": name, **{f"{part.split}: {what}": counts[number] for part in parts for what, counts in (
                ("pictures", part.class_pictures), ("objects", part.class_objects), ("pixels", part.class_pixels))}}
            for number, name in enumerate(metadata.class_names)
        ],
        "channels": [
            {"channel": number, "mean": round(mean, 3), "deviation": round(deviation, 3)}
            for number, (mean, deviation) in enumerate(zip(statistics.mean, statistics.std, strict=True))
        ],
        "problems": problems_of(config, metadata, parts, is_complete),
    }  # fmt: skip
    return report, _samples(datasets[0])


def _opens_without_skipping(config: DataConfig, has_val: bool) -> bool:
    """Whether training can open the data set with ``data.skip_broken`` off."""
    try:
        build_dataset(replace(config, skip_broken=False), "train")
        if has_val:
            build_dataset(replace(config, skip_broken=False), "val")
    except ValueError:
        return False
    return True


def recipe_line(
    config: DataConfig, dataset: SegmentationDataset, parts: Sequence[Part], statistics: BandStatistics
) -> str:
    """Command that trains on a data set; the statistics are those of the bands, if it is one of bands."""
    default, recipe = DataConfig(), load_recipe(RECIPE)
    root = str(config.root)
    root = f"./{root}" if root.startswith("-") else root
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(root).resolve().name).strip("_-") or "mine"
    words = ["python", "-m", "maskformer_fast.train", "--config", RECIPE, "--output", f"runs/{name}",
             "--data.dataset", config.dataset, "--data.root", root]  # fmt: skip
    for option, value, usual in (("train", config.train_split, default.train_split),
                                 ("val", config.val_split, default.val_split)):  # fmt: skip
        words += [f"--data.{option}-split", value] if value != usual else []
    if config.channels:
        words += ["--data.channels", str(config.channels), "--data.augment.no-color-jitter"]
        words += ["--model.pixel-mean", *(f"{mean:.6g}" for mean in statistics.mean)]
        words += ["--model.pixel-std", *(f"{deviation or 1:.6g}" for deviation in statistics.std)]
    if config.skip_broken:
        words.append("--data.skip-broken")
    most = max((count for part in parts for count in part.objects), default=0)
    if dataset.task != "semantic" and most > recipe.model.decoder.num_queries:
        words += ["--model.decoder.num-queries", str(-(-most // 10) * 10)]
    if dataset.task == "instance" and most > recipe.test.top_k:
        words += ["--test.top-k", str(-(-most // 10) * 10)]
    return shlex.join([*words, "--metrics", dataset.task])


def _samples(dataset: SegmentationDataset) -> list[tuple[str, np.ndarray]]:
    """Evenly spaced pictures with their labels, reduced to `_SAMPLE_SIDE`."""
    samples = []
    count = min(_SAMPLES, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        try:
            example = dataset[index]
        except BrokenExampleError:
            continue
        picture = Image.fromarray(visualize.draw_truth(example, dataset.metadata, dataset.task))
        picture.thumbnail((_SAMPLE_SIDE, _SAMPLE_SIDE))
        samples.append((dataset.file_names[index], np.asarray(picture)))
    return samples


def _sheet(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures in rows on one sheet."""
    rows = [list(pictures[start : start + _SHEET_COLUMNS]) for start in range(0, len(pictures), _SHEET_COLUMNS)]
    columns = len(rows[0])
    rows[-1] += [np.full((8, 8, 3), 255, np.uint8)] * (columns - len(rows[-1]))
    return visualize.grid(rows, [""] * columns)


def _summary(report: dict[str, Any], output: Path) -> str:
    lines = [f"{report['folder']}: {report['format']}, task {report['task']}"]
    for part in report["parts"]:
        kinds = "".join(f"; {count} of {kind}" for kind, count in part["files"].items())
        lines.append(f"  {part['split']}: {part['pictures']} pictures, {part['objects']} objects{kinds}")
    for row in report["classes"][:20]:
        lines.append("  " + ", ".join(f"{value}" if key == "class" else f"{key} {value}" for key, value in row.items()))
    if len(report["classes"]) > 20:
        lines.append(f"  and {len(report['classes']) - 20} more classes")
    means = ", ".join(str(row["mean"]) for row in report["channels"])
    lines.append(f"  mean {means}; deviation {', '.join(str(row['deviation']) for row in report['channels'])}")
    lines += [f"  suspicious: {line}" for line in report["problems"]]
    return "\n".join([*lines, f"report: {output / 'inspection.html'}", "to train:", report["recipe"]])


if __name__ == "__main__":
    run_command(main)
