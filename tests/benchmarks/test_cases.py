"""The cases of the benchmarks: their lists on both devices, and at tiny sizes that the implementations agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.__main__ import MODULES
from benchmarks.cases import (
    assignment,
    convolution,
    criterion,
    deformable_attention,
    deployment,
    eomt,
    loader,
    mask2former,
    mask_loss,
    mask_product,
    matching_cost,
    network,
    points,
    resize,
    rle,
    segments,
    semantic,
    train_step,
    window_attention,
)
from benchmarks.harness.case import Case, Work
from benchmarks.harness.measure import tensors
from benchmarks.harness.runner import SHARED_VARIABLE, plan
from maskformer_fast.config import AugmentConfig, BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16
from maskformer_fast.ops.assignment import linear_sum_assignment_eager
from tests.support.paths import ROOT

CPU = torch.device("cpu")
HALF, SINGLE, LOW, HIGH, SIZE = torch.float16, torch.float32, (16, 24), (64, 95), (64, 96)
BACKBONE = BackboneConfig("resnet50", stem_channels=16, bottleneck_channels=4, res2_channels=16)
MODEL = ModelConfig(
    num_classes=6, backbone=BACKBONE, pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=16),
    decoder=DecoderConfig(layers=2, hidden_dim=32, num_heads=4, ffn_dim=32, num_queries=7),
)  # fmt: skip
MASK2FORMER = ModelConfig(
    type="mask2former", num_classes=6, backbone=BACKBONE,
    pixel_decoder=PixelDecoderConfig(
        conv_dim=32, mask_dim=32, encoder_layers=1, encoder_heads=4, encoder_ffn_dim=48, encoder_dropout=0.0
    ),
    decoder=DecoderConfig(layers=3, hidden_dim=32, num_heads=4, ffn_dim=48, num_queries=7, dropout=0.0),
)  # fmt: skip
EOMT = ModelConfig(
    type="eomt", num_classes=6, size_divisibility=16, decoder=DecoderConfig(layers=2, num_queries=7),
    backbone=BackboneConfig("vit_small_dinov2", embed_dim=32, blocks=3, heads=2, mlp_dim=128, image_size=(64, 64)),
)  # fmt: skip
SWIN = BackboneConfig("swin_tiny", depths=(1, 1, 1, 1), embed_dim=8, num_heads=(1, 2, 4, 8), drop_path_rate=0.0)
AUGMENT = AugmentConfig(short_edge=(48, 64), crop_size=(64, 64))
TINY_COST = {"layers": 2, "batch": 2, "queries": 9, "count": 4, "size": (16, 8)}
TINY: dict[str, Callable[[torch.device], Work]] = {
    "semantic": partial(semantic.setup, kind="peaky", classes=300, size=(12, 10), queries=130, batch=2),
    "semantic fp16": partial(semantic.setup, kind="random", classes=19, size=(12, 10), dtype=HALF, planes=False),
    "panoptic": partial(segments.predictions_setup, low=LOW, high=HIGH),
    "panoptic from logits": partial(segments.logits_setup, low=LOW, high=HIGH),
    "panoptic from kept queries": partial(segments.kept_setup, low=LOW, high=HIGH),
    "instances": partial(segments.instances_setup, low=LOW, high=HIGH),
    "rle": partial(rle.setup, low=LOW, high=HIGH),
    "assignment": partial(assignment.setup, kind="matcher-like", shape=(6, 20, 5)),
    "matching from logits": partial(matching_cost.matching_from_logits, **TINY_COST),
    "matching from embeddings": partial(matching_cost.matching_from_embeddings, **TINY_COST),
    "cost": partial(matching_cost.cost_setup, dtype=HALF, depth=16, **TINY_COST),
    "cost from logits": partial(matching_cost.logits_cost_setup, **TINY_COST),
    "mask loss": partial(mask_loss.setup, dtype=torch.bfloat16, layers=2, batch=3, count=4, size=(16, 8), depth=16),
    "cost at points": partial(points.setup, gradients=False, layers=2, count=4, size=(16, 8), depth=16, points=64),
    "loss at points": partial(points.setup, gradients=True, layers=2, count=4, size=(16, 8), depth=16, points=64),
    "mask product": partial(mask_product.masks_setup, wanted=25, size=16),
    "mask product, labels": partial(mask_product.labels_setup, size=64),
    "convolution": partial(convolution.setup, dtype=torch.bfloat16, channels=16, size=16),
    "window attention": partial(window_attention.setup, dtype=torch.bfloat16, side=9),
    "deformable attention": partial(deformable_attention.setup, dtype=SINGLE, gradients=False, levels=(LOW, (3, 2))),
    "deformable attention, gradients": partial(
        deformable_attention.setup, dtype=torch.bfloat16, gradients=True, levels=((4, 6), (1, 1)), batch=2
    ),
    "criterion": partial(criterion.setup, layers=2, counts=(3, 5), queries=9, depth=8, size=(16, 16)),
    **{part: partial(network.setup, model=MODEL, part=part, dtype="float32", size=SIZE) for part in network.PARTS},
    "network bfloat16": partial(network.setup, model=MODEL, part="network", dtype="bfloat16", size=SIZE),
    "training step": partial(train_step.setup, backbone="resnet50", batch=1, size=(64, 64)),
    "Mask2Former beside eager PyTorch": partial(
        mask2former.network_setup, model=MASK2FORMER, peer=mask2former.EAGER, size=SIZE
    ),
    "Mask2Former beside Hugging Face": partial(
        mask2former.network_setup, model=replace(MASK2FORMER, backbone=SWIN), peer=mask2former.HUGGINGFACE, size=SIZE
    ),
    "Mask2Former, training step": partial(
        mask2former.step_setup, model=replace(MASK2FORMER, backbone=SWIN), batch=1, size=(64, 64)
    ),
    "EoMT": partial(eomt.network_setup, model=EOMT, dtype=SINGLE, size=(64, 64)),
    "EoMT bfloat16": partial(eomt.network_setup, model=EOMT, dtype=torch.bfloat16, size=(64, 64)),
    "EoMT, training step": partial(eomt.step_setup, model=EOMT, batch=1),
    "resize": partial(resize.setup, batch=2, frame=(54, 96), size=(33, 57)),
    "loader": partial(loader.setup, workers=1, count=4, size=SIZE, augment=AUGMENT, batch=2),
    "loader, example": loader.example_setup,
    "loader, batch": loader.batch_setup,
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_VARIABLE, str(tmp_path))


def solve_columns(cost: torch.Tensor) -> torch.Tensor:
    """Assign a column to each row, as torch-linear-assignment does."""
    return linear_sum_assignment_eager(cost.mT.contiguous())


@pytest.mark.parametrize("name", TINY)
def test_implementations_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("network bfloat16", "EoMT bfloat16") and not convolves_bfloat16():
        pytest.skip("this processor has no bfloat16 products")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the compiler has nothing to show here
    module = SimpleNamespace(batch_linear_assignment=solve_columns)
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", module)  # may not be installed
    torch.manual_seed(0)
    work = TINY[name](CPU)
    inputs = work.draw(0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(inputs), tensors(work.draw(0)), strict=True))
    ours = work.ours(*inputs)
    for peer, run in work.peers.items():
        result = run(*inputs)
        if peer in work.least:
            assert work.agreement is not None and work.agreement(ours, result) >= work.least[peer], peer
            if any(True for _ in tensors(inputs)) and name != "panoptic from logits" and peer != assignment.SCIPY:
                assert work.agreement(ours, run(*work.draw(1))) < 1, "the agreement tells results apart"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_well_formed(device: str) -> None:
    todo = plan(MODULES, device)
    assert not todo.failures and len(todo.cases) > 80 and len(todo.batches) <= 60, "each batch starts a process"
    for subject, case in todo.cases.values():
        late = subject in ("train_step", "deployment", "mask2former", "eomt") or "training step" in case.name  # long
        assert case.goal is None or case.rank == 0 or late, "goals are measured first"
        assert case.goal is None or case.bound is not None


def test_recorded_rows_can_be_measured_again() -> None:
    """With the name, peer and goal that the records have."""
    cases: dict[str, Case] = {name: case for name, (_, case) in plan(MODULES, "cpu").cases.items()}
    for name in ("cpu", "cpu-train_step"):
        for row in json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]:
            case = cases[row["name"]]
            assert row["peer"] == case.peer
            assert row["threads"] in (case.threads, 1)  # processor time is that of one thread
            assert case.goal is None or row["goals"][0]["text"] == f">= {case.goal:g}x"


@pytest.mark.no_cover
def test_labels_of_embeddings_by_triton_interpreter() -> None:
    code = (
        "import torch\nfrom benchmarks.cases import semantic\n"
        "work = semantic.embeddings_setup(torch.device('cpu'), 1, 4, (4, 4), 2, torch.float32, queries=5, depth=16)\n"
        "inputs = work.draw(0)\nours = work.ours(*inputs)\n"
        "assert all(work.agreement(ours, run(*inputs)) == 1 for run in work.peers.values()) and len(work.peers) == 2\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment, check=True, timeout=200)


def test_work_is_counted_without_numbers() -> None:
    parameters, operations = network.network_work(MODEL, SIZE)
    assert parameters == sum(parameter.numel() for parameter in network.networks(MODEL)[0].parameters())
    complete, *parts = (network.bound(MODEL, part, "float32", SIZE).operations for part in network.PARTS)
    assert operations == complete and 0.8 * sum(parts) < complete < sum(parts), "the folding spares a part"
    low = network.bound(MODEL, "network", "bfloat16", SIZE)
    assert (2 * low.bytes, low.rate) == (network.bound(MODEL, "network", "float32", SIZE).bytes, "bf16")


def test_pytorch_and_hugging_face_agree_on_the_labels_of_one_checkpoint() -> None:
    work = deployment.setup(CPU, 2, (64, 64), MODEL)
    inputs = work.draw(0)
    labels = work.peers[deployment.FP32](*inputs)
    assert labels.shape == (2, 64, 64) and len(np.unique(labels)) > 2, "weights by chance give several classes"
    theirs = work.peers[deployment.HUGGINGFACE](*inputs)
    assert work.agreement is not None
    assert work.agreement(labels, theirs) >= work.least[deployment.HUGGINGFACE], "masks are resized in another order"
