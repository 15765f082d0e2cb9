"""Synthetic scenes: consistent truth, reproducibility, and hundreds of classes."""

from __future__ import annotations

import numpy as np
import pytest

from maskformer_fast.config import ShapesConfig
from maskformer_fast.core.metadata import VOID
from maskformer_fast.data.datasets.scene import KINDS, signed_distance
from maskformer_fast.data.datasets.shapes import (
    MAX_STUFF,
    MAX_THINGS,
    MIN_AREA,
    MIN_STUFF_AREA,
    ShapesDataset,
    stuff_class,
    thing_class,
)

CONFIGS = {
    "demo": ShapesConfig(train_images=24, val_images=24),
    "hundreds": ShapesConfig(num_things=150, num_stuff=50, size=(97, 130), max_shapes=12, train_images=24),
    "many small": ShapesConfig(size=(160, 128), max_shapes=30, shape_area=(0.003, 0.01), train_images=24),
    "one class": ShapesConfig(num_things=1, num_stuff=1, size=(16, 40), train_images=24),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_truth_is_consistent(name: str) -> None:
    config = CONFIGS[name]
    dataset = ShapesDataset(config, "train")
    assert dataset.metadata.num_classes == config.num_things + config.num_stuff
    void = 0
    for index in range(len(dataset)):
        example = dataset[index]
        assert example.image.shape == (*config.size, 3) and example.image.dtype == np.uint8
        assert example.id_map.shape == config.size and example.id_map.dtype == np.int32
        ids, areas = np.unique(example.id_map[example.id_map != VOID], return_counts=True)
        assert [(s.id, s.area) for s in example.segments] == list(zip(ids, areas, strict=True))
        stuff = [s for s in example.segments if not s.is_thing]
        things = [s for s in example.segments if s.is_thing]
        assert len({s.category for s in stuff}) == len(stuff) >= 1
        assert len(things) <= config.max_shapes
        assert all(dataset.metadata.is_thing[s.category] == s.is_thing for s in example.segments)
        # A shape must first cover MIN_AREA and later ones leave it MIN_AREA.
        assert all(s.area >= MIN_AREA * config.shape_area[0] * example.id_map.size for s in things)
        assert all(s.area >= MIN_STUFF_AREA * example.id_map.size for s in stuff)
        void += np.count_nonzero(example.id_map == VOID)
    assert void < 0.01 * len(dataset) * np.prod(config.size)


def test_scene_is_a_pure_function_of_seed_split_and_index() -> None:
    config = CONFIGS["demo"]
    first, second = ShapesDataset(config, "train"), ShapesDataset(config, "train")
    order = np.random.default_rng(0).permutation(len(first))
    shuffled = {int(index): second[int(index)] for index in order}
    for index in range(len(first)):
        example = first[index]
        np.testing.assert_array_equal(example.image, shuffled[index].image)
        np.testing.assert_array_equal(example.id_map, shuffled[index].id_map)
        assert example.segments == shuffled[index].segments


def test_splits_seeds_and_indices_give_different_scenes() -> None:
    config = CONFIGS["demo"]
    other = ShapesConfig(train_images=24, seed=1)
    datasets = [ShapesDataset(config, "train"), ShapesDataset(config, "val"), ShapesDataset(other, "train")]
    maps = {dataset[index].id_map.tobytes() for dataset in datasets for index in range(24)}
    assert len(maps) == 3 * 24


def test_demo_scenes_have_every_class_overlaps_and_several_shapes() -> None:
    dataset = ShapesDataset(ShapesConfig(), "val")
    examples = [dataset[index] for index in range(100)]
    assert {s.category for e in examples for s in e.segments} == set(range(dataset.metadata.num_classes))
    counts = [sum(s.is_thing for s in e.segments) for e in examples]
    assert min(counts) >= 0 and max(counts) == 6 and 2.5 < np.mean(counts) < 5
    covered = 0  # number of scenes in which two shapes touch
    for example in examples:
        things = [s.id for s in example.segments if s.is_thing]
        left, right = example.id_map[:, :-1], example.id_map[:, 1:]
        covered += int(np.any(np.isin(left, things) & np.isin(right, things) & (left != right)))
    assert covered > 15


def test_the_area_of_shapes_is_as_configured() -> None:
    config = CONFIGS["many small"]
    dataset = ShapesDataset(config, "train")
    examples = [dataset[index] for index in range(len(dataset))]
    areas = np.array([s.area for e in examples for s in e.segments if s.is_thing]) / np.prod(config.size)
    least, largest = config.shape_area
    assert len(areas) > 8 * len(examples)
    assert areas.max() < 1.3 * largest and np.median(areas) < largest  # kinds differ somewhat in their area
    assert areas.max() > 0.8 * largest and areas.min() < least  # partly covered, or cut off by the border
    with pytest.raises(ValueError, match=r"data\.shapes\.shape_area: expected 0 < least <= largest <= 1"):
        ShapesConfig(shape_area=(0.2, 0.1))


def test_the_pixels_of_a_segment_have_the_colour_of_its_class() -> None:
    dataset = ShapesDataset(ShapesConfig(), "val")
    assert dataset.metadata.class_names[0] == "red plain circle"
    assert dataset.metadata.class_names[6] == "green grass"
    circles = 0
    for index in range(60):
        example = dataset[index]
        for segment in example.segments:
            red, green, blue = example.image[example.id_map == segment.id].mean(0)
            if segment.category == 0:
                circles += 1
                assert red > 1.4 * max(green, blue)
            elif segment.category == 6:
                assert green > 1.1 * max(red, blue)
    assert circles > 10


def test_hundreds_of_classes_are_distinct() -> None:
    metadata = ShapesDataset(ShapesConfig(num_things=MAX_THINGS, num_stuff=MAX_STUFF), "train").metadata
    assert len(set(metadata.class_names)) == metadata.num_classes == MAX_THINGS + MAX_STUFF
    assert len({thing_class(i) for i in range(MAX_THINGS)}) == MAX_THINGS
    assert len({stuff_class(i) for i in range(MAX_STUFF)}) == MAX_STUFF
    neighbours = [thing_class(i) for i in range(10)]
    assert len({c.kind for c in neighbours}) == len({c.hue for c in neighbours}) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_have_similar_areas_and_stay_within_the_extent(kind: str) -> None:
    y, x = np.mgrid[-2:2:0.01, -2:2:0.01].astype(np.float32)
    inside = signed_distance(kind, x, y) < 0
    assert 1.5 < inside.sum() * 1e-4 < 3.2
    assert np.hypot(x, y)[inside].max() < 1.57


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="split: expected one of 'train', 'val', got 'test'"):
        ShapesDataset(ShapesConfig(), "test")
    with pytest.raises(ValueError, match=r"data\.shapes\.num_things: expected at most 1200"):
        ShapesDataset(ShapesConfig(num_things=1201), "train")
    with pytest.raises(ValueError, match=r"data\.shapes\.num_stuff: expected at most 192"):
        ShapesDataset(ShapesConfig(num_stuff=193), "train")
    with pytest.raises(IndexError, match=r"expected 0\.\.127, got 128"):
        ShapesDataset(ShapesConfig(), "val")[128]
    with pytest.raises(ValueError, match="kind"):
        signed_distance("blob", np.zeros((2, 2)), np.zeros((2, 2)))
