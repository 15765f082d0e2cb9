"""Training of EoMT: schedules equal to recorded ones, and a run with its log, exact resuming and results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import maskformer_fast
from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig, SolverConfig
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training.optimizer import build_optimizer, mask_probabilities, set_learning_rate
from maskformer_fast.training.train_step import TrainStep
from maskformer_fast.training.trainer import Trainer
from tests.support.images import photo
from tests.support.paths import ORACLES, TINY_RECIPE

VIT = BackboneConfig("vit_micro", embed_dim=16, blocks=3, heads=2, mlp_dim=32, image_size=(32, 32))


def config_of(output: Path) -> Config:
    config = load_recipe(TINY_RECIPE)
    model = replace(
        config.model, type="eomt", backbone=VIT, size_divisibility=8, padding="black",
        decoder=replace(config.model.decoder, layers=2),
    )  # fmt: skip
    solver = replace(
        config.solver, schedule="poly_after_warmup", warmup_steps=1, backbone_warmup_steps=1, layer_decay=0.8,
        mask_annealing=((1, 3), (2, 6)),
    )  # fmt: skip
    return replace(
        config, output=str(output), model=model, solver=solver, loss=replace(config.loss, mask_loss="bce", points=50),
        test=replace(config.test, panoptic_rule="mask2former"),
    )  # fmt: skip


def test_a_run_logs_every_layer_resumes_exactly_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Trainer(config_of(tmp_path / "run")).run()
    assert metrics["step"] == 6 and {"miou", "pq", "ap"} <= metrics.keys()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert {name for name in losses[0] if name.startswith("loss_mask")} == {"loss_mask_0", "loss_mask_1", "loss_mask"}
    final = load_weights(tmp_path / "run").weights
    expected = torch.tensor([0.0, 0.25**0.9])  # of step 5, the last
    torch.testing.assert_close(final["predictor.mask_probability"], expected)

    step = TrainStep.run

    def interrupt_at_five(self: TrainStep, *arguments: Any) -> Any:
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(TrainStep, "run", interrupt_at_five)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config_of(tmp_path / "resumed")).run()
    monkeypatch.undo()
    torch.rand(7)  # a resumed process has another generator state
    resumed = Trainer(config_of(tmp_path / "resumed"), resume=True)
    assert resumed.step == 4
    resumed.run()
    again = load_weights(tmp_path / "resumed").weights
    assert again.keys() == final.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, msg=name)

    predictor = maskformer_fast.load(tmp_path / "run", "cpu")
    for task in ("semantic", "panoptic", "instance"):
        result = predictor.predict(photo(37, 50), task=task)
        assert result is not None


def network_of(blocks: int, layers: int = 2) -> nn.Module:
    vit = replace(VIT, blocks=blocks)
    return build_model(ModelConfig(type="eomt", num_classes=3, backbone=vit, decoder=DecoderConfig(layers=layers)))


@pytest.mark.parametrize(("step", "head", "backbone"), [
    (0, 0.0, 0.0), (5, 0.5, 0.0), (10, 1.0, 0.0), (15, (1 - 5 / 90) ** 0.9, 0.25), (30, (1 - 20 / 90) ** 0.9, 1.0),
    (65, (1 - 55 / 90) ** 0.9, 0.5**0.9), (100, 0.0, 0.0),
])  # fmt: skip
def test_the_backbone_warms_up_after_the_heads_and_layers_have_their_own_rates(
    step: int, head: float, backbone: float
) -> None:
    solver = SolverConfig(
        max_steps=100, lr=2.0, backbone_factor=1.0, layer_decay=0.5, schedule="poly_after_warmup", warmup_steps=10,
        warmup_factor=0.0, backbone_warmup_steps=20,
    )  # fmt: skip
    network = network_of(4)
    optimizer = build_optimizer(network, solver)
    set_learning_rate(optimizer, step, solver)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    for name, parameter in network.named_parameters():
        block = 3 if name.startswith("backbone.norm") else 0
        if name.startswith("backbone.blocks."):
            block = int(name.split(".")[2])
        expected = 2.0 * backbone * 0.5 ** (3 - block) if name.startswith("backbone.") else 2.0 * head
        assert math.isclose(rates[id(parameter)], expected, abs_tol=1e-12), name


def test_mask_probabilities_fall_between_their_steps() -> None:
    config = config_of(Path("unused"))
    assert mask_probabilities(0, config) == [1.0, 1.0] and mask_probabilities(6, config) == [0.0, 0.0]
    assert mask_probabilities(2, config) == [0.5**0.9, 1.0]
    without = replace(config, solver=replace(config.solver, mask_annealing=()))
    assert mask_probabilities(5, without) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"solver\.mask_annealing: expected none, or with model\.type=eomt one pair"):
        replace(config, solver=replace(config.solver, mask_annealing=((0, 1),)))
    with pytest.raises(ValueError, match=r"solver\.decay_query_blocks: expected True with model\.type=maskformer"):
        Config(solver=SolverConfig(decay_query_blocks=False))
    with pytest.raises(ValueError, match=r"solver\.mask_annealing: expected pairs of steps"):
        SolverConfig(mask_annealing=((3, 3),))
    with pytest.raises(ValueError, match=r"solver\.backbone_warmup_steps: expected 0 with schedule=poly"):
        SolverConfig(backbone_warmup_steps=3)


@pytest.fixture
def recorded() -> dict[str, Any]:
    path = ORACLES / "eomt_small_coco_panoptic/train.pt"
    if not path.is_file():
        pytest.skip("no recordings of the official code")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def test_schedules_equal_the_official_ones(recorded: dict[str, Any]) -> None:
    annealing = recorded["annealing"]
    pairs = tuple(zip(annealing["start_steps"], annealing["end_steps"], strict=True))
    model = ModelConfig(type="eomt", backbone=replace(VIT, blocks=6), decoder=DecoderConfig(layers=3))
    config = Config(model=model, solver=SolverConfig(mask_annealing=pairs, poly_power=annealing["poly_power"]))
    for step, expected in annealing["probs_at_global_step"].items():
        torch.testing.assert_close(torch.tensor(mask_probabilities(step, config)), expected)
    for name in ("default", "llrd_0.8_l2_disabled", "llrd_1_mult_0.1", "llrd_0.6"):
        one = recorded["optim"][name]
        args, official = dict(one["args"]), dict(one["group_lr"])
        solver = SolverConfig(
            max_steps=args["total_steps"], lr=args["lr"], backbone_factor=1.0, layer_decay=args["llrd"],
            schedule="poly_after_warmup", poly_power=args["poly_power"], warmup_factor=0.0,
            warmup_steps=args["warmup_steps"][0], backbone_warmup_steps=args["warmup_steps"][1],
            decay_query_blocks=args["llrd_l2_enabled"],
        )  # fmt: skip
        network = network_of(6, 3)
        optimizer = build_optimizer(network, solver)
        initial = {id(value): group["initial_lr"] for group in optimizer.param_groups for value in group["params"]}
        for parameter, value in network.named_parameters():
            theirs = official.get(f"network.encoder.{parameter}")
            if theirs is not None:
                assert math.isclose(initial[id(value)], theirs, rel_tol=1e-9), parameter
        for step, rates in dict(one["lr_at_step"]).items():
            set_learning_rate(optimizer, step, solver)
            current = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
            names = dict(network.named_parameters())
            ours = current[id(names["backbone.norm.weight"])], current[id(names["predictor.query_embed.weight"])]
            assert ours == pytest.approx((rates["first_backbone"], rates["last_group"]), rel=1e-9, abs=1e-15)
