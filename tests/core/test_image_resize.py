"""Sizes and errors of the torch-free resize; its pixels are tested with the transforms that use it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from maskformer_fast.core.image_resize import resize_array, short_edge_size

IMAGE = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def test_none_keeps_the_image_and_sizes_follow_the_short_edge() -> None:
    assert resize_array(IMAGE, None, 4) is IMAGE
    assert resize_array(IMAGE, 10, 100).shape == (10, 14, 3)
    assert resize_array(IMAGE, 10, 7).shape == (5, 7, 3)
    assert resize_array(IMAGE, (11, 3), 1).shape == (11, 3, 3), "a height and width, whatever the image's shape"


@pytest.mark.parametrize(("short_edge", "max_size"), [(65536, 65536), ((65536, 65536), 1)])
def test_an_input_that_would_fill_all_memory_is_refused(short_edge: int | tuple[int, int], max_size: int) -> None:
    with pytest.raises(ValueError, match="short_edge and max_size: expected an input of at most"):
        resize_array(IMAGE, short_edge, max_size)
    assert short_edge_size(1, 20000, 512, 2048) == (1, 2048)


def test_arrays_that_are_no_images_are_refused() -> None:
    for wrong, message in (
        (IMAGE.astype(np.float32), "image: expected uint8, got float32"),
        ([[1]], "image: expected an array"),
    ):
        with pytest.raises(TypeError, match=message):
            resize_array(wrong, 4, 8)  # type: ignore[arg-type]
    for shape in ((5, 7), (5, 7, 4), (0, 7, 3)):
        with pytest.raises(ValueError, match=r"image: expected shape \[H, W, 3\]"):
            resize_array(np.zeros(shape, np.uint8), 4, 8)


def test_without_pillow_only_a_resize_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert resize_array(IMAGE, None, 4) is IMAGE
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        resize_array(IMAGE, 4, 8)
