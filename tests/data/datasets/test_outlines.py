"""Outlines of COCO's objects: rasterised as pycocotools does, and refused before they take memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from maskformer_fast.data.datasets.outlines import normalise_outline, problem_of, rasterize, usable_polygons
from tests.support.coco_files import uncompressed

masks = hnp.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@settings(max_examples=150, deadline=None)
@given(mask=masks)
def test_run_lengths_agree_with_pycocotools(mask):
    height, width = mask.shape
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [height, width], "counts": compressed["counts"].decode()}
    np.testing.assert_array_equal(rasterize(text, height, width), mask)
    listed = {"size": [height, width], "counts": uncompressed(mask)}
    np.testing.assert_array_equal(rasterize(listed, height, width), mask)


def test_runs_of_several_characters_are_decoded():
    mask = np.zeros((700, 900), bool)  # differences of both signs, encoded in several characters
    mask[100:650, 30:800] = True
    mask[300:310] = False
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [700, 900], "counts": compressed["counts"].decode()}
    np.testing.assert_array_equal(rasterize(text, 700, 900), mask)


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12), height=st.integers(1, 9))
def test_any_encoded_text_gives_a_mask_or_a_value_error(text, height):
    try:
        mask = rasterize({"size": [height, 7], "counts": text}, height, 7)
    except ValueError as error:
        assert "segmentation" in str(error)
    else:
        assert mask.shape == (height, 7)


def test_an_outline_of_many_crossings_of_the_image_is_refused_before_it_takes_memory(tmp_path):
    side = 4000
    zigzag = [value for i in range(20_000) for value in (0 if i % 2 else 2 * side - 1, i % side)]
    with pytest.raises(ValueError, match=r"polygons of at most 4194304 pixels length, got 1599\d{5}"):
        rasterize([zigzag], side, side)


POLYGON = [2, 2, 10, 2, 10, 10, 2, 10]
POINTS = [[2, 2], [10, 2], [10, 10], [2, 10]]
CONTOUR = [[[2, 2]], [[10, 2]], [[10, 10]], [[2, 10]]]
FORMS = {
    "flat": POLYGON, "points": POINTS, "one more list": [[POINTS]], "contours": CONTOUR,
    "a list of contours": [CONTOUR], "texts": [[str(part) for part in POLYGON]],
    "a flat list of texts": [f"{part}.0" for part in POLYGON],
    "points with visibility": [[*point, 2] for point in POINTS],
    "points of texts": [["2", "2"], ["1e1", 2], [10, "10"], [2, 10]],
}  # fmt: skip


@pytest.mark.parametrize("outline", FORMS.values(), ids=FORMS.keys())
def test_the_forms_in_which_tools_write_a_polygon_are_one(outline):
    assert normalise_outline(outline) == [POLYGON] and problem_of([POLYGON], 20, 30) is None


def test_several_polygons_and_other_values_stay_as_they_are():
    assert normalise_outline([POLYGON, [1, 1, 5, 1, 5, 5]]) == [POLYGON, [1, 1, 5, 1, 5, 5]]
    rle = {"size": [2, 2], "counts": [0, 4]}
    assert normalise_outline([rle]) == normalise_outline(rle) == rle
    assert normalise_outline(None) == [] and normalise_outline([[]]) == [[]]
    deep = [[[[[[POLYGON]]]]]]
    with pytest.raises(ValueError, match="pairs of finite numbers"):
        rasterize(usable_polygons(normalise_outline(deep)), 20, 30)


@pytest.mark.parametrize("points", [[2, "x", 9, 2, 9, 9], [2, None, 9, 2], [[2, 2, 1], [9, 2, 1], [9, 9, 1], 3]])
def test_malformed_points_are_not_taken_for_few_points(points):
    outline = normalise_outline([points, POLYGON])
    assert problem_of(outline, 20, 30) is None
    with pytest.raises(ValueError, match="pairs of finite numbers"):
        rasterize(usable_polygons(outline), 20, 30)


@pytest.mark.parametrize("rle", [
    {"size": [4.0, 3.0], "counts": [2.0, 4.0, 6.0]}, {"size": ["4", "3"], "counts": ["2", "4", "6"]},
])  # fmt: skip
def test_run_lengths_may_be_whole_floats_or_texts(rle):
    assert rasterize(rle, 4, 3).T.ravel().tolist() == [False] * 2 + [True] * 4 + [False] * 6


def test_errors_of_run_lengths_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"expected runs of 0 pixels and more, got one of -5"):
        rasterize({"size": [4, 3], "counts": [10, -5, 7]}, 4, 3)
    with pytest.raises(ValueError, match=r"add up to 12 pixels, got 11"):
        rasterize({"size": [4, 3], "counts": [10, 1]}, 4, 3)
    with pytest.raises(ValueError, match=r"text or integers, got \[1\.5\]"):
        rasterize({"size": [4, 3], "counts": [1.5]}, 4, 3)
