"""Optimiser and learning-rate schedule of the official recipes."""

from __future__ import annotations

import torch
from torch import nn

from maskformer_fast.config import SolverConfig

NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(network: nn.Module, config: SolverConfig) -> list[dict[str, object]]:
    """Split the trained parameters by learning rate (backbone or not) and weight decay (norms and embeddings or not).

    Embeddings are the learned queries and Swin's relative position biases. Groups keep the order of
    ``named_parameters``, so that optimiser state loads into an identical network.
    """
    norms: set[int] = set()
    for module in network.modules():
        if isinstance(module, (*NORM_TYPES, nn.Embedding)):
            norms.update(id(parameter) for parameter in module.parameters(recurse=False))
    groups: dict[tuple[bool, bool], dict[str, object]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = name.startswith("backbone.")
        undecayed = id(parameter) in norms or name.endswith("relative_position_bias_table")
        group = groups.setdefault(
            (in_backbone, undecayed),
            {
                "params": [],
                "lr": config.lr * (config.backbone_factor if in_backbone else 1.0),
                "weight_decay": config.norm_weight_decay if undecayed else config.weight_decay,
            },
        )
        group["params"].append(parameter)  # type: ignore[attr-defined]
    return list(groups.values())


def build_optimizer(network: nn.Module, config: SolverConfig) -> torch.optim.AdamW:
    """Build a fused AdamW; ``initial_lr`` of each group keeps its initial rate for `set_learning_rate`."""
    optimizer = torch.optim.AdamW(parameter_groups(network, config), lr=config.lr, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rate_factor(step: int, config: SolverConfig) -> float:
    """Factor of the base learning rate at a step: linear warm-up times polynomial or stepwise decay."""
    if config.schedule == "poly":
        factor = (1.0 - min(step, config.max_steps) / config.max_steps) ** config.poly_power
    else:
        factor = config.gamma ** sum(step >= milestone for milestone in config.milestones)
    if step < config.warmup_steps:
        progress = step / config.warmup_steps
        factor *= config.warmup_factor * (1.0 - progress) + progress
    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: SolverConfig) -> float:
    """Set the learning rate of every group for a step -> the base rate. It depends on the step number alone."""
    factor = learning_rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return config.lr * factor
