"""A run of a Mask2Former: its log, exact resuming, and results of its predictor."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import maskformer_fast
from maskformer_fast.config import Config
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training.train_step import TrainStep
from maskformer_fast.training.trainer import Trainer
from tests.support.images import photo
from tests.support.paths import TINY_RECIPE


def config_of(output: Path) -> Config:
    config = load_recipe(TINY_RECIPE)
    encoder = {"encoder_layers": 1, "encoder_heads": 2, "encoder_ffn_dim": 32, "encoder_dropout": 0.0}
    return replace(
        config,
        output=str(output),
        model=replace(config.model, type="mask2former", pixel_decoder=replace(config.model.pixel_decoder, **encoder)),
        loss=replace(config.loss, mask_loss="bce", points=50),
        test=replace(config.test, panoptic_rule="mask2former"),
    )


def test_a_run_logs_every_layer_resumes_exactly_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Trainer(config_of(tmp_path / "run")).run()
    assert metrics["step"] == 6 and {"miou", "pq", "ap"} <= metrics.keys()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    # The learned queries are supervised before the two layers.
    assert {name for name in losses[0] if name.startswith("loss_mask")} == {"loss_mask_0", "loss_mask_1", "loss_mask"}
    final = load_weights(tmp_path / "run").weights

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
    assert final.keys() == again.keys()
    assert all(torch.equal(final[name], again[name]) for name in final)

    shutil.rmtree(tmp_path / "resumed")
    predictor = maskformer_fast.load(tmp_path / "run", device="cpu")
    assert predictor.tasks == ("semantic", "instance", "panoptic")
    image = photo()
    assert predictor.predict(image, "semantic").labels.shape == image.shape[:2]
    assert predictor.predict(image, "panoptic").id_map.shape == image.shape[:2]
    assert predictor.predict(image, "instance").size == image.shape[:2]
