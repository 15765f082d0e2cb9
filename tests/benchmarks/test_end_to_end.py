"""The benchmark from image files to label files, on images that take no time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import end_to_end
from benchmarks.end_to_end import SIDES, THEIRS


@pytest.mark.no_cover
def test_both_sides_label_the_same(tmp_path):
    files = end_to_end.prepare_images(None, 1, tmp_path / "images")
    torch.manual_seed(0)
    end_to_end.make_network(tmp_path / "network", 19, "confident", files)
    threads = torch.get_num_threads()
    try:
        sides = end_to_end.measure(tmp_path / "network", files, tmp_path / "labels")
    finally:
        torch.set_num_threads(threads)
    assert set(sides) == set(SIDES) and sides[THEIRS]["identical_labels"] == 1
    assert sides["ours, float32"]["identical_labels_in_their_order"] > 0.999
    assert sides["ours, float32"]["identical_labels"] > 0.8  # classes meet at other pixels, as ours resize once
    labels = np.array(Image.open(tmp_path / "labels" / "ours, float32" / "semantic" / "000.png"))
    assert labels.shape == (512, 512) and len(np.unique(labels)) > 3
    stages = sides["ours, float32"]["stages_ms"]
    assert list(stages) == [
        "decode", "resize", "normalize", "backbone", "pixel_decoder", "transformer", "postprocess", "write"
    ]  # fmt: skip
    assert sum(stages.values()) == pytest.approx(sides["ours, float32"]["milliseconds"], rel=0.2)


def test_photographs_become_squares(tmp_path):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    for name in ("b.png", "a.png"):
        wide.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    files = end_to_end.prepare_images(tmp_path, 2, tmp_path / "out")
    for file in files:
        pixels = np.array(Image.open(file))
        assert pixels.shape == (512, 512, 3)
        assert (abs(pixels[:, 100:400].astype(int) - (0, 0, 255)) < 20).all()  # JPEG's colours bleed at the edges
    with pytest.raises(ValueError, match="images: expected a folder with at least 9 images, got .4 in "):
        end_to_end.prepare_images(tmp_path, 9, tmp_path / "more")


def test_rows_say_ratio_memory_and_goal():
    milliseconds = (400.0, 250.0, 800.0, 600.0)
    sides = {name: {"milliseconds": ms, "images_per_second": 1e3 / ms, "identical_labels": 1.0}
             for name, ms in zip(SIDES, milliseconds, strict=True)}  # fmt: skip
    peaks = dict(zip(SIDES, (500.0, 900.0, 800.0, 700.0), strict=True))
    row = end_to_end.build_row(150, "random", sides, peaks)
    assert [goal["goal"] for goal in row["goals"]] == [1.6, 2.6]
    assert [goal["ratio"] for goal in row["goals"]] == [2.0, 3.2]
    assert [goal["reached"] for goal in row["goals"]] == [True, False]  # the second takes more memory than theirs
    lines = end_to_end.format_rows([row]).splitlines()
    assert lines[0].split() == ["network", "side", "ms", "images/s", "ratio", "goal", "MiB", "same", "labels"]
    assert lines[1].split()[-6:] == ["400", "2.50", "2.00", "1.6", "500", "1.00000"]
    assert not end_to_end.build_row(19, "random", sides, peaks)["goals"]
