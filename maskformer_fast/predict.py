"""``python -m maskformer_fast.predict CHECKPOINT IMAGES...``: segment files, folders and globs."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, takewhile
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
from maskformer_fast.core.image_files import IMAGE_SUFFIXES, in_result_folder, list_files, picture_suffixes
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data import BrokenExampleError
from maskformer_fast.data.bands import read_picture
from maskformer_fast.data.large_pictures import read_georeference
from maskformer_fast.data.shards import Member, expand_braces, is_shard, list_members, member_name, read_member
from maskformer_fast.deploy.bundle.manifest import Precision
from maskformer_fast.deploy.runtime.selection import Backend
from maskformer_fast.distributed import on_main, process_group, rank, world_size
from maskformer_fast.inference.batches import infer_each
from maskformer_fast.inference.bundle_predictor import BundlePredictor
from maskformer_fast.inference.load import fingerprint, load, stored_options
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.inference.tiled_files import remove_work, segment_file
from maskformer_fast.output.label_files import LabelFormat, LabelWriter
from maskformer_fast.output.parts import PartsWriter, Share
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
    with their ids and names. Of a video it writes ``NAME_TASK.mp4`` with the sound kept, and ``NAME.jsonl`` with a line
    for each frame. With ``--test.tile``, images of any size are segmented in tiles. The same command continues an
    interrupted run. Started by torchrun, several processes share the images. Exit status 1 if an image could not be
    read, segmented or written; the others are written.
    """

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder, weights file, or bundle."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders (searched recursively, without hidden files and without results of this command), globs, and
    tar files of images (``shard-{000..010}.tar``); video files, cameras (``/dev/video0``, ``camera:0``) and streams
    (``rtsp://...``); they come before the options."""
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
    resume: bool = True
    """Go on where an earlier run with the same inputs and settings stopped; ``--no-resume`` starts anew."""
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
    member: Member | None = None
    """The image within the tar file ``path``."""

    def read(self, upright: bool, channels: int) -> np.ndarray:
        """Decode the image, as `read_picture`."""
        content = None if self.member is None else read_member(self.path, self.member)
        return read_picture(self.path if self.member is None else self.name, upright, channels, content)

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}: {self.member.name}"


def find_images(patterns: Sequence[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> tuple[list[Input], list[str]]:
    """Expand files, folders and globs -> images, and problems: patterns without an image, and unreadable folders.

    Folders are searched by `image_files.list_files`. Results of earlier runs are left out of globs as well.
    """
    inputs: list[Input] = []
    problems: list[str] = []
    for pattern in patterns:
        before = len(inputs)
        if os.path.isdir(pattern):
            names = list_files(pattern, suffixes, onerror=lambda error: problems.append(str(error)))
            inputs += [Input(Path(pattern, name), name) for name in names]
        elif is_shard(pattern):
            inputs += _find_members(pattern, problems)
        else:
            files = [pattern] if os.path.isfile(pattern) else _expand(pattern)
            inputs += [Input(Path(file), Path(file).name) for file in files]
        if len(inputs) == before:
            hint = "; write / between folders, and /mnt/c/ for C:\\ in WSL" if "\\" in pattern else ""
            problems.append(f"{pattern}: no image there{hint}")
    return inputs, problems


def _find_members(pattern: str, problems: list[str]) -> list[Input]:
    """Images of the tar files that a pattern names; ``problems`` gets what cannot be used."""
    inputs: list[Input] = []
    for name in expand_braces(pattern):
        for file in [name] if os.path.lexists(name) else _expand(name):
            members, left_out = list_members(file)
            problems += left_out
            inputs += [Input(Path(file), member_name(file, member), member) for member in members]
    return inputs


def _expand(pattern: str) -> list[str]:
    """Files that match a glob, without results of earlier runs in folders that the pattern does not name."""
    fixed = list(takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    matches = sorted(glob.glob(pattern, recursive=True))
    return [file for file in matches if os.path.isfile(file) and not in_result_folder(file, Path(*fixed))]


def file_names(inputs: Sequence[Input]) -> list[str]:
    """File name of each image in the JSON files: its ``name``, or its path if other images have the same name.

    The path of an image in a tar file is that of the tar file, without its suffix, and then the member's.
    """
    counts = Counter(image.name for image in inputs)
    paths = [image.path if image.member is None else image.path.parent / image.name for image in inputs]
    return [image.name if counts[image.name] == 1 else path.as_posix()
            for image, path in zip(inputs, paths, strict=True)]  # fmt: skip


def image_ids(names: Sequence[str]) -> list[int]:
    """Image ids for COCO's formats: the names as numbers if all are distinct numbers, as COCO's are, else 1, 2, ..."""
    stems = [PurePosixPath(name).stem for name in names]
    if all(stem.isdecimal() and len(stem) <= MAX_ID_DIGITS for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(names) + 1))


def read_batches(
    inputs: Sequence[Input], batches: Iterable[range], writer: PartsWriter, upright: bool, channels: int
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Decode images in batches of (index, image). An image that cannot be read is noted in the writer and left out."""
    for numbers in batches:
        batch: list[tuple[int, np.ndarray]] = []
        for number in numbers:
            try:
                batch.append((number, inputs[number].read(upright, channels)))
            except (BrokenExampleError, MemoryError) as error:
                reason = error.reason if isinstance(error, BrokenExampleError) else error
                writer.fail(number, str(inputs[number]), reason)
                logger.error("%s", writer.failed[-1])
        yield batch


def predict_images(
    predictor: Predictor | BundlePredictor, options: PredictOptions, inputs: Sequence[Input], ids: Sequence[int],
    writer: PartsWriter, share: Share,
) -> None:  # fmt: skip
    """Segment images as a whole, in batches."""
    with tqdm(total=share.images, unit="img", dynamic_ncols=True, disable=share.rank > 0) as progress:
        for batch in read_batches(inputs, share, writer, options.exif, predictor.channels):
            results = infer_each(predictor, [image for _, image in batch], options.task) if batch else ()
            for (number, image), result in zip(batch, results, strict=True):
                if not writer.write(number, ids[number], image, result):
                    logger.error("%s", writer.failed[-1])
            writer.end_batch()
            progress.update(len(batch))


def predict_pictures(
    predictor: Predictor | BundlePredictor, options: PredictOptions, inputs: Sequence[Input], ids: Sequence[int],
    writer: PartsWriter, share: Share,
) -> None:  # fmt: skip
    """Segment pictures in tiles, one picture after another; an earlier run that was interrupted is continued."""
    checkpoint = Path(options.checkpoint)
    changed = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    settings = [options.checkpoint, changed, options.amp, options.precision, options.backend, options.labels,
                options.label_min_score, options.label_tolerance]  # fmt: skip
    for number in chain.from_iterable(share):
        image = inputs[number]
        with tqdm(unit="tile", desc=image.name, dynamic_ncols=True, disable=share.rank > 0) as progress:

            def advance(count: int, total: int, progress: tqdm = progress) -> None:
                progress.total = total
                progress.update(count)

            if not segment_file(predictor, image.path, options.task, writer, number, ids[number], options.exif,
                                settings, advance, image.member):  # fmt: skip
                logger.error("%s", writer.failed[-1])
        writer.end_batch()


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
    with process_group(options.device):  # ranks wait for each other here, and nowhere else
        this_rank, ranks = rank(), world_size()
        suffixes = picture_suffixes(stored[0].channels if stored else 0)
        videos, patterns = find_videos(options.images)
        inputs, problems = on_main(lambda: find_images(patterns, suffixes))
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
            check(predictor.channels == 0, "images", "no video, as the network takes pictures of bands", videos[0].name)
        names = [image.name for image in inputs]
        ids = image_ids(names)
        writer = PartsWriter(Path(options.output), predictor.metadata, options.overlays, names, file_names(inputs),
                             options.task, label_writer(options, predictor.metadata, inputs))  # fmt: skip
        has_images = bool(inputs or not videos)
        session, finished = on_main(lambda: writer.start(run_settings(options, inputs), options.resume)
                                    if has_images else ("", np.zeros(0, bool)))  # fmt: skip
    share = Share(finished, options.test.batch_size if options.test.tile is None else 1, this_rank, ranks)
    try:
        if has_images:
            writer.join(session, this_rank)
            work = predict_images if options.test.tile is None else predict_pictures
            work(predictor, options, inputs, ids, writer, share)
            writer.finish()
        problems += predict_videos(predictor, videos[this_rank::ranks], options.task, options.video,
                                   Path(options.output), options.overlays)  # fmt: skip
    except BaseException:
        if ranks == 1 and has_images:
            writer.close()  # an interrupted run keeps what it has
        raise
    if this_rank > 0:
        return 0  # torchrun would end the others for another status
    if has_images:
        writer.wait(session, ranks)
        merged = writer.merge()
        remove_work(writer)
        problems += merged.failed
        print(f"{merged.images} images segmented, results in {options.output}")
    return report_failures(problems, "inputs could not be used")


def label_writer(options: PredictOptions, metadata: Metadata, inputs: Sequence[Input]) -> LabelWriter | None:
    """Writer of label files, where some are wanted. Raises ``ValueError`` for what they cannot be made of."""
    if not options.labels:
        return None
    check(len(options.task) == 1, "task", "one task with labels", options.task)
    members = [image.path.name for image in inputs if image.member is not None]
    check(not members, "labels", "image files, which are copied beside the labels, not tar files", members[:1])
    return LabelWriter(
        Path(options.output, "labels"), metadata, options.labels, [image.name for image in inputs],
        [image.path for image in inputs], min_score=options.label_min_score, tolerance=options.label_tolerance,
        georeference=read_georeference,
    )  # fmt: skip


def run_settings(options: PredictOptions, inputs: Sequence[Input]) -> dict[str, object]:
    """Everything that results depend on: a run with the same goes on where another stopped, with any batch size."""
    listed = hashlib.sha256()
    for image in inputs:
        listed.update(f"{image}\0{image.name}\n".encode(errors="surrogateescape"))
    names = ("task", "exif", "overlays", "amp", "precision", "backend", "labels", "label_min_score", "label_tolerance")
    return {
        "checkpoint": fingerprint(options.checkpoint), "list of images": listed.hexdigest(),
        **{name: getattr(options, name) for name in names},
        **{f"test.{name}": value for name, value in asdict(options.test).items() if name != "batch_size"},
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
