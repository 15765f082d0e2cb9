"""``python -m maskformer_fast.predict CHECKPOINT IMAGES...``: segment files, folders and globs."""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from maskformer_fast.cli import leading_path, parse, report_failures, run_command
from maskformer_fast.config import Amp, Task, TestConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.files import check_no_windows_path
from maskformer_fast.core.image_files import in_result_folder, list_files
from maskformer_fast.data import BrokenExampleError
from maskformer_fast.data.images import read_image
from maskformer_fast.data.large_pictures import read_georeference
from maskformer_fast.deploy.bundle.manifest import Precision
from maskformer_fast.deploy.runtime.selection import Backend
from maskformer_fast.inference.batches import infer_each
from maskformer_fast.inference.bundle_predictor import BundlePredictor
from maskformer_fast.inference.load import load, stored_options
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.inference.tiled_files import remove_work, segment_file
from maskformer_fast.output.label_files import LabelFormat, LabelWriter
from maskformer_fast.output.writer import ResultWriter
from maskformer_fast.video.av_tools import av_tools
from maskformer_fast.video.command import predict_videos
from maskformer_fast.video.options import VideoOptions
from maskformer_fast.video.sources import find_videos

logger = logging.getLogger(__name__)

MAX_ID_DIGITS = 15
"""Longest file name that is an image id; JSON readers keep integers exactly up to 2^53."""


@dataclass(frozen=True)
class PredictOptions:
    """Segment images with a trained checkpoint, or a bundle exported from one.

    Writes below the output folder: ``semantic/NAME.png`` (class index), ``panoptic/NAME.png`` with
    ``panoptic.json`` (COCO panoptic format), ``instances.json`` (COCO results with RLE masks),
    ``overlays/NAME_TASK.png`` to look at, label files with ``--labels``, and ``images.json``, which lists the images
    with their ids and names. With ``--test.tile``, images of any size are segmented in tiles; the same command
    continues an interrupted run. Exit status 1 if an image could not be read, segmented or written; the others are
    written. Of a video it writes ``NAME_TASK.mp4`` with the sound kept, and ``NAME.jsonl`` with a line for each frame.
    """

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder, weights file, or bundle."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders (searched recursively, without hidden files and without results of this command) and globs;
    video files, cameras (``/dev/video0``, ``camera:0``) and streams (``rtsp://...``); they come before the options."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "predictions"
    """Folder for the results."""
    task: tuple[Task, ...] = ("semantic",)
    """One or several of semantic, panoptic, instance; one forward pass serves all, except by TensorRT."""
    overlays: bool = True
    """Also draw each result over its image."""
    labels: tuple[LabelFormat, ...] = ()
    """Also write label files of one task, to correct and to train on, with copies of the images: coco, yolo, labelme,
    geojson (without images); below ``labels/`` of the output."""
    label_min_score: float = 0.5
    """Lowest score of an object in label files."""
    label_tolerance: float = 0.0
    """Pixels by which outlines in label files may differ, to have fewer corners; 0 keeps every pixel."""
    exif: bool = True
    """Turn each image as its EXIF orientation says."""
    device: str = "auto"
    """``auto`` takes the GPU where there is one."""
    backend: Backend = "auto"
    """Backend of a bundle: ``auto`` takes TensorRT where the bundle has an engine for this GPU, else on the CPU
    openvino where it is installed, else onnxruntime."""
    amp: Amp | None = None
    """Precision of a checkpoint's network; by default that of its training."""
    graphs: bool = False
    """On a GPU, replay CUDA graphs of a checkpoint's network for batches whose sizes come again."""
    precision: Precision | None = None
    """Precision of a bundle's network. On a CPU: fp32, bf16 (openvino, where the processor has it) or int8 (an engine
    of openvino in the bundle); by default int8 where the bundle has it, else fp32. On a GPU: that of an engine."""
    test: TestConfig = field(default_factory=TestConfig)
    video: VideoOptions = field(default_factory=VideoOptions)


class Input(NamedTuple):
    """An image to segment."""

    path: Path
    name: str
    """Path below the folder that the user named, or the file's name."""


def find_images(patterns: Sequence[str]) -> tuple[list[Input], list[str]]:
    """Expand files, folders and globs -> images, and problems: patterns without an image, and unreadable folders.

    Folders are searched by `image_files.list_files`. Results of earlier runs are left out of globs as well.
    """
    inputs: list[Input] = []
    problems: list[str] = []
    for pattern in patterns:
        before = len(inputs)
        if os.path.isdir(pattern):
            names = list_files(pattern, onerror=lambda error: problems.append(str(error)))
            inputs += [Input(Path(pattern, name), name) for name in names]
        else:
            files = [pattern] if os.path.isfile(pattern) else _expand(pattern)
            inputs += [Input(Path(file), Path(file).name) for file in files]
        if len(inputs) == before:
            hint = "; write / between folders, and /mnt/c/ for C:\\ in WSL" if "\\" in pattern else ""
            problems.append(f"{pattern}: no image there{hint}")
    return inputs, problems


def _expand(pattern: str) -> list[str]:
    """Files that match a glob, without results of earlier runs in folders that the pattern does not name."""
    fixed = list(takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    matches = sorted(glob.glob(pattern, recursive=True))
    return [file for file in matches if os.path.isfile(file) and not in_result_folder(file, Path(*fixed))]


def file_names(inputs: Sequence[Input]) -> list[str]:
    """File name of each image in the JSON files: its ``name``, or its path if other images have the same name."""
    counts = Counter(image.name for image in inputs)
    return [image.name if counts[image.name] == 1 else image.path.as_posix() for image in inputs]


def image_ids(names: Sequence[str]) -> list[int]:
    """Image ids for COCO's formats: the names as numbers if all are distinct numbers, as COCO's are, else 1, 2, ..."""
    stems = [PurePosixPath(name).stem for name in names]
    if all(stem.isdecimal() and len(stem) <= MAX_ID_DIGITS for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(names) + 1))


def read_batches(
    inputs: Sequence[Input], batch_size: int, writer: ResultWriter, upright: bool
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Decode images in batches of (index, image). An image that cannot be read is noted in the writer and left out."""
    batch: list[tuple[int, np.ndarray]] = []
    for number, image in enumerate(inputs):
        try:
            batch.append((number, read_image(image.path, upright)))
        except (BrokenExampleError, MemoryError) as error:
            reason = error.reason if isinstance(error, BrokenExampleError) else error
            writer.fail(str(image.path), reason)
            logger.error("%s", writer.failed[-1])
            continue
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def predict_images(
    predictor: Predictor | BundlePredictor, options: PredictOptions, inputs: Sequence[Input], ids: Sequence[int],
    writer: ResultWriter,
) -> None:  # fmt: skip
    """Segment images as a whole, in batches."""
    with tqdm(total=len(inputs), unit="img", dynamic_ncols=True, disable=not inputs or None) as progress:
        for batch in read_batches(inputs, options.test.batch_size, writer, options.exif):
            results = infer_each(predictor, [image for _, image in batch], options.task)
            for (number, image), result in zip(batch, results, strict=True):
                if not writer.write(number, ids[number], image, result):
                    logger.error("%s", writer.failed[-1])
            progress.update(len(batch))


def predict_pictures(
    predictor: Predictor | BundlePredictor, options: PredictOptions, inputs: Sequence[Input], ids: Sequence[int],
    writer: ResultWriter,
) -> None:  # fmt: skip
    """Segment pictures in tiles, one picture after another; an earlier run that was interrupted is continued."""
    checkpoint = Path(options.checkpoint)
    changed = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    settings = [options.checkpoint, changed, options.amp, options.precision, options.backend, options.labels,
                options.label_min_score, options.label_tolerance]  # fmt: skip
    for number, image in enumerate(inputs):
        with tqdm(unit="tile", desc=image.name, dynamic_ncols=True) as progress:

            def advance(count: int, total: int, progress: tqdm = progress) -> None:
                progress.total = total
                progress.update(count)

            if not segment_file(predictor, image.path, options.task, writer, number, ids[number], options.exif,
                                settings, advance):  # fmt: skip
                logger.error("%s", writer.failed[-1])
    remove_work(writer)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    path = leading_path(argv)
    check_no_windows_path({"checkpoint": path})
    stored = stored_options(path) if path else None
    options = parse(
        PredictOptions,
        argv,
        prog="python -m maskformer_fast.predict",
        default=PredictOptions(tyro.MISSING, tyro.MISSING, test=stored[1]) if stored else None,
    )
    check_no_windows_path({"output": options.output})
    videos, images = find_videos(options.images)
    inputs, problems = find_images(images)
    predictor = load(
        options.checkpoint, options.device, options.test, options.backend, options.amp, options.precision,
        in_flight=(options.test.batch_size if videos else min(options.test.batch_size, len(inputs))) or None,
        graphs=options.graphs,
    )  # fmt: skip
    for task in options.task:
        predictor.check_task(task)
    if "instance" in options.task:
        coco_tools()  # an error before the first image, not after it
    if videos:
        av_tools()
    names = [image.name for image in inputs]
    ids = image_ids(names)
    labels = None
    if options.labels:
        check(len(options.task) == 1, "task", "one task with labels", options.task)
        labels = LabelWriter(
            Path(options.output, "labels"), predictor.metadata, options.labels, names, [image.path for image in inputs],
            min_score=options.label_min_score, tolerance=options.label_tolerance, georeference=read_georeference,
        )  # fmt: skip
    writer = ResultWriter(Path(options.output), predictor.metadata, options.overlays, names, file_names(inputs), labels)
    try:
        if options.test.tile is None:
            predict_images(predictor, options, inputs, ids, writer)
        else:
            predict_pictures(predictor, options, inputs, ids, writer)
    finally:
        writer.close()  # an interrupted run keeps what it has
    if inputs or not videos:
        print(f"{len(writer.images)} images segmented, results in {options.output}")
    problems += predict_videos(predictor, videos, options.task, options.video, Path(options.output), options.overlays)
    return report_failures([*problems, *writer.failed], "inputs could not be used")


if __name__ == "__main__":
    run_command(main)
