"""Results of many images as files: index PNGs, COCO panoptic, COCO instances, overlays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskformer_fast.config import Task
from maskformer_fast.core.files import atomic_write, write_json
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import PanopticResult, Result, SemanticResult
from maskformer_fast.distributed import gather_on_main
from maskformer_fast.output import visualize
from maskformer_fast.output.formats import instances_to_coco, write_index_png, write_panoptic_json, write_panoptic_png


class ResultWriter:
    """Writes files of each task below one folder; `close` writes the JSON files of all images.

    ``semantic/NAME.png`` has class indices; ``panoptic/NAME.png`` and ``panoptic.json`` are in COCO's panoptic format;
    ``instances.json`` is in COCO's results format (RLE masks); ``overlays/NAME_TASK.png`` are pictures to look at.
    """

    def __init__(self, folder: Path, metadata: Metadata, overlays: bool) -> None:
        self.folder = folder
        self.metadata = metadata
        self.overlays = overlays
        self.images: list[dict[str, Any]] = []
        self.panoptic: list[dict[str, Any]] = []
        self.instances: list[dict[str, Any]] = []
        self.tasks: set[Task] = set()

    def write(
        self,
        name: Path,
        image_id: int | str,
        image: np.ndarray,  # [H, W, 3] uint8 RGB
        results: Mapping[Task, Result],
    ) -> None:
        """Write the results of one image; ``name`` is its file name, relative to the folder of the images."""
        entry = {"id": image_id, "file_name": name.as_posix(), "height": image.shape[0], "width": image.shape[1]}
        self.images.append(entry)
        for task, result in results.items():
            self.tasks.add(task)
            if isinstance(result, SemanticResult):
                write_index_png(self._path("semantic", name), result.labels, self.metadata.colors)
            elif isinstance(result, PanopticResult):
                target = self._path("panoptic", name)
                annotation = write_panoptic_png(target, result, image_id, self.metadata)
                annotation["file_name"] = target.relative_to(self.folder / "panoptic").as_posix()
                self.panoptic.append(annotation)
            else:
                self.instances += instances_to_coco(result, image_id, self.metadata)
            if self.overlays:
                drawn = visualize.draw_result(image, result, self.metadata)
                with atomic_write(self._path("overlays", name, f"_{task}")) as file:
                    Image.fromarray(drawn).save(file, format="PNG")

    def close(self) -> None:
        """Write ``panoptic.json`` and ``instances.json`` for the tasks that ran, with the images of all ranks."""
        parts = gather_on_main((self.images, self.panoptic, self.instances, self.tasks))
        tasks = {task for *_, of_rank in parts for task in of_rank}
        if "panoptic" in tasks:
            images = [entry for of_rank, *_ in parts for entry in of_rank]
            panoptic = [entry for _, of_rank, *_ in parts for entry in of_rank]
            write_panoptic_json(self.folder / "panoptic.json", images, panoptic, self.metadata)
        if "instance" in tasks:
            write_json(self.folder / "instances.json", [entry for _, _, of_rank, _ in parts for entry in of_rank])

    def _path(self, kind: str, name: Path, ending: str = "") -> Path:
        return self.folder / kind / name.with_name(f"{name.stem}{ending}.png")
