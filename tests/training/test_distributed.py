"""Two processes on the CPU (gloo) against one: training, evaluation, checkpoints, restarts by torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from maskformer_fast import distributed
from maskformer_fast.config import SolverConfig
from maskformer_fast.data.loader import eval_shard
from maskformer_fast.modeling.weights import WEIGHTS_NAME, load_weights
from maskformer_fast.training.checkpoints import RAW_NAME, load_state
from maskformer_fast.training.trainer import Trainer
from tests.support.paths import ROOT

SCRIPT = ROOT / "tests/support/run_ranks.py"
SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

TIMEOUT = 600  # seconds, for ranks that wait for each other forever


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_ranks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranks = load_script()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder that two ranks ran `run_ranks.run` in, and the results of each. Takes about a minute."""
    folder = tmp_path_factory.mktemp("ranks")
    Trainer(ranks.exact("maskformer", folder / "single")).run()
    keep_the_first_half(folder / "single", folder / "from_single")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}  # fmt: skip
        environment = {**os.environ, **SETTINGS, **group}
        if rank:  # measuring the coverage of both ranks would take twice as long
            environment.pop("COVERAGE_PROCESS_CONFIG", None)
        processes.append(
            subprocess.Popen([sys.executable, str(SCRIPT), str(folder)], env=environment,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )  # fmt: skip
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder, [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def keep_the_first_half(source: Path, target: Path) -> None:
    """Copy the checkpoint that a run saved at its second step."""
    shutil.copytree(source / "checkpoints" / "step_00000002", target / "checkpoints" / "step_00000002")


def assert_same_run(folder: Path, other: Path, steps: tuple[int, ...] = (2, 4)) -> None:
    """Assert that weights, optimiser states and logged losses of two runs agree to 1e-5."""
    for step in steps:
        paths = [path / "checkpoints" / f"step_{step:08d}" for path in (folder, other)]
        assert (paths[0] / RAW_NAME).exists() == (paths[1] / RAW_NAME).exists()
        for file in (WEIGHTS_NAME, RAW_NAME) if (paths[0] / RAW_NAME).exists() else (WEIGHTS_NAME,):
            got, expected = (load_weights(path / file).weights for path in paths)
            assert got.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5,
                                           msg=lambda m, n=name: f"{n}: {m}")
        states = [load_state(path) for path in paths]
        got_state, expected_state = (state["optimizer"]["state"] for state in states)
        assert got_state.keys() == expected_state.keys() and states[0]["step"] == step
        for index, values in expected_state.items():
            for name, value in values.items():
                torch.testing.assert_close(got_state[index][name], value, rtol=1e-3, atol=1e-5)
    for line, other_line in zip(losses(folder, steps[-1]), losses(other, steps[-1]), strict=True):
        assert line.keys() == other_line.keys()
        for name, value in line.items():
            assert value == pytest.approx(other_line[name], rel=1e-5, abs=1e-5), name


def losses(folder: Path, step: int) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    of_step = [line for line in lines if "loss" in line and line["step"] == step]
    return [{name: v for name, v in line.items() if name.startswith(("loss", "grad", "lr", "step"))
             and name != "step_seconds"} for line in of_step]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel"), [(name, parallel) for name, kinds in ranks.PARALLEL.items() for parallel in kinds]
)
def test_two_ranks_train_as_one_process_with_the_full_batch(runs, tmp_path, name, parallel):
    folder, results = runs
    metrics = Trainer(ranks.exact(name, tmp_path)).run()
    assert_same_run(folder / f"{name}_{parallel}", tmp_path)
    first, second = (of_rank[f"{name} {parallel}"] for of_rank in results)
    assert first.keys() == second.keys() == metrics.keys()
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


@pytest.mark.slow
def test_two_ranks_accumulate_gradients_as_one_process(runs, tmp_path):
    folder, _ = runs
    Trainer(ranks.exact("maskformer", tmp_path, accumulate=2)).run()
    for parallel in ("ddp", "fsdp", "compiled"):
        assert_same_run(folder / f"accumulated_{parallel}", tmp_path, (4,))


@pytest.mark.slow
def test_a_checkpoint_of_sharded_ranks_resumes_in_one_process_and_vice_versa(runs, tmp_path):
    folder, _ = runs
    assert_same_run(folder / "from_single", folder / "single", (4,))
    keep_the_first_half(folder / "maskformer_fsdp", tmp_path)
    Trainer(ranks.exact("maskformer", tmp_path), resume=True).run()
    assert_same_run(tmp_path, folder / "maskformer_fsdp", (4,))


@pytest.mark.slow
def test_only_rank_0_writes_files(runs):
    folder, _ = runs
    for name in ("maskformer_ddp", "maskformer_fsdp"):
        lines = [json.loads(line)["step"] for line in (folder / name / "log.jsonl").read_text().splitlines()]
        assert lines == [1, 2, 3, 4, 4] and (folder / name / "predictions.png").exists()
        names = {path.name for path in (folder / name / "checkpoints").iterdir()}
        assert names == {"step_00000002", "step_00000004", "last", "best", "best.json"}


@pytest.mark.slow
def test_metrics_of_two_ranks_equal_those_of_one_process(runs):
    folder, results = runs
    for index, sizes in enumerate([(7, 2), (1, 1), (4, 3)]):
        expected = ranks.measured(folder / "single", *sizes)
        assert expected["semantic"]["per_class_iou"] and expected["miou"] > 0
        for of_rank in results:
            assert of_rank["metrics"][index] == expected
    written = json.loads((folder / "metrics.json").read_text())
    assert written["panoptic"] == json.loads(json.dumps(ranks.measured(folder / "single", 3, 1)))["panoptic"]
    rows = json.loads((folder / "report" / "per_image.json").read_text())
    assert [row["index"] for row in rows] == list(range(3))
    listed = json.loads((folder / "predictions" / "panoptic.json").read_text())
    assert len(listed["images"]) == len(listed["annotations"]) == 3
    assert [image["id"] for image in listed["images"]] == [0, 1, 2]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 16])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_shards_of_ranks_cover_the_data_set_in_order_and_split_it_between_batches(length, batch_size, world_size):
    shards = [eval_shard(length, batch_size, rank, world_size) for rank in range(world_size)]
    assert [index for shard in shards for index in shard] == list(range(length))
    assert all(shard.start % batch_size == 0 for shard in shards if shard)
    batches = [-(-len(shard) // batch_size) for shard in shards]
    assert max(batches) - min(batches) <= 1


@pytest.mark.slow
def test_a_nan_on_one_rank_skips_the_step_on_all(runs):
    _, results = runs
    (skipped, weights), (other_skipped, other_weights) = (of_rank["spoiled"] for of_rank in results)
    assert skipped == other_skipped == 1
    for name, tensor in weights.items():
        assert torch.isfinite(tensor).all() and torch.equal(tensor, other_weights[name]), name


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs):
    folder, results = runs
    assert [of_rank["stopped"] for of_rank in results] == [({}, True, 3)] * 2
    assert load_weights(folder / "stopped" / "checkpoints" / "last").step == 3


@pytest.mark.slow
def test_collectives_give_the_same_results_on_all_ranks(runs):
    _, results = runs
    for rank, of_rank in enumerate(results):
        assert of_rank["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert of_rank["gathered on main"] == ([] if rank else [0, 1])
        assert of_rank["delayed flag"] == [False, False, True, False] and of_rank["on main"] == 7
        assert of_rank["tensors"] == (0.5, [1.0, 2.0], [0, 7, 1, 8])
    assert results[0]["failure"] == "OSError: disk"
    assert results[1]["failure"] == "RankError: rank 0 failed: OSError: disk"


@pytest.mark.slow
def test_several_ranks_refuse_settings_that_cannot_work(runs):
    _, results = runs
    for of_rank in results:
        assert of_rank["sync"].startswith("ValueError: model.backbone.norm: expected batch or frozen")
        assert "accumulate x ranks = 1 x 2" in of_rank["batch"]


@pytest.mark.slow
@pytest.mark.no_cover  # five processes, and most of their work is imports
def test_ranks_restarted_by_torchrun_end_with_the_weights_of_an_undisturbed_run(runs, tmp_path):
    """Fails with ``init_process_group(init_method="env://")`` in place of `distributed._join` (torch 2.13).

    Restarted ranks would read addresses of the ended ones from torchrun's store, which outlives them.
    """
    folder, _ = runs
    run = tmp_path / "restarted"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", "1", str(SCRIPT), str(run), "restarted"]  # fmt: skip
    result = subprocess.run(line, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mIoU") == 1 and result.stdout.count("metrics: ") == 1
    got, expected = (load_weights(path / "checkpoints" / "last") for path in (run, folder / "uninterrupted"))
    assert got.step == expected.step == 6 and not run.with_name("restarted.1").exists()
    for name, tensor in expected.weights.items():
        assert torch.equal(got.weights[name], tensor), name
    steps = [json.loads(text)["step"] for text in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 6]


def test_every_start_of_ranks_agrees_on_a_new_prefix_in_a_store_with_keys_of_earlier_starts():
    """Ranks are threads. The second start lacks a rank; other ranks take their place in the later ones."""
    store = torch.distributed.HashStore()

    def start(ranks: tuple[int, ...], size: int, seconds: float = 20) -> dict[int, str]:
        with ThreadPoolExecutor(len(ranks)) as pool:
            calls = {rank: pool.submit(attempt, rank, size, seconds) for rank in ranks}
            return {rank: call.result() for rank, call in calls.items()}

    def attempt(rank: int, size: int, seconds: float) -> str:
        try:
            return distributed._agree_on_prefix(store, rank, size, timedelta(seconds=seconds))
        except RuntimeError as error:
            return str(error)

    first = start((0, 1, 2), 3)
    assert len(set(first.values())) == 1 and "expected" not in first[0]
    incomplete = start((0, 2), 3, 0.5)
    assert all("expected 3 ranks within" in text and "no answer from 1" in text for text in incomplete.values())
    again, fewer = start((2, 0, 1), 3), start((1, 0), 2)
    assert len({*first.values(), *again.values(), *fewer.values()}) == 3
    assert len(set(again.values())) == len(set(fewer.values())) == 1


def test_an_incomplete_environment_of_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE: expected to be set by torchrun"):
        distributed.process_group("cpu").__enter__()


@pytest.mark.parametrize("name", ["compile", "channels_last"])
def test_sharding_refuses_settings_that_it_does_not_support(name):
    with pytest.raises(ValueError, match=f"solver.{name}: expected False with parallel=fsdp"):
        SolverConfig(parallel="fsdp", **{name: True})
