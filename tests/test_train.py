"""The folder of a run: locks, links, folders that cannot be renamed, and paths and seeds that cannot be."""

import errno
import subprocess
import sys

import pytest

from maskformer_fast import train
from maskformer_fast.config import Config
from maskformer_fast.modeling.weights import load_weights
from tests.support.paths import TINY_RECIPE


@pytest.mark.no_cover
@pytest.mark.parametrize("name", ["link", "up/run", "run/../run", "link_of_link"])
def test_two_processes_cannot_share_a_run_by_different_names(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "link_of_link").symlink_to(tmp_path / "link")
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    with train.run_lock(tmp_path / "run"):
        line = [sys.executable, "-m", "maskformer_fast.train", "--config", TINY_RECIPE, "--output", tmp_path / name]
        result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "no other run" in result.stderr
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_of_the_longest_name_is_locked(tmp_path):
    with train.run_lock(tmp_path / ("n" * 255)):
        pass
    with train.run_lock(tmp_path / ("m" * 255)):  # another lock
        assert len(list(tmp_path.iterdir())) == 2


def test_a_second_run_by_a_link_moves_the_folder_and_keeps_the_link(tmp_path):
    arguments = ["--config", str(TINY_RECIPE), "--solver.max-steps", "1", "--output"]
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big/run")
    train.main([*arguments, str(tmp_path / "big/run")])
    train.main([*arguments, str(tmp_path / "link"), "--seed", "5"])
    assert (tmp_path / "link").is_symlink() and load_weights(tmp_path / "big/run").config.seed == 5
    assert load_weights(tmp_path / "big/run.1").config.seed == 0


def test_a_run_in_the_current_folder_is_made_and_resumed_but_not_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["--config", str(TINY_RECIPE), "--output", ".", "--solver.max-steps"]
    train.main([*line, "1"])
    train.main([*line, "2", "--resume"])
    assert load_weights("checkpoints/last").step == 2
    with pytest.raises(ValueError, match=r"output: .*holds a run already, got \..*--resume, or name another --output"):
        train.main([*line, "1"])
    assert load_weights(tmp_path / "checkpoints/last").step == 2


def test_a_folder_with_the_new_runs_data_in_it_is_not_moved(tmp_path):
    (tmp_path / "run/data").mkdir(parents=True)
    for name in ("config.yaml", "log.jsonl"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(ValueError, match="output: .*run/data in it"):
        train.move_aside(tmp_path / "run", [tmp_path / "run/data"])
    train.move_aside(tmp_path / "run", [tmp_path / "elsewhere", tmp_path / "run_2"])
    assert (tmp_path / "run.1/data").is_dir()


def test_a_folder_that_the_system_does_not_rename_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "log.jsonl"):
        (tmp_path / "run" / name).touch()

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(train.Path, "rename", busy)
    with pytest.raises(ValueError, match=r"cannot be renamed.*Device or resource busy.*--resume"):
        train.move_aside(tmp_path / "run")


PATHS = [
    (["--output", r"C:\runs\x"], "output: expected a path with /", "write /mnt/c/runs/x in WSL"),
    (["--output", "d:/runs/x"], "output: ", "write /mnt/d/runs/x in WSL"),
    (["--output", r"runs\x"], "output: ", "write runs/x"),
    (["--output", r"\\server\share\x"], "output: ", "a path of Windows"),
    (["--output", "new", "--data.root", r"C:\my data"], "data.root: ", "write /mnt/c/my data in WSL"),
    (["--output", "new", "--model.weights", r"runs\demo"], "model.weights: ", "write runs/demo"),
    (["--output", "/"], "output: expected a folder below /", "got '/'"),
    (["--output", "file"], "output: expected a folder", "got 'file'"),
    (["--output", "file/below/it"], "output: expected a folder", "got 'file/below/it'"),
    (["--output", "~/runs/x"], "output: expected a path without ~, ", "got '~/runs/x'"),
    (["--output", ""], "output: expected a folder", "got ''"),
    (["--output", "new", "--seed", str(2**64)], "seed: expected 0 to 18446744073709551615", f"got {2**64}"),
    (["--output", "new", "--seed", "-1"], "seed: expected 0 to 18446744073709551615", "got -1"),
]


@pytest.mark.parametrize(("arguments", "message", "advice"), PATHS)
def test_an_output_or_seed_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, arguments, message, advice
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, SystemExit)) as raised:
        train.main(["--config", str(TINY_RECIPE), *arguments])
    text = " ".join(f"{raised.value} {capsys.readouterr().err.replace('│', ' ')}".split())
    assert message in text and advice in text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_with_a_backslash_in_its_name_is_taken_where_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / r"runs\x").mkdir()
    train.check_paths(Config(output=r"runs\x"))


def test_the_largest_seed_trains(tmp_path):
    train.main(["--config", str(TINY_RECIPE), "--output", str(tmp_path / "run"), "--solver.max-steps", "1",
                "--seed", str(2**64 - 1)])
    assert load_weights(tmp_path / "run").config.seed == 2**64 - 1


def test_a_lock_file_with_any_content_can_be_locked(tmp_path):
    (tmp_path / ".run.lock").write_bytes(b"\xff\xfe")
    with train.run_lock(tmp_path / "run"):
        pass
