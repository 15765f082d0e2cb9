"""Runs of the tiny recipe: files, resuming, skipped steps, options."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskformer_fast.config import BackboneConfig
from maskformer_fast.data import build_dataset
from maskformer_fast.modeling.weights import CheckpointError, load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training.skipped_steps import TrainingDiverged
from maskformer_fast.training.train_step import TrainStep
from maskformer_fast.training.trainer import Trainer
from tests.support.paths import TINY_RECIPE

TINY = load_recipe(TINY_RECIPE)


def tiny(folder, **sections):
    """Tiny recipe in a folder, with some fields of its sections replaced."""
    changed = {name: replace(getattr(TINY, name), **fields) for name, fields in sections.items()}
    return replace(TINY, output=str(folder), **changed)


def weights(folder):
    return load_weights(Path(folder) / "checkpoints" / "last").weights


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_leaves_metrics_pictures_logs_and_checkpoints(tmp_path):
    metrics = Trainer(tiny(tmp_path, log={"tensorboard": True})).run()
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(metrics)) and saved["step"] == 6
    assert {"miou", "pq", "ap50", "semantic", "panoptic", "instance"} <= saved.keys()
    assert (tmp_path / "predictions.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    expected = {"loss_ce", "loss_mask", "loss_dice", "loss_ce_0", "lr", "grad_norm", "images_per_second", "data_share",
                "num_matched", "memory_gib", "eta_seconds", "skipped"}
    assert expected <= training[0].keys()
    assert load_weights(tmp_path).step == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, workers, monkeypatch):
    Trainer(tiny(tmp_path / "undisturbed", data={"workers": workers})).run()

    config = tiny(tmp_path / "cut", data={"workers": workers})
    trainer = Trainer(config)
    step = TrainStep.run

    def interrupt_at_five(self, *arguments):
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(TrainStep, "run", interrupt_at_five)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    monkeypatch.undo()
    torch.rand(7)  # a resumed process has another generator state
    resumed = Trainer(config, resume=True)
    assert resumed.step == 4
    resumed.run()
    assert_same_weights(weights(tmp_path / "undisturbed"), weights(tmp_path / "cut"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(5) == 1


def test_resuming_without_a_checkpoint_starts_over(tmp_path, caplog):
    trainer = Trainer(tiny(tmp_path), resume=True)
    assert trainer.step == 0 and "no checkpoint" in caplog.text
    assert not list(tmp_path.iterdir())  # building a trainer writes nothing


def test_a_finished_run_resumes_to_its_metrics(tmp_path):
    metrics = Trainer(tiny(tmp_path)).run()
    again = Trainer(tiny(tmp_path), resume=True).run()
    assert again["step"] == 6 and again["miou"] == metrics["miou"]


def test_a_failing_validation_loses_no_checkpoint_and_resuming_repeats_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "validate", lambda self: (_ for _ in ()).throw(MemoryError("validation")))
    with pytest.raises(MemoryError):
        Trainer(tiny(tmp_path)).run()
    monkeypatch.undo()
    assert load_weights(tmp_path / "checkpoints" / "last").step == 6
    assert not (tmp_path / "checkpoints" / "best").exists()
    assert Trainer(tiny(tmp_path), resume=True).run()["step"] == 6
    assert (tmp_path / "checkpoints" / "best").exists()


def test_the_best_checkpoint_is_kept_over_a_resume(tmp_path, monkeypatch):
    scores = {2: 0.5, 4: 0.9, 6: 0.7}
    monkeypatch.setattr(Trainer, "validate", lambda self: {"step": self.step, "miou": scores[self.step]})
    Trainer(tiny(tmp_path, solver={"max_steps": 4}, log={"validate_every": 2})).run()
    Trainer(tiny(tmp_path, log={"validate_every": 2}), resume=True).run()
    assert load_weights(tmp_path / "checkpoints" / "best").step == 4
    assert load_weights(tmp_path / "checkpoints" / "last").step == 6
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 2


def test_training_starts_from_a_checkpoint_with_a_new_classifier(tmp_path, caplog):
    first = Trainer(tiny(tmp_path / "first", solver={"max_steps": 1}))
    first.run()
    given = weights(tmp_path / "first")
    model = {"weights": str(tmp_path / "first")}
    same = Trainer(tiny(tmp_path / "same", model=model)).network.state_dict()
    counters = {name for name in given if name.endswith("num_batches_tracked")}
    assert_same_weights({name: same[name] for name in same if name not in counters},
                        {name: given[name] for name in given if name not in counters})
    assert counters and all(same[name] == 0 for name in counters)
    assert "other classes" not in caplog.text

    shapes = replace(TINY.data.shapes, num_things=3)
    frozen = replace(TINY.model.backbone, norm="frozen")
    with caplog.at_level("INFO"):
        other = Trainer(tiny(tmp_path / "other", data={"shapes": shapes}, model=model | {"backbone": frozen}))
    assert "kept: 2" in caplog.text and "moved: 2" in caplog.text and "new: 1" in caplog.text
    for name, tensor in other.network.state_dict().items():
        assert name.startswith("predictor.class_embed.") or torch.equal(tensor, given[name]), name

    with pytest.raises(CheckpointError, match=r"shape: predictor\.query_embed\.weight: expected \(9, 16\)"):
        Trainer(tiny(tmp_path / "misfit", model=model | {"decoder": replace(TINY.model.decoder, num_queries=9)}))


def test_a_resumed_run_needs_no_initial_weights(tmp_path):
    Trainer(tiny(tmp_path / "first", solver={"max_steps": 1})).run()
    model = {"weights": str(tmp_path / "first/checkpoints/last")}
    Trainer(tiny(tmp_path / "second", model=model, solver={"max_steps": 2})).run()
    (tmp_path / "first").rename(tmp_path / "gone")
    assert Trainer(tiny(tmp_path / "second", model=model), resume=True).step == 2


def test_seed_changes_the_weights(tmp_path):
    Trainer(tiny(tmp_path / "a", solver={"max_steps": 1})).run()
    Trainer(replace(tiny(tmp_path / "b", solver={"max_steps": 1}), seed=1)).run()
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert not torch.equal(a["predictor.class_embed.weight"], b["predictor.class_embed.weight"])


def make_non_finite(trainer, steps):
    """Make the costs and the BatchNorm statistics of the given steps NaN."""
    forward = trainer.train_step.forward

    def forward_with_nan(images, sizes):
        predictions = forward(images, sizes)
        if trainer.step in steps:
            for buffer in trainer.network.buffers():
                if buffer.is_floating_point():
                    buffer.data.fill_(float("nan"))
            return predictions._replace(mask_embeddings=predictions.mask_embeddings * float("nan"))
        return predictions

    trainer.train_step.forward = forward_with_nan


def test_a_non_finite_step_is_skipped_counted_and_named(tmp_path, caplog):
    trainer = Trainer(tiny(tmp_path))
    make_non_finite(trainer, {2, 4})
    trainer.run()
    assert trainer.skipped == 2 and trainer.train_step.skipped_in_a_row == 0
    assert "step 2 skipped" in caplog.text
    assert "decoder layer 0, image" in caplog.text and "decoder layer 1, image" in caplog.text
    for name, tensor in weights(tmp_path).items():
        assert torch.isfinite(tensor).all(), name


def test_a_skipped_step_leaves_weights_and_statistics_untouched(tmp_path):
    trainer = Trainer(tiny(tmp_path, solver={"max_steps": 1}))
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    make_non_finite(trainer, {0})
    trainer.run()
    assert_same_weights(
        {name: tensor for name, tensor in before.items() if tensor.is_floating_point()},
        {name: tensor for name, tensor in trainer.network.state_dict().items() if tensor.is_floating_point()},
    )


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    trainer = Trainer(tiny(tmp_path, loss={"max_nonfinite_steps": 3}))
    make_non_finite(trainer, {1, 2, 3, 4, 5})
    with pytest.raises(TrainingDiverged, match="3 steps in a row.*step 3"):
        trainer.run()
    assert trainer.step == 4 and trainer.skipped == 3


def test_fp16_gradients_that_stay_infinite_stop_the_run(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path, solver={"amp": "fp16", "max_steps": 60}, loss={"max_nonfinite_steps": 3}))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    weight = trainer.network.predictor.class_embed.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingDiverged, match="gradient norm nan"):
        trainer.run()


def test_the_log_stays_json_when_a_loss_is_not_finite(tmp_path):
    trainer = Trainer(tiny(tmp_path, solver={"max_steps": 2}))
    make_non_finite(trainer, {1})
    trainer.run()
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_validation_classes_must_be_those_of_training(tmp_path, monkeypatch):
    from maskformer_fast.training import trainer as module

    def build(config, split, trained):
        dataset = build_dataset(config, split, trained)
        if split == "val":
            names = dataset.metadata.class_names
            dataset.metadata = replace(dataset.metadata, class_names=(names[1], names[0], *names[2:]))
        return dataset

    monkeypatch.setattr(module, "build_dataset", build)
    with pytest.raises(ValueError, match="classes of training in their order"):
        Trainer(tiny(tmp_path))


@pytest.mark.parametrize(
    "sections",
    [
        {"solver": {"amp": "bf16", "max_steps": 2}},
        {"solver": {"amp": "fp16", "max_steps": 12}},
        {"solver": {"accumulate": 2, "max_steps": 2}},
        {"solver": {"channels_last": True, "max_steps": 2}},
        {"solver": {"schedule": "step", "milestones": (1,), "max_steps": 2}},
        {"loss": {"mask_loss": "bce", "deep_supervision": False}, "solver": {"max_steps": 2}},
        {"model": {"backbone": BackboneConfig("swin_micro", drop_path_rate=0.2)}, "solver": {"max_steps": 2}},
        {"model": {"backbone": BackboneConfig("resnet_micro", norm="sync")}, "solver": {"max_steps": 2}},
        {"model": {"backbone": BackboneConfig("resnet_micro", norm="frozen")}, "solver": {"max_steps": 2}},
    ],
    ids=["bf16", "fp16", "accumulate", "channels_last", "step_schedule", "bce", "swin", "sync_bn", "frozen_bn"],
)
def test_options_train_and_move_the_weights(tmp_path, sections):
    trainer = Trainer(tiny(tmp_path, **sections))
    before = trainer.network.predictor.class_embed.weight.detach().clone()
    metrics = trainer.run()
    assert metrics["step"] == trainer.config.solver.max_steps and trainer.skipped == 0
    assert not torch.equal(before, trainer.network.predictor.class_embed.weight)


@pytest.mark.parametrize("kind", ["per_pixel", "per_pixel_plus"])
def test_per_pixel_baselines_train_for_semantic_segmentation(tmp_path, kind):
    config = replace(tiny(tmp_path, model={"type": kind}, data={"task": "semantic"}), metrics=("semantic",))
    assert Trainer(config).run()["miou"] >= 0.0
    with pytest.raises(ValueError, match="task: expected one that a per_pixel"):
        Trainer(replace(config, metrics=("panoptic",)))


def test_training_reduces_the_loss(tmp_path):
    """Forty steps on one batch of scenes reduce the loss by a third."""
    config = tiny(
        tmp_path,
        data={"augment": replace(TINY.data.augment, scale_mode="none", crop_size=None, color_jitter=False),
              "shapes": replace(TINY.data.shapes, train_images=4)},
        solver={"max_steps": 40, "lr": 3e-3},
        log={"checkpoint_every": 100},
    )
    Trainer(config).run()
    losses = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0] * 2 / 3


def test_a_run_is_continued_with_a_warning_when_its_settings_changed(tmp_path, caplog):
    Trainer(tiny(tmp_path)).run()
    trainer = Trainer(tiny(tmp_path, solver={"max_steps": 8, "lr": 5e-4, "weight_decay": 0.3}), resume=True)
    assert "solver.lr: 0.001 -> 0.0005" in caplog.text
    groups = trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {5e-4, 5e-5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert trainer.run()["step"] == 8
