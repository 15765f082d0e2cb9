"""``--profile``."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from maskformer_fast import train
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training.profiler import TRACED, WARM_UP, step_trace
from maskformer_fast.training.trainer import Trainer
from tests.support.paths import TINY_RECIPE

RECIPE = TINY_RECIPE
PHASES = {"data", "forward", "criterion", "backward", "update"}


def test_a_profiled_run_writes_its_trace_and_ends_with_the_same_weights(tmp_path):
    steps = WARM_UP + TRACED + 1
    line = ["--config", str(RECIPE), "--solver.max-steps", str(steps), "--metrics", "semantic", "--output"]
    assert train.main([*line, str(tmp_path / "run"), "--profile"]) == 0
    trace = json.loads((tmp_path / "run" / "profile" / "trace_rank_0.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    for phase in PHASES:
        assert names.count(f"step: {phase}") == TRACED, phase
    assert any("adamw" in event.get("name", "") for event in trace["traceEvents"])
    config = load_recipe(RECIPE)
    config = replace(config, output=str(tmp_path / "plain"), metrics=("semantic",),
                     solver=replace(config.solver, max_steps=steps))  # fmt: skip
    Trainer(config).run()
    profiled, plain = (load_weights(tmp_path / name).weights for name in ("run", "plain"))
    assert all(torch.equal(profiled[name], plain[name]) for name in plain)


def test_a_run_that_is_too_short_to_trace_says_so(tmp_path, caplog):
    with step_trace(tmp_path / "profile", torch.device("cpu")) as traced:
        for _ in range(WARM_UP - 2):
            traced()
    assert "no trace was written: it takes 8 steps" in caplog.text and not (tmp_path / "profile").exists()
