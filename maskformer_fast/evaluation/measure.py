"""The evaluation loop of training and of `evaluate`: run a predictor over a data set and measure its results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from tqdm import tqdm

from maskformer_fast.config import Task
from maskformer_fast.core.display import as_display
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import Result
from maskformer_fast.data import BrokenExampleError, SegmentationDataset
from maskformer_fast.data.loader import EvalLoader, eval_shard
from maskformer_fast.distributed import gather_on_main, is_main, on_main, rank, world_size
from maskformer_fast.evaluation import Evaluator, build_evaluator
from maskformer_fast.evaluation.report import Report
from maskformer_fast.inference.batches import infer_all, infer_each
from maskformer_fast.inference.bundle_predictor import BundlePredictor
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.output import visualize
from maskformer_fast.output.writer import ResultWriter
from maskformer_fast.structures import Example

logger = logging.getLogger(__name__)


def check_classes(expected: Metadata, got: Metadata) -> None:
    """Compare the classes of the measured data set with those of the training.

    Raises:
        ValueError: another number of classes, or a class of training at another index. Other names only give a warning.
    """
    pairs = list(zip_longest(expected.class_names, got.class_names, fillvalue="(none)"))
    different = [f"{index}: {a} / {b}" for index, (a, b) in enumerate(pairs) if a != b]
    shown = "; ".join(different[:5])
    reordered = any(a != b and b in expected.class_names for a, b in pairs)
    if reordered or expected.num_classes != got.num_classes:
        raise ValueError(f"data: expected the {expected.num_classes} classes of training in their order, got "
                         f"{got.num_classes} (training / this data set: {shown})")
    if different:
        logger.warning("%d classes have other names than in training (training / here: %s)", len(different), shown)


def check_measurable(dataset: SegmentationDataset, tasks: Sequence[Task]) -> None:
    """Check, by its first example, that a data set's truth can be measured, before hours of training.

    Raises:
        ValueError: panoptic quality of instances, which may overlap.
    """
    if "panoptic" not in tasks or len(dataset) == 0:
        return
    try:
        overlaps = dataset[0].id_map is None
    except BrokenExampleError:  # reported by the validation
        return
    if overlaps:
        raise ValueError("metrics: expected semantic or instance for truth of instances, which may overlap, got "
                         f"{', '.join(tasks)}")


def measure(
    predictor: Predictor | BundlePredictor,
    dataset: SegmentationDataset,
    tasks: Sequence[Task],
    *,
    workers: int,
    skip_broken: bool = False,
    pictures: int = 0,
    limit: int | None = None,
    writer: ResultWriter | None = None,
    report: Report | None = None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Metrics of each task, and a grid of pictures (image, truth, results) of the first ``pictures`` images.

    The dictionary has the headline metrics of all tasks, and each task's complete metrics under the task's name.
    Several ranks share out the images. All ranks get the metrics, which equal those of one process; rank 0 alone gets
    the grid.

    Args:
        limit: number of examples to measure, the first ones; broken ones count.
        writer: gets every result. With a writer, an image whose files are broken, or whose inference or writing fails,
            does not end the measurement: the writer's ``failed`` lists it, and metrics are those of the others.
        report: gets every result; rank 0 has those of all ranks in it afterwards. Boundary metrics join the others.
    """
    evaluators = {task: build_evaluator(task, dataset.metadata) for task in tasks}
    rows: list[list[np.ndarray]] = []
    batch_size = predictor.test.batch_size
    total = len(dataset) if limit is None else min(limit, len(dataset))
    shard = eval_shard(total, batch_size, rank(), world_size())
    loader = EvalLoader(dataset, workers, skip_broken or writer is not None, shard)
    with tqdm(total=len(shard), desc="evaluate", unit="img", leave=False, dynamic_ncols=True,
              disable=not is_main()) as progress:
        for batch in loader.batches(batch_size):
            images = [example.image for _, example in batch]
            infer = infer_all if writer is None else infer_each
            for (index, example), results in zip(batch, infer(predictor, images, tasks), strict=True):
                if writer is not None:
                    writer.write(index, example.image_id, example.image, results)
                if isinstance(results, Exception):
                    continue
                for task, evaluator in evaluators.items():
                    evaluator.process(example, results[task])
                if report is not None:
                    report.add(index, dataset.file_names[index], example, results)
                if shard.start + len(rows) < pictures:
                    rows.append(_row(example, list(results.values()), dataset))
            progress.update(len(batch))
    if writer is not None and not skip_broken:
        for path, reason in loader.broken:
            writer.fail(None, path, reason)
        loader.broken.clear()
    parts = gather_on_main((evaluators, rows, loader.broken, report))
    # Rank 0 merges into the caller's report, of which its own part is a copy.
    by_task = on_main(lambda: _report([part[0] for part in parts], [report, *(part[3] for part in parts[1:])]))
    rows = [row for part in parts for row in part[1]][:pictures]
    if broken := [entry for part in parts for entry in part[2]]:
        listing = "\n  ".join(f"{path}: {reason}" for path, reason in broken)
        logger.warning("%d images were left out as broken:\n  %s", len(broken), listing)
    metrics: dict[str, Any] = {}
    for values in by_task.values():
        metrics.update({key: value for key, value in values.items() if not isinstance(value, dict)})
    titles = ["image", "truth", *tasks]
    metrics.update({str(task): values for task, values in by_task.items()})
    return metrics, visualize.grid(rows, titles) if rows else None


def _report(
    parts: Sequence[dict[Task, Evaluator]], reports: Sequence[Report | None]
) -> dict[Task, dict[str, Any]]:
    """Metrics of each task over the images of all ranks, whose reports are merged into the first."""
    merged, *others = parts
    for part in others:
        for task, evaluator in part.items():
            merged[task].merge(evaluator)
    metrics = {task: evaluator.evaluate() for task, evaluator in merged.items()}
    report, *more = reports
    if report is not None:
        for one in more:
            assert one is not None  # as on rank 0
            report.merge(one)
        for task, values in report.boundary_metrics().items():
            metrics[task].update(values)
    return metrics


def _row(example: Example, results: list[Result], dataset: SegmentationDataset) -> list[np.ndarray]:
    """A row of the grid: image, truth, results."""
    drawn = [visualize.draw_result(example.image, result, dataset.metadata) for result in results]
    return [as_display(example.image), visualize.draw_truth(example, dataset.metadata, dataset.task), *drawn]
