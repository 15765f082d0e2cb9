"""Copy-paste: against a naive composition pixel by pixel, both kinds of truth, determinism of batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast.config import AugmentConfig, ShapesConfig
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.copy_paste import paste_objects
from maskformer_fast.data.datasets.shapes import ShapesDataset
from maskformer_fast.data.loader import train_loader
from maskformer_fast.data.transforms import TrainTransform
from maskformer_fast.structures import Example, unpack_masks
from tests.data.test_loader import PartlyBroken, config, take

METADATA = Metadata("m", ("sky", "car", "bus"), (False, True, True), (0, 1, 2), ((0, 0, 0),) * 3)


def example(rng, size, things, kind, crowd=False):
    """Random image; the truth has one stuff segment below, void pixels, and things that overlap in ``masks``."""
    image = rng.integers(256, size=(*size, 3), dtype=np.uint8)
    segments = [SegmentInfo(3 * number + 7, int(rng.integers(1, 3)), is_crowd=crowd and number == 0)
                for number in range(things)]
    if kind == "masks":
        masks = np.zeros((things, *size), dtype=bool)
        for mask in masks:
            top, left = (int(rng.integers(side - 3)) for side in size)
            mask[top : top + rng.integers(2, size[0]), left : left + rng.integers(2, size[1])] = True
        return Example(image, segments, masks=masks)
    id_map = np.where(rng.random(size) < 0.1, VOID, 3).astype(np.int32)
    for segment in segments:
        top, left = (int(rng.integers(side - 3)) for side in size)
        id_map[top : top + rng.integers(2, size[0]), left : left + rng.integers(2, size[1])] = segment.id
    return Example(image, [SegmentInfo(3, 0, is_thing=False), *segments], id_map=id_map)


def naive(target, source, scale_range, flip, rng):
    """The same composition by loops over pixels; draws come in the documented order."""
    jitter = rng.uniform(*scale_range)
    (height, width), (rows, columns) = source.size, target.size
    scale = min(rows * jitter / height, columns * jitter / width)
    big = max(1, round(height * scale)), max(1, round(width * scale))
    cut = min(big[0], rows), min(big[1], columns)
    y0, x0 = int(rng.integers(big[0] - cut[0] + 1)), int(rng.integers(big[1] - cut[1] + 1))
    steps = height / big[0], width / big[1]
    box = (x0 * steps[1], y0 * steps[0], min(width, (x0 + cut[1]) * steps[1]), min(height, (y0 + cut[0]) * steps[0]))
    image = Image.fromarray(source.image)
    if big != source.size or cut != big:
        image = image.resize(cut[::-1], Image.Resampling.BILINEAR, box=box)
    image = np.asarray(image)
    truth = source.segment_masks(source.segments)
    masks = np.zeros((len(truth), *cut), dtype=bool)
    for y in range(cut[0]):
        for x in range(cut[1]):
            at = min(int(box[1] + (y + 0.5) * ((box[3] - box[1]) / cut[0])), height - 1), \
                 min(int(box[0] + (x + 0.5) * ((box[2] - box[0]) / cut[1])), width - 1)
            masks[:, y, x] = truth[:, at[0], at[1]]
    if flip and rng.random() < 0.5:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
    y1, x1 = int(rng.integers(rows - cut[0] + 1)), int(rng.integers(columns - cut[1] + 1))
    seen = [n for n, segment in enumerate(source.segments)
            if segment.category > 0 and not segment.is_crowd and masks[n].any()]
    result = {(segment.category, segment.id): set(zip(*np.nonzero(mask), strict=True))
              for segment, mask in zip(target.segments, target.segment_masks(target.segments), strict=True)}
    pixels = target.image.copy()
    if seen:
        keep = rng.random(len(seen)) < 0.5
        chosen = [n for n, kept in zip(seen, keep, strict=True) if kept]
        chosen = chosen or [seen[int(rng.integers(len(seen), size=1)[0])]]
        covered, pasted = set(), []
        for n in chosen:
            place = {(y + y1, x + x1) for y, x in zip(*np.nonzero(masks[n]), strict=True)}
            if target.id_map is not None:
                pasted = [(category, old - place) for category, old in pasted]
            pasted.append((source.segments[n].category, place))
            covered |= place
        for y, x in covered:
            pixels[y, x] = image[y - y1, x - x1]
        result = {key: place - covered for key, place in result.items()}
        result |= {(category, -n): place for n, (category, place) in enumerate(pasted, 1)}
    return pixels, sorted((key[0], sorted(place)) for key, place in result.items() if place or not seen)


@pytest.mark.parametrize("kind", ["masks", "id_map"])
@pytest.mark.parametrize("scale_range", [(0.1, 2.0), (0.3, 0.5), (1.5, 2.5), (1.0, 1.0)])
def test_the_composition_is_that_of_a_loop_over_pixels(kind, scale_range):
    dropped = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        target = example(rng, (18, 25), int(rng.integers(0, 5)), kind)
        source = example(rng, (21, 16), int(rng.integers(0, 4)), kind, crowd=True)
        transform = TrainTransform(AugmentConfig(flip=seed % 2 == 0), "instance", METADATA)
        before = target.image.copy(), target.segment_masks(target.segments)
        got = paste_objects(target, source, transform, scale_range, METADATA, np.random.default_rng(seed))
        pixels, segments = naive(target, source, scale_range, seed % 2 == 0, np.random.default_rng(seed))
        np.testing.assert_array_equal(got.image, pixels)
        places = [sorted(zip(*np.nonzero(mask), strict=True)) for mask in got.segment_masks(got.segments)]
        assert sorted(zip([s.category for s in got.segments], places, strict=True)) == segments
        assert len({segment.id for segment in got.segments}) == len(got.segments)
        # the arguments stay as they were
        np.testing.assert_array_equal(target.image, before[0])
        np.testing.assert_array_equal(target.segment_masks(target.segments), before[1])
        dropped += not {segment.id for segment in target.segments} <= {segment.id for segment in got.segments}
    assert dropped or kind == "masks" or scale_range[1] < 1.0  # some objects are covered completely


def pasting(share, task="panoptic", **changes):
    made = config(**changes)
    augment = replace(made.data.augment, copy_paste=share)
    return replace(made, data=replace(made.data, augment=augment, task=task))


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_batches_are_a_function_of_seed_and_step(task):
    dataset = ShapesDataset(ShapesConfig(size=(40, 56), train_images=10), "train")
    batches = take(train_loader(dataset, pasting(0.7), task), 6)
    for loader, first in (
        (train_loader(dataset, pasting(0.7, workers=2), task), 0), (train_loader(dataset, pasting(0.7), task, 3), 3),
    ):  # fmt: skip
        for one, other in zip(batches[first:], take(loader, 6 - first), strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.targets.masks, other.targets.masks)
            assert one.image_ids == other.image_ids
    plain = take(train_loader(dataset, pasting(0.0), task), 6)
    changed = [not torch.equal(a, b) for one, other in zip(batches, plain, strict=True)
               for a, b in zip(one.images, other.images, strict=True)]
    assert 0.4 < sum(changed) / len(changed) < 0.95  # the others are those without copy-paste
    if task == "panoptic":
        for batch in batches:
            masks = unpack_masks(batch.targets.masks, batch.images.shape[3])
            assert masks.sum(1).max() == 1  # panoptic targets do not overlap


def test_a_broken_source_is_reported_or_skipped():
    dataset = PartlyBroken(ShapesDataset(ShapesConfig(size=(40, 56), train_images=4), "train"), [2])
    batches = take(train_loader(dataset, pasting(1.0, skip_broken=True), "panoptic"), 3)
    assert ("images/2.jpg", "truncated") in batches[0].broken
    with pytest.raises(BrokenExampleError):
        take(train_loader(dataset, pasting(1.0), "panoptic"), 3)


def test_a_data_set_without_things_is_refused():
    dataset = ShapesDataset(ShapesConfig(size=(40, 56), train_images=4), "train")
    dataset = PartlyBroken(dataset, [])
    dataset.metadata = replace(dataset.metadata, is_thing=(False,) * dataset.metadata.num_classes)
    with pytest.raises(ValueError, match=r"data\.augment\.copy_paste: expected 0 for a data set without things"):
        train_loader(dataset, pasting(0.5), "semantic")
