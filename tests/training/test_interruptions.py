"""Early ends of a run: each gives advice, and the resumed run ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from maskformer_fast import train
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training import interruptions
from maskformer_fast.training.interruptions import (
    OutOfMemory,
    Stopped,
    StopSignals,
    WorkerLost,
    is_out_of_memory,
    training_advice,
)
from maskformer_fast.training.train_step import TrainStep
from maskformer_fast.training.trainer import Trainer
from tests.support.paths import TINY_RECIPE

RECIPE = TINY_RECIPE
TINY = load_recipe(RECIPE)
STEPS = 5


def config_in(folder, workers=0):
    """Run that saves and validates only at its end."""
    return replace(
        TINY,
        output=str(folder),
        metrics=("semantic",),
        data=replace(TINY.data, workers=workers),
        solver=replace(TINY.solver, max_steps=STEPS, accumulate=2),
        log=replace(TINY.log, checkpoint_every=1000, pictures=0),
    )


def last(folder):
    return load_weights(folder / "checkpoints" / "last")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights at the end of an undisturbed run."""
    folder = tmp_path_factory.mktemp("interruptions") / "undisturbed"
    Trainer(config_in(folder)).run()
    return last(folder).weights


def assert_resumes(folder, undisturbed, workers=0):
    assert Trainer(config_in(folder, workers), resume=True).run()["step"] == STEPS
    weights = last(folder).weights
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)


def in_step(monkeypatch, number, action):
    """Call a function between forward and backward pass of a step's second micro-batch."""
    gradients = TrainStep._gradients

    def disturbed(self, micro, *arguments):
        if self.step == number and micro == 1:
            criterion = self.criterion.forward

            def disturb(*inputs):
                self.criterion.forward = criterion
                losses = criterion(*inputs)
                action()
                return losses

            self.criterion.forward = disturb
        return gradients(self, micro, *arguments)

    monkeypatch.setattr(TrainStep, "_gradients", disturbed)


# Signals


@pytest.mark.parametrize(
    ("number", "times", "status"), [(signal.SIGTERM, 1, 0), (signal.SIGTERM, 2, 0), (signal.SIGINT, 1, 130)]
)
def test_a_signal_saves_the_current_step_and_ends_the_run(
    tmp_path, monkeypatch, undisturbed, number, times, status, capfd
):
    in_step(monkeypatch, 2, lambda: [os.kill(os.getpid(), number) for _ in range(times)])
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    line = ["--config", str(RECIPE), "--output", str(tmp_path / "run"), "--metrics", "semantic", "--log.pictures", "0",
            "--log.checkpoint-every", "1000", "--solver.max-steps", str(STEPS), "--solver.accumulate", "2"]  # fmt: skip
    assert train.main(line) == status
    assert capfd.readouterr().err.count(f"{number.name}: finishing the step") == 1
    assert last(tmp_path / "run").step == 3 and not (tmp_path / "run" / "metrics.json").exists()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    monkeypatch.undo()
    assert_resumes(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.no_cover
def test_sigterm_to_the_process_group_ends_the_command_with_status_0(tmp_path):
    """Loader processes get the signal too, as from the scheduler of a cluster."""
    line = [sys.executable, "-m", "maskformer_fast.train", "--config", str(RECIPE), "--output", str(tmp_path / "run"),
            "--solver.max-steps", "100000", "--data.workers", "2", "--log.checkpoint-every", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "stopped at step" in errors
    steps = [json.loads(row)["step"] for row in log.read_text().splitlines()]
    assert last(tmp_path / "run").step == steps[-1]


def test_a_signal_ends_a_validation_at_once_and_resuming_repeats_it(tmp_path, monkeypatch, undisturbed):
    from maskformer_fast.training import trainer as module

    trainer = Trainer(config_in(tmp_path))

    def measure(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    with monkeypatch.context() as patched:
        patched.setattr(module, "measure", measure)
        assert trainer.run() == {} and trainer.stopped
    assert last(tmp_path).step == STEPS and not (tmp_path / "metrics.json").exists()
    assert_resumes(tmp_path, undisturbed)


def test_a_second_signal_has_its_previous_effect():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received is signal.SIGINT
            with pytest.raises(Stopped), signals.at_once():
                pytest.fail("the block was entered")
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_repeated_sigterm_counts_only_after_a_while(monkeypatch):
    seen = []
    monkeypatch.setattr(interruptions, "REPEAT_SECONDS", 0.05)
    previous = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.06)
            assert signals.received is signal.SIGTERM and not seen
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_signals_are_left_alone_outside_the_main_thread():
    failures = []

    def enter():
        try:
            with StopSignals():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failures


# Memory


def too_much():
    return torch.empty(1 << 60, dtype=torch.uint8)


def cuda_too_much():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\nmore lines")


@pytest.mark.parametrize("allocate", [too_much, cuda_too_much], ids=["cpu", "cuda"])
def test_running_out_of_memory_saves_the_run_and_names_options_that_help(tmp_path, monkeypatch, undisturbed, allocate):
    in_step(monkeypatch, 3, allocate)
    with pytest.raises(OutOfMemory) as raised:
        Trainer(config_in(tmp_path)).run()
    message = str(raised.value)
    assert "a step of 4 images in 2 micro-batches of 2 of 32x32 pixels" in message
    assert "GiB" in message and "--solver.accumulate 4" in message and "--data.augment.crop-size" in message
    assert "--resume continues from" in message and "step_00000003" in message and "\n" not in message
    assert last(tmp_path).step == 3
    monkeypatch.undo()
    assert_resumes(tmp_path, undisturbed)


def test_out_of_memory_before_the_first_checkpoint_is_reported_as_such(tmp_path, monkeypatch):
    in_step(monkeypatch, 0, too_much)
    with pytest.raises(OutOfMemory, match="There is no checkpoint yet"):
        Trainer(config_in(tmp_path)).run()


def test_out_of_memory_in_validation_names_options_of_validation(tmp_path, monkeypatch, undisturbed):
    from maskformer_fast.training import trainer as module

    with monkeypatch.context() as patched:
        patched.setattr(module, "measure", lambda *_, **__: too_much())
        with pytest.raises(OutOfMemory, match=r"validation with 1 images.*--test\.short-edge.*step_00000005"):
            Trainer(config_in(tmp_path)).run()
    assert_resumes(tmp_path, undisturbed)


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("x"), KeyError("memory")])
def test_other_errors_pass_unchanged(tmp_path, monkeypatch, error):
    def fail():
        raise error

    assert not is_out_of_memory(error)
    in_step(monkeypatch, 1, fail)
    with pytest.raises(type(error)) as raised:
        Trainer(config_in(tmp_path)).run()
    assert raised.value is error and not (tmp_path / "checkpoints").exists()


def test_errors_of_running_out_of_memory_are_recognised():
    for kind in (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUDA error: out of memory")):
        assert is_out_of_memory(kind)
    with pytest.raises(RuntimeError) as raised:
        too_much()
    assert is_out_of_memory(raised.value)


def test_advice_names_only_options_that_can_still_reduce_memory():
    config = config_in("x")
    at_end = replace(config, solver=replace(config.solver, accumulate=4))
    assert "--solver.accumulate" not in training_advice(at_end, torch.device("cpu"), (32, 32))
    uncropped = replace(config, data=replace(config.data, augment=replace(config.data.augment, crop_size=None)))
    assert "so that no image is larger" in training_advice(uncropped, torch.device("cpu"), None)


# Loader processes


@pytest.mark.parametrize(("noticed", "step"), [("by its signal", 2), ("at the next batch", 3)])
def test_a_killed_loader_process_is_explained_and_the_run_resumes(tmp_path, monkeypatch, undisturbed, noticed, step):
    def kill():
        victim = multiprocessing.active_children()[0]
        if step == 3:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        victim.kill()
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)

    in_step(monkeypatch, 2, kill)
    previous = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(WorkerLost, match=r"OOM killer.*fewer --data\.workers.*--resume continues from") as raised:
        Trainer(config_in(tmp_path, workers=1)).run()
    if step == 3:
        signal.signal(signal.SIGCHLD, previous)
    assert "SIGKILL" in str(raised.value) and last(tmp_path).step == step
    monkeypatch.undo()
    assert_resumes(tmp_path, undisturbed, workers=1)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "listener")])
def test_a_killed_loader_process_is_explained_whatever_error_shows_it(tmp_path, monkeypatch, undisturbed, error):
    def fail():
        multiprocessing.active_children()[0].kill()
        raise error

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # no earlier notice by PyTorch
    take = _MultiProcessingDataLoaderIter._next_data
    monkeypatch.setattr(
        _MultiProcessingDataLoaderIter, "_next_data",
        lambda self: fail() if self._rcvd_idx == 4 else take(self)  # the third step's first batch
    )
    with pytest.raises(WorkerLost, match=r"SIGKILL.*--resume continues from") as raised:
        Trainer(config_in(tmp_path, workers=1)).run()
    assert last(tmp_path).step == 2 and "Traceback" not in str(raised.value)
    monkeypatch.undo()
    assert_resumes(tmp_path, undisturbed, workers=1)
