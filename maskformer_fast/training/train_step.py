"""One optimiser step, from micro-batches to new weights; the host never waits for the device.

A step is a pure function of weights, optimiser state, seed and step number, so a resumed run is exact. The device
decides whether to skip the update: by a flag there, the fused optimiser changes nothing.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from maskformer_fast.config import Config
from maskformer_fast.distributed import gather_ranks, max_over_ranks, rank, unsharded, world_size
from maskformer_fast.modeling import EoMT
from maskformer_fast.modeling.autocast import autocast
from maskformer_fast.modeling.backbone import resolve_backbone
from maskformer_fast.ops import draw_points
from maskformer_fast.ops.points import PointDraws
from maskformer_fast.structures import Batch, Targets
from maskformer_fast.training.criterion import Criterion, Losses
from maskformer_fast.training.optimizer import mask_probabilities, set_learning_rate
from maskformer_fast.training.parallel import gradient_sync
from maskformer_fast.training.per_pixel_criterion import PerPixelCriterion
from maskformer_fast.training.skipped_steps import SkippedSteps, StepReport
from maskformer_fast.training.weight_average import WeightAverage

LAST_STRIDE = 32
"""Stride of the backbones' last stage."""


class StepRecord(NamedTuple):
    """Numbers of a step for the log. Tensors stay on their device."""

    scalars: dict[str, Tensor]  # scalars float32: loss, its terms, grad_norm, num_matched; the log shows rank means
    updated: Tensor  # scalar bool: the weights were changed
    lr: float
    waited: float  # seconds spent waiting for data


class _Phase(enum.Enum):
    BETWEEN_STEPS = enum.auto()
    GRADIENTS = enum.auto()  # buffers and gradients have changed, which can be undone
    UPDATE = enum.auto()  # weights may have changed, which cannot be undone


class TrainStep:
    """Runs one optimiser step after another; ``step`` is the number of the next one.

    A step is skipped, and counted in ``skipped``, if a matching cost, a loss or the gradient norm is not finite. All
    buffers of the network (statistics of BatchNorm) are then as before the step. In fp16, gradients that overflow leave
    out the update too, but the step counts as skipped only once the gradient scaler's scale is down to 1.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion | PerPixelCriterion,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
        forward: nn.Module | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        """``forward`` is called in place of the network: compiled, or wrapped. ``optimizer`` must be fused.

        ``average`` is updated in each step.
        """
        self.network = network
        self.forward = network if forward is None else forward  # not `or`: a compiled module has no truth value
        self.criterion = criterion
        self.optimizer = optimizer
        self.average = average
        self.config = config
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.solver.amp == "fp16")
        self.step = 0
        self.broken: dict[str, str] = {}
        self.input_size: tuple[int, int] | None = None  # height, width of the last step's largest micro-batch
        self.skipped_steps = SkippedSteps(config)
        self._counters = torch.zeros(2, device=device)
        self._one = torch.ones((), device=device)
        self._phase = _Phase.BETWEEN_STEPS
        # Buffers that a forward pass can change. Integers among them count batches, exact in float32 up to 2^24.
        saved = network.state_dict(keep_vars=True)
        self._buffers = [b for name, b in network.named_buffers() if b.is_floating_point() or name in saved]
        self._buffers_before = self._flat_buffers()

    @property
    def skipped(self) -> int:
        """Number of steps skipped so far, up to the last report read."""
        return self.skipped_steps.total

    @property
    def skipped_in_a_row(self) -> int:
        """Number of consecutive steps skipped up to the last report read."""
        return self.skipped_steps.in_a_row

    def run(self, batches: Iterator[Batch]) -> StepRecord:
        """Do one step on the next ``solver.accumulate`` micro-batches, all fetched before the first forward pass.

        Raises:
            TrainingDiverged: too many steps in a row were skipped, up to this one or, on a GPU, an earlier one.
        """
        started = time.perf_counter()
        with record_function("step: data"):
            micro_batches = [next(batches) for _ in range(self.config.solver.accumulate)]
        waited = time.perf_counter() - started
        for batch in micro_batches:
            self.broken.update(batch.broken)
        self.input_size = max(batch.targets.input_size for batch in micro_batches)
        lr = set_learning_rate(self.optimizer, self.step, self.config.solver)
        if isinstance(self.network, EoMT):  # before the buffers are saved, so that a skipped step does not undo it
            self.network.set_mask_probability(mask_probabilities(self.step, self.config))
        self._buffers_before = self._flat_buffers()
        self._phase = _Phase.GRADIENTS
        inputs = [self._to_device(batch) for batch in micro_batches]
        step_counts = self._step_counts([targets for _, targets in inputs])
        results = [self._gradients(micro, *pair, step_counts) for micro, pair in enumerate(inputs)]
        with record_function("step: update"):
            report, updated = self._update(results)
        terms = tuple(results[0].terms)
        # Of all layers and micro-batches; times the ranks, so that the mean over ranks is the sum over ranks.
        matched = torch.stack([result.num_matched for result in results]).sum() * world_size()
        losses = zip(("loss", *terms), report.losses.mean(0).unbind(), strict=True)
        scalars = {**dict(losses), "grad_norm": report.grad_norm.float(), "num_matched": matched.float()}
        done, self.step = self.step, self.step + 1
        self._phase = _Phase.BETWEEN_STEPS
        self.skipped_steps.add(done, report, terms, micro_batches)
        return StepRecord(scalars, updated, lr, waited)

    def settle(self) -> None:
        """Wait for the reports of all steps and read them. Raises `TrainingDiverged` as `run` does."""
        self.skipped_steps.read(wait=True)

    def undo(self) -> bool:
        """Restore the state before a step that `run` left by an exception -> whether the state is that between steps.

        An interrupted update cannot be undone.
        """
        if self._phase is _Phase.GRADIENTS:
            self._write_buffers(self._buffers_before)
            self.optimizer.zero_grad(set_to_none=True)
            self._phase = _Phase.BETWEEN_STEPS
        return self._phase is _Phase.BETWEEN_STEPS

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, beside weights and optimiser; call `settle` first."""
        return {
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; other keys are ignored."""
        if state["scaler"]:  # empty if the saved run did not use fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.skipped_steps.total, self.skipped_steps.in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._counters = torch.tensor([self.skipped, self.skipped_in_a_row], dtype=torch.float32, device=self.device)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Targets]:
        images = batch.images.to(self.device, non_blocking=True)
        if self.config.solver.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, batch.targets.to(self.device, non_blocking=True)

    def _step_counts(self, targets: list[Targets]) -> Tensor | None:
        """`Criterion.image_counts` of all images of the step -> [N]; ``None`` if a single batch is the step."""
        if len(targets) == 1 and world_size() == 1:
            return None
        with record_function("step: counts"):
            return gather_ranks(torch.cat([self.criterion.image_counts(part) for part in targets]))

    def _gradients(self, micro: int, images: Tensor, targets: Targets, step_counts: Tensor | None) -> Losses:
        """Run forward and backward pass of one micro-batch -> its losses, detached."""
        solver = self.config.solver
        # Dropout depends on seed, step, rank and micro-batch alone, so a resumed run draws the same masks.
        part = rank() * solver.accumulate + micro
        torch.manual_seed(((self.config.seed * 1_000_003 + self.step) * 4099 + part) % 2**63)
        check_batch_norm(self.config, len(images), images.shape[2], images.shape[3])
        with gradient_sync(self.forward, micro == solver.accumulate - 1):
            with autocast(self.device, solver.amp):
                with record_function("step: forward"):
                    predictions = self.forward(images, targets.valid_sizes)
                with record_function("step: criterion"):
                    draws = self._draws(micro, len(images))
                    losses: Losses = self.criterion(predictions, targets, step_counts, *draws)
            with record_function("step: backward"):
                self.scaler.scale(losses.total / solver.accumulate).backward()
        terms = {name: value.detach() for name, value in losses.terms.items()}
        return losses._replace(total=losses.total.detach(), terms=terms)

    def _draws(self, micro: int, images: int) -> tuple[PointDraws, ...]:
        """Points of a micro-batch's images; none without ``loss.points``.

        They depend on seed, step and the image's number in the step, so a resumed run draws the same, and so does one
        on another number of ranks.
        """
        if self.config.loss.points == 0 or not self.config.model.classifies_masks:
            return ()
        first = (micro * world_size() + rank()) * images
        step = self.config.seed * 1_000_003 + self.step
        seeds = [(step * 65_537 + first + image) * 2 + 1 for image in range(images)]
        return (draw_points(self.config.loss, seeds, self.device),)

    def _update(self, results: list[Losses]) -> tuple[StepReport, Tensor]:
        """Update the weights, or restore the buffers if a number is not finite -> report, whether updated."""
        losses = torch.stack([torch.stack([result.total, *result.terms.values()]) for result in results])
        nonfinite = torch.stack([result.nonfinite for result in results])
        self.scaler.unscale_(self.optimizer)
        limit = self.config.solver.clip_norm or float("inf")
        norm = unsharded(nn.utils.clip_grad_norm_(self.network.parameters(), limit))
        bad_losses = max_over_ranks((nonfinite.any() | ~losses[:, 0].isfinite().all()).float()) > 0
        overflow = ~norm.isfinite() & (self.scaler.scale(self._one) > 1)  # above 1, the scaler lowers its scale
        skipped = bad_losses | ~(norm.isfinite() | overflow)
        unchanged = skipped | overflow
        self._phase = _Phase.UPDATE
        self.optimizer.found_inf = unchanged.float()  # type: ignore[attr-defined]  # read by fused optimisers; GradScaler sets it too
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
        self._write_buffers(torch.where(skipped, self._buffers_before, self._flat_buffers()))
        if self.average is not None:
            self.average.update(self.step, unchanged)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        total, in_a_row = self._counters
        in_a_row = torch.where(skipped, in_a_row + 1, in_a_row * overflow)
        self._counters = torch.stack([total + skipped, in_a_row])
        return StepReport(skipped, self._counters, norm, losses, nonfinite), ~unchanged

    def _flat_buffers(self) -> Tensor:
        return torch.cat([buffer.detach().flatten() for buffer in self._buffers])

    def _write_buffers(self, flat: Tensor) -> None:
        pieces = flat.split([buffer.numel() for buffer in self._buffers])
        values = [piece.view_as(buffer) for piece, buffer in zip(pieces, self._buffers, strict=True)]
        torch._foreach_copy_(self._buffers, values)


def check_batch_norm(config: Config, images: int, height: int, width: int) -> None:
    """Raise ``ValueError`` if BatchNorm would see one value of a channel in a micro-batch, which has no variance.

    A ResNet's last stage has the fewest: one for each `LAST_STRIDE` pixels in height and width, rounded up.
    """
    if "backbone" in config.solver.freeze:
        return
    norm = resolve_backbone(config.model.backbone).norm  # None in Swin and ViT
    values = images * (world_size() if norm == "sync" else 1) * -(-height // LAST_STRIDE) * -(-width // LAST_STRIDE)
    if norm in ("batch", "sync") and values == 1:
        solver = config.solver
        raise ValueError(
            f"solver.batch_size: expected micro-batches in which BatchNorm sees more than one value of a channel, got "
            f"one image of {height}x{width} pixels, a single pixel in the backbone's last stage (batch_size="
            f"{solver.batch_size}, accumulate={solver.accumulate}, processes={world_size()}). What helps: a larger "
            f"--solver.batch-size, a smaller --solver.accumulate, a --data.augment.crop-size above {LAST_STRIDE} "
            f"{LAST_STRIDE} (now data.augment.crop_size={config.data.augment.crop_size}), or pretrained weights with "
            "--model.backbone.norm frozen (now model.backbone.norm=" + norm + ")"
        )
