"""Files of results: which image each is of, results that others' tools read, and images that fail."""

from __future__ import annotations

import contextlib
import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult, SemanticResult
from maskformer_fast.output import writer as writer_module
from maskformer_fast.output.writer import ResultWriter
from maskformer_fast.structures import pack_masks

METADATA = Metadata("x", ("a", "b"), (True, True), (7, 9), ((0, 0, 0), (9, 9, 9)))
IMAGE = np.zeros((64, 80, 3), np.uint8)


def labels(value: int) -> SemanticResult:
    return SemanticResult(torch.full((64, 80), value, dtype=torch.uint8))


def instance(masks: np.ndarray, scores: list[float]) -> InstanceResult:
    packed = pack_masks(torch.from_numpy(masks))
    boxes = torch.tensor([[0.0, 0, 80, 64]]).repeat(len(masks), 1)
    return InstanceResult(torch.zeros(len(masks), dtype=torch.int64), torch.tensor(scores), packed, boxes, (64, 80))


def test_the_list_of_images_says_which_file_each_result_is_of(tmp_path: Path) -> None:
    names = ["../../out.png", "a.jpg", "a.png"]
    writer = ResultWriter(tmp_path / "deep" / "results", METADATA, True, names)
    for number in range(3):
        assert writer.write(number, f"id {number}", IMAGE, {"semantic": labels(number % 2)})
    writer.close()
    listed = json.loads((tmp_path / "deep/results/images.json").read_text())
    assert [(image["id"], image["file_name"]) for image in listed["images"]] == [
        ("id 0", "../../out.png"), ("id 1", "a.jpg"), ("id 2", "a.png")]  # fmt: skip
    folder = tmp_path / "deep/results/semantic"
    assert {path.stem for path in folder.iterdir()} == {image["result"] for image in listed["images"]}
    assert not writer.failed
    assert [path.name for path in tmp_path.iterdir()] == ["deep"], "nothing is written outside"


def test_instance_files_give_pycocotools_the_sizes_of_the_masks(tmp_path: Path) -> None:
    coco_api = pytest.importorskip("pycocotools.coco")
    masks = np.zeros((2, 64, 80), bool)
    masks[0, range(64), range(64)] = True  # 64 pixels, whose box has 4096
    masks[1, :4, :6] = True
    writer = ResultWriter(tmp_path, METADATA, False, ["cat.jpg"])
    writer.write(0, 1, IMAGE, {"instance": instance(masks, [0.5, 0.25])})
    writer.close()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_api.COCO(str(tmp_path / "images.json"))
        results = truth.loadRes(str(tmp_path / "instances.json"))
    assert truth.imgs[1]["file_name"] == "cat.jpg"
    assert [entry["area"] for entry in results.loadAnns(results.getAnnIds())] == [64, 24]


def test_an_image_that_fails_is_listed_and_the_others_are_written(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, METADATA, False, ["a.jpg", "b.jpg", "c.jpg"])
    assert not writer.write(0, 1, IMAGE, RuntimeError("out of memory"))
    assert not writer.write(1, 2, IMAGE, {"semantic": SemanticResult(torch.full((64, 80), 0.5))})
    assert writer.write(2, 3, IMAGE, {"semantic": labels(1)})
    writer.close()
    assert [entry["file_name"] for entry in json.loads((tmp_path / "images.json").read_text())["images"]] == ["c.jpg"]
    assert writer.failed[0] == "a.jpg: RuntimeError: out of memory" and writer.failed[1].startswith("b.jpg: TypeError")


def test_a_full_disk_ends_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(writer_module, "write_index_png", full)
    writer = ResultWriter(tmp_path, METADATA, False, ["a.jpg"])
    with pytest.raises(OSError, match="disk full"):
        writer.write(0, 1, IMAGE, {"semantic": labels(1)})


def test_file_names_that_are_not_utf_8_are_written_as_they_are(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, METADATA, False, ["x\udcff.png"])
    writer.write(0, 1, IMAGE, {"semantic": labels(1)})
    writer.close()
    content = (tmp_path / "images.json").read_bytes()
    assert json.loads(content)["images"][0]["file_name"] == "x\udcff.png" and content.decode("utf-8")
    assert (tmp_path / "semantic" / "x_.png").is_file()


def test_a_list_of_images_of_another_origin_is_kept(tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text("[]")
    with pytest.raises(ValueError, match=r"output: expected a folder without another images\.json.*got '.*json'"):
        ResultWriter(tmp_path, METADATA, False, ["a.jpg"])
    assert (tmp_path / "images.json").read_text() == "[]"


@pytest.mark.parametrize("name", ["instances.json", "panoptic.json", "semantic/a.png", "overlays/a.txt"])
def test_files_of_a_result_s_name_from_elsewhere_are_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / "semantic").mkdir()  # empty folders do not matter
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("truth")
    with pytest.raises(ValueError, match=rf"a folder without another {name.partition('/')[0]}; choose an empty one"):
        ResultWriter(tmp_path, METADATA, False, ["a.jpg"])
    (tmp_path / name).unlink()
    writer = ResultWriter(tmp_path, METADATA, False, ["a.jpg"])
    assert writer.write(0, 1, IMAGE, {"semantic": labels(1)}) and ResultWriter(tmp_path, METADATA, False, ["b.jpg"])


def test_an_output_that_is_a_file_or_below_one_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below/it"):
        with pytest.raises(ValueError, match="output: expected a folder, which may be new, got .*file"):
            ResultWriter(folder, METADATA, False, ["a"])
