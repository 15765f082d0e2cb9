"""``python -m maskformer_fast.predict CHECKPOINT IMAGES...``: segment files, folders and globs."""

from __future__ import annotations

import glob
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from maskformer_fast import visualize
from maskformer_fast.checkpoint import load_weights
from maskformer_fast.cli import leading_path, parse, run_command
from maskformer_fast.config import Task, TestConfig
from maskformer_fast.data import BrokenExampleError
from maskformer_fast.data.images import IMAGE_SUFFIXES, read_image
from maskformer_fast.files import atomic_write
from maskformer_fast.formats import (
    instances_to_coco,
    write_index_png,
    write_json,
    write_panoptic_json,
    write_panoptic_png,
)
from maskformer_fast.predictor import Predictor, load
from maskformer_fast.structures import PanopticResult, Result, SemanticResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictOptions:
    """Segment images with a trained checkpoint.

    Writes below the output folder: ``semantic/NAME.png`` (class index), ``panoptic/NAME.png`` with
    ``panoptic.json`` (COCO panoptic format), ``instances.json`` (COCO results with RLE masks), and
    ``overlays/NAME_TASK.png`` to look at. Exit status 1 if an image could not be read; the others are written.
    """

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder or weights file."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders (searched recursively) and globs."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "predictions"
    """Folder for the results."""
    task: tuple[Task, ...] = ("semantic",)
    """One or several of semantic, panoptic, instance; one forward pass serves all."""
    overlays: bool = True
    """Also draw each result over its image."""
    device: str = "auto"
    """``auto`` takes the GPU where there is one."""
    test: TestConfig = field(default_factory=TestConfig)


class ResultWriter:
    """Files of each task below one folder; `close` writes the JSON files that cover all images."""

    def __init__(self, folder: Path, predictor: Predictor, overlays: bool) -> None:
        self.folder = folder
        self.metadata = predictor.metadata
        self.overlays = overlays
        self.images: list[dict[str, Any]] = []
        self.panoptic: list[dict[str, Any]] = []
        self.instances: list[dict[str, Any]] = []
        self.tasks: set[Task] = set()

    def write(self, name: Path, image: np.ndarray, results: dict[Task, Result]) -> None:
        """Write the results of one image; ``name`` is relative and has no suffix."""
        image_id = len(self.images) + 1
        entry = {"id": image_id, "file_name": name.as_posix(), "height": image.shape[0], "width": image.shape[1]}
        self.images.append(entry)
        for task, result in results.items():
            self.tasks.add(task)
            if isinstance(result, SemanticResult):
                target = self._path(Path("semantic") / name)
                write_index_png(target, result.labels, self.metadata.colors)
            elif isinstance(result, PanopticResult):
                target = self._path(Path("panoptic") / name)
                entry_for_json = write_panoptic_png(target, result, image_id, self.metadata)
                entry_for_json["file_name"] = target.relative_to(self.folder / "panoptic").as_posix()
                self.panoptic.append(entry_for_json)
            else:
                found = instances_to_coco(result, image_id, self.metadata)
                self.instances += [{**instance, "file_name": name.as_posix()} for instance in found]
            if self.overlays:
                with atomic_write(self._path(Path("overlays") / f"{name}_{task}")) as file:
                    Image.fromarray(visualize.draw_result(image, result, self.metadata)).save(file, format="PNG")

    def close(self) -> None:
        """Write ``panoptic.json`` and ``instances.json`` for the tasks that ran."""
        if "panoptic" in self.tasks:
            write_panoptic_json(self.folder / "panoptic.json", self.images, self.panoptic, self.metadata)
        if "instance" in self.tasks:
            write_json(self.folder / "instances.json", self.instances)

    def _path(self, name: Path) -> Path:
        path = self.folder / name.with_name(f"{name.name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def find_images(patterns: Sequence[str]) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Expand files, folders and globs -> [(path, output name without suffix)], and problems (nothing found there).

    Names keep the folder structure below a given folder; a name that is taken gets ``_2``, ``_3``...
    """
    found: list[tuple[Path, Path]] = []
    problems: list[str] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            found += [(file, file.relative_to(path).with_suffix("")) for file in files]
        else:
            files = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
            files = [file for file in files if file.is_file()]
            found += [(file, Path(file.stem)) for file in files]
        if not files:
            problems.append(f"{pattern}: no image there")
    taken: set[Path] = set()
    unique = []
    for file, name in found:
        candidate, number = name, 1
        while candidate in taken:
            number += 1
            candidate = name.with_name(f"{name.name}_{number}")
        taken.add(candidate)
        unique.append((file, candidate))
    return unique, problems


def read_batches(
    files: Sequence[tuple[Path, Path]], batch_size: int, problems: list[str]
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Decode images in batches; one that cannot be read goes to ``problems`` and the rest goes on."""
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
    config = load_weights(path).config if path else None
    options = parse(
        PredictOptions,
        argv,
        prog="python -m maskformer_fast.predict",
        default=PredictOptions(tyro.MISSING, tyro.MISSING, test=config.test) if config else None,
    )
    predictor = load(options.checkpoint, options.device, test=options.test)
    for task in options.task:
        predictor.check_task(task)
    files, problems = find_images(options.images)
    writer = ResultWriter(Path(options.output), predictor, options.overlays)
    with tqdm(total=len(files), unit="img", dynamic_ncols=True) as progress:
        for batch in read_batches(files, options.test.batch_size, problems):
            images = [image for _, image in batch]
            results = predictor.infer([predictor.resize(image) for image in images], images, options.task)
            for index, (name, image) in enumerate(batch):
                writer.write(name, image, {task: results[task][index] for task in options.task})
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
