"""The training loop: a step is a pure function of (weights, optimiser state, seed, step), so a resumed run is exact."""

from __future__ import annotations

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
    complete_checkpoints,
    config_differences,
    load_backbone,
    load_into,
    load_state,
    load_weights,
    remove_leftovers,
    save_checkpoint,
)
from maskformer_fast.config import Config, Task
from maskformer_fast.criterion import Criterion, Losses
from maskformer_fast.data import SegmentationDataset, build_dataset
from maskformer_fast.data.loader import Batch, train_loader
from maskformer_fast.files import atomic_write
from maskformer_fast.formats import write_json
from maskformer_fast.modeling import build_model
from maskformer_fast.pixel_criterion import PixelCriterion
from maskformer_fast.predictor import AMP_DTYPES, Predictor, resolve_device, with_classes
from maskformer_fast.runlog import RunLog
from maskformer_fast.solver import build_optimizer, set_learning_rate
from maskformer_fast.validation import measure

logger = logging.getLogger(__name__)

HEADLINES: dict[Task, str] = {"semantic": "miou", "panoptic": "pq", "instance": "ap"}


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps had a non-finite cost, loss or gradient."""


class Trainer:
    """One run in ``config.output``. The caller holds the folder's lock and decides whether it continues a run."""

    def __init__(self, config: Config, resume: bool = False) -> None:
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        self.device = resolve_device(config.device)
        self.train_set: SegmentationDataset = build_dataset(config.data, "train")
        self.val_set: SegmentationDataset = build_dataset(config.data, "val")
        self.metadata = self.train_set.metadata
        self.config = config = with_classes(config, self.metadata)

        torch.manual_seed(config.seed)
        self.network = build_model(config.model)
        if config.model.backbone.weights:
            load_backbone(self.network, config.model.backbone.weights)
        layout = torch.channels_last if config.solver.channels_last else torch.contiguous_format
        self.network.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.forward = torch.compile(self.network, fullgraph=True) if config.solver.compile else self.network
        pixelwise = config.model.type != "maskformer"
        criterion = PixelCriterion if pixelwise else Criterion
        self.criterion = criterion(config.model.num_classes, config.loss).to(self.device)
        self.optimizer = build_optimizer(self.network, config.solver)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.solver.amp == "fp16")
        self.predictor = Predictor(self.network, config, self.metadata, self.device)
        self.tasks: Sequence[Task] = config.metrics or (self.val_set.task,)
        for task in self.tasks:
            self.predictor.check_task(task)

        self.step = 0
        self.best: float | None = None
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.broken: dict[str, str] = {}
        remove_leftovers(self.checkpoints)
        if resume:
            self._restore()
        self.log = RunLog(self.folder, self.step, config.log.tensorboard)

    def run(self) -> dict[str, Any]:
        """Train to ``max_steps``; returns the last validation's metrics, which also stand in ``metrics.json``."""
        config = self.config
        metrics: dict[str, Any] = {}
        batches: Iterator[Batch] = iter(
            train_loader(self.train_set, config, self.train_set.task, start_step=self.step)
        )
        window = _Window()
        self.network.train()
        try:
            with tqdm(total=config.solver.max_steps, initial=self.step, unit="step", dynamic_ncols=True) as progress:
                while self.step < config.solver.max_steps:
                    record = self._step(batches, window)
                    self.step += 1
                    progress.update()
                    if self.step % config.log.every == 0 or self.step == config.solver.max_steps:
                        remaining = config.solver.max_steps - self.step
                        line = window.summary(record, config.solver.batch_size, remaining)
                        self.log.scalars(self.step, line)
                        progress.set_postfix(loss=f"{line['loss']:.3f}", data=f"{line['data_share']:.0%}")
                        window = _Window()
                    metrics = self._milestone() or metrics
        finally:
            self.log.close()
            if self.broken:
                listing = "\n  ".join(f"{path}: {reason}" for path, reason in self.broken.items())
                logger.warning("%d files were skipped as broken:\n  %s", len(self.broken), listing)
        return metrics or self.validate()

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
            # Dropout depends on the step alone, so a resumed run draws the same masks.
            torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 4099 + micro)
            images = batch.images.to(self.device, non_blocking=True)
            if solver.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            targets = batch.targets.to(self.device, non_blocking=True)
            with autocast:
                predictions = self.forward(images, targets.valid_sizes)
                losses: Losses = self.criterion(predictions, targets)
            self.scaler.scale(losses.total / solver.accumulate).backward()
            for name, value in {"loss": losses.total, **losses.terms}.items():
                terms[name] = terms.get(name, 0.0) + value.detach() / solver.accumulate
            problems += _describe_nonfinite(losses, batch)
        self.scaler.unscale_(self.optimizer)
        limit = solver.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        if problems or not (self.scaler.is_enabled() or bool(torch.isfinite(norm))):
            torch._foreach_copy_(buffers, kept)
            self._skip(problems or [f"gradient norm {float(norm)}"])
        else:
            self.skipped_in_a_row = 0
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        window.steps += 1
        return {**terms, "grad_norm": norm, "lr": rate, "skipped": float(self.skipped)}

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

    def _milestone(self) -> dict[str, Any]:
        """Validate and save where a step asks for it."""
        log, last = self.config.log, self.step == self.config.solver.max_steps
        validate = last or (log.validate_every > 0 and self.step % log.validate_every == 0)
        if not validate and self.step % log.checkpoint_every != 0:
            return {}
        metrics = self.validate() if validate else {}
        score = metrics.get(HEADLINES[self.tasks[0]])
        is_best = score is not None and (self.best is None or score > self.best)
        if is_best:
            self.best = score
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "best": self.best,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        save_checkpoint(self.checkpoints, self.network, self.config, self.metadata, self.step, state, is_best)
        return metrics

    def validate(self) -> dict[str, Any]:
        """Measure on the validation split; writes ``metrics.json``, a picture grid and the log."""
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
        write_json(self.folder / "metrics.json", metrics)
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
        """Continue from the newest whole checkpoint; without one, start at step 0."""
        found = complete_checkpoints(self.checkpoints)
        if not found:
            logger.info("%s has no checkpoint yet: starting at step 0", self.folder)
            return
        saved = load_weights(found[-1])
        changed = config_differences(saved.config, self.config, ("model", "loss", "data", "solver"))
        if changed:
            logger.warning("resuming with another configuration:\n  %s", "\n  ".join(changed))
        load_into(self.network, saved.weights, found[-1])
        state = load_state(found[-1])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        logger.info("resuming from %s", found[-1])


class _Window:
    """Time and data wait since the last line of the log."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def summary(
        self, record: dict[str, Tensor | float], batch_size: int, remaining_steps: int
    ) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        per_step = seconds / max(self.steps, 1)
        return {
            **{name: float(value) for name, value in record.items()},
            "images_per_second": batch_size / per_step,
            "step_seconds": per_step,
            "data_share": self.waited / seconds,
            "eta_seconds": per_step * remaining_steps,
        }


def _describe_nonfinite(losses: Losses, batch: Batch) -> list[str]:
    """Which image and decoder layer had a non-finite cost; empty in the usual, finite case."""
    finite = torch.isfinite(losses.total) & ~losses.nonfinite.any()
    if bool(finite):
        return []
    where = [
        f"non-finite matching cost in decoder layer {layer}, image {batch.image_ids[image]} ({batch.paths[image]})"
        for layer, image in losses.nonfinite.nonzero().tolist()
    ]
    terms = [f"{name}={float(value)}" for name, value in losses.terms.items() if not bool(torch.isfinite(value))]
    return where or [f"non-finite loss ({', '.join(terms)}) on images {', '.join(map(str, batch.image_ids))}"]
