"""The GPU benchmark of deployment on the CPU: what the sides compute, goals for shares, patience for builds."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_deploy, gpu_harness, gpu_report, gpu_schedule
from benchmarks.gpu_harness import OURS, Bound, Case, Peer
from maskformer_fast.cli import parse
from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig, TestConfig
from maskformer_fast.export import ExportOptions
from tests.support.tiny_bundle import tiny_bundle

CPU = torch.device("cpu")
SIZE = (64, 96)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A tiny network's bundle and predictor in the place of R50's; the compiler has nothing to show here."""
    test = TestConfig(short_edge=None)
    bundle, predictor = tiny_bundle(tmp_path / "bundle", test)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("load", "load_network"):
        monkeypatch.setattr(f"maskformer_fast.inference.load.{name}", lambda *_, **options: predictor)
    monkeypatch.setattr(gpu_deploy, "checkpoint", lambda model: tmp_path)
    monkeypatch.setattr(gpu_deploy, "write_bundle", lambda path, folder, *_: folder.symlink_to(bundle.folder))
    monkeypatch.setattr(gpu_deploy, "temporary_folder", lambda: type("Folder", (), {"name": str(tmp_path)}))
    for cached in (gpu_deploy.bundle, gpu_deploy.in_pytorch):
        cached.cache_clear()


def test_sides_give_the_same_labels(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    work = gpu_deploy.setup(CPU, 2, SIZE)
    inputs, other = work.draw(0), work.draw(1)
    assert inputs[0].shape == (2, *SIZE, 3) and inputs[0].dtype == torch.uint8
    assert torch.equal(inputs[0], work.draw(0)[0]) and not torch.equal(inputs[0], other[0])
    ours = work.sides[OURS](*inputs)
    assert ours.shape == (2, *SIZE) and len(np.unique(ours)) > 1
    for side in (gpu_deploy.EAGER, gpu_deploy.COMPILED, gpu_deploy.FP32):
        np.testing.assert_array_equal(work.sides[side](*inputs), ours, err_msg=side)
    assert work.shares is not None
    shares = work.shares(*inputs)
    assert list(shares) == ["preprocess", "network", "postprocess"] and 0.9 < sum(shares.values()) <= 1.01
    precise = gpu_deploy.precision_setup(CPU, 2, SIZE)
    assert precise.agreement is not None and precise.least_agreement == 0.95
    reference = precise.sides[gpu_deploy.FP32](*inputs)
    assert precise.agreement(ours, reference) == 1 > precise.agreement(work.sides[OURS](*other), reference)
    monkeypatch.setenv(gpu_deploy.VARIABLE, "trained")
    assert gpu_deploy.precision_setup(CPU, 2, SIZE).least_agreement == 0.995


def test_hugging_face_has_the_weights_of_the_checkpoint() -> None:
    backbone = BackboneConfig("resnet50", stem_channels=16, bottleneck_channels=4, res2_channels=16)
    model = ModelConfig(
        num_classes=6, backbone=backbone, pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=16),
        decoder=DecoderConfig(layers=1, hidden_dim=32, num_heads=4, ffn_dim=32, num_queries=7),
    )  # fmt: skip
    work = gpu_deploy.setup(CPU, 2, (64, 64), model)
    (frames,) = work.draw(0)
    theirs = work.sides[gpu_deploy.HUGGING_FACE](frames)
    assert theirs.shape == (2, 64, 64)
    labels = work.sides[gpu_deploy.FP32](frames)
    assert len(np.unique(labels)) > 2, "weights by chance give several classes"
    assert np.mean(theirs == labels) > 0.8, "masks are resized in another order, no more"


def test_tensorrt_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"tensorrt_rtx"}
    monkeypatch.setattr(gpu_deploy.importlib.util, "find_spec", lambda name: name if name in found else None)
    assert gpu_deploy.tensorrt_api() == "tensorrt_rtx"
    found.add("tensorrt")
    assert gpu_deploy.tensorrt_api() == "tensorrt"
    found.clear()
    with pytest.raises(ModuleNotFoundError, match="'tensorrt' or 'tensorrt_rtx'"):
        gpu_deploy.tensorrt_api()


def test_the_bundle_is_exported_as_a_user_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_deploy, "tensorrt_api", lambda: "tensorrt_rtx")
    for target in (None, "sm_90"):
        arguments = gpu_deploy.export_arguments(tmp_path / "model", tmp_path / "bundle", "8x512x512", target)
        options = parse(ExportOptions, arguments, prog="export")
        assert options.with_engine == (target is not None) and options.flavours == ("raw",)
        if target is not None:
            assert options.target == (target,) and options.frames == ("8x512x512",) and options.tasks == ("semantic",)
            engine = options.engine
            assert (engine.precision, engine.api) == ("fp16", "tensorrt_rtx")
            assert engine.min_shape == engine.opt_shape == engine.max_shape == (8, 512, 512)


def test_what_is_missing_costs_our_unit_alone(stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bundle(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'tensorrt' or 'tensorrt_rtx'")

    monkeypatch.setattr(gpu_deploy, "write_bundle", write_bundle)
    case = Case("deploy", partial(gpu_deploy.setup, batch=1, size=SIZE),
                (Peer(gpu_deploy.EAGER, 6.0, graph=False),), Bound(1.0), graph=False)  # fmt: skip
    out = (tmp_path / "out").open("w+")
    monkeypatch.setattr(gpu_harness, "load_cases", lambda path: [case])
    worker = gpu_harness.Worker(tmp_path, "cpu", out)
    assert worker.run([("deploy", OURS), ("deploy", gpu_deploy.EAGER)]) == 0
    text = (tmp_path / "out").read_text()
    assert text.count("absent") == 1 and text.count('"timed"') == 1


@pytest.mark.parametrize(("share", "reached"), [(0.05, True), (0.2, False), (None, None)])
def test_goal_for_a_share(share: float | None, reached: bool | None, tmp_path: Path) -> None:
    case = Case("deploy", lambda device: gpu_harness.Work(lambda seed: (), {}), (), Bound(1.0),
                max_shares={"postprocess": 0.1})  # fmt: skip
    ours = {"call": {"ms": 2.0}} | ({} if share is None else {"shares": {"postprocess": share}})
    todo = gpu_schedule.Plan({"deploy": case}, [], {})
    rows = gpu_report.build_rows(todo, {("deploy", OURS): ours}, {})
    (goal,) = rows[0]["goals"]
    assert goal["text"] == "postprocess <= 10 % of a call" and goal["reached"] is reached
    page = gpu_report.markdown({"machine": {}, "tests": None, "rows": rows})
    assert share is None or f"postprocess {100 * share:.1f} %" in page


CASES = """
from benchmarks.gpu_harness import Bound, Case, Peer

def cases():
    return [Case(name, None, (), Bound(1.0), patience=patience) for name, patience in (("slow", 20.0), ("hangs", 0.0))]
"""
WORKER = """
import json, sys, time
for unit in json.load(sys.stdin):
    print(json.dumps({"unit": unit, "stage": "begun", "result": {}}), flush=True)
    time.sleep(2.0 if unit[0] == "slow" else 1000)
    print(json.dumps({"unit": unit, "stage": "done", "result": {"call": {"ms": 1.0}}}), flush=True)
"""


def test_patience_is_for_its_own_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cases.py").write_text(CASES)
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu_schedule, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    monkeypatch.setattr(gpu_schedule, "UNIT_SECONDS", 1.5)
    todo = gpu_schedule.plan([tmp_path / "cases.py"])
    results = gpu_schedule.run(todo, "cpu", time.monotonic() + 100, lambda found: None)
    assert results["slow", OURS] == {"call": {"ms": 1.0}}
    assert results["hangs", OURS]["error"] == "not done after 1.5 s"
