"""A training step never makes the host wait for the device, and late reports of steps are read in order."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from maskformer_fast.config import BackboneConfig, LossConfig
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.skipped_steps import SkippedSteps, StepReport, TrainingDiverged
from tests.support.host_reads import NoHostRead
from tests.support.step_cases import CLASSES, SWIN, TINY, batches, config_of, spoil, step_of

# Late reports of steps


class FakeEvent:
    """CUDA event that happens when a test sets ``happened``."""

    def __init__(self):
        self.happened = False
        self.waited = False

    def query(self):
        return self.happened

    def synchronize(self):
        self.waited = not self.happened


def test_reports_are_read_in_order_once_they_have_arrived(monkeypatch, caplog):
    arrivals = []
    to_host = StepReport.to_host

    def to_host_late(self):
        arrivals.append(FakeEvent())
        return to_host(self)[0], arrivals[-1]

    monkeypatch.setattr(StepReport, "to_host", to_host_late)
    step = step_of(config_of(loss={"max_nonfinite_steps": 4}))
    iterator = batches(1)
    undo = spoil(step, "loss")
    step.run(iterator)
    step.run(iterator)
    arrivals[1].happened = True
    undo()
    step.run(iterator)
    assert not caplog.text and step.skipped == 0  # the first has not arrived, and nothing waits for it
    arrivals[0].happened = True
    step.run(iterator)
    assert "step 0 skipped" in caplog.text and "step 1 skipped" in caplog.text
    assert step.skipped == step.skipped_in_a_row == 2
    assert not any(arrival.waited for arrival in arrivals)
    step.settle()
    assert [arrival.waited for arrival in arrivals] == [False, False, True, True] and step.skipped_in_a_row == 0
    spoil(step, "loss")
    for _ in range(6):
        step.run(iterator)
    with pytest.raises(TrainingDiverged, match="4 steps in a row were not finite, the last at step 7"):
        step.settle()


def test_counters_survive_a_checkpoint():
    step = step_of(config_of())
    iterator = batches(1)
    spoil(step, "loss")
    step.run(iterator)
    again = step_of(config_of(loss={"max_nonfinite_steps": 2}))
    again.load_state_dict(step.state_dict())
    assert (again.step, again.skipped, again.skipped_in_a_row) == (1, 1, 1)
    spoil(again, "loss")
    with pytest.raises(TrainingDiverged, match="2 steps in a row"):
        again.run(iterator)


# Reads by the host

@contextmanager
def no_host_read(monkeypatch):
    """Let reads of a tensor's values fail, except in the reader of reports."""
    allowed = []
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"):
        original = getattr(torch.Tensor, name)

        def checked(self, *arguments, name=name, original=original):
            assert allowed, f"Tensor.{name} reads from the device"
            return original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, checked)
    read_report = SkippedSteps._read_report

    def read_allowed(self, pending):
        allowed.append(True)
        try:
            read_report(self, pending)
        finally:
            allowed.pop()

    monkeypatch.setattr(SkippedSteps, "_read_report", read_allowed)
    with NoHostRead():
        yield
    monkeypatch.undo()


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["maskformer", "per_pixel_plus", "swin"])
def test_the_host_reads_no_value_in_a_step(amp, kind, monkeypatch):
    backbone = replace(SWIN, drop_path_rate=0.2, checkpointing=True) if kind == "swin" else TINY.model.backbone
    config = config_of("maskformer" if kind == "swin" else kind, backbone, accumulate=2, amp=amp)
    step = step_of(config)
    step.run(batches(2))  # scaler and optimiser make their state
    step.scaler.update(8.0)
    taken = [next(iterator) for iterator in [batches(2)] for _ in range(4)]
    iterator = iter(taken)
    with no_host_read(monkeypatch):
        record = step.run(iterator)
        spoil(step, "loss")
        step.run(iterator)
    assert record.updated and step.skipped == 1


@pytest.mark.parametrize("read", [lambda t: float(t), lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: bool(t),
                                  lambda t: t.tolist()])  # fmt: skip
def test_the_check_notices_every_kind_of_host_read(read, monkeypatch):
    with pytest.raises(AssertionError, match=r"reads from the device|indexed by a mask"), no_host_read(monkeypatch):
        read(torch.ones(()) if read(torch.ones(1)) is not None else None)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize(
    "backbone",
    [BackboneConfig("resnet50", depths=(1, 1, 1, 1)), replace(SWIN, drop_path_rate=0.2, checkpointing=True)],
    ids=["resnet", "swin"],
)
def test_a_gpu_step_never_synchronises(amp, backbone):
    step = step_of(config_of(backbone=backbone, accumulate=2, amp=amp), "cuda")
    iterator = batches(2, pin=True)
    for _ in range(3):
        step.run(iterator)
    step.settle()
    skipped_before = step.skipped
    micro_batches = iter([next(iterator) for _ in range(12)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(6):
            undo = spoil(step, "loss") if number == 3 else lambda: None
            step.run(micro_batches)
            undo()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.settle()
    assert step.skipped == skipped_before + 1 and step.skipped_in_a_row == 0
    assert all(tensor.isfinite().all() for tensor in step.network.state_dict().values())


@pytest.mark.gpu
def test_the_criterion_replays_as_a_cuda_graph():
    config = config_of()
    step = step_of(config, "cuda")
    streams = [batches(1, seed) for seed in (1, 2)]
    examples = []
    for stream in streams:
        batch = next(stream)
        images, targets = batch.images.cuda(), batch.targets.to("cuda")
        with torch.no_grad():
            predictions = step.network(images, targets.valid_sizes, project=True, all_layers=True)
        examples.append((predictions, targets))
    criterion = Criterion(CLASSES, LossConfig()).cuda()

    def losses_and_gradients(leaves, predictions, targets):
        names = ("class_logits", "mask_embeddings", "pixel_features")
        losses = criterion(predictions._replace(**dict(zip(names, leaves, strict=True))), targets)
        return [losses.total.detach(), losses.nonfinite, *torch.autograd.grad(losses.total, leaves)]

    def leaves_of(predictions):
        return [tensor.clone().requires_grad_() for tensor in predictions[:3]]

    expected = [losses_and_gradients(leaves_of(p), p, t) for p, t in examples]
    predictions, targets = examples[0]
    leaves = leaves_of(predictions)
    fixed = targets._replace(**{name: getattr(targets, name).clone() for name in ("labels", "counts", "masks")})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            losses_and_gradients(leaves, predictions, fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = losses_and_gradients(leaves, predictions, fixed)
    for (example, truth), wanted in [*zip(examples, expected, strict=True)] * 2:
        with torch.no_grad():
            for leaf, value in zip(leaves, example[:3], strict=True):
                leaf.copy_(value)
        for name in ("labels", "counts", "masks"):
            getattr(fixed, name).copy_(getattr(truth, name))
        graph.replay()
        for got, value in zip(captured, wanted, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-8)
    assert not torch.equal(expected[0][0], expected[1][0])
