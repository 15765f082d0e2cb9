"""The training step: accumulation, skipped steps, and that the host asks the device for nothing."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskformer_fast.config import BackboneConfig, LossConfig
from maskformer_fast.criterion import Criterion
from maskformer_fast.data.loader import Batch
from maskformer_fast.modeling import build_model
from maskformer_fast.nonfinite import SkippedSteps, TrainingDiverged, Verdict
from maskformer_fast.pixel_criterion import PixelCriterion
from maskformer_fast.recipes import load_recipe
from maskformer_fast.solver import build_optimizer
from maskformer_fast.step import TrainStep
from maskformer_fast.structures import Targets, pack_masks

TINY = load_recipe(Path(__file__).parent / "tiny.yaml")
CLASSES = 4
SIZE = (40, 48)
COUNTS = [3, 0, 1, 11, 2, 5, 1, 0]  # of 8 queries: one image has more targets


def config_of(kind="maskformer", backbone=None, loss=None, **solver):
    """The tiny recipe for 8 images a step, without dropout, whose networks treat every image alone."""
    model = replace(
        TINY.model,
        type=kind,
        num_classes=CLASSES,
        backbone=backbone or replace(TINY.model.backbone, norm="frozen"),
        decoder=replace(TINY.model.decoder, dropout=0.0),
    )
    fields = {"batch_size": 8, "warmup_steps": 0, "clip_norm": 0.01} | solver
    return replace(TINY, model=model, solver=replace(TINY.solver, **fields), loss=replace(TINY.loss, **(loss or {})))


def step_of(config, device="cpu"):
    torch.manual_seed(3)
    network = build_model(config.model).to(device).train()
    criterion = (Criterion if config.model.type == "maskformer" else PixelCriterion)(CLASSES, config.loss).to(device)
    return TrainStep(network, criterion, build_optimizer(network, config.solver), config, torch.device(device))


def batches(parts, seed=0, pin=False):
    """The same images again and again, 8 a step, cut into ``parts`` micro-batches with as many slots as each needs."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.tensor(COUNTS)
    while True:
        images = torch.randint(256, (8, 3, *SIZE), generator=rng, dtype=torch.uint8)
        present = torch.arange(max(COUNTS)) < counts[:, None]
        masks = pack_masks((torch.rand(8, max(COUNTS), *SIZE, generator=rng) < 0.3) & present[..., None, None])
        labels = torch.randint(CLASSES, present.shape, generator=rng) * present
        valid = torch.tensor([[SIZE[0] - 3 * b, SIZE[1]] for b in range(8)])
        for part in torch.arange(8).chunk(parts):
            slots = max(1, int(counts[part].max()))
            targets = Targets(labels[part, :slots], counts[part], masks[part, :slots].contiguous(), valid[part], SIZE)
            tensors = [images[part], *targets[:4]]
            moved = [tensor.pin_memory() for tensor in tensors] if pin else tensors
            names = [f"image{number}" for number in part.tolist()]
            yield Batch(moved[0], Targets(*moved[1:], SIZE), names, [f"{name}.jpg" for name in names], [])


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


SWIN = BackboneConfig("swin_micro")


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "backbone", "loss"),
    [
        ("maskformer", None, {}),
        ("maskformer", SWIN, {"no_object_weight": 0.6, "padding": "include"}),
        ("per_pixel_plus", None, {}),
    ],
    ids=["resnet", "swin", "per_pixel_plus"],
)
def test_micro_batches_give_the_numbers_of_one_batch(parts, kind, backbone, loss):
    steps = [step_of(config_of(kind, backbone, loss, accumulate=number, lr=1e-4)) for number in (1, parts)]
    iterators = [batches(number) for number in (1, parts)]
    for _ in range(3):
        one, several = (step.run(iterator) for step, iterator in zip(steps, iterators, strict=True))
        assert one.names == several.names and one.updated and several.updated
        torch.testing.assert_close(several.values, one.values, rtol=1e-5, atol=1e-5)
    weights = [step.network.state_dict() for step in steps]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)
    start = step_of(config_of(kind, backbone, loss)).network.state_dict()
    moved = [(weights[0][name] - start[name]).abs().max() for name in start if start[name].is_floating_point()]
    assert max(moved) > 1e-4  # ten times the tolerance


def spoil(step, where):
    """Make the next run non-finite in one place; gives back what undoes it."""
    forward, losses_of, calls = step.forward, step.criterion.forward, []
    if where == "cost":
        def spoiled(images, sizes):
            for buffer in step.network.buffers():
                buffer.data.copy_(torch.full_like(buffer, 7) if not buffer.is_floating_point() else buffer * torch.nan)
            predictions = forward(images, sizes)
            return predictions._replace(mask_embeddings=predictions.mask_embeddings * torch.nan)
        step.forward = spoiled
    elif where == "cost of one image":  # nothing is matched with it, so the losses stay finite
        def spoiled(images, sizes):
            predictions = forward(images, sizes)
            embeddings = predictions.mask_embeddings.clone()
            calls.append(1)
            if len(calls) == 2:
                embeddings[0, -2, 0] = torch.nan
            return predictions._replace(mask_embeddings=embeddings.detach())
        step.forward = spoiled
    elif where == "loss":
        def spoiled(*arguments):
            losses = losses_of(*arguments)
            bad = {next(iter(losses.terms)): losses.total * torch.inf}
            return losses._replace(total=losses.total * torch.inf, terms=losses.terms | bad)
        step.criterion.forward = spoiled
    else:
        weight = step.network.get_parameter("predictor.class_embed.weight")
        handle = weight.register_hook(lambda gradient: gradient * torch.inf)
        return handle.remove

    def undo():
        step.forward, step.criterion.forward = forward, losses_of

    return undo


@pytest.mark.parametrize("where", ["cost", "cost of one image", "loss", "gradient"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_skipped_step_changes_nothing_at_all(where, first, caplog):
    step = step_of(config_of(backbone=TINY.model.backbone, accumulate=2))  # BatchNorm has statistics to spoil
    iterator = batches(2)
    for _ in range(first):
        assert step.run(iterator).updated
    before = state(step)
    undo = spoil(step, where)
    record = step.run(iterator)
    assert not record.updated and step.skipped == step.skipped_in_a_row == 1 and step.step == first + 1
    assert f"step {first} skipped" in caplog.text
    said = {
        "cost": "decoder layer 1, image image5 (image5.jpg)",
        "cost of one image": ": non-finite matching cost in decoder layer 0, image image6 (image6.jpg)\n",
        "loss": "non-finite loss (loss_ce_0=inf) on images image4, image5, image6, image7",
        "gradient": "gradient norm",
    }
    assert said[where] in caplog.text
    assert_same(before, state(step))
    undo()
    assert step.run(iterator).updated and step.skipped == 1 and step.skipped_in_a_row == 0


def test_a_skipped_first_step_is_as_if_it_had_not_been():
    steps = [step_of(config_of()) for _ in range(2)]
    undo = spoil(steps[1], "loss")
    steps[1].run(batches(1, seed=5))
    undo()
    for step in steps:
        step.step = 1
        step.run(batches(1))
    assert_same(state(steps[0]), state(steps[1]))


def test_fp16_overflow_lowers_the_scale_and_counts_only_at_scale_one():
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


def test_an_interrupted_step_is_undone_unless_the_update_had_begun(monkeypatch):
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


# Late reports


class Arrival:
    """An event that has not happened until ``here``."""

    def __init__(self):
        self.here = False
        self.waited = False

    def query(self):
        return self.here

    def synchronize(self):
        self.waited = not self.here


def test_reports_are_read_in_order_once_they_have_arrived(monkeypatch, caplog):
    arrivals = []
    send = Verdict.send

    def send_late(self):
        arrivals.append(Arrival())
        return send(self)[0], arrivals[-1]

    monkeypatch.setattr(Verdict, "send", send_late)
    step = step_of(config_of(loss={"max_nonfinite_steps": 4}))
    iterator = batches(1)
    undo = spoil(step, "loss")
    step.run(iterator)
    step.run(iterator)
    arrivals[1].here = True
    undo()
    step.run(iterator)
    assert not caplog.text and step.skipped == 0  # the first has not arrived, and nothing waits for it
    arrivals[0].here = True
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


# No host read

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique2", "_unique2",
         "repeat_interleave.Tensor", "allclose", "bincount"}  # fmt: skip


class NoHostRead(TorchDispatchMode):
    """Fails on what would make the host wait for a device: numbers read, and shapes that depend on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, _, overload = func.name().removeprefix("aten::").partition(".")
        assert packet not in READS and f"{packet}.{overload}" not in READS, f"{func.name()} reads from the device"
        if packet in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), "indexed by a mask"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_read(monkeypatch):
    """Inside, reading a tensor's values fails, but in the reader of reports."""
    allowed = []
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"):
        original = getattr(torch.Tensor, name)

        def checked(self, *arguments, name=name, original=original):
            assert allowed, f"Tensor.{name} reads from the device"
            return original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, checked)
    judge = SkippedSteps._judge

    def judge_allowed(self, report):
        allowed.append(True)
        try:
            judge(self, report)
        finally:
            allowed.pop()

    monkeypatch.setattr(SkippedSteps, "_judge", judge_allowed)
    with NoHostRead():
        yield
    monkeypatch.undo()


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["maskformer", "per_pixel_plus", "swin"])
def test_the_host_reads_nothing_in_a_step(amp, kind, monkeypatch):
    backbone = replace(SWIN, drop_path_rate=0.2) if kind == "swin" else TINY.model.backbone
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
def test_a_host_read_is_noticed(read, monkeypatch):
    with pytest.raises(AssertionError, match=r"reads from the device|indexed by a mask"), no_host_read(monkeypatch):
        read(torch.ones(()) if read(torch.ones(1)) is not None else None)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_gpu_step_never_synchronises(amp):
    backbone = BackboneConfig("resnet50", depths=(1, 1, 1, 1))
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
