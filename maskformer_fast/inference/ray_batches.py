"""`SegmentBatch`: a model as an actor of Ray Data, from columns of images to columns of run lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from maskformer_fast.config import Amp, Task, TestConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.images import as_rgb_array, read_image
from maskformer_fast.inference.batches import infer_each
from maskformer_fast.inference.load import load


class SegmentBatch:
    """Segments batches of `ray.data.Dataset.map_batches` by one model, which is loaded when the actor starts.

    Give the class itself to ``map_batches``, with ``batch_format="numpy"``, these arguments as
    ``fn_constructor_kwargs``, and the number of actors. Rows keep their columns, but for that of the images, and get:

    - ``height``, ``width``: int32, of the image; 0 for one that cannot be used.
    - ``error``: string, empty unless the image could not be decoded or segmented. Such a row has no masks.
    - ``TASK_category_id``, ``TASK_counts``, ``TASK_score``: for each task a list with an element for each mask: its
      category in the data set (int64), compressed run lengths of COCO (string; they belong to the height and width),
      and score (float32; 1 where the task has none). Masks of semantic results are those of the classes in the image.

    Types of columns are the same for every batch, so that files of Parquet have one schema.
    """

    def __init__(
        self,
        checkpoint: str,
        task: Task | Sequence[Task] = "semantic",
        image_column: str = "bytes",
        device: str = "auto",
        test: TestConfig | None = None,
        amp: Amp | None = None,
        exif: bool = True,
    ) -> None:
        """Load the model; errors are those of `maskformer_fast.load`, whose arguments these are otherwise.

        Args:
            checkpoint: checkpoint, run folder or bundle, at the same path on every machine.
            task: one task or several.
            image_column: column of the images: the bytes of files, as `ray.data.read_binary_files` gives them, or uint8
                arrays [H, W, 3] RGB, as `ray.data.read_images(mode="RGB")` does.
            exif: turn images from bytes as their EXIF orientation says.

        Raises:
            ModuleNotFoundError: pyarrow or pycocotools is not installed.
        """
        self._arrow = _arrow()
        coco_tools()
        self._model = load(checkpoint, device, test, amp=amp)
        self._tasks: tuple[Task, ...] = (task,) if isinstance(task, str) else tuple(task)
        for name in self._tasks:
            self._model.check_task(name)
        self._column, self._exif = image_column, exif

    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        """Segment a batch -> `pyarrow.Table`, a row for each of the batch, in its order.

        Args:
            batch: columns as NumPy arrays; that of the images has elements of type bytes, or is [B, H, W, 3] uint8, or
                has such arrays [H, W, 3] as elements.

        Raises:
            ValueError: there is no column of images, or it has another type.
        """
        check(self._column in batch, "image_column", f"one of {', '.join(batch)}", self._column)
        images: list[np.ndarray | None] = []
        errors: list[str] = []
        for value in batch[self._column]:
            image, error = self._decoded(value)
            images.append(image)
            errors.append(error)
        good = [number for number, image in enumerate(images) if image is not None]
        step = self._model.test.batch_size
        rows: dict[int, list[list[dict[str, Any]]]] = {}
        categories = self._model.metadata.category_ids
        for start in range(0, len(good), step):
            numbers = good[start : start + step]
            results = infer_each(self._model, [image for image in map(images.__getitem__, numbers)
                                               if image is not None], self._tasks)  # fmt: skip
            for number, result in zip(numbers, results, strict=True):
                if isinstance(result, Exception):
                    errors[number] = f"{type(result).__name__}: {result}"
                else:
                    rows[number] = [result[task].to_coco(number, categories) for task in self._tasks]
        return self._table(batch, images, errors, rows)

    def _decoded(self, value: Any) -> tuple[np.ndarray | None, str]:
        """Pixels of an image, or why it has none."""
        try:
            if isinstance(value, (bytes, bytearray, memoryview)):
                return read_image("image", self._exif, content=bytes(value)), ""
            return as_rgb_array(np.asarray(value)), ""
        except BrokenExampleError as error:
            return None, error.reason
        except (TypeError, ValueError, MemoryError) as error:
            return None, f"{type(error).__name__}: {error}"

    def _table(
        self, batch: dict[str, np.ndarray], images: Sequence[np.ndarray | None], errors: Sequence[str],
        rows: dict[int, list[list[dict[str, Any]]]],
    ) -> Any:  # fmt: skip
        arrow = self._arrow
        columns = {name: _as_column(arrow, values) for name, values in batch.items() if name != self._column}
        sizes = [image.shape[:2] if number in rows and image is not None else (0, 0)
                 for number, image in enumerate(images)]  # fmt: skip
        columns["height"] = arrow.array([size[0] for size in sizes], arrow.int32())
        columns["width"] = arrow.array([size[1] for size in sizes], arrow.int32())
        columns["error"] = arrow.array(errors, arrow.string())
        for index, task in enumerate(self._tasks):
            masks = [rows[number][index] if number in rows else [] for number in range(len(images))]
            for name, kind in (("category_id", arrow.int64()), ("counts", arrow.string()), ("score", arrow.float32())):
                values = [[mask["segmentation"]["counts"] if name == "counts" else mask.get(name, 1.0)
                           for mask in row] for row in masks]  # fmt: skip
                columns[f"{task}_{name}"] = arrow.array(values, arrow.list_(kind))
        return arrow.table(columns)


def _as_column(arrow: Any, values: np.ndarray) -> Any:
    if values.ndim == 1 and values.dtype != object:
        return arrow.array(values)
    return arrow.array([value.tolist() if isinstance(value, np.ndarray) else value for value in values])


def _arrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pyarrow is needed for batches of Ray Data; install it with: pip install "maskformer_fast[ray]"',
            name=error.name,
        ) from error
    return pyarrow
