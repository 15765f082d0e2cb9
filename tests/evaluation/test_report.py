"""Report of an evaluation: files, the worst images, escaping, ranks, and the command."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast import evaluate
from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.core.results import SemanticResult
from maskformer_fast.evaluation import report as report_module
from maskformer_fast.evaluation.report import Report
from maskformer_fast.output.report_page import confusion_picture, reduced_jpeg
from maskformer_fast.structures import Example
from maskformer_fast.training.trainer import Trainer
from tests.training.test_trainer import TINY, tiny

HOSTILE = '<script>alert("x")</script>'
METADATA = Metadata("m", ("sky", HOSTILE, "=cmd|x"), (False, True, True), (0, 1, 2), ((9, 9, 9),) * 3)


def images(count, side=40):
    """Examples and results; image n has about n / count of its pixels wrong."""
    rng = np.random.default_rng(0)
    for number in rng.permutation(count):
        truth = rng.integers(0, 2, (side, side + 10)).astype(np.int32)
        labels = np.where(rng.random(truth.shape) < number / count, 2, truth)
        segments = [SegmentInfo(label, label, is_thing=bool(label)) for label in range(2)]
        example = Example(rng.integers(256, size=(*truth.shape, 3), dtype=np.uint8), segments, truth, None, int(number))
        yield int(number), example, {"semantic": SemanticResult(torch.from_numpy(labels.astype(np.int64)))}


def filled(count, pick=lambda number: True):
    report = Report(("semantic",), METADATA, "semantic")
    for number, example, results in images(count):
        if pick(number):
            report.add(number, f"{HOSTILE}{number}.jpg", example, results)
    return report


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.names, self.pictures = [], [], []
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._heading = tag == "h3"
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])

    def handle_data(self, data):
        if self._heading:
            self.names.append(data)
            self._heading = False


def written(report, folder):
    metrics = {"miou": 0.5, "semantic": {"miou": 0.5, "boundary_iou": None}}
    report.write(folder, metrics)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_worst_images_are_on_the_page_in_order_and_names_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "WORST", 5)
    files = written(filled(20), tmp_path / "report")
    assert files.keys() == {"index.html", "metrics.json", "per_image.csv", "per_image.json", "confusion.csv",
                            "confusion.json", "confusion.png"}
    rows = json.loads(files["per_image.json"])
    assert [row["index"] for row in rows] == list(range(20))
    worst = sorted(rows, key=lambda row: (row["semantic/miou"], row["index"]))[:5]
    page = Page(files["index.html"].decode())
    assert [name.rpartition(": ")[0] for name in page.names] == [row["file_name"] for row in worst]
    assert "script" not in page.tags and all(source.startswith("data:image/") for source in page.pictures)
    assert len(page.pictures) == 1 + 5 * 3
    for source in page.pictures[1:]:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert picture.format == "JPEG" and max(picture.size) <= 320
    assert not re.search(r"(src|href)=\"(?!data:)", files["index.html"].decode())


def test_scores_and_confusion_are_those_of_each_image_and_all(tmp_path):
    report, total = filled(8), np.zeros((3, 3), dtype=np.int64)
    files = written(report, tmp_path)
    rows = {row["index"]: row for row in json.loads(files["per_image.json"])}
    for number, example, results in images(8):
        labels = results["semantic"].labels.numpy()
        counts = np.array([[((example.id_map == t) & (labels == p)).sum() for p in range(3)] for t in range(3)])
        ious = [counts[k, k] / (counts[k].sum() + counts[:, k].sum() - counts[k, k]) for k in range(3)
                if counts[k].sum() + counts[:, k].sum()]
        assert rows[number]["semantic/miou"] == pytest.approx(np.mean(ious))
        assert rows[number]["semantic/pixel_accuracy"] == pytest.approx(np.trace(counts) / counts.sum())
        total += counts
    confusion = json.loads(files["confusion.json"])
    assert confusion["pixels"] == total.tolist()
    assert confusion["normalised"][0] == pytest.approx((total[0] / total[0].sum()).tolist(), abs=1e-6)
    assert confusion["normalised"][2] == [0.0, 0.0, 0.0]  # no pixel of this class
    table = list(csv.reader(io.StringIO(files["confusion.csv"].decode())))
    assert table[0] == ["truth \\ prediction", "sky", HOSTILE, "'=cmd|x"]  # no formula for a spreadsheet
    assert [[int(cell) for cell in row[1:]] for row in table[1:]] == total.tolist()
    in_csv = list(csv.DictReader(io.StringIO(files["per_image.csv"].decode())))
    assert [float(row["semantic/miou"]) for row in in_csv] == [rows[n]["semantic/miou"] for n in range(8)]


def test_reports_of_ranks_merge_to_that_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "WORST", 6)
    merged = filled(20, lambda number: number % 3 == 0)
    for remainder in (1, 2):
        part = filled(20, lambda number, remainder=remainder: number % 3 == remainder)
        assert len(part.worst) == 6
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert written(merged, tmp_path / "merged") == written(filled(20), tmp_path / "one")
    assert merged.boundary_metrics() == filled(20).boundary_metrics()


def test_pictures_are_bounded_whatever_the_images():
    assert max(Image.open(io.BytesIO(reduced_jpeg(np.zeros((2000, 900, 3), np.uint8)))).size) == 320
    for classes in (1, 2, 19, 60, 61, 847):
        counts = np.random.default_rng(0).integers(0, 9, (classes, classes))
        picture = confusion_picture(counts, [f"class\n{n}" for n in range(classes)])
        assert max(picture.shape) <= 1110 and picture.dtype == np.uint8
    picture = confusion_picture(np.diag(np.arange(1, 101)), ["x"] * 100)
    assert (picture[4, 4] < 100).all() and (picture[4, 20] == 255).all()


def test_the_command_writes_a_report_of_all_tasks(tmp_path, capsys):
    Trainer(tiny(tmp_path / "run", solver={"max_steps": 1})).run()
    folder = tmp_path / "out" / "report"
    arguments = [str(tmp_path / "run"), "--task", "semantic", "panoptic", "instance", "--device", "cpu"]
    assert evaluate.main([*arguments, "--report", str(folder), "--output", str(tmp_path / "m.json")]) == 0
    assert str(folder / "index.html") in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == json.loads((tmp_path / "m.json").read_text())
    assert {"boundary_iou", "per_class_boundary_iou"} <= metrics["semantic"].keys()
    assert {"boundary_ap", "boundary_ap50", "per_class_boundary_ap"} <= metrics["instance"].keys()
    rows = json.loads((folder / "per_image.json").read_text())
    assert len(rows) == TINY.data.shapes.val_images
    assert {"semantic/miou", "panoptic/pq", "instance/ap"} <= rows[0].keys()
    page = Page((folder / "index.html").read_text())
    assert len(page.pictures) == 1 + len(page.names) * 5
    without = tmp_path / "plain.json"
    assert evaluate.main([*arguments, "--output", str(without)]) == 0
    plain = json.loads(without.read_text())
    assert plain["miou"] == metrics["miou"] and "boundary_iou" not in plain["semantic"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="report: expected a folder, not a file"):
        evaluate.evaluate(replace(evaluate.EvaluateOptions("x"), report=str(tmp_path / "file")))
