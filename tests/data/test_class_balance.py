"""Repeat factor sampling: factors, counted classes, their file, batches as a function of seed and step."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from maskformer_fast.config import ShapesConfig
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.class_balance import (
    cached_presence,
    count_classes,
    present_classes,
    read_presence,
    repeat_factors,
    write_presence,
)
from maskformer_fast.data.datasets.shapes import ShapesDataset
from maskformer_fast.data.loader import TrainSampler, train_loader
from maskformer_fast.structures import Example
from tests.data.test_loader import PartlyBroken, config, take

METADATA = Metadata("m", ("sky", "car", "bus"), (False, True, True), (0, 1, 2), ((0, 0, 0),) * 3)


def test_factors_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    presence = rng.random((200, 7)) < [0.9, 0.3, 0.1, 0.05, 0.01, 0.2, 0.0]
    presence[3] = False
    got = repeat_factors(presence, 0.25)
    shares = [sum(bool(row[c]) for row in presence) / 200 for c in range(7)]
    for row, factor in zip(presence, got, strict=True):
        classes = [max(1.0, math.sqrt(0.25 / shares[c])) for c in range(7) if row[c]]
        assert factor == pytest.approx(max(classes, default=1.0))
    assert got.max() > 2 and got[3] == 1.0 and repeat_factors(presence, 1e-9).tolist() == [1.0] * 200


@pytest.mark.parametrize(("task", "expected"), [("semantic", [1, 1, 1]), ("panoptic", [1, 1, 0]),
                                                ("instance", [0, 1, 0])])
def test_present_classes_have_pixels_and_are_targets(task, expected):
    id_map = np.full((4, 6), VOID, dtype=np.int32)
    id_map[0], id_map[1], id_map[2] = 1, 2, 3
    segments = [SegmentInfo(1, 0, is_thing=False), SegmentInfo(2, 1), SegmentInfo(3, 2, is_crowd=True),
                SegmentInfo(9, 2)]  # the last has no pixel
    image = np.zeros((4, 6, 3), dtype=np.uint8)
    assert present_classes(Example(image, segments, id_map), task, METADATA).tolist() == [bool(e) for e in expected]
    masks = id_map[None] == np.array([1, 2, 3, 9])[:, None, None]
    by_masks = present_classes(Example(image, segments, masks=masks), task, METADATA)
    assert by_masks.tolist() == [bool(e) for e in expected]


def shapes(count=12):
    return ShapesDataset(ShapesConfig(5, 2, size=(40, 56), max_shapes=2, train_images=count), "train")


def test_counts_are_those_of_the_examples_and_kept_in_a_file(tmp_path, monkeypatch, caplog):
    dataset, path = shapes(), tmp_path / "presence.npz"
    expected = np.zeros((12, 7), dtype=bool)
    for index in range(12):
        for segment in dataset[index].segments:
            expected[index, segment.category] = (dataset[index].id_map == segment.id).any()
    for workers in (0, 2):
        np.testing.assert_array_equal(count_classes(dataset, range(3, 9), workers, False, False), expected[3:9])
    np.testing.assert_array_equal(cached_presence(path, dataset, 0, False), expected)

    def fail(*_):
        raise AssertionError("counted again")

    with monkeypatch.context() as patch:
        patch.setattr("maskformer_fast.data.class_balance.count_classes", fail)
        np.testing.assert_array_equal(cached_presence(path, dataset, 0, False), expected)
    assert read_presence(path, shapes(11)) is None  # another data set
    assert not caplog.text
    for content in (b"", path.read_bytes()[:100], b"PK\x03\x04 no archive"):
        path.write_bytes(content)
        assert read_presence(path, dataset) is None and "counting the classes again" in caplog.text
        caplog.clear()
    np.savez(path, fingerprint=np.array("x"), presence=np.array([object()], dtype=object))  # pickled, never loaded
    assert read_presence(path, dataset) is None
    write_presence(path, dataset, expected[:5])  # of another length
    assert read_presence(path, dataset) is None and "packed bits" in caplog.text


def test_broken_examples_have_no_classes_or_stop_the_count():
    dataset = PartlyBroken(shapes(4), [1])
    assert not count_classes(dataset, range(4), 0, True, False)[1].any()
    with pytest.raises(BrokenExampleError):
        count_classes(dataset, range(4), 0, False, False)


def keys(sampler, batches):
    return [key for batch in islice(sampler, batches) for key in batch]


def test_images_come_as_often_as_their_factors():
    repeats = np.array([1.0, 1.0, 2.0, 3.25, 1.5])
    made = keys(TrainSampler(5, 4, 0, repeats=repeats), 600)
    epochs = max(epoch for epoch, _, _ in made)
    counts = Counter((epoch, index) for epoch, index, _ in made if epoch < epochs)
    for index, factor in enumerate(repeats):
        times = [counts[epoch, index] for epoch in range(epochs)]
        assert set(times) <= {math.floor(factor), math.ceil(factor)}
        assert np.mean(times) == pytest.approx(factor, abs=0.15)
    assert len(set(made)) == len(made)  # each time has a number of its own
    first = [index for epoch, index, _ in made if epoch == 0]
    assert first != sorted(first)


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_a_step_is_the_same_wherever_a_run_starts_and_however_it_is_divided(accumulate, world_size):
    repeats = np.array([1.0, 1.2, 2.0, 3.25, 1.5])
    expected = keys(TrainSampler(5, 8, 3, repeats=repeats), 40)
    parts = [iter(TrainSampler(5, 8, 3, accumulate=accumulate, start_step=17, rank=rank, world_size=world_size,
                               repeats=repeats)) for rank in range(world_size)]
    got = [key for _ in range(23 * accumulate) for part in parts for key in next(part)]
    assert got == expected[17 * 8 :]


def test_repeated_images_are_augmented_anew_and_the_first_time_as_without_repeats():
    dataset = shapes(4)
    sampler_repeats = np.array([3.0, 1.0, 1.0, 1.0])
    batches = take(train_loader(dataset, config(batch_size=6), "panoptic", repeats=sampler_repeats), 1)
    images = [image for image, name in zip(batches[0].images, batches[0].image_ids, strict=True)
              if name == dataset[0].image_id]
    assert len(images) == 3 and not any(torch.equal(a, b) for a, b in itertools.pairwise(images))
    plain = take(train_loader(dataset, config(batch_size=4), "panoptic"), 1)[0]
    one = plain.images[plain.image_ids.index(dataset[0].image_id)]
    assert sum(torch.equal(image, one) for image in images) == 1
