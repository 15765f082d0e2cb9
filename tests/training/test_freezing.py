"""Training with frozen parts: what changes, what autograd keeps, errors, checkpoints."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from maskformer_fast.config import BackboneConfig
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.training.checkpoints import load_state
from maskformer_fast.training.freezing import freeze, set_training
from maskformer_fast.training.train_step import TrainStep
from maskformer_fast.training.trainer import Trainer
from tests.support.step_cases import TINY, config_of
from tests.training.test_trainer import assert_same_weights, tiny


def network_of(backbone="resnet_micro"):
    torch.manual_seed(0)
    settings = replace(TINY.model.backbone, norm="batch") if backbone == "resnet_micro" else BackboneConfig(backbone)
    return build_model(config_of(backbone=settings).model)


@pytest.mark.parametrize("parts", [("backbone",), ("backbone.stem", "backbone.res2"), ("pixel_decoder", "predictor"),
                                   ("predictor.query_embed.weight",)])
def test_frozen_parts_stay_as_they_are_and_the_others_train(tmp_path, parts):
    decays = {"weight_decay": 0.5, "norm_weight_decay": 0.5}
    trainer = Trainer(tiny(tmp_path, solver={"freeze": parts, "ema_decay": 0.5, "max_steps": 2, **decays}))
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.run()
    changed = {name for name, value in trainer.network.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {name for name in before if any(name == part or name.startswith(f"{part}.") for part in parts)}
    assert frozen and not changed & frozen
    trained = {name for name, _ in trainer.network.named_parameters()} - frozen
    # A bias before BatchNorm and a key's bias in attention have a zero gradient; the others must have changed.
    assert len(trained - changed) < 0.2 * len(trained)
    assert all(torch.equal(trainer.average.weights[name], before[name]) for name in frozen)
    states = load_state(tmp_path / "checkpoints/last")["optimizer"]["state"]
    assert len(states) == len(trained)
    assert len([part for part in trainer.network.modules() if not part.training]) == sum(
        len(list(trainer.network.get_submodule(part).modules())) for part in parts if "weight" not in part)


@pytest.mark.parametrize("backbone", ["resnet_micro", "swin_micro"])
def test_a_frozen_backbone_runs_without_autograd(backbone):
    network = network_of(backbone)
    set_training(network, freeze(network, ["backbone"]))
    saved = []
    images = torch.rand(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        features = network.backbone(images)
    assert not saved and not any(feature.requires_grad for feature in features)
    assert torch.equal(features[3], network.eval().backbone(images)[3])  # no dropout, no statistics of the batch


def test_a_part_of_the_backbone_keeps_nothing_below_it():
    network = network_of()
    frozen = freeze(network, ["backbone.stem", "backbone.res2"])
    set_training(network, frozen)
    features = network.backbone(torch.rand(2, 3, 64, 64))
    assert [feature.requires_grad for feature in features] == [False, True, True, True]
    assert {type(module) for part in frozen for module in part.modules()} >= {nn.BatchNorm2d}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("backbone.res9", "expected parts of backbone, which are stem, res2, res3, res4, res5; got 'backbone.res9'"),
        ("bakbone", "expected parts of the network, which are backbone, pixel_decoder, predictor; got 'bakbone'"),
        ("", "expected parts of the network, which are backbone"),
        ("predictor.query_embed.bias", "expected parts of predictor.query_embed, which are weight; got"),
    ],
)
def test_an_unknown_part_is_named_with_those_there_are(part, message):
    with pytest.raises(ValueError, match="solver.freeze: " + message):
        freeze(network_of(), ["pixel_decoder", part])


def test_something_must_be_left_to_train():
    with pytest.raises(ValueError, match="leave something to train"):
        freeze(network_of(), ["backbone", "pixel_decoder", "predictor"])


def test_a_run_resumes_with_its_frozen_parts_alone(tmp_path, monkeypatch):
    solver = {"freeze": ("backbone",)}
    Trainer(tiny(tmp_path / "undisturbed", solver=solver)).run()
    Trainer(tiny(tmp_path / "cut", solver=solver | {"max_steps": 2})).run()
    with pytest.raises(ValueError, match=r"solver\.freeze: expected the \['backbone'\] of .*, got \[\]"):
        Trainer(tiny(tmp_path / "cut"), resume=True)
    # the schedule of the shorter run is another one until its end
    whole = tiny(tmp_path / "whole", solver=solver)
    trainer, run = Trainer(whole), TrainStep.run

    def interrupt_at_three(self, *arguments):
        if self.step == 3:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(TrainStep, "run", interrupt_at_three)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    monkeypatch.undo()
    Trainer(whole, resume=True).run()
    weights = [load_weights(tmp_path / name / "checkpoints/last").weights for name in ("undisturbed", "whole")]
    assert_same_weights(*weights)


def test_one_image_of_one_cell_is_no_problem_for_a_frozen_batch_norm(tmp_path):
    Trainer(tiny(tmp_path, solver={"freeze": ("backbone",), "batch_size": 1, "max_steps": 1})).run()
    with pytest.raises(ValueError, match="BatchNorm sees more than one value"):
        Trainer(tiny(tmp_path / "other", solver={"batch_size": 1}))


def test_a_frozen_backbone_compiles(tmp_path, monkeypatch):
    from functools import partial

    from maskformer_fast.modeling.compile import compile_single_graph

    monkeypatch.setattr("maskformer_fast.training.trainer.compile_single_graph",
                        partial(compile_single_graph, backend="eager"))
    results = []
    for compiled in (False, True):
        # without dropout, whose draws differ in compiled code
        model = {"decoder": replace(TINY.model.decoder, dropout=0.0)}
        config = tiny(tmp_path / str(compiled), model=model,
                      solver={"freeze": ("backbone",), "compile": compiled, "max_steps": 2})
        trainer = Trainer(config)
        trainer.run()
        results.append(trainer.network.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
