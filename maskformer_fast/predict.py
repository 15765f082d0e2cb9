"""``python -m maskformer_fast.predict CHECKPOINT IMAGES...``: segment files, folders and globs."""

from __future__ import annotations

import glob
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from maskformer_fast.cli import leading_path, parse, run_command
from maskformer_fast.config import Amp, Task, TestConfig
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.data import BrokenExampleError
from maskformer_fast.data.images import IMAGE_SUFFIXES, read_image
from maskformer_fast.inference.bundle_predictor import Backend
from maskformer_fast.inference.load import load, stored_options
from maskformer_fast.output.writer import ResultWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictOptions:
    """Segment images with a trained checkpoint, or a bundle exported from one.

    Writes below the output folder: ``semantic/NAME.png`` (class index), ``panoptic/NAME.png`` with
    ``panoptic.json`` (COCO panoptic format), ``instances.json`` (COCO results with RLE masks), and
    ``overlays/NAME_TASK.png`` to look at. Exit status 1 if an image could not be read; the others are written.
    """

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder, weights file, or bundle."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders (searched recursively) and globs; they come before the options."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "predictions"
    """Folder for the results."""
    task: tuple[Task, ...] = ("semantic",)
    """One or several of semantic, panoptic, instance; one forward pass serves all, except by TensorRT."""
    overlays: bool = True
    """Also draw each result over its image."""
    device: str = "auto"
    """``auto`` takes the GPU where there is one."""
    backend: Backend = "auto"
    """Backend of a bundle: ``auto`` takes TensorRT where the bundle has an engine for this GPU, else onnxruntime."""
    amp: Amp | None = None
    """Precision of the network; by default that of its training. A bundle has the one it was exported with."""
    test: TestConfig = field(default_factory=TestConfig)


def find_images(patterns: Sequence[str]) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Expand files, folders and globs -> [(path, output name)], and problems: patterns without an image.

    Names keep the folder structure below a given folder. Of names that are equal but for the suffix, the second and
    later ones get ``_2``, ``_3``...
    """
    matches: list[tuple[Path, Path]] = []
    problems: list[str] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            matches += [(file, file.relative_to(path)) for file in files]
        else:
            files = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
            files = [file for file in files if file.is_file()]
            matches += [(file, Path(file.name)) for file in files]
        if not files:
            problems.append(f"{pattern}: no image there")
    taken: set[Path] = set()
    unique = []
    for file, name in matches:
        candidate, number = name, 1
        while candidate.with_suffix("") in taken:
            number += 1
            candidate = name.with_name(f"{name.stem}_{number}{name.suffix}")
        taken.add(candidate.with_suffix(""))
        unique.append((file, candidate))
    return unique, problems


def image_ids(names: Sequence[Path]) -> dict[Path, int]:
    """Image ids for COCO's formats: the names as numbers if all are distinct numbers, as COCO's are, else 1, 2, ..."""
    stems = [name.stem for name in names]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return {name: int(name.stem) for name in names}
    return {name: number for number, name in enumerate(names, start=1)}


def read_batches(
    files: Sequence[tuple[Path, Path]], batch_size: int, problems: list[str]
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Decode images in batches. An image that cannot be read is added to ``problems`` and left out."""
    batch: list[tuple[Path, np.ndarray]] = []
    for file, name in files:
        try:
            batch.append((name, read_image(file)))
        except BrokenExampleError as error:
            problems.append(str(error))
            logger.error("%s", error)
            continue
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    path = leading_path(argv)
    stored = stored_options(path) if path else None
    options = parse(
        PredictOptions,
        argv,
        prog="python -m maskformer_fast.predict",
        default=PredictOptions(tyro.MISSING, tyro.MISSING, test=stored[1]) if stored else None,
    )
    predictor = load(options.checkpoint, options.device, options.test, options.backend, options.amp)
    for task in options.task:
        predictor.check_task(task)
    if "instance" in options.task:
        coco_tools()  # an error before the first image, not after it
    files, problems = find_images(options.images)
    ids = image_ids([name for _, name in files])
    writer = ResultWriter(Path(options.output), predictor.metadata, options.overlays)
    with tqdm(total=len(files), unit="img", dynamic_ncols=True) as progress:
        for batch in read_batches(files, options.test.batch_size, problems):
            images = [image for _, image in batch]
            results = predictor.infer(images, options.task)
            for index, (name, image) in enumerate(batch):
                writer.write(name, ids[name], image, {task: results[task][index] for task in options.task})
            progress.update(len(batch))
    writer.close()
    print(f"{len(writer.images)} images segmented, results in {options.output}")
    if problems:
        listing = "\n  ".join(problems)
        print(f"error: {len(problems)} inputs could not be used:\n  {listing}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
