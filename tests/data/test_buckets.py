"""Padded sizes of training batches under `torch.compile`: few, large enough, and derived from the recipe."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskformer_fast.config import AugmentConfig
from maskformer_fast.data.buckets import bucket_side, bucket_targets
from maskformer_fast.data.loader import _collate_read
from maskformer_fast.data.transforms import Sample

SHORT_EDGE = AugmentConfig(short_edge=(480, 640, 800), max_size=1333, crop_size=None)
UNBOUNDED = AugmentConfig(scale_mode="none", crop_size=None)


def test_levels_follow_from_the_recipe() -> None:
    assert sorted({bucket_side(side, SHORT_EDGE, 32) for side in range(1, 1334)}) == [800, 1056, 1344]
    exact = {480: 800, 800: 800, 801: 1032, 1032: 1032, 1033: 1333, 1333: 1333}
    assert {side: bucket_side(side, SHORT_EDGE, 1) for side in exact} == exact
    unbounded = {1: 32, 48: 64, 96: 96, 97: 128, 512: 512, 513: 768, 1000: 1024}
    assert {side: bucket_side(side, UNBOUNDED, 32) for side in unbounded} == unbounded


@given(st.integers(1, 5000), st.sampled_from([0, 1, 7, 32]), st.sampled_from([SHORT_EDGE, UNBOUNDED]))
def test_padded_sizes_contain_the_image_and_fit_the_divisor(side: int, divisor: int, augment: AugmentConfig) -> None:
    padded = bucket_side(side, augment, divisor)
    assert padded >= side and padded % max(1, divisor) == 0
    if augment is UNBOUNDED:
        assert padded < max(2, 1.5 * side) + max(1, divisor)


@given(st.integers(0, 2000))
def test_targets_are_padded_to_a_power_of_two(count: int) -> None:
    slots = bucket_targets(count)
    assert slots >= max(8, count) and math.log2(slots).is_integer() and (slots == 8 or slots < 2 * count)


def sample(height: int, width: int, count: int) -> tuple[Sample, list[tuple[str, str]]]:
    masks = torch.full((count, height, (width + 7) // 8), 1, dtype=torch.uint8)
    image = torch.full((3, height, width), 9, dtype=torch.uint8)
    return Sample(image, torch.arange(count), masks, 0, "image.png"), []


@pytest.mark.parametrize("crop, expected", [(None, (800, 1056)), ((640, 640), (640, 1024))])
def test_a_batch_is_padded_to_the_levels_of_its_largest_sides(
    crop: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    """Recipes with a crop pad to no levels; here one image is larger than the crop to show it."""
    augment = AugmentConfig(short_edge=(800,), max_size=1333, crop_size=crop)
    items = [sample(600, 1000, 9), sample(620, 500, 0)]
    plain = _collate_read(items, 32, crop or (0, 0), None)
    batch = _collate_read(items, 32, crop or (0, 0), augment)
    assert plain.targets.labels.shape == (2, 9) and plain.images.shape[2:] == ((640, 1024))
    assert batch.targets.labels.shape == (2, 16) and batch.images.shape[2:] == batch.targets.input_size == expected
    assert torch.equal(batch.targets.counts, plain.targets.counts)
    assert torch.equal(batch.targets.valid_sizes, plain.targets.valid_sizes)
    assert torch.equal(batch.targets.masks[:, :9, :640, :128], plain.targets.masks)
    assert batch.targets.masks.sum() == plain.targets.masks.sum() and batch.images.sum() == plain.images.sum()
