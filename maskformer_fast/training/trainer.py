"""The training loop: steps, lines of the log, checkpoints and validations, and how a run ends before its time."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from maskformer_fast.config import Config, Task
from maskformer_fast.core.files import atomic_write, write_json
from maskformer_fast.data import SegmentationDataset, build_dataset
from maskformer_fast.data.loader import train_loader
from maskformer_fast.distributed import LateFlag, gather_objects, is_main, on_main, rank, resolve_device, world_size
from maskformer_fast.evaluation import build_evaluator
from maskformer_fast.evaluation.measure import check_classes, measure
from maskformer_fast.inference.load import with_classes
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.compile import compile_single_graph
from maskformer_fast.modeling.weights import load_backbone, load_initial, load_into, load_weights
from maskformer_fast.structures import Batch
from maskformer_fast.training.checkpoints import (
    best_score,
    complete_checkpoints,
    config_differences,
    load_state,
    mark_best,
    newest_undamaged,
    remove_leftovers,
    save_checkpoint,
    set_aside,
)
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.interruptions import (
    OutOfMemory,
    Stopped,
    StopSignals,
    WorkerLost,
    is_lost_worker,
    is_out_of_memory,
    out_of_memory,
    training_advice,
    validation_advice,
    worker_lost,
)
from maskformer_fast.training.optimizer import build_optimizer
from maskformer_fast.training.parallel import average_statistics, load_optimizer, unsharded_parameters, wrap
from maskformer_fast.training.per_pixel_criterion import PixelCriterion
from maskformer_fast.training.profiler import step_trace
from maskformer_fast.training.run_log import NoLog, RunLog
from maskformer_fast.training.skipped_steps import TrainingDiverged
from maskformer_fast.training.step_averages import Meter
from maskformer_fast.training.train_step import TrainStep

logger = logging.getLogger(__name__)

HEADLINES: dict[Task, str] = {"semantic": "miou", "panoptic": "pq", "instance": "ap"}

GROUP_SETTINGS = ("lr", "initial_lr", "weight_decay")
"""What the configuration says of a parameter group."""


class Trainer:
    """One run in ``config.output``. The caller holds the folder's lock and decides whether it continues a run.

    In a process group every rank makes one; rank 0 writes the files and every rank reads them.
    """

    def __init__(self, config: Config, resume: bool = False, profile: bool = False) -> None:
        """``profile`` writes a trace of a few steps into the run's folder, see `tracing.step_trace`."""
        self.profile = profile
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        self.device = resolve_device(config.device)
        self.train_set: SegmentationDataset = build_dataset(config.data, "train")
        self.val_set: SegmentationDataset = build_dataset(config.data, "val")
        self.metadata = self.train_set.metadata
        check_classes(self.metadata, self.val_set.metadata)
        self.config = config = with_classes(config, self.metadata)

        torch.manual_seed(config.seed)
        self.network = build_model(config.model)
        if not (resume and on_main(lambda: bool(complete_checkpoints(self.checkpoints)))):
            self._load_pretrained()
        layout = torch.channels_last if config.solver.channels_last else torch.contiguous_format
        self.network.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        pixelwise = config.model.type != "maskformer"
        criterion = (PixelCriterion if pixelwise else Criterion)(config.model.num_classes, config.loss).to(self.device)
        forward: Any = self.network
        if config.solver.compile:
            forward, criterion = compile_single_graph(forward), compile_single_graph(criterion)
        forward = wrap(forward, config)  # which may share parameters out: the optimiser comes after it
        self.optimizer = build_optimizer(self.network, config.solver)
        self.train_step = TrainStep(self.network, criterion, self.optimizer, config, self.device, forward)
        self.predictor = Predictor(self.network, config, self.metadata, self.device)
        self.tasks: Sequence[Task] = config.metrics or (self.val_set.task,)
        for task in self.tasks:
            self.predictor.check_task(task)
            build_evaluator(task, self.val_set.metadata)  # what it lacks is said now, not at the first validation

        self.signals = StopSignals()
        self._asked_to_stop = LateFlag()
        self.stopped = False
        self.resumed: Path | None = None
        self.damaged: list[Path] = []
        if resume:
            self._restore()

    def _load_pretrained(self) -> None:
        """Weights that training starts from, where the configuration names some."""
        model = self.config.model
        if model.backbone.weights:
            load_backbone(self.network, model.backbone.weights)
        if model.weights and (fresh := load_initial(self.network, model.weights)):
            logger.info("%s has another number of classes: %s start anew", model.weights, ", ".join(fresh))

    @property
    def step(self) -> int:
        """Number of the next step: how many were done."""
        return self.train_step.step

    def run(self) -> dict[str, Any]:
        """Train to ``max_steps``; returns the last validation's metrics, which also stand in ``metrics.json``.

        SIGTERM or SIGINT ends it early, after the current step and with a checkpoint: then ``stopped`` is true.

        Raises:
            TrainingDiverged, OutOfMemory, WorkerLost, OSError: what stands in the way; ``--resume`` continues the run.
        """
        self.log: RunLog | NoLog = NoLog()
        if is_main():
            remove_leftovers(self.checkpoints)
            if self.resumed is not None:
                set_aside(self.damaged, self.resumed)
            self.log = RunLog(self.folder, self.step, self.config.log.tensorboard)
        try:
            with self.signals, self._explained():
                # A run killed between saving a checkpoint and measuring it resumes here.
                measured = on_main(lambda: measured_step(self.folder))
                owed = self.resumed is not None and self._validation_due() and measured != self.step
                metrics = self._validate_checkpoint(self.resumed) if owed else {}
                metrics = self._train() or metrics
                metrics = metrics if metrics or self.stopped else self.validate()
                for broken in gather_objects(self.train_step.broken):
                    self.train_step.broken.update(broken)
                return metrics
        except Stopped:  # out of a validation, which --resume makes up for
            self.stopped = True
            return {}
        finally:
            self.log.close()
            if broken := self.train_step.broken:
                listing = "\n  ".join(f"{path}: {reason}" for path, reason in broken.items())
                logger.warning("%d files were skipped as broken:\n  %s", len(broken), listing)

    def _train(self) -> dict[str, Any]:
        """The steps that are left -> metrics of the last validation among them."""
        config = self.config
        metrics: dict[str, Any] = {}
        if self.step >= config.solver.max_steps:
            return metrics
        loader = train_loader(
            self.train_set, config, self.train_set.task, start_step=self.step, rank=rank(), world_size=world_size()
        )
        batches: Iterator[Batch] = iter(loader)
        meter = Meter(config.solver.batch_size, self.device)
        self.network.train()
        tracing = step_trace(self.folder / "profile", self.device) if self.profile else nullcontext(lambda: None)
        bar = tqdm(
            total=config.solver.max_steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not is_main()
        )
        with tracing as traced, bar as progress:
            while self.step < config.solver.max_steps and not self._stop():
                meter.add(self.train_step.run(batches))
                traced()
                progress.update()
                if self.step % config.log.every == 0 or self.step == config.solver.max_steps:
                    progress.set_postfix(self._log_line(meter))
                paused = time.perf_counter()
                metrics = self._milestone() or metrics
                meter.pause(time.perf_counter() - paused)
        if self.stopped:
            logger.info("stopped at step %d: --resume continues from %s", self.step, self._save())
        return metrics

    def _stop(self) -> bool:
        """Whether a signal asked any rank for it; several ranks do one step more until they all know."""
        self.stopped = self._asked_to_stop(self.signals.received is not None)
        return self.stopped

    def _log_line(self, meter: Meter) -> dict[str, str]:
        """Write a line of the log -> what the progress bar shows of it. The host waits for the device here."""
        self.train_step.settle()
        line = meter.line(self.config.solver.max_steps - self.step)
        line["skipped"] = self.skipped
        self.log.scalars(self.step, line)
        shown = {
            "loss": f"{line['loss']:.3f}",
            "img/s": f"{line['images_per_second']:.3g}",
            "data": f"{line['data_share']:.0%}",
            "mem": f"{line['memory_gib']:.1f}G",
        }
        return shown | ({"skipped": str(self.skipped)} if self.skipped else {})

    @property
    def skipped(self) -> int:
        """Steps left out so far because something was not finite."""
        return self.train_step.skipped

    @contextmanager
    def _explained(self, validating: bool = False) -> Iterator[None]:
        """Say of faults of the machine what to do about them, and save what the run has reached."""
        try:
            yield
        except (OutOfMemory, WorkerLost):
            raise
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) or is_lost_worker(error)):
                raise
            traceback.clear_frames(error.__traceback__)  # frees what the step held
            saved = self._save_state()
            if is_lost_worker(error):
                raise worker_lost(error, saved) from error
            if validating:
                advice = validation_advice(self.config, self.device)
            else:
                advice = training_advice(self.config, self.device, self.train_step.input_size)
            raise out_of_memory(error, advice, saved) from error

    def _save_state(self) -> str:
        """After a fault: save what the run has reached, if it is whole -> where ``--resume`` continues."""
        try:
            # A rank that fails alone cannot save: the others wait for it elsewhere.
            if world_size() == 1 and self.train_step.undo() and self.step > 0:
                self._save()
        except (OSError, TrainingDiverged) as error:
            logger.warning("the state at step %d could not be saved: %s", self.step, error)
        found = complete_checkpoints(self.checkpoints)
        return f"--resume continues from {found[-1]}" if found else "There is no checkpoint yet"

    def _validation_due(self) -> bool:
        every = self.config.log.validate_every
        return self.step == self.config.solver.max_steps or (every > 0 and self.step % every == 0)

    def _milestone(self) -> dict[str, Any]:
        """Save and validate where a step asks for it. Saved first: nothing is lost if validation fails."""
        validate = self._validation_due()
        if not validate and self.step % self.config.log.checkpoint_every != 0:
            return {}
        path, failure = None, None
        try:
            path = self._save()
        except OSError as error:
            failure = error
            if is_main():
                logger.error("%s\ntraining goes on; the next checkpoint is tried at its step", error)
        metrics = self._validate_checkpoint(path) if validate else {}
        if failure is not None and self.step == self.config.solver.max_steps:
            raise failure
        return metrics

    @contextmanager
    def _unless_at_the_end(self) -> Iterator[None]:
        """Go on over what cannot be written, as on a full disk, while there are steps to do and to save."""
        try:
            yield
        except OSError as error:
            if self.step == self.config.solver.max_steps:
                raise
            logger.error("%s\ntraining goes on", error)

    def _save(self) -> Path:
        self.train_step.settle()
        average_statistics(self.network)
        state = {"optimizer": self.optimizer.state_dict(), **self.train_step.state_dict()}
        return save_checkpoint(self.checkpoints, self.network, self.config, self.metadata, self.step, state)

    def _validate_checkpoint(self, path: Path | None) -> dict[str, Any]:
        """Measure the network, whose weights ``path`` holds if they could be saved; that may be the best checkpoint."""
        metrics = self.validate()
        if is_main():
            with self._unless_at_the_end():
                score, best = metrics.get(HEADLINES[self.tasks[0]]), best_score(self.checkpoints)
                if path is not None and score is not None and (best is None or score > best):
                    mark_best(self.checkpoints, path, score)
                write_json(self.folder / "metrics.json", metrics)  # last: it says that nothing is owed for this step
        return metrics

    def validate(self) -> dict[str, Any]:
        """Measure on the validation split; writes a picture grid and the log."""
        data, log = self.config.data, self.config.log
        started = time.perf_counter()
        # ranks have not equally many images, so each runs the network on its own
        with self.signals.at_once(), self._explained(validating=True), unsharded_parameters(self.network):
            metrics, grid = measure(
                self.predictor,
                self.val_set,
                self.tasks,
                workers=data.workers,
                skip_broken=data.skip_broken,
                pictures=log.pictures,
            )
        metrics = {"step": self.step, "seconds": round(time.perf_counter() - started, 2), **metrics}
        self.log.scalars(self.step, {f"val/{key}": v for key, v in metrics.items() if isinstance(v, float)})
        if grid is not None:
            with self._unless_at_the_end():
                pictures = self.folder / "pictures"
                pictures.mkdir(exist_ok=True)
                for target in (pictures / f"step_{self.step:08d}.png", self.folder / "predictions.png"):
                    with atomic_write(target) as file:
                        Image.fromarray(grid).save(file, format="PNG")
                self.log.picture(self.step, grid)
        return metrics

    def _restore(self) -> None:
        """Continue from the newest undamaged checkpoint; without one, start at step 0."""
        found, self.damaged = on_main(lambda: newest_undamaged(self.checkpoints))
        if found is None:
            logger.warning("%s has no checkpoint: starting at step 0", self.folder)
            return
        saved = load_weights(found)
        changed = config_differences(saved.config, self.config, ("model", "loss", "data", "solver"))
        if changed:
            logger.warning("resuming with another configuration:\n  %s", "\n  ".join(changed))
        load_into(self.network, saved.weights, found)
        state = load_state(found)
        settings = [{key: group[key] for key in GROUP_SETTINGS} for group in self.optimizer.param_groups]
        load_optimizer(self.optimizer, state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # a changed rate or decay counts, not the saved one
        self.train_step.load_state_dict(state)
        self.resumed = found
        logger.info("resuming from %s", found)


def measured_step(folder: Path) -> int | None:
    """Step of the run's last finished validation; ``None`` if there was none."""
    path = folder / "metrics.json"
    return json.loads(path.read_text())["step"] if path.exists() else None
