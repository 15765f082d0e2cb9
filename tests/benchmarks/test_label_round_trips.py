"""The study of labels' round trips, and its record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import label_round_trips as study
from tests.support.paths import ROOT


def test_a_reader_that_loses_pixels_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    masks = study.true_masks(study.RoundTripOptions(1))
    assert len(masks[0]) > 2 and masks[0].any((1, 2)).all()
    assert study.write_labels(tmp_path, masks, 0.0) > study.write_labels(tmp_path, masks, 2.0)
    study.write_labels(tmp_path, masks, 0.0)
    row = study.compare(masks, study.by_our_reader("yolo", "yolo"), tmp_path / "labels")
    assert row == {"objects": len(masks[0]), "exact": len(masks[0]), "mean_iou": 1.0, "min_iou": 1.0}
    moved = study.compare(masks, lambda labels, number: np.roll(masks[number], 1, 2), tmp_path / "labels")
    assert moved["exact"] == 0 and 0 < moved["min_iou"] < moved["mean_iou"] < 1
    with pytest.raises(ValueError, match="objects: expected"):
        study.compare(masks, lambda labels, number: masks[number][1:], tmp_path / "labels")


def test_the_record_has_what_the_page_says() -> None:
    content = json.loads((ROOT / "benchmarks/results/label_round_trips.json").read_text())
    rows = {(row["tolerance"], row["format"], row["reader"]): row for row in content["rows"]}
    assert {(form, tool) for _, form, tool in rows} == set(study.READERS)
    page = (ROOT / "docs/labels.md").read_text()
    for tolerance in study.TOLERANCES:
        assert f"{rows[tolerance, 'COCO', 'pycocotools']['corners']:,}" in page
        for form, tool in study.READERS:
            row = rows[tolerance, form, tool]
            is_drawn = tool in ("ultralytics", "labelme")
            assert row["objects"] == 90 and (row["exact"] == 90) == (tolerance < 1 and not is_drawn)
            if row["exact"] == 0:
                assert f"{row['mean_iou']:.3f} ({row['min_iou']:.3f})" in page
