"""Parameter groups and learning-rate schedules, with values computed by hand."""

import pytest
import torch
from torch import nn

from maskformer_fast.config import SolverConfig
from maskformer_fast.training.optimizer import (
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.query_embed = nn.Embedding(5, 4)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def test_groups_split_by_backbone_and_decay_and_lose_no_parameter():
    config = SolverConfig(lr=1e-3, backbone_factor=0.1, weight_decay=0.05, norm_weight_decay=0.0)
    network = Toy()
    groups = parameter_groups(network, config)
    got = {(round(group["lr"], 8), group["weight_decay"]): {id(p) for p in group["params"]} for group in groups}
    expected = {
        (1e-4, 0.05): {id(p) for p in network.backbone[0].parameters()},
        (1e-4, 0.0): {id(p) for p in network.backbone[1].parameters()},
        (1e-3, 0.05): {id(p) for p in network.head[0].parameters()},
        (1e-3, 0.0): {id(p) for p in [*network.head[1].parameters(), *network.query_embed.parameters()]},
    }
    assert got == expected


def test_poly_schedule_with_warmup():
    config = SolverConfig(max_steps=100, poly_power=0.9, warmup_steps=10, warmup_factor=0.1)
    assert learning_rate_factor(0, config) == pytest.approx(0.1)
    assert learning_rate_factor(5, config) == pytest.approx(0.55 * 0.95**0.9)
    assert learning_rate_factor(50, config) == pytest.approx(0.5**0.9)
    assert learning_rate_factor(100, config) == 0.0


def test_step_schedule():
    config = SolverConfig(max_steps=100, schedule="step", milestones=(30, 60), gamma=0.1)
    factors = [learning_rate_factor(step, config) for step in (0, 29, 30, 59, 60, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_rate_of_each_group_follows_its_own_base_rate():
    config = SolverConfig(lr=1e-3, backbone_factor=0.1, max_steps=10, poly_power=1.0)
    optimizer = build_optimizer(Toy(), config)
    assert set_learning_rate(optimizer, 5, config) == pytest.approx(5e-4)
    assert sorted({round(group["lr"], 9) for group in optimizer.param_groups}) == pytest.approx([5e-5, 5e-4])
