"""Configuration of optimisation, logs and checkpoints, a part of `config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from maskformer_fast.core.checks import check, check_choice, check_finite

Amp = Literal["off", "bf16", "fp16"]


@dataclass(frozen=True)
class SolverConfig:
    """Optimisation."""

    max_steps: int = 160_000
    batch_size: int | Literal["auto"] = 16
    """Number of images of one optimiser step, over all micro-batches and processes; ``auto`` takes as many as memory
    holds, by trial steps at the start (`training.batch_size`)."""
    accumulate: int = 1
    """Number of micro-batches of a step; it must divide ``batch_size``, which stays the same."""
    lr: float = 1e-4
    backbone_factor: float = 0.1
    """Learning-rate factor of the backbone."""
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    """Weight decay of normalisation layers, learned queries and Swin's relative position biases."""
    layer_decay: float = 1.0
    """ViT: factor of the learning rate from a block to the one before it; embeddings have that of the first block."""
    decay_query_blocks: bool = True
    """EoMT: whether ``layer_decay`` lowers the rates of the blocks with queries too; else these have the full rate."""
    schedule: Literal["poly", "step", "poly_after_warmup"] = "poly"
    """``poly_after_warmup``, EoMT's, starts to decay after the warm-up; other rates also decay during it."""
    poly_power: float = 0.9
    milestones: tuple[int, ...] = ()
    """Steps at which ``step`` multiplies the rate by ``gamma``."""
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_factor: float = 1.0
    """Factor of the rate at step 0, rising linearly to 1 after ``warmup_steps``."""
    backbone_warmup_steps: int = 0
    """With ``poly_after_warmup``: the backbone's rate stays 0 for ``warmup_steps``, then rises during these steps."""
    mask_annealing: tuple[tuple[int, int], ...] = ()
    """EoMT: for each block with queries, the steps from and to which the share of queries with masked attention falls
    from 1 to 0; empty keeps it at 1."""
    clip_norm: float = 0.01
    """Largest gradient norm of the full model; 0 turns clipping off."""
    amp: Amp = "off"
    compile: bool = False
    """Compile network and criterion by `torch.compile`; batches are padded to a few sizes, each compiled once."""
    channels_last: bool = False
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, as 0.9998, which is validated and saved as the network; 0: none."""
    early_stopping: int = 0
    """Validations in a row without a better score (of the metric that chooses the best checkpoint) after which training
    ends; 0: never."""
    freeze: tuple[str, ...] = ()
    """Parts of the network that are not trained, by their names in it, as ``backbone`` or ``backbone.res2``."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes (torchrun): replicate the network, or shard weights and optimiser state."""

    def __post_init__(self) -> None:
        check_finite(self, "solver")
        check_choice("solver.parallel", self.parallel, ("ddp", "fsdp"))
        for name in ("compile", "channels_last"):
            check(self.parallel == "ddp" or not getattr(self, name), f"solver.{name}", "False with parallel=fsdp", True)
        for name in ("max_steps", "batch_size", "accumulate"):
            value = getattr(self, name)
            automatic = name == "batch_size" and value == "auto"
            check(automatic or (isinstance(value, int) and value > 0), f"solver.{name}", "a positive integer", value)
        fits = not isinstance(self.batch_size, int) or self.batch_size % self.accumulate == 0
        check(fits, "solver.accumulate", f"a divisor of batch_size={self.batch_size}", self.accumulate)
        check(self.lr > 0, "solver.lr", "> 0", self.lr)
        check_choice("solver.schedule", self.schedule, ("poly", "step", "poly_after_warmup"))
        check(0.0 <= self.ema_decay < 1.0, "solver.ema_decay", "0 <= decay < 1", self.ema_decay)
        check(self.early_stopping >= 0, "solver.early_stopping", ">= 0", self.early_stopping)
        check(0.0 < self.layer_decay <= 1.0, "solver.layer_decay", "0 < factor <= 1", self.layer_decay)
        check(self.schedule == "poly_after_warmup" or not self.backbone_warmup_steps, "solver.backbone_warmup_steps",
              f"0 with schedule={self.schedule}", self.backbone_warmup_steps)
        check(self.backbone_warmup_steps >= 0, "solver.backbone_warmup_steps", ">= 0", self.backbone_warmup_steps)
        check(all(0 <= start < end for start, end in self.mask_annealing), "solver.mask_annealing",
              "pairs of steps, each 0 <= start < end", self.mask_annealing)
        check_choice("solver.amp", self.amp, get_args(Amp))
        for name in ("backbone_factor", "weight_decay", "norm_weight_decay", "poly_power", "gamma", "warmup_steps",
                     "warmup_factor", "clip_norm"):
            check(getattr(self, name) >= 0, f"solver.{name}", ">= 0", getattr(self, name))


    @property
    def images(self) -> int:
        """``batch_size`` as a number. Raises ``ValueError`` as long as it is ``auto``."""
        if not isinstance(self.batch_size, int):
            raise ValueError("solver.batch_size: expected a number here, got auto, which "
                             "training.batch_size.with_batch_size replaces")
        return self.batch_size


@dataclass(frozen=True)
class LogConfig:
    """Logs, checkpoints and validations of a run; intervals are in steps."""

    every: int = 50
    validate_every: int = 5000
    """Steps from one validation to the next; 0 validates only at the end."""
    checkpoint_every: int = 5000
    pictures: int = 4
    """Number of sample pictures at each validation."""
    tensorboard: bool = True
    wandb: bool = False
    """Log to Weights & Biases too (``WANDB_MODE=offline`` keeps it in the run's folder)."""
    mlflow: bool = False
    """Log to MLflow too: to ``MLFLOW_TRACKING_URI``, by default to ``mlruns`` in the run's folder."""
    project: str = "maskformer_fast"
    """Project at Weights & Biases, and experiment of MLflow."""

    def __post_init__(self) -> None:
        check(self.every > 0, "log.every", "> 0", self.every)
        check(self.checkpoint_every > 0, "log.checkpoint_every", "> 0", self.checkpoint_every)
        check(self.validate_every >= 0, "log.validate_every", ">= 0", self.validate_every)
        check(self.pictures >= 0, "log.pictures", ">= 0", self.pictures)
        check(self.project != "", "log.project", "a name", self.project)
