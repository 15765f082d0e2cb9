"""One optimiser step: from micro-batches to new weights, without the host ever waiting for the device.

A step is a pure function of (weights, optimiser state, seed, step number), so a resumed run is exact. Whether its
update is done is decided where the numbers are: a flag on the device tells the fused optimiser to change nothing.
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
from maskformer_fast.modeling.autocast import autocast
from maskformer_fast.structures import Batch, Targets
from maskformer_fast.training.criterion import Criterion, Losses
from maskformer_fast.training.optimizer import set_learning_rate
from maskformer_fast.training.parallel import gradient_sync
from maskformer_fast.training.per_pixel_criterion import PixelCriterion
from maskformer_fast.training.skipped_steps import SkippedSteps, Verdict


class StepRecord(NamedTuple):
    """What the log says of a step. Tensors stay on their device."""

    names: tuple[str, ...]
    values: Tensor  # [len(names)] float32: loss, its terms, grad_norm, num_matched; to be averaged over ranks
    updated: Tensor  # scalar bool: the weights were changed
    lr: float
    waited: float  # seconds in which the data were not there yet


class _Phase(enum.Enum):
    BETWEEN = enum.auto()  # the state is that of a whole number of steps
    GRADIENTS = enum.auto()  # buffers and gradients have changed, which can be undone
    UPDATE = enum.auto()


class TrainStep:
    """Runs one optimiser step after another; ``step`` is the number of the next one.

    An update is left out, and counted in ``skipped``, where a matching cost, a loss or the gradient norm is not finite;
    all buffers of the network (statistics of BatchNorm) are then as before the step. In fp16 gradients that overflow
    leave out the update as well, but are the scaler's business as long as it has a scale to lower.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion | PixelCriterion,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
        forward: nn.Module | None = None,
    ) -> None:
        """``forward`` is the network as it is called: compiled or wrapped. ``optimizer`` must be fused."""
        self.network = network
        self.forward = network if forward is None else forward  # a compiled module has no truth value
        self.criterion = criterion
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.solver.amp == "fp16")
        self.step = 0
        self.broken: dict[str, str] = {}
        self.input_size: tuple[int, int] | None = None  # height, width of the last step's largest micro-batch
        self.skips = SkippedSteps(config)
        self._counters = torch.zeros(2, device=device)
        self._one = torch.ones((), device=device)
        self._phase = _Phase.BETWEEN
        # What a forward pass can change. Integers here are counts of batches, exact in float32 up to 2^24.
        saved = network.state_dict(keep_vars=True)
        self._buffers = [b for name, b in network.named_buffers() if b.is_floating_point() or name in saved]
        self._kept = self._flat_buffers()

    @property
    def skipped(self) -> int:
        """Steps skipped so far, as far as their reports were read."""
        return self.skips.total

    @property
    def skipped_in_a_row(self) -> int:
        """The same, without a finite step since."""
        return self.skips.in_a_row

    def run(self, batches: Iterator[Batch]) -> StepRecord:
        """One step on the next ``solver.accumulate`` micro-batches, which all are fetched first.

        Raises:
            TrainingDiverged: found in the report of this step or, on a GPU, of an earlier one.
        """
        started = time.perf_counter()
        with record_function("step: data"):
            taken = [next(batches) for _ in range(self.config.solver.accumulate)]
        waited = time.perf_counter() - started
        for batch in taken:
            self.broken.update(batch.broken)
        self.input_size = max(batch.targets.input_size for batch in taken)
        rate = set_learning_rate(self.optimizer, self.step, self.config.solver)
        self._kept = self._flat_buffers()
        self._phase = _Phase.GRADIENTS
        inputs = [self._to_device(batch) for batch in taken]
        whole = self._whole_step([targets for _, targets in inputs])
        results = [self._gradients(micro, *pair, whole) for micro, pair in enumerate(inputs)]
        with record_function("step: update"):
            verdict, updated = self._update(results)
        terms = tuple(results[0].terms)
        # of all layers and micro-batches; times the ranks, so that their mean counts those of the whole step
        matched = torch.stack([result.num_matched for result in results]).sum() * world_size()
        values = torch.cat([verdict.losses.mean(0), verdict.grad_norm[None].float(), matched[None].float()])
        done, self.step = self.step, self.step + 1
        self._phase = _Phase.BETWEEN
        self.skips.add(done, verdict, terms, taken)
        return StepRecord(("loss", *terms, "grad_norm", "num_matched"), values, updated, rate, waited)

    def settle(self) -> None:
        """Wait for the reports of all steps and read them. Raises `TrainingDiverged`, see `run`."""
        self.skips.read(wait=True)

    def undo(self) -> bool:
        """After an exception in `run`: make the state that of the step's start -> whether it is, or was anyway.

        It cannot be where the update itself was interrupted.
        """
        if self._phase is _Phase.GRADIENTS:
            self._write_buffers(self._kept)
            self.optimizer.zero_grad(set_to_none=True)
            self._phase = _Phase.BETWEEN
        return self._phase is _Phase.BETWEEN

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights and optimiser; call `settle` first."""
        return {
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; other keys are ignored."""
        if state["scaler"]:  # empty where the run that was saved had no fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.skips.total, self.skips.in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._counters = torch.tensor([self.skipped, self.skipped_in_a_row], dtype=torch.float32, device=self.device)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Targets]:
        images = batch.images.to(self.device, non_blocking=True)
        if self.config.solver.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, batch.targets.to(self.device, non_blocking=True)

    def _whole_step(self, targets: list[Targets]) -> Tensor | None:
        """What each image of the step adds to the divisors of the losses -> [N]; ``None``: there is one batch only."""
        if len(targets) == 1 and world_size() == 1:
            return None
        with record_function("step: amounts"):
            return gather_ranks(torch.cat([self.criterion.amounts(part) for part in targets]))

    def _gradients(self, micro: int, images: Tensor, targets: Targets, whole: Tensor | None) -> Losses:
        """Forward and backward pass of one micro-batch -> its losses without their graph."""
        solver = self.config.solver
        # Dropout depends on the step alone, so a resumed run draws the same masks.
        stream = rank() * solver.accumulate + micro
        torch.manual_seed(((self.config.seed * 1_000_003 + self.step) * 4099 + stream) % 2**63)
        with gradient_sync(self.forward, micro == solver.accumulate - 1):
            with autocast(self.device, solver.amp):
                with record_function("step: forward"):
                    predictions = self.forward(images, targets.valid_sizes)
                with record_function("step: criterion"):
                    losses: Losses = self.criterion(predictions, targets, whole)
            with record_function("step: backward"):
                self.scaler.scale(losses.total / solver.accumulate).backward()
        terms = {name: value.detach() for name, value in losses.terms.items()}
        return losses._replace(total=losses.total.detach(), terms=terms)

    def _update(self, results: list[Losses]) -> tuple[Verdict, Tensor]:
        """Judge the gradients and apply them, or else undo what the step did -> verdict, whether it was an update."""
        losses = torch.stack([torch.stack([result.total, *result.terms.values()]) for result in results])
        nonfinite = torch.stack([result.nonfinite for result in results])
        self.scaler.unscale_(self.optimizer)
        limit = self.config.solver.clip_norm or float("inf")
        norm = unsharded(nn.utils.clip_grad_norm_(self.network.parameters(), limit))
        bad = max_over_ranks((nonfinite.any() | ~losses[:, 0].isfinite().all()).float()) > 0
        overflow = ~norm.isfinite() & (self.scaler.scale(self._one) > 1)  # at scale 1 there is nothing left to lower
        skipped = bad | ~(norm.isfinite() | overflow)
        unchanged = skipped | overflow
        self._phase = _Phase.UPDATE
        self.optimizer.found_inf = unchanged.float()  # type: ignore[attr-defined]  # as GradScaler tells it
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
        self._write_buffers(torch.where(skipped, self._kept, self._flat_buffers()))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        total, in_a_row = self._counters
        in_a_row = torch.where(skipped, in_a_row + 1, in_a_row * overflow)
        self._counters = torch.stack([total + skipped, in_a_row])
        return Verdict(skipped, self._counters, norm, losses, nonfinite), ~unchanged

    def _flat_buffers(self) -> Tensor:
        return torch.cat([buffer.detach().flatten() for buffer in self._buffers])

    def _write_buffers(self, flat: Tensor) -> None:
        pieces = flat.split([buffer.numel() for buffer in self._buffers])
        own = [piece.view_as(buffer) for piece, buffer in zip(pieces, self._buffers, strict=True)]
        torch._foreach_copy_(self._buffers, own)
