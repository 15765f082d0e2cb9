"""Results of many images as files: index PNGs, COCO panoptic, COCO instances, overlays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskformer_fast.config import Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write, is_full_disk, write_json
from maskformer_fast.core.image_files import RESULT_FOLDERS, RESULT_LIST, RESULT_MARK, is_result_list, result_names
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import PanopticResult, Result, SemanticResult
from maskformer_fast.distributed import gather_on_main
from maskformer_fast.output import visualize
from maskformer_fast.output.formats import (
    coco_categories,
    instances_to_coco,
    write_index_png,
    write_panoptic_json,
    write_panoptic_png,
)
from maskformer_fast.output.label_files import LabelEntries, LabelWriter

_LISTS = ("panoptic.json", "instances.json")


class ResultWriter:
    """Writes files of each task below one folder; `close` writes the JSON files of all images.

    ``semantic/NAME.png`` has class indices; ``panoptic/NAME.png`` and ``panoptic.json`` are in COCO's panoptic format;
    ``instances.json`` is in COCO's results format (RLE masks); ``overlays/NAME_TASK.png`` are pictures to look at.
    ``images.json`` lists the images: id, file name, size, and NAME as ``result``. ``labels`` is the folder of a
    `LabelWriter`.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Metadata,
        overlays: bool,
        names: Sequence[str],
        file_names: Sequence[str] | None = None,
        labels: LabelWriter | None = None,
    ) -> None:
        """Write nothing yet.

        Args:
            names: names or relative paths of all images, also of other ranks; `image_files.result_names` makes NAME.
            file_names: file names in the JSON files, if they are not ``names``.
            labels: writer of label files, which gets the objects of one task.

        Raises:
            ValueError: the folder is a file or lies below one, or has files of a result's name from elsewhere, which
                would be lost.
        """
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        check(nearest.is_dir(), "output", "a folder, which may be new", str(nearest))
        listed = folder / RESULT_LIST
        if not is_result_list(listed):  # whatever has the name of a result is another's, as a data set's truth
            for name in (RESULT_LIST, *_LISTS, *RESULT_FOLDERS):
                check(not os.path.lexists(folder / name) or _is_empty_folder(folder / name), "output",
                      f"a folder without another {name}; choose an empty one", str(folder / name))
        self.folder = folder
        self.metadata = metadata
        self.overlays = overlays
        self.names = result_names(names)
        self.file_names = names if file_names is None else file_names
        self.images: list[dict[str, Any]] = []
        self.panoptic: list[dict[str, Any]] = []
        self.instances: list[dict[str, Any]] = []
        self.tasks: set[Task] = set()
        self.labels = labels
        self.label_entries: list[LabelEntries] = []
        self.failed: list[str] = []
        """File name and reason of each image whose results are not written; after `close` those of all ranks."""

    def write(
        self,
        number: int,
        image_id: int | str,
        image: np.ndarray,  # [H, W, 3] uint8 RGB
        results: Mapping[Task, Result] | Exception,
    ) -> bool:
        """Write the results of one image -> whether that worked; if not, the reason is added to ``failed``.

        Args:
            number: index of the image in ``file_names``.
            results: those of each task, or the error that came in their place.

        Raises:
            OSError: the disk is full.
        """
        try:
            if isinstance(results, Exception):
                raise results
            self._write(number, image_id, image, results)
        except Exception as error:  # whatever an image can cause
            if is_full_disk(error):
                raise
            self.fail(number, self.file_names[number], error)
            return False
        return True

    def fail(self, number: int | None, file_name: str, reason: object) -> None:
        """Note that an image has no results; ``number`` is its index, where it is known."""
        reason = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
        self.failed.append(f"{file_name}: {reason}")

    def _write(self, number: int, image_id: int | str, image: np.ndarray, results: Mapping[Task, Result]) -> None:
        self.begin()
        name = self.names[number]
        panoptic: list[dict[str, Any]] = []
        instances: list[dict[str, Any]] = []
        for task, result in results.items():
            if isinstance(result, SemanticResult):
                write_index_png(self.folder / "semantic" / f"{name}.png", result.labels, self.metadata.colors)
            elif isinstance(result, PanopticResult):
                target = self.folder / "panoptic" / f"{name}.png"
                panoptic.append(write_panoptic_png(target, result, image_id, self.metadata))
                panoptic[-1]["file_name"] = f"{name}.png"
            else:
                instances += instances_to_coco(result, image_id, self.metadata)
            if self.overlays:
                self.write_overlay(number, task, image, result)
        size = (image.shape[0], image.shape[1])
        labels: LabelEntries | None = None
        if self.labels is not None:
            (result,) = results.values()
            labels = self.labels.write(number, image_id, size, result.to_objects())
        self.add(number, image_id, size, panoptic, instances, results, labels)

    def write_overlay(
        self,
        number: int,
        task: Task,
        image: np.ndarray,  # [H, W, 3] uint8 RGB
        result: Result,
    ) -> None:
        """Draw a result over an image, or both over a smaller copy of it."""
        drawn = visualize.draw_result(image, result, self.metadata)
        with atomic_write(self.folder / "overlays" / f"{self.names[number]}_{task}.png") as file:
            Image.fromarray(drawn).save(file, format="PNG")

    def begin(self) -> None:
        """Mark the folder as one of results, if it is not: a search for images leaves out unfinished ones, too."""
        if not is_result_list(self.folder / RESULT_LIST):
            self._write_list(())

    def add(
        self,
        number: int,
        image_id: int | str,
        size: tuple[int, int],
        panoptic: Sequence[dict[str, Any]],
        instances: Sequence[dict[str, Any]],
        tasks: Iterable[Task],
        labels: LabelEntries | None = None,
    ) -> None:
        """Take the entries of an image, of a height and width, whose other files are written."""
        self.images.append({"id": image_id, "file_name": self.file_names[number], "height": size[0],
                            "width": size[1], "result": self.names[number]})  # fmt: skip
        self.panoptic += panoptic
        self.instances += instances
        self.tasks.update(tasks)
        if labels is not None:
            self.label_entries.append(labels)

    def close(self) -> None:
        """Write the JSON files: ``images.json``, and those of the tasks that ran, with the images of all ranks."""
        parts = gather_on_main(
            (self.images, self.panoptic, self.instances, self.tasks, self.failed, self.label_entries)
        )
        if not parts:
            return
        tasks = {task for part in parts for task in part[3]}
        images = [entry for part in parts for entry in part[0]]
        self.failed = [entry for part in parts for entry in part[4]]
        if images:
            self._write_list(images)
            if self.labels is not None:
                self.labels.close(lambda: (entries for part in parts for entries in part[5]))
        if "panoptic" in tasks:
            panoptic = [entry for part in parts for entry in part[1]]
            write_panoptic_json(self.folder / "panoptic.json", images, panoptic, self.metadata)
        if "instance" in tasks:
            write_json(self.folder / "instances.json", [entry for part in parts for entry in part[2]])

    def _write_list(self, images: Sequence[dict[str, Any]]) -> None:
        content = {
            "info": {"description": RESULT_MARK},
            "images": images,
            "annotations": [],
            "categories": coco_categories(self.metadata),
        }
        write_json(self.folder / RESULT_LIST, content, indent=None)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
