"""Outlines of COCO's objects: rasterised as pycocotools does, and refused before they take memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from maskformer_fast.data.datasets.outlines import rasterize
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
