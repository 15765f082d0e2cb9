"""``solver.batch_size: auto``: as many images as memory holds, by the measured memory of a few small training steps."""

from __future__ import annotations

import logging
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from maskformer_fast.config import Config
from maskformer_fast.core.machine import available_memory_bytes, keep_freed_memory
from maskformer_fast.data import build_dataset
from maskformer_fast.data.loader import train_loader
from maskformer_fast.distributed import peak_memory_bytes, resolve_device, world_size
from maskformer_fast.inference.load import with_classes
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.training.checkpoints import newest_undamaged
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.freezing import freeze, set_training
from maskformer_fast.training.initial_network import initial_network
from maskformer_fast.training.optimizer import build_optimizer
from maskformer_fast.training.per_pixel_criterion import PerPixelCriterion
from maskformer_fast.training.step_averages import GIB
from maskformer_fast.training.train_step import TrainStep
from maskformer_fast.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

TRIALS = (2, 4)
"""Images of the trial steps."""
SHARE = 0.75
"""Share of the available memory that is used: validation, loader processes and larger images need some, too."""
MOST = 256
"""Largest number of images of a micro-batch that is chosen."""


class Trial(NamedTuple):
    """Memory of trial steps, in bytes."""

    available: int  # to this process, before the steps
    peaks: tuple[int, ...]  # after the steps of each of `TRIALS` images
    examples: int  # number of images of the data set


def with_batch_size(config: Config, resume: bool) -> Config:
    """The configuration with a number in place of ``batch_size: auto``; a number stays as it is. Rank 0 alone calls it.

    A resumed run takes the number of its newest checkpoint. The learning rate stays as it is, and the log says so.

    Raises:
        ValueError: memory does not hold the trial steps.
    """
    solver = config.solver
    if solver.batch_size != "auto":
        return config
    if resume:
        newest, _ = newest_undamaged(Path(config.output) / "checkpoints")
        if newest is not None:
            saved = load_weights(newest).config.solver.images
            return replace(config, solver=replace(solver, batch_size=saved))
    trial = measure_trial(config)
    micro = micro_batch(trial)
    total = micro * solver.accumulate * world_size()
    per_image = (trial.peaks[-1] - trial.peaks[0]) / (TRIALS[-1] - TRIALS[0])
    logger.info(
        "solver.batch_size: %d = %d images x %d micro-batches x %d processes; steps of %s images took up to %s GiB, "
        "which is %.3f GiB an image, of %.2f GiB available. solver.lr stays %g: it is not scaled with the batch size",
        total, micro, solver.accumulate, world_size(), " and ".join(map(str, TRIALS)),
        " and ".join(f"{peak / GIB:.2f}" for peak in trial.peaks), per_image / GIB, trial.available / GIB, solver.lr,
    )  # fmt: skip
    return replace(config, solver=replace(solver, batch_size=total))


def micro_batch(trial: Trial) -> int:
    """Number of images whose step fits into `SHARE` of the available memory, by a line through the trials' peaks.

    At least 1, at most `MOST` and the number of images of the data set.

    Raises:
        ValueError: one image would not fit.
    """
    per_image = max((trial.peaks[-1] - trial.peaks[0]) / (TRIALS[-1] - TRIALS[0]), 1.0)
    base = trial.peaks[0] - TRIALS[0] * per_image
    count = int((SHARE * trial.available - base) / per_image)
    if count < 1:
        raise ValueError(f"solver.batch_size: expected memory for a step of one image with auto, about "
                         f"{(base + per_image) / GIB:.2f} GiB, got {SHARE:.0%} of {trial.available / GIB:.2f} GiB")
    return min(count, MOST, trial.examples)


def measure_trial(config: Config) -> Trial:
    """Run trial steps on the data set's first images in a process of its own, whose peak is that of the steps.

    Raises:
        ValueError: the process ended, as when memory runs out, or raised an error.
    """
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    context = multiprocessing.get_context("spawn")  # a fork would have this process's memory, and no CUDA
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_trial, args=(replace(config, device=str(device)), sender), daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = "its process ended"
    process.join()
    if not isinstance(answer, Trial):
        raise ValueError(f"solver.batch_size: expected trial steps of {TRIALS[0]} to {TRIALS[-1]} images to succeed "
                         f"with auto, got: {answer} (status {process.exitcode}); name a number instead")
    return answer


def _run_trial(config: Config, sender: Connection) -> None:
    try:
        sender.send(_trial(config))
    except Exception as error:  # told to the other process, whose error names it
        sender.send(f"{type(error).__name__}: {error}")


def _trial(config: Config) -> Trial:
    device = torch.device(config.device)
    dataset = build_dataset(config.data, "train", None)
    config = with_classes(config, dataset.metadata)
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = available_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        keep_freed_memory()  # as the trainer does, which makes the peak larger
    network = initial_network(config, None, device)
    frozen = freeze(network, config.solver.freeze)
    set_training(network, frozen)
    criterion_type = Criterion if config.model.classifies_masks else PerPixelCriterion
    criterion = criterion_type(config.model.num_classes, config.loss).to(device)
    optimizer = build_optimizer(network, config.solver)
    average = WeightAverage(network, config.solver.ema_decay) if config.solver.ema_decay else None
    peaks = []
    for count in TRIALS:
        solver = replace(config.solver, batch_size=count, accumulate=1)
        trial = replace(config, solver=solver, data=replace(config.data, workers=0))
        step = TrainStep(network, criterion, optimizer, trial, device, average=average)
        batches = iter(train_loader(dataset, trial, dataset.task))
        for _ in range(2):  # the optimiser's state is there from the second on
            step.run(batches)
        step.settle()
        peaks.append(peak_memory_bytes(device))
    return Trial(available, tuple(peaks), len(dataset))
