"""Checkpoints on a full disk, and checkpoints damaged after they were saved."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from maskformer_fast.config import Config, ModelConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.modeling.weights import CheckpointError, load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.train import with_own_recipe
from maskformer_fast.training import checkpoints
from maskformer_fast.training import trainer as trainer_module
from maskformer_fast.training.checkpoints import complete_checkpoints, newest_undamaged, save_checkpoint
from maskformer_fast.training.run_log import RunLog
from maskformer_fast.training.trainer import Trainer
from tests.support.paths import TINY_RECIPE

TINY = load_recipe(TINY_RECIPE)
METADATA = Metadata("toy", ("cat", "sky"), (True, False), (3, 7), ((1, 2, 3), (4, 5, 6)))
CONFIG = Config(model=ModelConfig(num_classes=2))


def tiny(folder, **log):
    return replace(TINY, output=str(folder), metrics=("semantic",), log=replace(TINY.log, **log))


def save(folder, step, size=1000):
    network = nn.Linear(size, 1, bias=False)
    return save_checkpoint(folder, network, CONFIG, METADATA, step, {"step": step, "moments": torch.rand(2 * size)})


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make writes of this process fail, as on a full disk, once a file is larger than ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100_000, 500_000], ids=["at once", "weights", "state"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_of_the_new_one(tmp_path, size):
    save(tmp_path, 1)
    with largest_file(size), pytest.raises(OSError, match=r"step_00000002: .* not be written \([\d.]+ MiB free\)"):
        save(tmp_path, 2, size=100_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step_00000001"]
    assert load_weights(tmp_path / "last").step == 1 and newest_undamaged(tmp_path) == (tmp_path / "step_00000001", [])
    save(tmp_path, 2, size=100_000)
    assert load_weights(tmp_path / "last").step == 2


def fill_disk(monkeypatch, steps):
    """Make saving the checkpoints of some steps fail as on a full disk."""
    write = checkpoints.write_weights

    def full(path, weights, config, metadata, step):
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, weights, config, metadata, step)

    monkeypatch.setattr(checkpoints, "write_weights", full)


def test_training_goes_on_after_a_full_disk_and_saves_the_next_checkpoint(tmp_path, monkeypatch, caplog):
    fill_disk(monkeypatch, {2, 4})
    metrics = Trainer(tiny(tmp_path, validate_every=2)).run()
    assert caplog.text.count("No space left") == 2 and "MiB free" in caplog.text
    assert metrics["step"] == 6 and load_weights(tmp_path / "checkpoints" / "best").step == 6
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step_00000006"]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "val/" in line] == [2, 4, 6]


def test_a_log_line_cut_by_a_full_disk_is_completed_later(tmp_path, caplog):
    log, path = RunLog(tmp_path, 0, tensorboard=False), tmp_path / "log.jsonl"
    log.scalars(1, {"loss": 1.0})
    with largest_file(path.stat().st_size + 5):
        log.scalars(2, {"loss": 2.0})
        log.scalars(3, {"loss": 3.0})
    assert caplog.text.count("not all of the log could be written") == 1
    log.scalars(4, {"loss": 4.0})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]


def test_training_goes_on_when_a_validation_cannot_be_written(tmp_path, monkeypatch, caplog):
    trainer = Trainer(tiny(tmp_path, validate_every=2))
    for name in ("atomic_write", "mark_best"):
        monkeypatch.setattr(trainer_module, name, full_until(trainer, 6, getattr(trainer_module, name)))
    assert trainer.run()["step"] == 6 and caplog.text.count("No space left") == 4
    folder = tmp_path / "checkpoints"
    assert load_weights(folder / "best").step == load_weights(folder / "last").step == 6
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step_00000006.png"]


def full_until(trainer, step, write):
    """Function that fails as on a full disk before a step."""

    def attempt(*arguments):
        if trainer.step < step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    return attempt


def test_a_full_disk_after_the_last_step_is_an_error(tmp_path, monkeypatch):
    fill_disk(monkeypatch, {6})
    with pytest.raises(OSError, match=r"step_00000006.*MiB free\), earlier ones stand"):
        Trainer(tiny(tmp_path)).run()
    assert load_weights(tmp_path / "checkpoints" / "last").step == 4
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 6
    monkeypatch.undo()
    assert Trainer(tiny(tmp_path), resume=True).run()["step"] == 6
    assert load_weights(tmp_path / "checkpoints" / "last").step == 6


def flip(path: Path) -> None:
    """Flip one bit near the end of a file, which then still loads without an error."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": lambda path: flip(path / "model.safetensors"),
    "half a state": lambda path: (path / "trainer.pt").write_bytes((path / "trainer.pt").read_bytes()[:1000]),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "no sums": lambda path: (path / "checksums.json").write_text("[1]"),
    "old and cut": lambda path: ((path / "checksums.json").unlink(), (path / "model.safetensors").write_bytes(b"{")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    undamaged, newest = save(tmp_path, 1), save(tmp_path, 2)
    assert newest_undamaged(tmp_path) == (newest, [])
    damage(newest)
    assert newest_undamaged(tmp_path) == (undamaged, [newest])


def test_a_readable_checkpoint_without_checksums_counts_as_undamaged(tmp_path):
    path = save(tmp_path, 1)
    (path / "checksums.json").unlink()
    assert newest_undamaged(tmp_path) == (path, [])


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path, caplog):
    Trainer(tiny(tmp_path / "undisturbed")).run()
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "cut", symlinks=True)
    folder = tmp_path / "cut" / "checkpoints"
    flip(folder / "step_00000006" / "model.safetensors")
    trainer = Trainer(tiny(tmp_path / "cut"), resume=True)
    assert trainer.step == 4 and "step_00000006/model.safetensors: damaged, the SHA-256" in caplog.text
    assert "trying the checkpoint before it" in caplog.text and (folder / "step_00000006").exists()
    trainer.run()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best", "best.json", "damaged_step_00000006", "last", "step_00000004", "step_00000006"]
    expected, got = (load_weights(tmp_path / name / "checkpoints" / "last").weights for name in ("undisturbed", "cut"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert newest_undamaged(folder) == (folder / "step_00000006", [])


def test_if_all_checkpoints_are_damaged_each_is_named_and_no_file_changes(tmp_path):
    Trainer(tiny(tmp_path)).run()
    for path in (tmp_path / "checkpoints").glob("step_*"):
        flip(path / "trainer.pt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"(?s)all are damaged:.*step_00000006/trainer.*step_00000004/trainer"):
        Trainer(tiny(tmp_path), resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_copies_of_checkpoints_under_other_names_are_neither_read_nor_deleted(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    copies = [tmp_path / name for name in ("step_00000002.bak", "step_abc", "step_00000009 (copy)")]
    for copy in copies:
        shutil.copytree(tmp_path / "step_00000002", copy)
    for step in (3, 4, 5):
        save(tmp_path, step)
    assert newest_undamaged(tmp_path) == (tmp_path / "step_00000005", [])
    assert all(copy.is_dir() for copy in copies)


def test_a_checkpoint_without_weights_and_checksums_is_passed_over(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    for name in ("model.safetensors", "checksums.json"):
        (second / name).unlink()
    assert newest_undamaged(tmp_path) == (first, [second])


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"\n", None])
def test_a_lost_recipe_is_written_anew_from_the_newest_checkpoint(tmp_path, caplog, content):
    save(tmp_path / "checkpoints", 1)
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    assert with_own_recipe(["--resume", "--output", str(tmp_path)])[:2] == ["--config", str(tmp_path / "config.yaml")]
    assert load_recipe(tmp_path / "config.yaml") == replace(CONFIG, output=str(tmp_path))
    assert "empty, and written anew from" in caplog.text


def test_a_recipe_with_a_mistake_stays_as_it_is(tmp_path):
    save(tmp_path / "checkpoints", 1)
    (tmp_path / "config.yaml").write_text("solver: {max_step: 3}")
    with_own_recipe(["--resume", "--output", str(tmp_path)])
    assert (tmp_path / "config.yaml").read_text() == "solver: {max_step: 3}"
