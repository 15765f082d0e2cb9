"""The training loop: a step is a pure function of (weights, optimiser state, seed, step), so a resumed run is exact."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from maskformer_fast.checkpoint import (
    best_score,
    complete_checkpoints,
    config_differences,
    load_backbone,
    load_initial,
    load_into,
    load_state,
    load_weights,
    mark_best,
    newest_whole,
    remove_leftovers,
    save_checkpoint,
    set_aside,
)
from maskformer_fast.config import Config, Task
from maskformer_fast.criterion import Criterion, Losses
from maskformer_fast.data import SegmentationDataset, build_dataset
from maskformer_fast.data.loader import Batch, train_loader
from maskformer_fast.distributed import (
    any_rank,
    average_statistics,
    gather_objects,
    gradient_sync,
    is_main,
    load_optimizer,
    mean_over_ranks,
    on_main,
    rank,
    unsharded,
    world_size,
    wrap,
)
from maskformer_fast.evaluation import build_evaluator
from maskformer_fast.files import atomic_write
from maskformer_fast.formats import write_json
from maskformer_fast.modeling import build_model
from maskformer_fast.pixel_criterion import PixelCriterion
from maskformer_fast.predictor import AMP_DTYPES, Predictor, resolve_device, with_classes
from maskformer_fast.runlog import NoLog, RunLog
from maskformer_fast.solver import build_optimizer, set_learning_rate
from maskformer_fast.validation import check_classes, measure

logger = logging.getLogger(__name__)

HEADLINES: dict[Task, str] = {"semantic": "miou", "panoptic": "pq", "instance": "ap"}


GROUP_SETTINGS = ("lr", "initial_lr", "weight_decay")
"""What the configuration says of a parameter group."""


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps had a non-finite cost, loss or gradient."""


class Trainer:
    """One run in ``config.output``. The caller holds the folder's lock and decides whether it continues a run.

    In a process group every rank makes one; rank 0 writes the files and every rank reads them.
    """

    def __init__(self, config: Config, resume: bool = False) -> None:
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
        compiled: Any = torch.compile(self.network, fullgraph=True) if config.solver.compile else self.network
        self.forward = wrap(compiled, config)
        pixelwise = config.model.type != "maskformer"
        criterion = PixelCriterion if pixelwise else Criterion
        self.criterion = criterion(config.model.num_classes, config.loss).to(self.device)
        self.optimizer = build_optimizer(self.network, config.solver)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.solver.amp == "fp16")
        self.predictor = Predictor(self.network, config, self.metadata, self.device)
        self.tasks: Sequence[Task] = config.metrics or (self.val_set.task,)
        for task in self.tasks:
            self.predictor.check_task(task)
            build_evaluator(task, self.val_set.metadata)  # what it lacks is said now, not at the first validation

        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.broken: dict[str, str] = {}
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

    def run(self) -> dict[str, Any]:
        """Train to ``max_steps``; returns the last validation's metrics, which also stand in ``metrics.json``."""
        self.log: RunLog | NoLog = NoLog()
        if is_main():
            remove_leftovers(self.checkpoints)
            if self.resumed is not None:
                set_aside(self.damaged, self.resumed)
            self.log = RunLog(self.folder, self.step, self.config.log.tensorboard)
        try:
            # A run killed between saving a checkpoint and measuring it resumes here.
            measured = on_main(lambda: measured_step(self.folder))
            owed = self.resumed is not None and self._validation_due() and measured != self.step
            metrics = self._validate_checkpoint(self.resumed) if owed else {}
            metrics = self._train() or metrics or self.validate()
            for broken in gather_objects(self.broken):
                self.broken.update(broken)
            return metrics
        finally:
            self.log.close()
            if self.broken:
                listing = "\n  ".join(f"{path}: {reason}" for path, reason in self.broken.items())
                logger.warning("%d files were skipped as broken:\n  %s", len(self.broken), listing)

    def _train(self) -> dict[str, Any]:
        """The steps that are left -> metrics of the last validation among them."""
        config = self.config
        metrics: dict[str, Any] = {}
        if self.step >= config.solver.max_steps:
            return metrics
        batches: Iterator[Batch] = iter(
            train_loader(
                self.train_set, config, self.train_set.task, start_step=self.step, rank=rank(), world_size=world_size()
            )
        )
        window = _Window()
        self.network.train()
        with tqdm(
            total=config.solver.max_steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not is_main()
        ) as progress:
            while self.step < config.solver.max_steps:
                window.add(self._step(batches, window))
                self.step += 1
                progress.update()
                if self.step % config.log.every == 0 or self.step == config.solver.max_steps:
                    remaining = config.solver.max_steps - self.step
                    line = window.summary(config.solver.batch_size, remaining)
                    self.log.scalars(self.step, line)
                    progress.set_postfix(loss=f"{line['loss']:.3f}", data=f"{line['data_share']:.0%}")
                    window = _Window()
                paused = time.perf_counter()
                metrics = self._milestone() or metrics
                window.started += time.perf_counter() - paused
        return metrics

    def _step(self, batches: Iterator[Batch], window: _Window) -> dict[str, Tensor | float]:
        """One optimiser step; it is skipped, and buffers restored, where anything was not finite."""
        solver = self.config.solver
        rate = set_learning_rate(self.optimizer, self.step, solver)
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        kept = [buffer.clone() for buffer in buffers]
        autocast = torch.autocast(
            self.device.type, AMP_DTYPES.get(solver.amp, torch.bfloat16), enabled=solver.amp != "off"
        )
        terms: dict[str, Tensor] = {}
        problems: list[str] = []
        for micro in range(solver.accumulate):
            started = time.perf_counter()
            batch = next(batches)
            window.waited += time.perf_counter() - started
            self.broken.update(batch.broken)
            # Dropout depends on the step and rank alone, so a resumed run draws the same masks.
            stream = micro + rank() * solver.accumulate
            torch.manual_seed(((self.config.seed * 1_000_003 + self.step) * 4099 + stream) % 2**63)
            images = batch.images.to(self.device, non_blocking=True)
            if solver.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            targets = batch.targets.to(self.device, non_blocking=True)
            with gradient_sync(self.forward, micro == solver.accumulate - 1):
                with autocast:
                    predictions = self.forward(images, targets.valid_sizes)
                    losses: Losses = self.criterion(predictions, targets)
                self.scaler.scale(losses.total / solver.accumulate).backward()
            for name, value in {"loss": losses.total, **losses.terms}.items():
                terms[name] = terms.get(name, 0.0) + value.detach() / solver.accumulate
            problems += _describe_nonfinite(losses, batch, self.config)
        self.scaler.unscale_(self.optimizer)
        limit = solver.clip_norm or float("inf")
        norm = unsharded(nn.utils.clip_grad_norm_(self.network.parameters(), limit))
        finite = bool(torch.isfinite(norm))
        # An overflow of scaled fp16 gradients is the scaler's business; at scale 1 there is nothing left to lower.
        overflow = not finite and self.scaler.is_enabled() and self.scaler.get_scale() > 1.0
        if not problems and not (finite or overflow):
            problems = [f"gradient norm {float(norm)}"]
        if any_rank(bool(problems)):
            problems = [problem for found in gather_objects(problems) for problem in found]
            torch._foreach_copy_(buffers, kept)
            self._skip(problems)
        else:
            self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {**terms, "grad_norm": norm, "lr": rate, "skipped": float(bool(problems))}

    def _skip(self, problems: list[str]) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning("step %d skipped (%d so far): %s", self.step, self.skipped, "; ".join(problems))
        if self.skipped_in_a_row >= self.config.loss.max_nonfinite_steps:
            raise TrainingDiverged(
                f"{self.skipped_in_a_row} steps in a row were not finite, the last at step {self.step}: "
                f"{'; '.join(problems)}. Lower solver.lr, use bf16 instead of fp16, or look at the images named above; "
                f"--resume continues from the last checkpoint. loss.max_nonfinite_steps sets the limit."
            )

    def _validation_due(self) -> bool:
        every = self.config.log.validate_every
        return self.step == self.config.solver.max_steps or (every > 0 and self.step % every == 0)

    def _milestone(self) -> dict[str, Any]:
        """Save and validate where a step asks for it. Saved first: nothing is lost if validation fails."""
        validate = self._validation_due()
        if not validate and self.step % self.config.log.checkpoint_every != 0:
            return {}
        average_statistics(self.network)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        path, failure = None, None
        try:
            path = save_checkpoint(self.checkpoints, self.network, self.config, self.metadata, self.step, state)
        except OSError as error:
            failure = error
            logger.error("%s\ntraining goes on; the next checkpoint is tried at its step", error)
        metrics = self._validate_checkpoint(path) if validate else {}
        if failure is not None and self.step == self.config.solver.max_steps:
            raise failure
        return metrics

    def _validate_checkpoint(self, path: Path | None) -> dict[str, Any]:
        """Measure the network, whose weights ``path`` holds if they could be saved; that may be the best checkpoint."""
        metrics = self.validate()
        if is_main():
            score, best = metrics.get(HEADLINES[self.tasks[0]]), best_score(self.checkpoints)
            if path is not None and score is not None and (best is None or score > best):
                mark_best(self.checkpoints, path, score)
            write_json(self.folder / "metrics.json", metrics)  # last: it says that nothing is owed for this step
        return metrics

    def validate(self) -> dict[str, Any]:
        """Measure on the validation split; writes a picture grid and the log."""
        data, log = self.config.data, self.config.log
        started = time.perf_counter()
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
            pictures = self.folder / "pictures"
            pictures.mkdir(exist_ok=True)
            for target in (pictures / f"step_{self.step:08d}.png", self.folder / "predictions.png"):
                with atomic_write(target) as file:
                    Image.fromarray(grid).save(file, format="PNG")
            self.log.picture(self.step, grid)
        return metrics

    def _restore(self) -> None:
        """Continue from the newest undamaged checkpoint; without one, start at step 0."""
        found, self.damaged = on_main(lambda: newest_whole(self.checkpoints))
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
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.resumed = found
        logger.info("resuming from %s", found)


class _Window:
    """What happened since the last line of the log."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.sums: dict[str, Tensor | float] = {}

    def add(self, record: dict[str, Tensor | float]) -> None:
        """Count a step; its numbers stay on their device."""
        self.steps += 1
        for name, value in record.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def summary(self, batch_size: int, remaining_steps: int) -> dict[str, float]:
        """Means over the window's steps, and its speed."""
        seconds = time.perf_counter() - self.started
        per_step = seconds / self.steps
        means = mean_over_ranks(torch.tensor([float(value) / self.steps for value in self.sums.values()]))
        return {
            **dict(zip(self.sums, means.tolist(), strict=True)),
            "images_per_second": batch_size / per_step,
            "step_seconds": per_step,
            "data_share": self.waited / seconds,
            "eta_seconds": per_step * remaining_steps,
        }


def measured_step(folder: Path) -> int | None:
    """Step of the run's last finished validation; ``None`` if there was none."""
    path = folder / "metrics.json"
    return json.loads(path.read_text())["step"] if path.exists() else None


def _describe_nonfinite(losses: Losses, batch: Batch, config: Config) -> list[str]:
    """Which image and decoder layer had a non-finite cost (per pixel: logit); empty in the usual, finite case."""
    finite = torch.isfinite(losses.total) & ~losses.nonfinite.any()
    if bool(finite):
        return []
    what = "matching cost" if config.model.type == "maskformer" else "logits"
    first = 0 if config.loss.deep_supervision else config.model.decoder.layers - 1
    where = [
        f"non-finite {what} in decoder layer {first + layer}, image {batch.image_ids[image]} ({batch.paths[image]})"
        for layer, image in losses.nonfinite.nonzero().tolist()
    ]
    terms = [f"{name}={float(value)}" for name, value in losses.terms.items() if not bool(torch.isfinite(value))]
    return where or [f"non-finite loss ({', '.join(terms)}) on images {', '.join(map(str, batch.image_ids))}"]
