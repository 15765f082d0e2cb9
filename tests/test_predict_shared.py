"""``predict`` by several processes, killed and resumed: the files are those of one process, byte by byte."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast import predict, train
from tests.support.killed_predict import die_after
from tests.support.paths import TINY_RECIPE

IMAGES = 11
KILLED = str(Path(__file__).parent / "support" / "killed_predict.py")
TASKS = ["--task", "semantic", "panoptic", "instance", "--no-overlays"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained tiny run."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    assert train.main(["--config", str(TINY_RECIPE), "--output", str(folder), "--solver.max-steps", "2"]) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of several sizes in nested folders and in a shard, one of each broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "shard-000.tar", "w") as shard:
        for number in range(IMAGES):
            pixels = rng.integers(0, 255, (*rng.integers(20, 70, 2), 3), dtype=np.uint8)
            path = folder / "images" / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            if number == 4:
                path.write_bytes(b"not an image")
            content = path.read_bytes()
            entry = tarfile.TarInfo(f"{number:03d}.left.png")
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}  # fmt: skip


def inputs_of(photos):
    return [str(photos / "images"), str(photos / "shard-{000..000}.tar")]


def launch(arguments, cache, ranks=1, program=("-m", "maskformer_fast.predict")):
    """Run predict in processes of its own -> exit status, output."""
    module = program[0] == "-m"
    by_torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    line = [sys.executable, *(by_torchrun if ranks > 1 else []), *program, *arguments]
    if module and ranks > 1:
        line = [sys.executable, *by_torchrun, "--module", *program[1:], *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASKFORMER_FAST_CACHE": str(cache)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def expected(run, photos, tmp_path_factory):
    """Files of a single process that nothing interrupts, and the folder of its measurements."""
    folder = tmp_path_factory.mktemp("expected")
    arguments = [str(run), *inputs_of(photos), "-o", str(folder / "out"), *TASKS, "--test.batch-size", "2"]
    status, output = launch(arguments, folder / "cache")
    assert status == 1 and f"{2 * IMAGES - 2} images segmented" in output, output
    assert "4.png: cannot be decoded" in output and "shard-000.tar: 004.left.png: cannot be decoded" in output
    assert not (folder / "out/.parts").exists()
    return files_of(folder / "out"), folder / "cache"


def test_results_of_a_shard_are_those_of_its_images_as_files(expected):
    files, _ = expected
    listed = json.loads(files["images.json"])["images"]
    assert [image["id"] for image in listed] == [n for n in range(1, 2 * IMAGES + 1) if n not in (4, 16)]
    for kind in ("semantic", "panoptic"):
        for number in set(range(IMAGES)) - {4}:
            folder = "ab"[number % 2]
            assert files[f"{kind}/{folder}/{number}.png"] == files[f"{kind}/shard-000/{number:03d}.left.png"]


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("tile", [(), ("--test.tile", "32")], ids=["whole", "tiles"])
def test_killed_and_resumed_by_other_numbers_of_processes(run, photos, expected, tmp_path, tile):
    files, cache = expected
    arguments = [str(run), *inputs_of(photos), "-o", str(tmp_path / "out"), *TASKS, "--test.batch-size", "2", *tile]
    if tile:
        one = [str(tmp_path / "one") if argument == str(tmp_path / "out") else argument for argument in arguments]
        assert launch(one, cache)[0] == 1
        files = files_of(tmp_path / "one")
    status, output = launch(arguments, cache, 2, (KILLED, "1", "3"))
    assert status != 0 and "images segmented" not in output, output
    parts = list((tmp_path / "out/.parts").glob("*.part"))
    assert len(parts) == 2
    with open(parts[0], "ab") as file:  # as a killed write leaves it
        file.write(b'7\t{"id": 7, "file_n')
    status, output = launch(arguments, cache, 1, (KILLED, "0", "4"))
    assert status == -9, output
    status, output = launch(arguments, cache, 3)
    assert status == 1 and f"{2 * IMAGES - 2} images segmented" in output, output
    assert "goes on with an unfinished run" in output
    assert files_of(tmp_path / "out") == files


@pytest.mark.slow
@pytest.mark.no_cover
def test_processes_of_two_machines_share_a_folder(run, photos, expected, tmp_path):
    files, cache = expected
    port = 29400 + os.getpid() % 1000
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASKFORMER_FAST_CACHE": str(cache)}
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
             "--master-addr=127.0.0.1", f"--master-port={port}", "--module", "maskformer_fast.predict", str(run),
             *inputs_of(photos), "-o", str(tmp_path / "out"), *TASKS, "--test.batch-size", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for node in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=600)[0] for machine in machines]
    assert f"{2 * IMAGES - 2} images segmented" in outputs[0], outputs[0]
    assert machines[1].returncode == 0 and files_of(tmp_path / "out") == files


def forked(arguments, ranks, killed=None):
    """Run predict in forked ranks, of which one is killed after some images -> exit statuses; others die with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if ranks > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
                if killed is not None:
                    die_after(*killed)
                status = predict.main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children[pid] = rank
    statuses = {}
    while children:
        pid, status = os.wait()
        statuses[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if os.WIFSIGNALED(status):
            for other in children:
                os.kill(other, signal.SIGKILL)  # as torchrun does
    return [statuses[rank] for rank in range(ranks)]


@pytest.mark.parametrize("tile", [(), ("--test.tile", "32")], ids=["whole", "tiles"])
def test_killed_ranks_and_other_numbers_of_ranks_end_with_the_files_of_one(run, photos, tmp_path, tile, capfd):
    torch.set_num_threads(1)
    options = [*TASKS, "--test.batch-size", "2", *tile]
    assert predict.main([str(run), *inputs_of(photos), "-o", str(tmp_path / "one"), *options]) == 1
    arguments = [str(run), *inputs_of(photos), "-o", str(tmp_path / "out"), *options]
    assert forked(arguments, 2, (1, 3)) == [-signal.SIGKILL, -signal.SIGKILL]
    lines = [path.read_bytes().count(b"\n") for path in (tmp_path / "out/.parts").glob("*.part")]
    assert len(lines) == 2 and 0 < sum(lines) < 2 * IMAGES
    part = next((tmp_path / "out/.parts").glob("*_0.part"))
    part.write_bytes(part.read_bytes() + b'7\t{"id": 7, "file_n')  # as a write that was killed leaves it
    assert forked(arguments, 1, (0, 4)) == [-signal.SIGKILL]
    capfd.readouterr()
    assert forked(arguments, 3) == [1, 0, 0], "rank 0 reports the broken images"
    output = capfd.readouterr()
    assert f"{2 * IMAGES - 2} images segmented" in output.out and "2 inputs could not be used" in output.err
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_an_interrupted_run_goes_on_without_repeating_what_is_finished(run, photos, tmp_path, monkeypatch, capsys):
    arguments = [str(run), str(photos / "images"), "-o", str(tmp_path / "out"), *TASKS]
    write, written = predict.PartsWriter.write, []

    def stop(self, number, *rest):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(predict.PartsWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            predict.main(arguments)
    assert len(json.loads((tmp_path / "out/images.json").read_text())["images"]) == 5
    before = list(written)

    def note(self, number, *rest):
        written.append(number)
        return write(self, number, *rest)

    monkeypatch.setattr(predict.PartsWriter, "write", note)
    with pytest.raises(ValueError, match=r'settings of the unfinished run in .*\(task: \["semantic", .*--no-resume'):
        predict.main([*arguments[:4], "--task", "semantic", "--no-overlays"])
    (tmp_path / "other.png").write_bytes((photos / "images/b/1.png").read_bytes())
    with pytest.raises(ValueError, match=rf"images: {IMAGES}\);.*got .images: {IMAGES + 1}"):
        predict.main([arguments[0], str(tmp_path / "other.png"), *arguments[1:]])
    assert written == before
    assert predict.main(arguments) == 1
    assert sorted(written) == sorted(set(range(IMAGES)) - {3}), "one is broken"
    written.clear()
    assert predict.main([*arguments, "--no-resume"]) == 1 and len(written) == IMAGES - 1, "a finished run starts anew"
