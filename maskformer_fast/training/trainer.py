"""Training loop: steps, log, checkpoints and validations, resuming, and early ends of a run."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from maskformer_fast.config import Config, Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write, write_json
from maskformer_fast.core.machine import keep_freed_memory
from maskformer_fast.data import SegmentationDataset, build_dataset
from maskformer_fast.data.class_balance import cached_presence, repeat_factors
from maskformer_fast.data.loader import check_batch_size, check_copy_paste, train_loader
from maskformer_fast.data.worker import worker_death
from maskformer_fast.distributed import DelayedFlag, gather_objects, is_main, on_main, rank, resolve_device, world_size
from maskformer_fast.evaluation import build_evaluator
from maskformer_fast.evaluation.common import MAIN_METRICS
from maskformer_fast.evaluation.measure import check_classes, check_measurable, measure
from maskformer_fast.inference.load import with_classes
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling.compile import compile_single_graph
from maskformer_fast.modeling.weights import Checkpoint, load_into, load_weights
from maskformer_fast.structures import Batch
from maskformer_fast.training.checkpoints import (
    RAW_NAME,
    best_score,
    best_step,
    check_same_classes,
    clean_run,
    complete_checkpoints,
    config_differences,
    load_state,
    mark_best,
    newest_undamaged,
    save_checkpoint,
    saved_number,
    set_aside,
)
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.freezing import freeze, set_training
from maskformer_fast.training.initial_network import initial_network
from maskformer_fast.training.interruptions import (
    OutOfMemory,
    Stopped,
    StopSignals,
    WorkerLost,
    is_out_of_memory,
    out_of_memory,
    training_advice,
    validation_advice,
)
from maskformer_fast.training.loggers import check_loggers, open_loggers
from maskformer_fast.training.optimizer import build_optimizer
from maskformer_fast.training.parallel import average_statistics, load_optimizer, unsharded_parameters, wrap
from maskformer_fast.training.per_pixel_criterion import PerPixelCriterion
from maskformer_fast.training.profiler import profile_steps
from maskformer_fast.training.run_log import NoLog, RunLog
from maskformer_fast.training.skipped_steps import TrainingDiverged
from maskformer_fast.training.step_averages import StepAverages
from maskformer_fast.training.train_step import TrainStep, check_batch_norm
from maskformer_fast.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

GROUP_SETTINGS = ("lr", "initial_lr", "weight_decay", "in_backbone")
"""Keys of an optimiser's parameter group that the configuration sets."""


class Trainer:
    """One run in the folder ``config.output``, which the caller must have locked.

    In a process group every rank creates a trainer. Rank 0 writes the files, and every rank reads them.
    """

    def __init__(self, config: Config, resume: bool = False, profile: bool = False) -> None:
        """``resume`` continues the folder's run; ``profile`` writes a trace of a few steps to it (`profile_steps`)."""
        self.profile = profile
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        self.device = resolve_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.resumed: Path | None = None
        self.damaged: list[Path] = []
        saved = self._newest_checkpoint() if resume else None
        self.train_set: SegmentationDataset = build_dataset(config.data, "train", saved and saved.metadata)
        self.val_set: SegmentationDataset = build_dataset(config.data, "val", self.train_set.metadata)
        check(len(self.train_set) > 0, "data", "at least one example to train", len(self.train_set))
        check_batch_size(config.solver.images, config.solver.accumulate, world_size())
        self.metadata = self.train_set.metadata
        check_copy_paste(config.data.augment, self.train_set)
        check_loggers(config)
        check_classes(self.metadata, self.val_set.metadata)
        self.config = config = with_classes(config, self.metadata)
        if (crop := config.data.augment.crop_size) is not None:  # otherwise every step checks its images
            images = config.solver.images // (config.solver.accumulate * world_size())
            step = max(config.model.size_divisibility, 1)
            check_batch_norm(config, images, *(-(-side // step) * step for side in crop))

        self.network = initial_network(config, self.metadata if saved is None else None, self.device)
        self.frozen = freeze(self.network, config.solver.freeze)
        criterion_type = Criterion if config.model.classifies_masks else PerPixelCriterion
        criterion = criterion_type(config.model.num_classes, config.loss).to(self.device)
        forward: Any = self.network
        if config.solver.compile:
            forward, criterion = compile_single_graph(forward), compile_single_graph(criterion)
        forward = wrap(forward, config)  # before the optimiser, as it may shard the parameters
        self.optimizer = build_optimizer(self.network, config.solver)
        decay = config.solver.ema_decay
        self.average = WeightAverage(self.network, decay) if decay else None
        self.train_step = TrainStep(self.network, criterion, self.optimizer, config, self.device, forward, self.average)
        self.predictor = Predictor(self.network, config, self.metadata, self.device)
        self.tasks: Sequence[Task] = config.metrics or (self.val_set.task,)
        for task in self.tasks:
            self.predictor.check_task(task)
            build_evaluator(task, self.val_set.metadata)  # raises now, not at the first validation
        check_measurable(self.val_set, self.tasks)

        self.signals = StopSignals()
        self._stop_flag = DelayedFlag()
        self.stopped = False
        self.stopped_early = False
        if saved is not None:
            self._restore(saved)

    @property
    def step(self) -> int:
        """Number of the next step, which is the number of steps done."""
        return self.train_step.step

    def run(self) -> dict[str, Any]:
        """Train to ``max_steps``; returns the metrics of the last validation, which are also in ``metrics.json``.

        SIGTERM or SIGINT ends the run early, after the current step and with a checkpoint; ``stopped`` is then true.

        Raises:
            TrainingDiverged, OutOfMemory, WorkerLost, OSError: the run could not go on; ``--resume`` continues it.
        """
        self.log: RunLog | NoLog = NoLog()
        if is_main():
            clean_run(self.folder)
            if self.resumed is not None:
                set_aside(self.damaged, self.resumed)
        # A run killed between saving a checkpoint and validating it lacks this validation.
        validated = on_main(lambda: saved_number(self.folder / "metrics.json", "step"))
        missing = self.resumed is not None and self._validation_due() and validated != self.step
        if is_main():
            validates = missing or self.step >= self.config.solver.max_steps
            loggers = open_loggers(self.folder, self.config)
            self.log = RunLog(self.folder, self.step, self.config.log.tensorboard, validates, loggers)
        try:
            with self.signals, self._explain_interruptions():
                metrics = self._validate_checkpoint(self.resumed) if missing else {}
                self.stopped_early = self.stopped_early or self._without_progress()
                metrics = self._train() or metrics
                metrics = metrics if metrics or self.stopped else self.validate()
                for broken in gather_objects(self.train_step.broken):
                    self.train_step.broken.update(broken)
                return metrics
        except Stopped:  # during a validation, which --resume repeats
            self.stopped = True
            return {}
        finally:
            self.log.close()
            if broken := self.train_step.broken:
                listing = "\n  ".join(f"{path}: {reason}" for path, reason in broken.items())
                logger.warning("%d files were skipped as broken:\n  %s", len(broken), listing)

    def _train(self) -> dict[str, Any]:
        """Do the remaining steps -> metrics of the last validation among them, empty without one."""
        config = self.config
        metrics: dict[str, Any] = {}
        if self.step >= config.solver.max_steps or self.stopped_early:
            return metrics
        loader = train_loader(
            self.train_set, config, self.train_set.task, start_step=self.step, rank=rank(), world_size=world_size(),
            repeats=self._repeats(),
        )  # fmt: skip
        batches: Iterator[Batch] = iter(loader)
        averages = StepAverages(config.solver.images, self.device)
        set_training(self.network, self.frozen)
        profiler = profile_steps(self.folder / "profile", self.device) if self.profile else nullcontext(lambda: None)
        bar = tqdm(
            total=config.solver.max_steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not is_main()
        )
        with profiler as end_profiled_step, bar as progress:
            while self.step < config.solver.max_steps and not (self.stopped_early or self._should_stop()):
                averages.add(self.train_step.run(batches))
                end_profiled_step()
                progress.update()
                if self.step % config.log.every == 0 or self.step == config.solver.max_steps:
                    progress.set_postfix(self._write_log(averages))
                started = time.perf_counter()
                metrics = self._save_and_validate_if_due() or metrics
                averages.exclude(time.perf_counter() - started)
        if self.stopped:
            logger.info("stopped at step %d: --resume continues from %s", self.step, self._save())
        return metrics

    def _repeats(self) -> np.ndarray | None:
        """Repeat factors of the training images; ``None`` if each comes once in an epoch."""
        data = self.config.data
        if data.repeat_threshold == 0.0:
            return None
        path = self.folder / "class_presence.npz"
        presence = cached_presence(path, self.train_set, data.workers, data.skip_broken)
        factors = repeat_factors(presence, data.repeat_threshold)
        logger.info("%d of %d images come more than once in an epoch, up to %.2f times; %.2f times in the mean",
                    np.count_nonzero(factors > 1.0), len(factors), factors.max(), factors.mean())
        return factors

    def _should_stop(self) -> bool:
        """Whether any rank received a stop signal; several ranks do one step more, until all of them know."""
        self.stopped = self._stop_flag(self.signals.received is not None)
        return self.stopped

    def _write_log(self, averages: StepAverages) -> dict[str, str]:
        """Write a line of the log -> texts for the progress bar. Waits for the device."""
        self.train_step.settle()
        numbers = averages.read(self.config.solver.max_steps - self.step)
        numbers["skipped"] = self.skipped
        self.log.scalars(self.step, numbers)
        shown = {
            "loss": f"{numbers['loss']:.3f}",
            "img/s": f"{numbers['images_per_second']:.3g}",
            "data": f"{numbers['data_share']:.0%}",
            "mem": f"{numbers['memory_gib']:.1f}G",
        }
        return shown | ({"skipped": str(self.skipped)} if self.skipped else {})

    @property
    def skipped(self) -> int:
        """Number of steps skipped so far because a number was not finite."""
        return self.train_step.skipped

    @contextmanager
    def _explain_interruptions(self, validating: bool = False) -> Iterator[None]:
        """Save the run's state when memory runs out or a loader process dies, and raise an error with advice."""
        try:
            yield
        except (OutOfMemory, WorkerLost):
            raise
        except Exception as error:
            death = worker_death(error)
            if death is None and not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # frees the tensors of the step
            saved = self._save_after_error()
            if death is not None:
                raise WorkerLost(f"{death}. {saved}") from error
            if validating:
                advice = validation_advice(self.config, self.device)
            else:
                advice = training_advice(self.config, self.device, self.train_step.input_size)
            raise out_of_memory(error, advice, saved) from error

    def _save_after_error(self) -> str:
        """Save the state of the last finished step, if it can be restored -> a sentence on where to resume."""
        try:
            # A rank that fails alone cannot save, which takes all ranks.
            if world_size() == 1 and self.train_step.undo() and self.step > 0:
                self._save()
        except (OSError, TrainingDiverged) as error:
            logger.warning("the state at step %d could not be saved: %s", self.step, error)
        saved = complete_checkpoints(self.checkpoints)
        return f"--resume continues from {saved[-1]}" if saved else "There is no checkpoint yet"

    def _validation_due(self) -> bool:
        """Whether the last step done is one after which to validate."""
        every = self.config.log.validate_every
        return self.step == self.config.solver.max_steps or (every > 0 and self.step % every == 0)

    def _save_and_validate_if_due(self) -> dict[str, Any]:
        """Save a checkpoint and validate where the step number asks for it -> metrics, empty without a validation.

        The checkpoint comes first, so that nothing is lost if validation fails.
        """
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
    def _log_write_errors(self) -> Iterator[None]:
        """Log errors of writing, as on a full disk, and go on; after the last step, raise them."""
        try:
            yield
        except OSError as error:
            if self.step == self.config.solver.max_steps:
                raise
            logger.error("%s\ntraining goes on", error)

    def _save(self) -> Path:
        self.train_step.settle()
        average_statistics(self.network)
        if self.average is not None:
            with self.average.applied():
                average_statistics(self.network)
        state = {"optimizer": self.optimizer.state_dict(), **self.train_step.state_dict()}
        average = None if self.average is None else self.average.weights
        return save_checkpoint(self.checkpoints, self.network, self.config, self.metadata, self.step, state, average)

    def _validate_checkpoint(self, path: Path | None) -> dict[str, Any]:
        """Validate the network and mark its checkpoint if it is the best; ``path`` is ``None`` if saving failed."""
        metrics = self.validate()
        if is_main():
            with self._log_write_errors():
                score, best = metrics.get(MAIN_METRICS[self.tasks[0]]), best_score(self.checkpoints)
                if path is not None and score is not None and (best is None or score > best):
                    mark_best(self.checkpoints, path, score)
                write_json(self.folder / "metrics.json", metrics)  # last: it means that this step is validated
        self.stopped_early = self._without_progress()
        return metrics

    def _without_progress(self) -> bool:
        """Whether ``solver.early_stopping`` validations up to this step followed that of the best checkpoint.

        It depends on the steps alone, so that a resumed run stops where an uninterrupted one does.
        """
        patience, every = self.config.solver.early_stopping, self.config.log.validate_every
        if patience == 0 or self.step == 0 or self.step % every:
            return False
        best = on_main(lambda: best_step(self.checkpoints))
        if best is None or self.step // every - best // every < patience:
            return False
        logger.info("stopped early at step %d: none of %d validations was better than that of step %d", self.step,
                    patience, best)
        return True

    def validate(self) -> dict[str, Any]:
        """Measure on the validation split; writes a grid of pictures and a line of the log."""
        data, log = self.config.data, self.config.log
        started = time.perf_counter()
        # Ranks differ in their number of images, so each calls the network independently of the others.
        average = nullcontext() if self.average is None else self.average.applied()
        with (
            self._explain_interruptions(validating=True), average, self.signals.at_once(),
            unsharded_parameters(self.network),
        ):  # fmt: skip
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
            with self._log_write_errors():
                pictures = self.folder / "pictures"
                pictures.mkdir(exist_ok=True)
                for target in (pictures / f"step_{self.step:08d}.png", self.folder / "predictions.png"):
                    with atomic_write(target) as file:
                        Image.fromarray(grid).save(file, format="PNG")
                self.log.picture(self.step, grid)
        return metrics

    def _newest_checkpoint(self) -> Checkpoint | None:
        """Read the newest undamaged checkpoint's weights, to resume from it; None without a checkpoint."""
        self.resumed, self.damaged = on_main(lambda: newest_undamaged(self.checkpoints))
        if self.resumed is None:
            logger.warning("%s has no checkpoint: starting at step 0", self.folder)
            return None
        return load_weights(self.resumed)

    def _restore(self, saved: Checkpoint) -> None:
        """Continue from the checkpoint ``resumed``, whose weights are ``saved``."""
        newest = self.resumed
        assert newest is not None
        check_same_classes(saved.metadata, self.metadata, newest)
        changed = config_differences(saved.config, self.config, ("model", "loss", "data", "solver"))
        if changed:
            logger.warning("resuming with another configuration:\n  %s", "\n  ".join(changed))
        before, now = saved.config.solver.freeze, self.config.solver.freeze
        check(set(before) == set(now), "solver.freeze", f"the {list(before)} of {newest}, whose optimiser has no state "
              "of other parts (start a new run from it with --model.weights)", list(now))
        load_into(self.network, saved.weights, newest)
        if self.average is not None:
            self.average.reset()
        if (newest / RAW_NAME).exists():
            load_into(self.network, load_weights(newest / RAW_NAME).weights, newest / RAW_NAME)
        state = load_state(newest)
        settings = [{key: group[key] for key in GROUP_SETTINGS} for group in self.optimizer.param_groups]
        load_optimizer(self.optimizer, state["optimizer"])
        for group, current in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(current)  # the configuration's rates and decays, which may differ from the saved ones
        self.train_step.load_state_dict(state)
        logger.info("resuming from %s", newest)
