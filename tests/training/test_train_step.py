"""Training step: accumulation, and skipped steps that change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maskformer_fast.training.train_step import check_batch_norm
from maskformer_fast.training.trainer import Trainer
from tests.support.step_cases import SWIN, TINY, batches, config_of, spoil, step_of


def state(step):
    """Everything a step may change, by name."""
    tensors = dict(step.network.state_dict())
    for number, values in step.optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": value for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(before, after):
    assert before.keys() <= after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before.get(name, torch.zeros_like(tensor)), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "backbone", "loss"),
    [
        ("maskformer", None, {}),
        ("maskformer", SWIN, {"no_object_weight": 0.6, "padding": "include"}),
        ("per_pixel_plus", None, {}),
        ("mask2former", None, {"mask_loss": "bce", "points": 60}),
    ],
    ids=["resnet", "swin", "per_pixel_plus", "mask2former"],
)
def test_micro_batches_give_the_numbers_of_one_batch(parts, kind, backbone, loss):
    steps = [step_of(config_of(kind, backbone, loss, accumulate=number, lr=1e-4)) for number in (1, parts)]
    iterators = [batches(number) for number in (1, parts)]
    for _ in range(3):
        one, several = (step.run(iterator) for step, iterator in zip(steps, iterators, strict=True))
        assert list(one.scalars) == list(several.scalars) and one.updated and several.updated
        torch.testing.assert_close(several.scalars, one.scalars, rtol=1e-5, atol=1e-5)
    weights = [step.network.state_dict() for step in steps]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)
    start = step_of(config_of(kind, backbone, loss)).network.state_dict()
    moved = [(weights[0][name] - start[name]).abs().max() for name in start if start[name].is_floating_point()]
    assert max(moved) > 1e-4  # ten times the tolerance


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (32, 32), (33, 32), (32, 64), (31, 5)])
def test_batch_norm_of_one_value_is_refused_exactly_where_pytorch_cannot_compute_it(norm, images, height, width):
    def fails(work):
        try:
            work()
        except ValueError as error:
            return str(error)
        return ""

    config = config_of(backbone=replace(TINY.model.backbone, norm=norm))
    network = step_of(config).network.train()
    pytorch = fails(lambda: network(torch.zeros(images, 3, height, width, dtype=torch.uint8)))
    ours = fails(lambda: check_batch_norm(config, images, height, width))
    assert bool(pytorch) == bool(ours) == (norm == "batch" and images == 1 and height <= 32 and width <= 32)
    assert not ours or all(name in ours for name in ("solver.batch_size", "data.augment.crop_size", "backbone.norm"))


@pytest.mark.parametrize("crop", [(20, 32), None])
def test_a_run_whose_batches_give_batch_norm_one_value_is_refused(tmp_path, crop):
    augment = replace(TINY.data.augment, crop_size=crop, short_edge=(20,))
    config = replace(TINY, output=str(tmp_path), data=replace(TINY.data, augment=augment),
                     solver=replace(TINY.solver, batch_size=2, accumulate=2))
    with pytest.raises(ValueError, match=r"solver\.batch_size: .*one image of 32x32.*batch_size=2, accumulate=2"):
        Trainer(config).run()  # without a crop, at the first such image
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("where", ["cost", "cost of one image", "loss", "gradient"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_skipped_step_changes_no_weight_buffer_or_optimiser_state(where, first, caplog):
    step = step_of(config_of(backbone=TINY.model.backbone, accumulate=2))  # BatchNorm has statistics to spoil
    iterator = batches(2)
    for _ in range(first):
        assert step.run(iterator).updated
    before = state(step)
    undo = spoil(step, where)
    record = step.run(iterator)
    assert not record.updated and step.skipped == step.skipped_in_a_row == 1 and step.step == first + 1
    assert f"step {first} skipped" in caplog.text
    messages = {
        "cost": "decoder layer 1, image image4 (image4.jpg); and 2 more\n",  # an image without targets has no cost
        "cost of one image": ": non-finite matching cost in decoder layer 0, image image6 (image6.jpg)\n",
        "loss": "non-finite loss (loss_ce_0=inf) on images image4, image5, image6, image7",
        "gradient": "gradient norm",
    }
    assert messages[where] in caplog.text
    assert_same(before, state(step))
    undo()
    assert step.run(iterator).updated and step.skipped == 1 and step.skipped_in_a_row == 0


def test_a_run_whose_first_step_is_skipped_equals_one_that_starts_after_it():
    steps = [step_of(config_of()) for _ in range(2)]
    undo = spoil(steps[1], "loss")
    steps[1].run(batches(1, seed=5))
    undo()
    for step in steps:
        step.step = 1
        step.run(batches(1))
    assert_same(state(steps[0]), state(steps[1]))


def test_an_fp16_overflow_lowers_the_scale_and_counts_as_skipped_only_at_scale_one():
    step = step_of(config_of(amp="fp16"))
    iterator = batches(1)
    step.run(iterator)  # makes the scaler's tensors
    spoil(step, "gradient")
    before = state(step)
    step.scaler.update(4.0)
    scales = []
    for _ in range(4):
        record = step.run(iterator)
        scales.append((step.scaler.get_scale(), step.skipped))
        assert not record.updated
    assert scales == [(2.0, 0), (1.0, 0), (0.5, 1), (0.25, 2)]
    assert_same(before, state(step))


@pytest.mark.parametrize(("before", "after"), [("off", "fp16"), ("fp16", "off"), ("bf16", "fp16")])
def test_a_run_continues_in_another_precision(before, after):
    step, other = step_of(config_of(amp=before)), step_of(config_of(amp=after))
    step.run(batches(1))
    other.load_state_dict(step.state_dict())
    assert other.step == 1 and other.run(batches(1)).scalars


def test_an_interrupted_step_is_undone_unless_its_update_had_begun(monkeypatch):
    step = step_of(config_of(backbone=TINY.model.backbone, accumulate=2))
    iterator = batches(2)
    step.run(iterator)
    before = state(step)
    calls = []

    def fail_on_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return losses_of(*arguments)

    losses_of, step.criterion.forward = step.criterion.forward, fail_on_the_second
    with pytest.raises(MemoryError):
        step.run(iterator)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state(step).items())
    assert step.undo() and step.step == 1
    assert_same(before, state(step))
    assert all(parameter.grad is None for parameter in step.network.parameters())
    step.criterion.forward = losses_of
    step.run(iterator)
    assert step.undo() and step.step == 2
    monkeypatch.setattr(step.optimizer, "step", lambda: calls[99])
    with pytest.raises(IndexError):
        step.run(iterator)
    assert not step.undo()
