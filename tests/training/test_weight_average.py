"""Moving average of the weights: against PyTorch's own, skipped steps, checkpoints, exact resume, validation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import maskformer_fast
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.training.checkpoints import RAW_NAME, check_undamaged
from maskformer_fast.training.train_step import TrainStep
from maskformer_fast.training.trainer import Trainer
from maskformer_fast.training.weight_average import WeightAverage
from tests.support.step_cases import TINY, batches, config_of, spoil, step_of
from tests.training.test_trainer import assert_same_weights, tiny


def averaging_step(decay=0.9, **solver):
    """A step with an average, of a network with trained BatchNorm."""
    config = config_of(backbone=replace(TINY.model.backbone, norm="batch"), lr=1e-2, **solver)
    step = step_of(config)
    step.average = WeightAverage(step.network, decay)
    return step


def test_the_average_is_that_of_pytorch():
    step = averaging_step(decay=0.3)
    reference = AveragedModel(step.network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    reference.n_averaged += 1  # the initial weights are the first average here
    data = batches(1)
    for number in range(5):
        step.run(data)
        decay = min(0.3, (1 + number) / (10 + number))
        reference.multi_avg_fn = get_ema_multi_avg_fn(decay)
        reference.update_parameters(step.network)
    expected = reference.module.state_dict()
    assert step.average.weights.keys() == expected.keys()
    current = step.network.state_dict()
    statistics = [name for name in expected if name.endswith("running_var")]
    assert statistics
    for name, value in expected.items():
        if not value.is_floating_point():  # PyTorch truncates an average of counters; here they are copied
            value = current[name]
        torch.testing.assert_close(step.average.weights[name], value, rtol=1e-6, atol=1e-7, msg=name)
    for name in (*statistics, "predictor.class_embed.weight"):
        assert not torch.equal(step.average.weights[name], current[name])


def test_the_decay_rises_to_the_configured_one():
    average = WeightAverage(torch.nn.Linear(2, 2), 0.999)
    decays = [average.decay_at(step) for step in (0, 1, 90, 8_980, 10**6)]
    assert decays == [0.1, 2 / 11, 0.91, pytest.approx(8981 / 8990), 0.999]


@pytest.mark.parametrize("where", ["cost", "loss", "gradient"])
def test_a_skipped_step_leaves_the_average_alone(where):
    step = averaging_step()
    data = batches(1)
    step.run(data)
    before = copy.deepcopy(step.average.weights)
    undo = spoil(step, where)
    step.run(data)
    undo()
    assert step.skipped == 1
    assert_same_weights(step.average.weights, before)
    step.run(data)
    assert not torch.equal(step.average.weights["predictor.class_embed.weight"], before["predictor.class_embed.weight"])


def test_applying_the_average_exchanges_and_restores_all_tensors():
    step = averaging_step()
    step.run(batches(1))
    network, average = copy.deepcopy(step.network.state_dict()), copy.deepcopy(step.average.weights)
    with pytest.raises(KeyboardInterrupt), step.average.applied():
        assert_same_weights(step.network.state_dict(), average)
        raise KeyboardInterrupt
    assert_same_weights(step.network.state_dict(), network)
    assert_same_weights(step.average.weights, average)


def test_the_average_changes_no_trained_weight(tmp_path):
    Trainer(tiny(tmp_path / "plain")).run()
    Trainer(tiny(tmp_path / "averaged", solver={"ema_decay": 0.9})).run()
    plain = load_weights(tmp_path / "plain").weights
    raw = load_weights(tmp_path / "averaged/checkpoints/last" / RAW_NAME).weights
    assert_same_weights(raw, plain)
    assert not torch.equal(load_weights(tmp_path / "averaged").weights["predictor.class_embed.weight"],
                           plain["predictor.class_embed.weight"])


def test_an_interrupted_run_ends_with_the_same_average(tmp_path, monkeypatch):
    Trainer(tiny(tmp_path / "undisturbed", solver={"ema_decay": 0.8})).run()
    config = tiny(tmp_path / "cut", solver={"ema_decay": 0.8})
    trainer = Trainer(config)
    run = TrainStep.run

    def interrupt_at_five(self, *arguments):
        if self.step == 5:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(TrainStep, "run", interrupt_at_five)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    monkeypatch.undo()
    resumed = Trainer(config, resume=True)
    assert resumed.step == 4
    resumed.run()
    for name in ("model.safetensors", RAW_NAME):
        last = [load_weights(tmp_path / run / "checkpoints/last" / name).weights for run in ("undisturbed", "cut")]
        assert_same_weights(*last)


def test_validation_and_load_take_the_average_and_a_path_the_raw_weights(tmp_path, monkeypatch):
    seen = {}
    trainer = Trainer(tiny(tmp_path, solver={"ema_decay": 0.9, "max_steps": 2}))
    monkeypatch.setattr("maskformer_fast.training.trainer.measure", lambda predictor, *_, **__: (
        seen.update(copy.deepcopy(predictor.network.state_dict())) or {"miou": 0.5}, None))
    trainer.run()
    saved = load_weights(tmp_path).weights
    assert_same_weights(seen, saved)
    raw_file = tmp_path / "checkpoints/last" / RAW_NAME
    raw = load_weights(raw_file).weights
    assert_same_weights(trainer.network.state_dict(), raw)
    check_undamaged(raw_file.parent)
    from maskformer_fast.inference.load import load_network

    for path, expected in ((tmp_path, saved), (raw_file, raw)):
        assert_same_weights(load_network(path, "cpu").network.state_dict(), expected)
        maskformer_fast.load(path, "cpu")


def test_a_damaged_raw_file_damages_the_checkpoint(tmp_path):
    config = tiny(tmp_path, solver={"ema_decay": 0.9})
    Trainer(config).run()
    file = tmp_path / "checkpoints/last" / RAW_NAME
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert Trainer(config, resume=True).step == 4
    file.unlink()
    assert Trainer(config, resume=True).step == 4


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_run_continues_when_the_average_is_switched(tmp_path, decay):
    before = tiny(tmp_path, solver={"ema_decay": 0.9 - decay, "max_steps": 4})
    first = Trainer(before)
    first.run()
    resumed = Trainer(tiny(tmp_path, solver={"ema_decay": decay}), resume=True)
    assert_same_weights(resumed.network.state_dict(), first.network.state_dict())
    resumed.run()
    assert (tmp_path / "checkpoints/last" / RAW_NAME).exists() == bool(decay)
