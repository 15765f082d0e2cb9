"""Optimiser and learning-rate schedule of the official recipes."""

from __future__ import annotations

import re

import torch
from torch import nn

from maskformer_fast.config import Config, SolverConfig
from maskformer_fast.modeling import EoMT

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(network: nn.Module, config: SolverConfig) -> list[dict[str, object]]:
    """Split the trained parameters by learning rate (backbone, depth) and weight decay (norms and embeddings or not).

    Embeddings are the learned queries and Swin's relative position biases. Groups keep the order of
    ``named_parameters``, so that optimiser state loads into an identical network.
    """
    norms: set[int] = set()
    for module in network.modules():
        if isinstance(module, (*NORM_TYPES, nn.Embedding)):
            norms.update(id(parameter) for parameter in module.parameters(recurse=False))
    blocks = _block_count(network)
    full_rate = 0
    if isinstance(network, EoMT) and not config.decay_query_blocks:
        full_rate = network.config.decoder.layers
    groups: dict[tuple[bool, bool, float], dict[str, object]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = name.startswith("backbone.")
        undecayed = id(parameter) in norms or name.endswith("relative_position_bias_table")
        depth_factor = _depth_factor(name, blocks, full_rate, config.layer_decay) if in_backbone else 1.0
        group = groups.setdefault(
            (in_backbone, undecayed, depth_factor),
            {
                "params": [],
                "lr": config.lr * (config.backbone_factor * depth_factor if in_backbone else 1.0),
                "weight_decay": config.norm_weight_decay if undecayed else config.weight_decay,
                "in_backbone": in_backbone,
            },
        )
        group["params"].append(parameter)  # type: ignore[attr-defined]
    return list(groups.values())


def _block_count(network: nn.Module) -> int:
    """Number of blocks of a ViT, 0 of other backbones."""
    names = (_BLOCK.match(name) for name, _ in network.named_parameters())
    return max((int(match[1]) + 1 for match in names if match), default=0)


def _depth_factor(name: str, blocks: int, full_rate: int, decay: float) -> float:
    """Factor of a ViT's learning rate: ``decay`` to the number of blocks after a parameter's own.

    The last ``full_rate`` blocks have factor 1. Embeddings have that of the first block if it decays.
    """
    if blocks == 0 or name.startswith("backbone.norm."):
        return 1.0
    match = _BLOCK.match(name)
    above = blocks - 1 - (int(match[1]) if match else 0)
    return 1.0 if match and above < full_rate else decay**above


def build_optimizer(network: nn.Module, config: SolverConfig) -> torch.optim.AdamW:
    """Build a fused AdamW; ``initial_lr`` of each group keeps its initial rate for `set_learning_rate`."""
    optimizer = torch.optim.AdamW(parameter_groups(network, config), lr=config.lr, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rate_factor(step: int, config: SolverConfig, in_backbone: bool = False) -> float:
    """Factor of the base learning rate at a step: linear warm-up, and polynomial or stepwise decay.

    With ``poly_after_warmup`` the decay follows the warm-up, and the backbone's warm-up the other parameters'; with the
    other schedules they are multiplied, and the same for all parameters.
    """
    if config.schedule == "poly_after_warmup":
        start, length = 0, config.warmup_steps
        if in_backbone and config.backbone_warmup_steps:
            if step < config.warmup_steps:
                return 0.0
            start, length = config.warmup_steps, config.backbone_warmup_steps
        if step < start + length:
            return _rising((step - start) / length, config)
        total = max(config.max_steps - start - length, 1)
        return (1.0 - min((step - start - length) / total, 1.0)) ** config.poly_power
    if config.schedule == "poly":
        factor = (1.0 - min(step, config.max_steps) / config.max_steps) ** config.poly_power
    else:
        factor = config.gamma ** sum(step >= milestone for milestone in config.milestones)
    return factor * _rising(step / config.warmup_steps, config) if step < config.warmup_steps else factor


def _rising(progress: float, config: SolverConfig) -> float:
    return config.warmup_factor * (1.0 - progress) + progress


def mask_probabilities(step: int, config: Config) -> list[float]:
    """Share of queries with masked attention in each of EoMT's last blocks at a step (Kerssies et al., section 3.2).

    Between the two steps of ``solver.mask_annealing`` it falls from 1 to 0 as a polynomial of power ``poly_power``.
    """
    solver = config.solver
    annealing = solver.mask_annealing
    if not annealing:
        return [1.0] * config.model.decoder.layers
    return [
        (1.0 - min(max((step - start) / (end - start), 0.0), 1.0)) ** solver.poly_power for start, end in annealing
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: SolverConfig) -> float:
    """Set the learning rate of every group for a step -> the base rate. It depends on the step number alone."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor(step, config, bool(group["in_backbone"]))
    return config.lr * learning_rate_factor(step, config)
