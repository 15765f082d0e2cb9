"""Details of a measurement beside the metrics: confusion matrix, boundary scores, scores by image, the worst images.

Memory does not grow with the number of images but for a row of scores each (about 200 bytes, and for average precision
the encoded masks, as without a report); of pictures only the worst are kept, reduced in size.
"""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskformer_fast.config import Task
from maskformer_fast.core.files import atomic_write, write_json
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import Result
from maskformer_fast.evaluation.boundary import BoundaryInstanceEvaluator, BoundarySemanticEvaluator
from maskformer_fast.evaluation.common import MAIN_METRICS, Evaluator, class_keys
from maskformer_fast.evaluation.instance import InstanceEvaluator
from maskformer_fast.evaluation.panoptic import PanopticEvaluator
from maskformer_fast.evaluation.semantic import SemanticEvaluator
from maskformer_fast.output import visualize
from maskformer_fast.output.report_page import WorstImage, confusion_picture, normalised, page, png_bytes, reduced_jpeg
from maskformer_fast.structures import Example

WORST = 24
"""Largest number of images on the page."""
_KINDS: dict[Task, type[SemanticEvaluator] | type[PanopticEvaluator] | type[InstanceEvaluator]] = {
    "semantic": SemanticEvaluator, "panoptic": PanopticEvaluator, "instance": InstanceEvaluator,
}  # fmt: skip
_SHOWN: dict[Task, tuple[str, ...]] = {
    "semantic": ("miou", "mean_accuracy", "pixel_accuracy"), "panoptic": ("pq", "sq", "rq"),
    "instance": ("ap", "ap50", "ap75"),
}  # fmt: skip
"""Metrics of one image, by task."""


class Report:
    """Collects the details of the images of one rank; `merge` joins those of ranks, and `write` makes the files.

    The worst images are those of the lowest `MAIN_METRICS` of the first task. It can be pickled, as evaluators can.
    """

    def __init__(self, tasks: tuple[Task, ...], metadata: Metadata, truth_task: Task) -> None:
        """``truth_task`` is the data set's, as which the truth is drawn."""
        self.tasks = tasks
        self.metadata = metadata
        self.truth_task = truth_task
        self.rows: list[dict[str, Any]] = []
        self.worst: list[tuple[float, int, WorstImage]] = []  # heap of (minus score, minus index, image)
        self.confusion = SemanticEvaluator(metadata) if "semantic" in tasks else None
        self.boundary: dict[Task, Evaluator] = {}
        if "semantic" in tasks:
            self.boundary["semantic"] = BoundarySemanticEvaluator(metadata)
        if "instance" in tasks:
            self.boundary["instance"] = BoundaryInstanceEvaluator(metadata)

    def add(self, index: int, name: str, example: Example, results: Mapping[Task, Result]) -> None:
        """Add one image by its index and file name in the data set. Errors are those of the evaluators."""
        row: dict[str, Any] = {"index": index, "image_id": example.image_id, "file_name": name}
        for task in self.tasks:
            of_image = _KINDS[task](self.metadata)
            of_image.process(example, results[task])
            if self.confusion is not None and isinstance(of_image, SemanticEvaluator):
                self.confusion.merge(of_image)
            scores = of_image.evaluate()
            row.update({f"{task}/{key}": scores[key] for key in _SHOWN[task]})
            if task in self.boundary:
                self.boundary[task].process(example, results[task])
        self.rows.append(row)
        score = row[f"{self.tasks[0]}/{MAIN_METRICS[self.tasks[0]]}"]
        if score is None or (len(self.worst) == WORST and (-score, -index) < self.worst[0][:2]):
            return
        drawn = [visualize.draw_result(example.image, results[task], self.metadata) for task in self.tasks]
        pictures = [example.image, visualize.draw_truth(example, self.metadata, self.truth_task), *drawn]
        self._keep((-score, -index, WorstImage(name, score, tuple(reduced_jpeg(picture) for picture in pictures))))

    def _keep(self, entry: tuple[float, int, WorstImage]) -> None:
        if len(self.worst) < WORST:
            heapq.heappush(self.worst, entry)
        else:
            heapq.heappushpop(self.worst, entry)

    def merge(self, other: Report) -> None:
        """Add the images of another rank."""
        self.rows += other.rows
        for entry in other.worst:
            self._keep(entry)
        if self.confusion is not None and other.confusion is not None:
            self.confusion.merge(other.confusion)
        for task, evaluator in self.boundary.items():
            evaluator.merge(other.boundary[task])

    def boundary_metrics(self) -> dict[Task, dict[str, Any]]:
        """Boundary IoU (semantic) and boundary AP (instance) over all images."""
        return {task: evaluator.evaluate() for task, evaluator in self.boundary.items()}

    def write(self, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Write the files of a report.

        - ``index.html``: metrics, confusion matrix and the worst images, in one file that needs no other.
        - ``per_image.csv``, ``per_image.json``: scores of each image.
        - ``confusion.csv``, ``.json``, ``.png``: with semantic results, pixels by true and predicted class.
        - ``metrics.json``: the metrics as given.

        Raises:
            OSError: a file cannot be written.
        """
        write_json(folder / "metrics.json", metrics)
        rows = sorted(self.rows, key=lambda row: row["index"])
        write_json(folder / "per_image.json", rows, indent=None)
        columns = ["index", "image_id", "file_name"]
        columns += [f"{task}/{key}" for task in self.tasks for key in _SHOWN[task]]
        _write_csv(folder / "per_image.csv", [columns, *([row[column] for column in columns] for row in rows)])
        names, picture = class_keys(self.metadata), None
        if self.confusion is not None:
            counts = self.confusion.confusion
            write_json(folder / "confusion.json", {
                "classes": names, "pixels": counts.tolist(), "normalised": np.round(normalised(counts), 6).tolist(),
            }, indent=None)  # fmt: skip
            table = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
            _write_csv(folder / "confusion.csv", [["truth \\ prediction", *names], *table])
            drawn = confusion_picture(counts, names)
            with atomic_write(folder / "confusion.png") as file:
                Image.fromarray(drawn).save(file, format="PNG")
            picture = png_bytes(drawn)
        worst = [image for _, _, image in sorted(self.worst, key=lambda entry: (-entry[0], -entry[1]))]
        headlines = {f"{task}: {key}": metrics[task].get(key) for task in self.tasks
                     for key in (*_SHOWN[task], "boundary_iou", "boundary_ap") if key in metrics[task]}
        text = page(f"{self.metadata.name}: {len(rows)} images", headlines, picture, worst,
                    ["image", "truth", *self.tasks], f"{self.tasks[0]} {MAIN_METRICS[self.tasks[0]]}")
        with atomic_write(folder / "index.html") as file:
            file.write(text.encode(errors="backslashreplace"))


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    """Write a table. Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([[_cell(value) for value in row] for row in rows])
    with atomic_write(path) as file:
        file.write(buffer.getvalue().encode(errors="backslashreplace"))


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
