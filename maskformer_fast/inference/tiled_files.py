"""Large pictures from file to result files, tile by tile, in bounded memory; what is interrupted goes on later.

While it runs, the folder ``.tiles`` below that of the results has a folder for each picture, with what is known of its
tiles and of the results (`tiled.TileFiles`). A finished picture leaves its entries of the JSON files there until all
are done without a failure.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskformer_fast.config import Task
from maskformer_fast.core.files import is_full_disk, write_json
from maskformer_fast.core.label_formats import LabelledObject, outlines_at
from maskformer_fast.core.results import PanopticResult, Result, SemanticResult
from maskformer_fast.data.large_pictures import LargePicture, open_picture
from maskformer_fast.data.shards import Member
from maskformer_fast.inference.tile_grid import Box
from maskformer_fast.inference.tiled import Progress, TiledPredictor, TiledSegmentation, TileFiles, full_size
from maskformer_fast.output.large_results import instance_entry, segment_entries, write_id_file, write_label_file
from maskformer_fast.output.writer import ResultWriter

logger = logging.getLogger(__name__)

WORK_FOLDER = ".tiles"
"""Folder, below that of the results, of unfinished pictures."""
OVERLAY_SIDE = 1536
"""Longest side of an overlay, in pixels."""
OVERLAY_INSTANCES = 100
"""Most instances that an overlay shows, the best ones."""
STRIP_PIXELS = 1 << 22
"""Pixels that are read at a time for an overlay."""



def segment_file(
    predictor: TiledPredictor,
    path: Path,
    tasks: Sequence[Task],
    writer: ResultWriter,
    number: int,  # of the picture in the writer's list
    image_id: int | str,
    exif: bool,
    settings: object,  # whatever else changes results, such as the checkpoint
    progress: Progress,
    member: Member | None = None,
) -> bool:
    """Write the results of one picture -> whether that worked; if not, the reason is added to the writer's.

    Args:
        path: the picture's file, or the tar file that has it as ``member``.
        progress: as of `TiledSegmentation.run`.

    Raises:
        OSError: the disk is full.
    """
    try:
        writer.begin()
        folder = writer.folder / WORK_FOLDER / writer.names[number]
        finished = _open_folder(folder, _job(path, tasks, predictor, exif, image_id, [settings, member]))
        if finished is None:
            with open_picture(path, exif, member, predictor.channels) as picture:
                finished = _segment(predictor, picture, tasks, writer, number, image_id, folder, progress)
            # before the tiles go: a run that is killed among them must not go on with what is left of them
            write_json(folder / "finished.json", finished)
        for entry in folder.iterdir():
            if entry.suffix in (".npz", ".npy"):
                entry.unlink()
        size = (int(finished["size"][0]), int(finished["size"][1]))
        writer.add(number, image_id, size, finished["panoptic"], finished["instances"], tasks,
                   finished["labels"])  # fmt: skip
    except Exception as error:  # whatever a picture can cause
        if is_full_disk(error):
            raise
        writer.fail(number, writer.file_names[number], error)
        return False
    return True


def remove_work(writer: ResultWriter) -> None:
    """Delete what is kept for resuming, unless a picture failed after some of its tiles: the same command goes on."""
    work = writer.folder / WORK_FOLDER
    if failed := [name for name in writer.names if any((work / name).glob("*.npz"))]:
        logger.warning("%s keeps the tiles of %s; the same command continues with them", work, ", ".join(failed[:5]))
        return
    shutil.rmtree(work, ignore_errors=True)


def _job(
    path: Path, tasks: Sequence[Task], predictor: TiledPredictor, exif: bool, image_id: int | str, settings: object
) -> dict[str, Any]:
    """All that must be the same for tiles of an earlier run to be used."""
    status = path.stat()
    job = {"picture": str(path.absolute()), "bytes": status.st_size, "modified": status.st_mtime_ns, "exif": exif,
           "tasks": list(tasks), "test": asdict(predictor.test), "id": image_id, "settings": settings}  # fmt: skip
    return dict(json.loads(json.dumps(job, default=str)))


def _open_folder(folder: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """Make a folder for a job, or empty it if it is of another -> what an earlier run wrote in the end, if it did."""
    try:
        same = json.loads((folder / "job.json").read_text()) == job
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "job.json", job)
        return None
    try:
        return dict(json.loads((folder / "finished.json").read_text()))
    except (OSError, ValueError):
        return None


def _segment(
    predictor: TiledPredictor, picture: LargePicture, tasks: Sequence[Task], writer: ResultWriter, number: int,
    image_id: int | str, folder: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Segment a picture and write its files -> what the JSON files have of it."""

    def make_array(name: str, size: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
        path = folder / f"{name}.npy"
        if path.exists():  # of the same job
            return np.lib.format.open_memmap(path, "r+")
        array = np.lib.format.open_memmap(path.with_suffix(".new"), "w+", dtype, size)
        path.with_suffix(".new").replace(path)  # complete, or not there
        return array

    tiled = TiledSegmentation(predictor, picture, tasks, TileFiles(folder), make_array)
    tiled.run(progress)
    name, reference = writer.names[number], picture.georeference
    if writer.overlays:
        step = -(-max(picture.size) // OVERLAY_SIDE)
        small = _shrunk_picture(picture, step)
        for task in tasks:
            writer.write_overlay(number, task, small, _shrunk_result(tiled, task, step, small.shape[:2]))
    picture.close()  # its memory is needed for the files
    panoptic: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    if tiled.labels is not None:
        write_label_file(writer.folder / "semantic" / name, tiled.labels, predictor.metadata, reference)
    if tiled.id_map is not None:
        file_name = write_id_file(writer.folder / "panoptic" / name, tiled.id_map, reference)
        entries = segment_entries(tiled.id_map, tiled.segments, predictor.metadata)
        file_name = str(Path(name).with_name(file_name).as_posix())
        panoptic.append({"image_id": image_id, "file_name": file_name, "segments_info": entries})
    for label, score, box, mask in tiled.instances:
        corner = box.top, box.left
        instances.append(instance_entry(image_id, label, score, corner, mask, picture.size, predictor.metadata))
    labels = writer.labels and writer.labels.write(number, image_id, picture.size, _objects(tiled))
    return {"size": list(picture.size), "panoptic": panoptic, "instances": instances, "labels": labels}


def _objects(tiled: TiledSegmentation) -> list[LabelledObject]:
    """Outlines of the segments of the one task."""
    if tiled.labels is not None:
        return SemanticResult[np.ndarray](tiled.labels).to_objects()
    if tiled.id_map is not None:
        return PanopticResult[np.ndarray](tiled.id_map, tiled.segments).to_objects()
    return [
        LabelledObject(label, score, outlines_at(mask, (box.top, box.left)))
        for label, score, box, mask in tiled.instances
    ]


def _shrunk_picture(picture: LargePicture, step: int) -> np.ndarray:
    """Every so many pixels of a picture's rows and columns -> [h, w, 3] uint8."""
    height, width = picture.size
    rows = step * max(1, STRIP_PIXELS // (width * step))
    strips = [picture.read(Box(top, 0, min(top + rows, height), width))[::step, ::step]
              for top in range(0, height, rows)]  # fmt: skip
    return np.concatenate(strips)


def _shrunk_result(tiled: TiledSegmentation, task: Task, step: int, size: tuple[int, int]) -> Result:
    """Result of a task at the pixels of `_shrunk_picture`."""
    if task == "semantic":
        assert tiled.labels is not None
        return SemanticResult(torch.from_numpy(tiled.labels[::step, ::step].copy()))
    if task == "panoptic":
        assert tiled.id_map is not None
        id_map = tiled.id_map[::step, ::step].copy()
        present = set(np.unique(id_map).tolist())
        return PanopticResult(torch.from_numpy(id_map), [one for one in tiled.segments if one.id in present])
    kept = []
    for instance in tiled.instances[:OVERLAY_INSTANCES]:
        top, left = -(-instance.box.top // step), -(-instance.box.left // step)
        mask = instance.mask[top * step - instance.box.top :: step, left * step - instance.box.left :: step]
        if mask.any():
            box = Box(top, left, top + mask.shape[0], left + mask.shape[1])
            kept.append(instance._replace(box=box, mask=mask))
    return full_size(kept, size)
