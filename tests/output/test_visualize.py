"""Colours go where the segments are, names are readable, and pictures fit their grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.output.visualize import (
    class_rows,
    display_scale,
    draw_instances,
    draw_panoptic,
    draw_semantic,
    draw_truth,
    grid,
)
from maskformer_fast.structures import Example, pack_masks

METADATA = Metadata("t", ("cat", "dog", "sky"), (True, True, False), (1, 2, 3), ((200, 0, 0), (0, 200, 0), (0, 0, 200)))
HEIGHT, WIDTH = 330, 401
GRAY = np.full((HEIGHT, WIDTH, 3), 100, dtype=np.uint8)


def scene() -> tuple[np.ndarray, list[SegmentInfo]]:
    id_map = np.full((HEIGHT, WIDTH), 4, dtype=np.int32)
    id_map[20:120, 20:120], id_map[20:120, 120:220], id_map[200:300, 300:400] = 1, 2, 3
    id_map[310:] = VOID
    return id_map, [SegmentInfo(1, 0), SegmentInfo(2, 0), SegmentInfo(3, 1), SegmentInfo(4, 2, is_thing=False)]


def instances(scores: list[float], labels: list[int], masks: np.ndarray) -> InstanceResult:
    return InstanceResult(torch.tensor(labels), torch.tensor(scores), pack_masks(torch.from_numpy(masks)),
                          torch.zeros(len(labels), 4), (masks.shape[1], masks.shape[2]))


@pytest.mark.parametrize(
    ("low", "high", "shape"),
    [(-1, 9, (7, 5)), (3, 4, (1, 1)), (-1, 0, (4, 4)), (0, 800, (60, 50)), (0, 3, (0, 0))],
)
def test_rows_are_those_of_the_sorted_classes(low: int, high: int, shape: tuple[int, int]) -> None:
    labels = np.random.default_rng(0).integers(low, high, shape).astype(np.int16)
    classes, rows = class_rows(labels)
    assert classes == [int(label) for label in np.unique(labels) if label != VOID]
    np.testing.assert_array_equal(np.append(classes, VOID)[rows], labels)


def test_semantic_pictures_have_the_classes_colours() -> None:
    id_map, segments = scene()
    example = Example(GRAY.copy(), segments, id_map=id_map)
    labels = example.semantic_map()
    drawn = draw_semantic(example.image, labels, METADATA)
    assert drawn.shape == GRAY.shape and drawn.dtype == np.uint8
    for (y, x), channel in {(30, 30): 0, (110, 210): 0, (290, 310): 1, (150, 10): 2}.items():
        assert drawn[y, x].argmax() == channel and drawn[y, x, channel] > 140, (y, x)
    assert drawn[325, 5].max() < 60, "void is darker than the image"
    assert (example.image == GRAY).all(), "the image is left as it is"
    np.testing.assert_array_equal(draw_semantic(GRAY, torch.from_numpy(labels), METADATA), drawn)
    np.testing.assert_array_equal(draw_truth(example, METADATA, "semantic"), drawn)
    clean = np.where(labels == VOID, 2, labels).astype(np.uint8)
    np.testing.assert_array_equal(draw_semantic(GRAY, SemanticResult(torch.from_numpy(clean)), METADATA),
                                  draw_semantic(GRAY, clean, METADATA))


def test_names_are_readable() -> None:
    """Somewhere in every segment, white letters stand on a box much darker than they are."""
    id_map, segments = scene()
    drawn = draw_panoptic(GRAY, PanopticResult(torch.from_numpy(id_map), segments), METADATA).astype(int)
    for segment in segments:
        # Away from the white outlines.
        ys, xs = np.nonzero(id_map == segment.id)
        part = drawn[ys.min() + 3 : ys.max() - 2, xs.min() + 3 : xs.max() - 2]
        inside = (id_map == segment.id)[ys.min() + 3 : ys.max() - 2, xs.min() + 3 : xs.max() - 2]
        letters, box = (part.min(-1) > 230) & inside, (part.max(-1) < 70) & inside
        assert letters.sum() > 10 and box.sum() > 40, segment
    unnamed = Metadata("t", (" ", " ", " "), METADATA.is_thing, METADATA.category_ids, METADATA.colors)
    other = draw_panoptic(GRAY, PanopticResult(torch.from_numpy(id_map), segments), unnamed)
    assert (other != drawn).any(), "the letters are the names'"


def test_things_of_one_class_differ_and_are_outlined() -> None:
    id_map, segments = scene()
    drawn = draw_panoptic(GRAY, PanopticResult(torch.from_numpy(id_map), segments), METADATA).astype(int)
    assert np.abs(drawn[30, 30] - drawn[30, 130]).sum() > 40
    assert drawn[30, 120].min() > 250, "a white line between the two"
    many = [SegmentInfo(i, 0) for i in range(1, 9)]
    stripes = np.repeat(np.arange(1, 9, dtype=np.int32), 50)[None].repeat(HEIGHT, 0)
    drawn = draw_panoptic(GRAY[:, :400], PanopticResult(torch.from_numpy(stripes), many), METADATA).astype(int)
    neighbours = [np.abs(drawn[10, 25 + 50 * i] - drawn[10, 75 + 50 * i]).sum() for i in range(7)]
    assert min(neighbours) > 25, neighbours


def test_instances_are_drawn_with_the_best_on_top() -> None:
    masks = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    masks[0, :100, :100] = masks[1, 50:200, 50:200] = masks[2, 250:, 300:] = True
    result = instances([0.9, 0.6, 0.4], [0, 1, 1], masks)
    drawn = draw_instances(GRAY, result, METADATA)
    assert (drawn[260, 310] == GRAY[0, 0]).all(), "below the score"
    assert (draw_instances(GRAY, result, METADATA, min_score=0.3)[260, 310] != GRAY[0, 0]).any()
    assert drawn[5, 90].argmax() == 0 and drawn[190, 60].argmax() == 1
    assert drawn[60, 60].argmax() == 0, "the better one is on top"
    # Whatever the order they come in.
    flipped = instances([0.6, 0.9], [1, 0], masks[[1, 0]])
    np.testing.assert_array_equal(draw_instances(GRAY, flipped, METADATA), drawn)
    none = instances([], [], masks[:0])
    np.testing.assert_array_equal(draw_instances(GRAY, none, METADATA), GRAY)
    empty = instances([0.9], [0], np.zeros((1, HEIGHT, WIDTH), bool))
    np.testing.assert_array_equal(draw_instances(GRAY, empty, METADATA), GRAY)


def test_truth_is_drawn_for_every_task() -> None:
    id_map, segments = scene()
    from_map = Example(GRAY, segments, id_map=id_map)
    from_masks = Example(GRAY, segments, masks=id_map[None] == np.array([1, 2, 3, 4])[:, None, None])
    drawn = draw_truth(from_map, METADATA, "instance")
    assert (drawn[150, 10] == GRAY[0, 0]).all(), "stuff is no instance"
    assert drawn[30, 30].argmax() == 0 and drawn[290, 310].argmax() == 1
    np.testing.assert_array_equal(draw_truth(from_masks, METADATA, "instance"), drawn)
    np.testing.assert_array_equal(draw_truth(from_masks, METADATA, "semantic"),
                                  draw_truth(from_map, METADATA, "semantic"))
    np.testing.assert_array_equal(draw_truth(from_map, METADATA, "panoptic"),
                                  draw_panoptic(GRAY, PanopticResult(torch.from_numpy(id_map), segments), METADATA))
    assert draw_truth(from_masks, METADATA, "panoptic").shape == GRAY.shape
    nothing = Example(GRAY, [], id_map=np.full((HEIGHT, WIDTH), VOID, dtype=np.int32))
    for task in ("semantic", "panoptic", "instance"):
        assert draw_truth(nothing, METADATA, task).shape == GRAY.shape
    with pytest.raises(ValueError, match="task"):
        draw_truth(nothing, METADATA, "depth")  # type: ignore[arg-type]


def test_tiny_images_are_enlarged() -> None:
    assert display_scale((64, 64)) == 5 and display_scale((320, 100)) == 1 and display_scale((1024, 2048)) == 1
    image = np.random.default_rng(0).integers(0, 256, (7, 40, 3), dtype=np.uint8)
    drawn = draw_semantic(image, np.zeros((7, 40), dtype=np.int64), METADATA)
    assert drawn.shape == (56, 320, 3)
    assert draw_semantic(image[:1, :1], np.zeros((1, 1), dtype=np.int64), METADATA).shape == (320, 320, 3)


def test_grid_places_pictures_under_their_titles() -> None:
    rng = np.random.default_rng(0)
    tiny, plain = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 32), (330, 350)))
    huge = np.zeros((1000, 2000, 3), dtype=np.uint8)
    sheet = grid([[tiny, plain], [plain, huge]], ["image", "truth"])
    assert sheet.dtype == np.uint8
    header = sheet.shape[0] - (330 + 384 + 3 * 6)  # tiny -> 320, huge -> 384 x 768
    assert sheet.shape[1] == 350 + 768 + 3 * 6 and 20 < header < 80
    enlarged = tiny.repeat(10, 0).repeat(10, 1)
    y, x = header + 6 + 5, 6 + 15
    np.testing.assert_array_equal(sheet[y : y + 320, x : x + 320], enlarged)
    assert (sheet[:header] < 128).any(), "the titles are there"


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected 2 pictures in each row"):
        grid([[GRAY, GRAY], [GRAY]], ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        grid([], ["a"])
    id_map, segments = scene()
    with pytest.raises(ValueError, match="labels: expected the image's size"):
        draw_semantic(GRAY, id_map[:-1], METADATA)
    with pytest.raises(ValueError, match=r"labels: expected -1..2, got -1..4"):
        draw_semantic(GRAY, id_map, METADATA)
    with pytest.raises(ValueError, match="id_map: expected the image's size"):
        draw_panoptic(GRAY[:-1], PanopticResult(torch.from_numpy(id_map), segments), METADATA)
    with pytest.raises(ValueError, match="result: expected the image's size"):
        draw_instances(GRAY[:-1], instances([0.9], [0], id_map[None] == 1), METADATA)
    with pytest.raises(ValueError, match="image: expected uint8"):
        draw_semantic(GRAY[..., 0], id_map, METADATA)


def test_a_track_has_its_shade_whatever_its_place_among_the_segments() -> None:
    id_map, segments = scene()
    result = PanopticResult(torch.from_numpy(id_map), segments)
    turned = PanopticResult(torch.from_numpy(id_map), segments[::-1])
    first = draw_panoptic(GRAY, result, METADATA, [7, 8, 9, 10])
    again = draw_panoptic(GRAY, turned, METADATA, [10, 9, 8, 7])
    at = (25, 25), (25, 140), (290, 310), (280, 20)
    assert all((first[place] == again[place]).all() for place in at)
    assert len({tuple(first[place]) for place in at}) == 4
    assert (first[280, 20] == draw_panoptic(GRAY, result, METADATA)[280, 20]).all(), "stuff has its class's colour"
    packed = np.stack([id_map == 1, id_map == 2])
    one = draw_instances(GRAY, instances([0.9, 0.8], [0, 0], packed), METADATA, tracks=[7, 8])
    assert (one[25, 25] == first[25, 25]).all() and (one[25, 140] == first[25, 140]).all()
