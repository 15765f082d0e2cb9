"""The cases of the CPU's benchmarks, tiny: that both sides of them can be called, and agree."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cpu, cpu_criterion, cpu_matching, cpu_semantic, deployment, gpu_deploy, loader, network
from benchmarks.bounds import network_work
from benchmarks.harness import SHARED_VARIABLE, Sides
from maskformer_fast.config import AugmentConfig, BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.config import TestConfig as Testing
from maskformer_fast.ops.assignment import linear_sum_assignment_eager
from tests.support.tiny_bundle import tiny_bundle

SIZE = (64, 96)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SHARED_VARIABLE, str(tmp_path))
    return tmp_path


def compare(sides: Sides) -> tuple[Any, Any]:
    """The results of both sides, which agree."""
    results = sides.ours(), sides.peer()
    assert sides.check is not None
    sides.check(*results)
    return results


def test_real_cases_are_well_formed() -> None:
    todo = cpu.plan([path for name in cpu.SUBJECTS if (path := cpu.FOLDER / f"{name}.py").exists()])
    assert not todo.failures and {subject for subject, _ in todo.cases.values()} <= set(cpu.SUBJECTS)
    for subject, case in todo.cases.values():
        late = "training step swin" in case.name  # one of two goals of four minutes together
        assert case.goal is None or case.rank == 0 or late, "goals are measured first"
        assert case.bound is not None or subject != "operators" or case.goal is None, case.name
        assert " --" not in case.name, "it can be given on the command line"
    assert len(todo.batches) <= 24, "each starts a process"
    goals = {case.peer: case.goal for _, case in todo.cases.values() if case.name.startswith("training step")}
    assert goals == {"Hugging Face MaskFormer": 1.35}


@pytest.fixture(scope="module")
def tiny_network():
    """A small ResNet of both in the place of R50."""
    backbone = BackboneConfig("resnet50", stem_channels=16, bottleneck_channels=4, res2_channels=16)
    model = ModelConfig(
        num_classes=6, backbone=backbone, pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=16),
        decoder=DecoderConfig(layers=2, hidden_dim=32, num_heads=4, ffn_dim=32, num_queries=7),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(network, "ModelConfig", lambda **_: model)
        for cached in (network.networks, network.prepared, network.least_work):
            cached.cache_clear()
        yield
        for cached in (network.networks, network.prepared, network.least_work):
            cached.cache_clear()


def test_work_is_told_without_numbers(tiny_network: None) -> None:
    model = network.ModelConfig()
    parameters, operations = network_work(model, SIZE)
    assert parameters == sum(parameter.numel() for parameter in network.networks("resnet50")[0].parameters())
    parts = (network.bound("resnet50", part, "float32", SIZE).operations for part in network.PARTS)
    whole, *rest = parts
    assert operations == whole and 0.8 * sum(rest) < whole < sum(rest), "the folding spares a part"
    assert network_work(model, SIZE, training=True)[1] > 0


@pytest.mark.parametrize("part", network.PARTS)
def test_parts_of_the_network_agree(tiny_network: None, part: str) -> None:
    sides = network.setup("resnet50", part, "float32", False, SIZE)
    ours, theirs = compare(sides)
    low = network.setup("resnet50", part, "bfloat16", False, SIZE)
    rounded, _ = compare(low)
    pairs = list(zip(network.tensors(ours), network.tensors(rounded), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs), "it ran in bfloat16"
    shifted = [tensor + 0.02 * tensor.abs().max() for tensor in network.tensors(theirs)]
    with pytest.raises(RuntimeError, match="result 0: ours and the peer's differ by 0.0(19|2)"):
        sides.check(ours, shifted)
    bounds = [network.bound("resnet50", part, dtype, SIZE) for dtype in network.DTYPES]
    assert bounds[0].bytes == 2 * bounds[1].bytes > 0 and bounds[0].operations == bounds[1].operations
    assert [bound.rate for bound in bounds] == ["fp32", "bf16"]
    if part != "transformer decoder":
        large = network.bound("resnet50", part, "float32", (2 * SIZE[0], 2 * SIZE[1])).operations
        assert 3.4 * bounds[0].operations < large <= 4.01 * bounds[0].operations


def test_loader_gives_the_same_batches_packed_and_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SIZE", SIZE)
    monkeypatch.setattr(loader, "AUGMENT", AugmentConfig(short_edge=(48, 64), crop_size=(64, 64)))
    monkeypatch.setattr(loader, "BATCH", 2)
    ours, theirs = compare(loader.setup(1, 4))
    assert ours.targets.masks.dtype == torch.uint8 and theirs.targets.masks.dtype == torch.float32
    assert theirs.targets.masks.shape[2:] == (64, 64) and theirs.targets.masks.sum() > 0
    changed = theirs._replace(targets=theirs.targets._replace(masks=1 - theirs.targets.masks))
    with pytest.raises(RuntimeError, match="batches differ"):
        loader.check_batches(ours, changed)


def test_bundle_and_predictor_agree(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, predictor = tiny_bundle(folder / "tiny", Testing(short_edge=None))
    monkeypatch.setattr(deployment, "write_checkpoint", lambda path, model: path.write_text("stands in"))
    monkeypatch.setattr(deployment, "write_bundle", lambda path, place, *_: place.symlink_to(bundle.folder))
    monkeypatch.setattr("maskformer_fast.inference.load.load", lambda *_, **__: predictor)
    sides = deployment.setup(gpu_deploy.EAGER, size=SIZE)
    ours, theirs = compare(sides)
    assert ours[0].shape == theirs[0].shape == SIZE
    with pytest.raises(RuntimeError, match="0.999 of them equal at least, got 0.0000"):
        sides.check(ours, [theirs[0] + 1])


def test_criterion_and_the_official_formula_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUERIES", 9), ("DEPTH", 8), ("MASK_SIZE", (16, 16)), ("INPUT_SIZE", (64, 64))):
        monkeypatch.setattr(cpu_criterion, name, value)
    torch.manual_seed(0)
    sides = cpu_criterion.criterion(2, (3, 5))
    ours, theirs = compare(sides)
    with pytest.raises(RuntimeError, match="embeddings: ours and the peer's differ"):
        sides.check(ours, (*theirs[:2], 1.1 * theirs[2], theirs[3]))


def test_semantic_labels_are_compared() -> None:
    torch.manual_seed(0)
    sides = cpu_semantic.setup(cpu_semantic.peaky_logits, 19, (16, 16), cpu_semantic.OFFICIAL)
    ours, theirs = compare(sides)
    with pytest.raises(RuntimeError, match="disagree"):
        sides.check(ours, theirs.roll(1, 2))


def test_torch_linear_assignment_is_a_peer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, 12, 5)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, cpu_matching.TORCH_ASSIGNMENT.replace("-", "_"), None)
        with pytest.raises(ModuleNotFoundError):
            cpu_matching.beside_torch_assignment(shape)
    module = SimpleNamespace(batch_linear_assignment=lambda cost: linear_sum_assignment_eager(cost.mT.contiguous()))
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", module)
    sides = cpu_matching.beside_torch_assignment(shape)
    ours, theirs = compare(sides)
    assert theirs.shape == (3, 5)
    with pytest.raises(RuntimeError, match="differ in cost"):
        sides.check(ours, theirs.flip(1))
