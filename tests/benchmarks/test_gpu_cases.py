"""The cases of the GPU benchmarks, tiny and on the CPU: that their sides can be called, and compute one thing."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_harness,
    gpu_mask_loss,
    gpu_matching,
    gpu_report,
    gpu_resize,
    gpu_schedule,
    gpu_segments,
    gpu_semantic,
    gpu_train_step,
)
from benchmarks.gpu_harness import OURS
from tests.support.paths import ROOT


def setups():
    half, single, low, high = torch.float16, torch.float32, (16, 24), (64, 95)
    semantic = partial(gpu_semantic.labels_setup, batch=2, size=(12, 10))
    return {
        "semantic fp16": partial(semantic, classes=19, dtype=half),
        "semantic bf16 planes": partial(semantic, classes=7, dtype=torch.bfloat16, planes=True),
        "semantic fp32 peaky": partial(semantic, classes=300, dtype=single, peaky=True),
        "assignment": partial(gpu_matching.assignment_setup, kind="matcher-like", shape=(6, 20, 5)),
        "cost fp32": partial(gpu_matching.cost_setup, dtype=single, layers=2, batch=3, queries=9, slots=4, size=(16, 8),
                             depth=16),
        "cost fp16": partial(gpu_matching.cost_setup, dtype=half, layers=1, batch=2, queries=9, slots=4, size=(8, 16),
                             depth=8),
        "cost from logits": partial(gpu_matching.logits_cost_setup, layers=2, batch=3, queries=9, slots=4, size=(8, 8)),
        "mask loss fp32": partial(gpu_mask_loss.setup, dtype=single, layers=2, batch=3, slots=4, size=(16, 8),
                                  depth=16),
        "mask loss bf16": partial(gpu_mask_loss.setup, dtype=torch.bfloat16, layers=1, batch=2, slots=3, size=(8, 16),
                                  depth=8),
        "panoptic kept": partial(gpu_segments.kept_setup, low=low, high=high),
        "panoptic predictions": partial(gpu_segments.predictions_setup, low=low, high=high),
        "instances": partial(gpu_segments.instances_setup, low=low, high=high),
        "training step": partial(gpu_train_step.setup, name="resnet50", size=(64, 64), compiled=False, batch=1),
        "resize": partial(gpu_resize.setup, batch=2, frame=(54, 96), size=(33, 57)),
    }  # fmt: skip


@pytest.mark.parametrize("name", setups())
def test_sides_of_the_real_cases_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the compiler has nothing to show here
    work = setups()[name](torch.device("cpu"))
    inputs, other = work.draw(0), work.draw(1)
    pairs = list(zip(gpu_harness.tensors(inputs), gpu_harness.tensors(other), strict=True))
    assert pairs and any(not torch.equal(a, b) for a, b in pairs), "inputs are fresh"
    assert all(torch.equal(a, b) for a, b in zip(*map(gpu_harness.tensors, (inputs, work.draw(0))), strict=True))
    ours = work.sides[OURS](*inputs)
    for side, run in work.sides.items():
        if side == "torch-linear-assignment":
            continue
        result = run(*inputs)
        if work.agreement is not None:
            assert work.agreement(ours, result) >= work.least_agreement, side
            stranger = run(*other)
            assert work.agreement(ours, stranger) < 1, "agreement tells results apart"


@pytest.mark.no_cover
def test_fused_embeddings_by_the_interpreter() -> None:
    code = (
        "import torch\nfrom benchmarks import gpu_semantic\ngpu_semantic.QUERIES = 5\n"
        "work = gpu_semantic.embeddings_setup(torch.device('cpu'), 1, 4, (4, 4), 2, torch.float32, depth=16)\n"
        "inputs = work.draw(0)\nresults = [run(*inputs) for run in work.sides.values()]\n"
        "assert all(work.agreement(results[0], result) == 1 for result in results) and len(results) == 3\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment, check=True, timeout=200)


def test_real_cases_are_well_formed() -> None:
    todo = gpu_schedule.plan([ROOT / "benchmarks" / name for name in gpu.FILES])
    assert not todo.failures and len(todo.cases) > 30
    ranks = [todo.cases[name].rank for _, units in todo.batches for name, side in units if side == OURS]
    assert ranks == sorted(ranks), "what has goals comes first"
    assert len(todo.batches) <= 16, "each starts a process"
    text = {goal["text"] for row in gpu_report.build_rows(todo, {}, {}) for goal in row["goals"]}
    assert {"<= 45 µs", "<= 60 µs", ">= 60 % of the bound", ">= 20x Hugging Face", ">= 10x SciPy with the copies",
            "peak memory <= 1/10 of eager formula"} <= text  # fmt: skip
    for case in todo.cases.values():
        assert case.bound.bytes > 0
        late = case.name.startswith(("training step", "deploy"))  # they take longest
        assert case.rank == 0 or late or not any(peer.ratio for peer in case.peers), "goals are measured first"
