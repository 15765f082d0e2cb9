"""Run a predictor over a data set and measure it: the one evaluation loop of training and of `evaluate`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from maskformer_fast import visualize
from maskformer_fast.config import Task
from maskformer_fast.data import SegmentationDataset
from maskformer_fast.data.loader import eval_loader
from maskformer_fast.evaluation import build_evaluator
from maskformer_fast.predictor import Predictor
from maskformer_fast.structures import Example, Result

logger = logging.getLogger(__name__)


def measure(
    predictor: Predictor,
    dataset: SegmentationDataset,
    tasks: Sequence[Task],
    *,
    workers: int,
    skip_broken: bool = False,
    pictures: int = 0,
    limit: int | None = None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Metrics of each task, and a picture grid (image, truth, results) of the first ``pictures`` images.

    Headline numbers stand flat in the returned dictionary; each task's whole report stands under its name.
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
                for task, evaluator in evaluators.items():
                    evaluator.process(example, results[task][index])
                if len(rows) < pictures:
                    rows.append(_row(example, [results[task][index] for task in tasks], dataset))
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


def _row(example: Example, results: list[Result], dataset: SegmentationDataset) -> list[np.ndarray]:
    drawn = [visualize.draw_result(example.image, result, dataset.metadata) for result in results]
    return [example.image, visualize.draw_truth(example, dataset.metadata, dataset.task), *drawn]
