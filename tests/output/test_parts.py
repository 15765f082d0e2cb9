"""Parts of results: JSON files that are the same for any number of processes, and shares of the images."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult
from maskformer_fast.output import parts as parts_module
from maskformer_fast.output.parts import PartsWriter, Share
from maskformer_fast.output.writer import ResultWriter
from maskformer_fast.structures import pack_masks

METADATA = Metadata("x", ("a", "é\t\n"), (True, True), (7, 9), ((0, 0, 0), (9, 9, 9)))
NAMES = [f"{number}.jpg" for number in range(7)] + ["tab\t.png", "x\udcff.png", "zürich\u2028.png"]
IMAGE = np.zeros((16, 20, 3), np.uint8)
TASKS = ("panoptic", "instance")


def results(number: int) -> dict:
    rng = np.random.default_rng(number)
    masks = torch.from_numpy(rng.random((number % 3, 16, 20)) > 0.5)
    count = len(masks)
    instances = InstanceResult(torch.zeros(count, dtype=torch.int64), torch.from_numpy(rng.random(count)),
                               pack_masks(masks), torch.zeros(count, 4), (16, 20))  # fmt: skip
    segments = [SegmentInfo(1, 0, True)]
    return {"panoptic": PanopticResult(torch.ones(16, 20, dtype=torch.int32), segments), "instance": instances}


def writer_of(folder: Path) -> PartsWriter:
    return PartsWriter(folder, METADATA, False, NAMES, NAMES, TASKS)


def work(writer: PartsWriter, numbers: range | list[int], broken: tuple[int, ...] = ()) -> None:
    for number in numbers:
        if number in broken:
            writer.fail(number, NAMES[number], "broken")
        else:
            assert writer.write(number, number + 1, IMAGE, results(number))
        writer.end_batch()


def json_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def test_files_are_the_same_for_any_processes_and_have_the_content_of_a_plain_writer(tmp_path):
    plain = ResultWriter(tmp_path / "plain", METADATA, False, NAMES, NAMES)
    for number in range(len(NAMES)):
        if number != 3:
            assert plain.write(number, number + 1, IMAGE, results(number))
    plain.close()
    for ranks in (1, 2, 5):
        folder = tmp_path / str(ranks)
        first = writer_of(folder)
        session, finished = first.start({"a": (1, 2)}, True)
        assert not finished.any()
        for rank in range(ranks):
            each = first if rank == 0 else writer_of(folder)
            each.join(session, rank)
            work(each, range(rank, len(NAMES), ranks), (3,))
            each.finish()
        first.wait(session, ranks)
        merged = first.merge()
        assert merged == (len(NAMES) - 1, ["3.jpg: broken"]) and not (folder / ".parts").exists()
        assert json_files(folder) == json_files(tmp_path / "1")
    for name, content in json_files(tmp_path / "plain").items():
        assert json.loads(json_files(tmp_path / "5")[name]) == json.loads(content)
    assert json_files(tmp_path / "5")["images.json"] == json_files(tmp_path / "plain")["images.json"]
    assert json_files(tmp_path / "5")["panoptic.json"] == json_files(tmp_path / "plain")["panoptic.json"]


def test_a_run_goes_on_after_damage_and_tries_failed_images_again(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "MOST_PARTS", 2)
    whole = writer_of(tmp_path / "whole")
    whole.join(whole.start({}, True)[0], 0)
    work(whole, range(len(NAMES)))
    whole.finish()
    whole.merge()
    folder = tmp_path / "out"
    for rank, (numbers, broken) in enumerate([([0, 2], ()), ([1, 4, 6], (4,)), ([3, 5], ())]):
        writer = writer_of(folder)
        session, _ = writer.start({"x": 1}, True)
        writer.join(session, rank)
        work(writer, numbers, broken)
        writer._lock.close()  # as when the process dies
        part = folder / f".parts/{session}_{rank}.part"
        if rank == 2:
            part.write_bytes(part.read_bytes()[:-5] + b"\n99\t{}\t\t\t\n6\t\t\t\t\n\xff\xfe\n7\t{")
    writer = writer_of(folder)
    session, finished = writer.start({"x": 1}, True)
    assert np.flatnonzero(finished).tolist() == [0, 1, 2, 3, 6] and len(list(folder.glob(".parts/*.part"))) == 1
    writer.join(session, 0)
    work(writer, np.flatnonzero(~finished).tolist())
    writer.finish()
    assert writer.merge().failed == [] and json_files(folder) == json_files(tmp_path / "whole")


def test_failures_that_are_noted_before_their_batch_is_written_are_merged_in_order(tmp_path):
    writer = writer_of(tmp_path)
    session, _ = writer.start({}, True)
    for process, numbers in enumerate(([2, 3], [2, 3, 4])):  # as of a run and of one that repeats its last batch
        writer.join(session, process)
        writer.fail(3, NAMES[3], "broken")
        for number in numbers:
            if number != 3:
                assert writer.write(number, number, IMAGE, results(number))
        writer.finish()
    assert writer.merge() == (2, ["3.jpg: broken"])
    assert [image["id"] for image in json.loads((tmp_path / "images.json").read_text())["images"]] == [2, 4]


def test_other_settings_are_refused_and_another_process_is_locked_out(tmp_path):
    writer = writer_of(tmp_path)
    session, _ = writer.start({"task": ("panoptic",), "test.tile": None}, True)
    writer.join(session, 0)
    work(writer, [0])
    line = ("from pathlib import Path; from tests.output.test_parts import writer_of; import sys\n"
            "writer_of(Path(sys.argv[1])).start({'task': ('panoptic',), 'test.tile': None}, True)")  # fmt: skip
    other = subprocess.run([sys.executable, "-c", line, str(tmp_path)], capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "expected a folder no other run is using" in other.stderr
    writer._lock.close()
    with pytest.raises(ValueError, match=r'unfinished run in .*\(task: \["panoptic"\]\).*got .task: \["instance"\]'):
        writer_of(tmp_path).start({"task": ("instance",), "test.tile": None}, True)
    assert writer_of(tmp_path).start({"task": ["panoptic"], "test.tile": None}, True)[1].sum() == 1
    assert writer_of(tmp_path).start({"task": ["instance"], "test.tile": None}, False)[1].sum() == 0


def test_memory_of_a_merge_does_not_grow_with_the_images(tmp_path):
    peaks = []
    for count in (2000, 8000):
        names = [str(number) for number in range(count)]
        writer = PartsWriter(tmp_path / str(count), METADATA, False, names, names, TASKS)
        session, _ = writer.start({}, True)
        writer.join(session, 0)
        for number in range(count):
            writer.add(number, number, (5, 5), [{"id": 1, "text": "x" * 500}], [{"counts": "y" * 500}] * 3, TASKS)
            writer.end_batch() if number % 500 == 0 else None
        writer.finish()
        tracemalloc.start()
        assert writer.merge().images == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(json.loads((tmp_path / str(count) / "instances.json").read_text())) == 3 * count
    assert peaks[1] < peaks[0] + 200_000 < 2_000_000, peaks


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 7), st.integers(1, 5))
def test_shares_of_all_processes_have_every_batch_with_an_unfinished_image_once(finished, size, ranks):
    done = np.array(finished, bool)
    shares = [[list(batch) for batch in Share(done, size, rank, ranks)] for rank in range(ranks)]
    batches = [list(range(len(done)))[start : start + size] for start in range(0, len(done), size)]
    assert sorted(chain(*shares)) == [batch for batch in batches if not done[batch].all()]
    assert all(share == sorted(share) for share in shares)
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert sum(Share(done, size, rank, ranks).images for rank in range(ranks)) == sum(map(len, chain(*shares)))
