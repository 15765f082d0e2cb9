"""``python -m maskformer_fast.evaluate CHECKPOINT``: measure a checkpoint on a data set."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from maskformer_fast.cli import leading_path, parse, report_failures, run_command
from maskformer_fast.config import Amp, DataConfig, Task, TestConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write, check_no_windows_path, write_json
from maskformer_fast.data import build_dataset
from maskformer_fast.data.worker import WorkerDied, worker_deaths_explained
from maskformer_fast.deploy.bundle.manifest import Precision
from maskformer_fast.deploy.runtime.selection import Backend
from maskformer_fast.distributed import RankError, is_main, process_group
from maskformer_fast.evaluation import format_table
from maskformer_fast.evaluation.measure import check_classes, check_measurable, measure
from maskformer_fast.evaluation.report import Report
from maskformer_fast.inference.load import load, stored_options
from maskformer_fast.output.writer import ResultWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a checkpoint or bundle: mIoU, PQ or AP.

    Data and test settings default to those that the checkpoint was trained with. A bundle fixes its test settings,
    except the batch size, and stores no path of a data set.
    """

    checkpoint: tyro.conf.Positional[str]
    """Run folder (its best checkpoint), checkpoint folder, weights file, or bundle."""
    task: tuple[Task, ...] = ()
    """Tasks to measure; default: the data set's task."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """JSON file for the metrics; default: metrics on the screen only."""
    picture: str | None = None
    """PNG file for a grid of the first images: image, truth, results."""
    predictions: str | None = None
    """Folder for the results, as `predict` writes them, with the data set's image ids. An image that causes an error is
    left out and listed at the end, and the exit status is 1."""
    report: str | None = None
    """Folder for a report: confusion matrix, boundary IoU, scores of each image, and ``index.html`` with the worst."""
    limit: int | None = None
    """Number of images to measure, the first ones; default: all."""
    device: str = "auto"
    """``auto`` takes the GPU where there is one."""
    backend: Backend = "auto"
    """Backend of a bundle: ``auto`` takes TensorRT where the bundle has an engine for this GPU, else on the CPU
    openvino where it is installed, else onnxruntime."""
    amp: Amp | None = None
    """Precision of a checkpoint's network; by default that of its training."""
    graphs: bool = False
    """On a GPU, replay CUDA graphs of a checkpoint's network for batches whose sizes come again."""
    precision: Precision | None = None
    """Precision of a bundle's network. On a CPU: fp32, bf16 (openvino, where the processor has it) or int8 (an engine
    of openvino in the bundle); by default int8 where the bundle has it, else fp32. On a GPU: that of an engine."""
    data: DataConfig = field(default_factory=DataConfig)
    test: TestConfig = field(default_factory=TestConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    path = leading_path(argv)
    check_no_windows_path({"checkpoint": path})
    stored = stored_options(path) if path else None
    options = parse(
        EvaluateOptions,
        argv,
        prog="python -m maskformer_fast.evaluate",
        default=EvaluateOptions(tyro.MISSING, data=stored[0], test=stored[1]) if stored else None,
    )
    with process_group(options.device), worker_deaths_explained():
        return evaluate(options)


def evaluate(options: EvaluateOptions) -> int:
    """Measure, print and write -> exit status. The ranks of a process group share out the images; rank 0 reports."""
    check_no_windows_path({"output": options.output, "picture": options.picture, "predictions": options.predictions,
                           "report": options.report, "data.root": options.data.root})
    check(options.limit is None or options.limit > 0, "limit", "a positive number of images", options.limit)
    for name in ("output", "picture"):
        target = getattr(options, name)
        check(target is None or not Path(target).is_dir(), name, "a file, not a folder", target)
    folder = options.report
    check(folder is None or not Path(folder).is_file(), "report", "a folder, not a file", folder)
    predictor = load(
        options.checkpoint, options.device, options.test, options.backend, options.amp, options.precision,
        in_flight=options.test.batch_size, graphs=options.graphs,
    )  # fmt: skip
    dataset = build_dataset(options.data, "val", predictor.metadata)
    check_classes(predictor.metadata, dataset.metadata)
    predictor.metadata = dataset.metadata  # for the data set's things, category ids and colours
    tasks = options.task or (dataset.task,)
    for task in tasks:
        predictor.check_task(task)
    check_measurable(dataset, tasks)
    augmented = options.test.multi_scale or options.test.flip
    if augmented and set(tasks) != {"semantic"}:
        logger.warning("test.multi_scale and test.flip apply to semantic segmentation alone")
    writer = None
    if options.predictions:
        writer = ResultWriter(Path(options.predictions), dataset.metadata, False, dataset.file_names)
    report = Report(tuple(tasks), dataset.metadata, dataset.task) if options.report else None
    metrics, grid = measure(
        predictor,
        dataset,
        tasks,
        workers=options.data.workers,
        skip_broken=options.data.skip_broken,
        pictures=4 if options.picture else 0,
        limit=options.limit,
        writer=writer,
        report=report,
    )
    if writer is not None:
        writer.close()
    if not is_main():
        return 0
    for task in tasks:
        print(format_table(task, metrics[task]))
    if options.report and report is not None:
        report.write(Path(options.report), metrics)
        print(f"report: {Path(options.report) / 'index.html'}")
    if options.output:
        write_json(Path(options.output), metrics)
    if options.picture and grid is not None:
        with atomic_write(options.picture) as file:
            Image.fromarray(grid).save(file, format="PNG")
    return report_failures(writer.failed if writer else [], "images have no results")


if __name__ == "__main__":
    run_command(main, RankError, WorkerDied)
