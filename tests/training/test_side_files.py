"""A run's own small files, damaged or left over: resuming goes on, with a warning that names them."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from maskformer_fast.core.files import atomic_write, remove_temporary_files
from maskformer_fast.modeling.weights import CheckpointError, load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.train import move_aside
from maskformer_fast.training.checkpoints import best_score, newest_undamaged, saved_number
from maskformer_fast.training.run_log import RunLog
from maskformer_fast.training.trainer import Trainer
from tests.support.paths import TINY_RECIPE

TINY = load_recipe(TINY_RECIPE)
NESTED = b"[" * 100_000
DAMAGED = [b"", b"{}", b"[]", b"null", b"7", b"\xff\xfe", b"{", NESTED, b'{"step": "6", "score": "1"}',
           b'{"step": NaN, "score": Infinity}', b'{"step": true, "score": null}', b'{"step": {}, "score": [1]}',
           b'{"step": ' + b"9" * 5000 + b"}", b'{"score": 1' + b"0" * 400 + b"}"]


def config(folder, steps=4, validate_every=4):
    return replace(TINY, output=str(folder), metrics=("semantic",), solver=replace(TINY.solver, max_steps=steps),
                   log=replace(TINY.log, validate_every=validate_every))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, validated at its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    Trainer(config(folder)).run()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def validations(run):
    return [line["step"] for line in log_of(run) if "val/miou" in line]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:20]))
@pytest.mark.parametrize(("name", "key"), [("metrics.json", "step"), ("best.json", "score")])
def test_a_damaged_number_counts_as_absent_and_its_file_is_named(tmp_path, caplog, name, key, content):
    (tmp_path / name).write_bytes(content)
    assert saved_number(tmp_path / name, key) is None
    assert caplog.text.count(str(tmp_path / name)) == 1


def test_a_folder_in_place_of_a_file_counts_as_absent_too(tmp_path, caplog):
    (tmp_path / "best.json").mkdir()
    (tmp_path / "best").mkdir()
    assert best_score(tmp_path) is None and "best.json" in caplog.text


def test_an_absent_file_gives_no_warning(tmp_path, caplog):
    assert best_score(tmp_path) is None and not caplog.text


@pytest.mark.parametrize("name", ["metrics.json", "checkpoints/best.json"])
def test_a_run_with_a_damaged_file_of_numbers_goes_on_and_writes_it_again(run, caplog, name):
    (run / name).write_bytes(b"")
    assert Trainer(config(run, steps=6), resume=True).run()["step"] == 6
    assert str(run / name) in caplog.text and json.loads((run / name).read_text())
    assert validations(run) == [4, 6]


def test_what_stands_in_the_place_of_a_runs_files_is_renamed(run, caplog):
    for name in ("metrics.json", "log.jsonl", "checkpoints/best.json", "predictions.png"):
        (run / name).unlink()
        (run / name).mkdir()
    (run / "log.jsonl").rmdir()
    os.mkfifo(run / "log.jsonl")  # to read it would take for ever
    (run / "checkpoints/last").unlink()
    (run / "checkpoints/last").mkdir()
    shutil.rmtree(run / "pictures")
    (run / "pictures").write_text("mine")
    assert Trainer(config(run, steps=6), resume=True).run()["step"] == 6
    assert json.loads((run / "metrics.json").read_text())["step"] == 6 and validations(run) == [4, 6]
    assert (run / "damaged_pictures").read_text() == "mine" and (run / "checkpoints/last").is_symlink()
    assert all(f"{run / name}: expected a" in caplog.text for name in ("metrics.json", "pictures", "checkpoints/last"))


def test_a_lost_link_to_the_best_checkpoint_is_made_by_the_next_validation(run):
    (run / "checkpoints/best.json").write_text('{"step": "step_00000004", "score": 1000.0}')
    (run / "checkpoints/best").unlink()
    Trainer(config(run, steps=6), resume=True).run()
    assert (run / "checkpoints/best").is_symlink()


LINES = {"not UTF-8": b"\xff", "no step": b"{}", "a list": b"[1]", "a text as step": b'{"step": "4"}', "nested": NESTED,
         "no JSON": b"<<<<<<< HEAD", "two lines for other readers": b'{"step":\r 4}'}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_a_damaged_line_of_the_log_is_left_out_and_the_file_kept(run, caplog, line):
    first, rest = (run / "log.jsonl").read_bytes().split(b"\n", 1)
    damaged = first + b"\n" + line + b"\n" + rest
    (run / "log.jsonl").write_bytes(damaged)
    Trainer(config(run, steps=5), resume=True).run()
    assert [line["step"] for line in log_of(run) if "loss" in line] == [1, 2, 3, 4, 5]
    assert "1 of 6 lines are damaged (line 2)" in caplog.text and str(run / "log.jsonl") in caplog.text
    assert (run / "damaged_log.jsonl").read_bytes() == damaged


def test_half_a_line_at_the_end_is_no_damage(run, caplog):
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    RunLog(run, 4, tensorboard=False).close()
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4, 4] and not caplog.text
    assert not list(run.glob("damaged*"))


def test_a_log_of_zeros_is_kept_beside_the_new_one(run, caplog):
    (run / "log.jsonl").write_bytes(bytes(100))
    RunLog(run, 4, tensorboard=False).close()
    assert not log_of(run) and (run / "damaged_log.jsonl").read_bytes() == bytes(100) and "1 of 1 lines" in caplog.text


def test_a_log_that_cannot_be_read_at_all_is_renamed(tmp_path, caplog):
    (tmp_path / "log.jsonl").mkdir()
    (tmp_path / "damaged_log.jsonl").mkdir()
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.scalars(1, {"loss": 1.0})
    log.close()
    assert log_of(tmp_path) == [{"step": 1, "loss": 1.0}] and (tmp_path / "damaged_log.jsonl.1").is_dir()


UNREADABLE = [b"", b"[1]", b"\xff", NESTED, b"{}", b'{"model.safetensors": "x"}']


@pytest.mark.parametrize("content", UNREADABLE, ids=lambda content: repr(content[:20]))
def test_unreadable_checksums_pass_the_checkpoint_over_but_never_end_the_run(run, caplog, content):
    folder = run / "checkpoints"
    older, newest = sorted(folder.glob("step_*"))
    (newest / "checksums.json").write_bytes(content)
    assert newest_undamaged(folder) == (older, [newest])
    (older / "checksums.json").write_bytes(content)
    assert newest_undamaged(folder) == (newest, [])
    assert "taken without its checksums" in caplog.text and str(newest / "checksums.json") in caplog.text
    (newest / "trainer.pt").write_bytes(b"x")
    assert newest_undamaged(folder) == (older, [newest])
    (older / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="all are damaged"):
        newest_undamaged(folder)


def test_a_run_with_one_checkpoint_of_unreadable_checksums_resumes_to_the_same_weights(finished, run):
    older, newest = sorted((run / "checkpoints").glob("step_*"))
    shutil.rmtree(newest)
    (older / "checksums.json").write_bytes(NESTED)
    Trainer(config(run), resume=True).run()
    got, expected = (load_weights(folder / "checkpoints/last").weights for folder in (run, finished))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_validation_that_a_resumed_run_repeats_replaces_its_line(run):
    before = log_of(run)
    (run / "metrics.json").unlink()  # a process killed between the log's line and this file
    Trainer(config(run, steps=6, validate_every=2), resume=True).run()
    assert validations(run) == [4, 6] and [line["step"] for line in log_of(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    Trainer(config(run, steps=6, validate_every=2), resume=True).run()  # a finished run is measured again
    assert validations(run) == [4, 6]
    assert [line for line in log_of(run) if line["step"] < 4] == [line for line in before if line["step"] < 4]


def test_temporary_files_of_a_killed_process_go_at_the_next_start_and_others_stay(run):
    leftovers = [run / part / f".{'0f' * 8}.tmp" for part in (".", "pictures", "checkpoints")]
    mine = [run / "notes.tmp", run / ".tmp", run / f".{'0f' * 8}.tmp.txt", run / f".{'0g' * 8}.tmp"]
    for path in [*leftovers, *mine]:
        path.write_text("x")
    (run / "checkpoints" / ".writing-last").symlink_to("nowhere")
    Trainer(config(run, steps=5), resume=True).run()
    assert all(path.exists() for path in mine) and not any(path.exists() for path in leftovers)
    assert not (run / "checkpoints" / ".writing-last").is_symlink()
    leftovers[0].write_text("x")
    (run / "config.yaml").touch()
    move_aside(run)
    assert not list(run.parent.rglob(leftovers[0].name))


def test_what_atomic_write_leaves_when_killed_is_what_is_removed(tmp_path):
    with atomic_write(tmp_path / "file"):
        (left,) = tmp_path.iterdir()
        shutil.copy(left, tmp_path / "saved")
        name = left.name
    (tmp_path / name).write_bytes(b"half")
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "saved"]
    remove_temporary_files(tmp_path / "missing")
