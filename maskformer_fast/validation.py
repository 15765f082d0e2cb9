"""Run a predictor over a data set and measure it: the one evaluation loop of training and of `evaluate`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskformer_fast import visualize
from maskformer_fast.config import Task
from maskformer_fast.data import SegmentationDataset
from maskformer_fast.data.loader import eval_loader
from maskformer_fast.evaluation import build_evaluator
from maskformer_fast.predictor import Predictor
from maskformer_fast.structures import Example, Metadata, Result
from maskformer_fast.writer import ResultWriter

logger = logging.getLogger(__name__)


def check_classes(expected: Metadata, got: Metadata) -> None:
    """Hold the classes of the data set that is measured on against those that were trained.

    Raises:
        ValueError: another number of classes, or the same ones in another order. Other names only give a warning.
    """
    pairs = list(zip_longest(expected.class_names, got.class_names, fillvalue="(none)"))
    different = [f"{index}: {a} / {b}" for index, (a, b) in enumerate(pairs) if a != b]
    shown = "; ".join(different[:5])
    reordered = bool(different) and set(expected.class_names) == set(got.class_names)
    if reordered or expected.num_classes != got.num_classes:
        raise ValueError(f"data: expected the {expected.num_classes} classes of training in their order, got "
                         f"{got.num_classes} (training / this data set: {shown})")
    if different:
        logger.warning("%d classes have other names than in training (training / here: %s)", len(different), shown)


def measure(
    predictor: Predictor,
    dataset: SegmentationDataset,
    tasks: Sequence[Task],
    *,
    workers: int,
    skip_broken: bool = False,
    pictures: int = 0,
    limit: int | None = None,
    writer: ResultWriter | None = None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Metrics of each task, and a picture grid (image, truth, results) of the first ``pictures`` images.

    ``writer`` is given every result. Headline numbers stand flat in the returned dictionary; each task's whole report
    stands under its name.
    """
    evaluators = {task: build_evaluator(task, dataset.metadata) for task in tasks}
    rows: list[list[np.ndarray]] = []
    batch_size = predictor.config.test.batch_size
    loader = eval_loader(dataset, predictor.config.test, workers, skip_broken)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    with tqdm(total=total, desc="evaluate", unit="img", leave=False, dynamic_ncols=True) as progress:
        samples = iter(itertools.islice(loader, limit))
        while batch := list(itertools.islice(samples, batch_size)):
            examples = [example for example, _ in batch]
            results = predictor.infer([image for _, image in batch], [e.image for e in examples], tasks)
            for index, example in enumerate(examples):
                own = {task: results[task][index] for task in tasks}
                for task, evaluator in evaluators.items():
                    evaluator.process(example, own[task])
                if writer is not None:
                    writer.write(_file_name(example), example.image_id, example.image, own)
                if len(rows) < pictures:
                    rows.append(_row(example, list(own.values()), dataset))
            progress.update(len(batch))
    if loader.broken:
        listing = "\n  ".join(f"{path}: {reason}" for path, reason in loader.broken)
        logger.warning("%d images were left out as broken:\n  %s", len(loader.broken), listing)
    report = {task: evaluator.evaluate() for task, evaluator in evaluators.items()}
    metrics: dict[str, Any] = {}
    for values in report.values():
        metrics.update({key: value for key, value in values.items() if not isinstance(value, dict)})
    titles = ["image", "truth", *tasks]
    metrics.update({str(task): values for task, values in report.items()})
    return metrics, visualize.grid(rows, titles) if rows else None


def _file_name(example: Example) -> Path:
    """Name for an image's results: a textual id keeps its folders, a number goes with the file's own name."""
    named_by_file = isinstance(example.image_id, int) and example.path
    return Path(Path(example.path).name if named_by_file else f"{example.image_id}.png")


def _row(example: Example, results: list[Result], dataset: SegmentationDataset) -> list[np.ndarray]:
    drawn = [visualize.draw_result(example.image, result, dataset.metadata) for result in results]
    return [example.image, visualize.draw_truth(example, dataset.metadata, dataset.task), *drawn]
