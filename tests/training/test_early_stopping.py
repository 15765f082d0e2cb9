"""Early stopping: patience in validations, the same across a resume."""

from __future__ import annotations

import pytest

from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.training.trainer import Trainer
from tests.training.test_trainer import tiny

SCORES = {1: 0.3, 2: 0.5, 3: 0.5, 4: 0.1, 5: 0.6, 6: 0.7}


def config(folder, patience, max_steps=6):
    return tiny(folder, solver={"early_stopping": patience, "max_steps": max_steps}, log={"validate_every": 1})


@pytest.fixture
def validations(monkeypatch):
    """Steps that were validated; the scores are those of `SCORES`."""
    steps = []

    def validate(self):
        steps.append(self.step)
        return {"step": self.step, "miou": SCORES[self.step]}

    monkeypatch.setattr(Trainer, "validate", validate)
    return steps


@pytest.mark.parametrize(("patience", "last"), [(0, 6), (1, 3), (2, 4), (3, 6)])
def test_a_run_ends_after_as_many_validations_without_a_better_score(tmp_path, validations, patience, last, caplog):
    with caplog.at_level("INFO"):
        trainer = Trainer(config(tmp_path, patience))
        metrics = trainer.run()
    assert validations == list(range(1, last + 1)) and metrics["step"] == trainer.step == last
    assert trainer.stopped_early == (last < 6) and not trainer.stopped
    assert ("stopped early" in caplog.text) == (last < 6)
    assert load_weights(tmp_path / "checkpoints/last").step == last


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_stops_at_the_same_step(tmp_path, validations, cut, monkeypatch):
    def interrupt(self, path, validate=Trainer._validate_checkpoint):
        metrics = validate(self, path)
        if self.step == cut:
            raise KeyboardInterrupt
        return metrics

    monkeypatch.setattr(Trainer, "_validate_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(tmp_path, 2)).run()
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "validate", lambda self: {"step": self.step, "miou": SCORES[self.step]})
    resumed = Trainer(config(tmp_path, 2), resume=True)
    assert resumed.step == cut
    resumed.run()
    assert resumed.step == 4 and resumed.stopped_early


def test_a_stopped_run_does_not_train_on_when_it_is_resumed_unless_the_patience_is_larger(tmp_path, validations):
    Trainer(config(tmp_path, 2)).run()
    again = Trainer(config(tmp_path, 2), resume=True)
    assert again.run()["step"] == again.step == 4
    longer = Trainer(config(tmp_path, 3), resume=True)
    longer.run()
    assert longer.step == 6 and not longer.stopped_early


def test_a_run_without_any_score_is_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "validate", lambda self: {"step": self.step, "miou": None})
    trainer = Trainer(config(tmp_path, 1))
    trainer.run()
    assert trainer.step == 6


def test_patience_without_validations_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"solver\.early_stopping: expected 0 without log\.validate_every, got 2"):
        tiny(tmp_path, solver={"early_stopping": 2})
