"""Trace of a few training steps (``--profile``)."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from maskformer_fast import train
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training.profiler import TRACED_STEPS, WARM_UP_STEPS, profile_steps
from maskformer_fast.training.trainer import Trainer
from tests.support.paths import TINY_RECIPE

RECIPE = TINY_RECIPE
PHASES = {"data", "forward", "criterion", "backward", "update"}


def test_a_profiled_run_writes_its_trace_and_ends_with_the_same_weights(tmp_path):
    steps = WARM_UP_STEPS + TRACED_STEPS + 1
    line = ["--config", str(RECIPE), "--solver.max-steps", str(steps), "--metrics", "semantic", "--output"]
    assert train.main([*line, str(tmp_path / "run"), "--profile"]) == 0
    trace = json.loads((tmp_path / "run" / "profile" / "trace_rank_0.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    for phase in PHASES:
        assert names.count(f"step: {phase}") == TRACED_STEPS, phase
    assert any("adamw" in event.get("name", "") for event in trace["traceEvents"])
    config = load_recipe(RECIPE)
    config = replace(config, output=str(tmp_path / "plain"), metrics=("semantic",),
                     solver=replace(config.solver, max_steps=steps))  # fmt: skip
    Trainer(config).run()
    profiled, plain = (load_weights(tmp_path / name).weights for name in ("run", "plain"))
    assert all(torch.equal(profiled[name], plain[name]) for name in plain)


def test_a_run_too_short_for_a_trace_logs_a_warning(tmp_path, caplog):
    with profile_steps(tmp_path / "profile", torch.device("cpu")) as end_profiled_step:
        for _ in range(WARM_UP_STEPS - 2):
            end_profiled_step()
    assert "no trace was written: it takes 8 steps" in caplog.text and not (tmp_path / "profile").exists()
