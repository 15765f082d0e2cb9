"""Training transforms: aligned image and truth, official limits, targets of each task."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast.config import AugmentConfig, Task
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.data.transforms import (
    Sample,
    TrainTransform,
    jitter_colors,
    resize_image,
    short_edge_size,
    target_segments,
)
from maskformer_fast.structures import Example, pack_masks, unpack_masks

PLAIN = AugmentConfig(scale_mode="none", crop_size=None, single_category_max_area=1.0, flip=False)


def metadata(is_thing: list[bool]) -> Metadata:
    count = len(is_thing)
    names = tuple(f"class {i}" for i in range(count))
    return Metadata("test", names, tuple(is_thing), tuple(range(count)), ((0, 0, 0),) * count)


def ramp_example(height: int, width: int, axis: int, overlap: bool) -> Example:
    """Make an example whose rows (axis 0) or columns (1) are segments, with their number as pixel value."""
    ids = np.indices((height, width))[axis].astype(np.int32)
    image = np.repeat(ids[:, :, None], 3, axis=2).astype(np.uint8)
    count = (height, width)[axis]
    segments = [SegmentInfo(i, i) for i in range(count)]
    if overlap:
        return Example(image, segments, masks=ids == np.arange(count)[:, None, None])
    return Example(image, segments, id_map=ids)


def label_map(sample: Sample) -> np.ndarray:
    """Return the category of each pixel of targets that cover the image without overlap."""
    masks = unpack_masks(sample.masks, sample.image.shape[2])
    assert masks.sum(0).eq(1).all()
    return sample.labels[masks.to(torch.uint8).argmax(0)].numpy()


GEOMETRY = {
    "short edge, crop, flip": AugmentConfig(short_edge=(45, 52, 200), crop_size=(60, 51)),
    "up to a limit": AugmentConfig(short_edge=(250,), max_size=166, crop_size=None),
    "large-scale jitter": AugmentConfig(scale_mode="scale", scale_size=(100, 150), crop_size=(75, 75)),
    "crop only": AugmentConfig(scale_mode="none", crop_size=(32, 39)),
    "detr": AugmentConfig(detr_crop=True, short_edge=(60, 130), max_size=200, crop_size=None),
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", GEOMETRY)
def test_image_and_truth_stay_aligned(name: str, axis: int, overlap: bool) -> None:
    example = ramp_example(72, 100, axis, overlap)
    transform = TrainTransform(GEOMETRY[name], "instance", metadata([True] * 100))
    sizes = set()
    for seed in range(8):
        sample = transform(example, np.random.default_rng(seed))
        sizes.add(tuple(sample.image.shape))
        height, width = sample.image.shape[1:]
        assert sample.image.dtype == torch.uint8 and sample.masks.dtype == torch.uint8
        assert sample.masks.shape == (len(sample.labels), height, (width + 7) // 8)
        truth, pixels = label_map(sample), sample.image[0].numpy().astype(int)
        # Nearest and bilinear sample the same positions; downscaling averages up to a few source pixels at a border.
        error = np.abs(truth - pixels)
        assert np.mean(error) < 0.6
        reach = max(1.0, 72 / height) + 1.0
        assert error.max() <= reach
    assert len(sizes) > 1 or name in ("up to a limit", "crop only")


def test_a_crop_equals_the_same_crop_of_the_resized_image() -> None:
    rng = np.random.default_rng(0)
    example = Example(rng.integers(0, 256, (83, 120, 3), dtype=np.uint8), [SegmentInfo(0, 0)],
                      id_map=np.zeros((83, 120), np.int32))
    augment = AugmentConfig(short_edge=(131,), crop_size=(120, 150), flip=False)
    sample = TrainTransform(augment, "semantic", metadata([False]))(example, np.random.default_rng(3))
    resized = resize_image(example.image, 131, 2048).to(torch.int16)
    windows = resized.unfold(1, 120, 1).unfold(2, 150, 1)  # [3, y, x, 120, 150]
    error = (windows - sample.image.to(torch.int16)[:, None, None]).abs().amax((0, 3, 4))
    assert error.min() <= 1  # Pillow's weights of a box differ by rounding from those of the full image
    assert (error <= 30).sum() == 1


def test_a_crop_keeps_one_category_below_its_limit() -> None:
    id_map = np.zeros((40, 200), np.int32)
    id_map[:, 60:140] = VOID
    id_map[:, 140:150] = 1
    id_map[:, 150:] = 2  # of the same category as 1
    segments = [SegmentInfo(0, 0), SegmentInfo(1, 1), SegmentInfo(2, 1)]
    example = Example(np.zeros((40, 200, 3), np.uint8), segments, id_map=id_map)

    def share(limit: float, seed: int) -> float:
        augment = AugmentConfig(scale_mode="none", crop_size=(40, 130), single_category_max_area=limit)
        transform = TrainTransform(augment, "semantic", metadata([False, False]))
        sample = transform(example, np.random.default_rng(seed))
        areas = unpack_masks(sample.masks, 130).sum((1, 2))
        return float(areas.max() / areas.sum())

    assert max(share(0.9, seed) for seed in range(60)) < 0.9
    assert sum(share(1.0, seed) >= 0.9 for seed in range(60)) > 10


def test_cropping_an_image_of_one_category_ends() -> None:
    example = Example(np.zeros((30, 30, 3), np.uint8), [SegmentInfo(4, 0)], id_map=np.full((30, 30), 4, np.int32))
    sample = TrainTransform(replace(PLAIN, crop_size=(8, 9), single_category_max_area=0.75), "semantic",
                            metadata([False]))(example, np.random.default_rng(0))
    assert sample.image.shape == (3, 8, 9) and sample.labels.tolist() == [0]


def test_flip_mirrors_half_of_the_images_and_their_masks() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((3, 21, 37)) < 0.4
    example = Example(rng.integers(0, 256, (21, 37, 3), dtype=np.uint8), [SegmentInfo(i, i) for i in range(3)],
                      masks=masks)
    transform = TrainTransform(replace(PLAIN, flip=True), "instance", metadata([True] * 3))
    flipped = 0
    for seed in range(200):
        sample = transform(example, np.random.default_rng(seed))
        image, dense = sample.image.numpy().transpose(1, 2, 0), unpack_masks(sample.masks, 37).numpy()
        mirrored = not np.array_equal(image, example.image)
        flipped += mirrored
        step = -1 if mirrored else 1
        np.testing.assert_array_equal(image, example.image[:, ::step])
        np.testing.assert_array_equal(dense, masks[:, :, ::step])
        assert torch.equal(sample.masks, pack_masks(torch.from_numpy(masks[:, :, ::step].copy())))
    assert 70 < flipped < 130


def panoptic_example() -> tuple[Example, Metadata]:
    """Make an example of two things, a crowd of their class, two parts of a stuff class, another stuff class, void."""
    id_map = np.full((6, 8), VOID, np.int32)
    for row, segment_id in enumerate([10, 1 << 20, 7, 3, 5]):
        id_map[row] = segment_id
    segments = [
        SegmentInfo(10, 0), SegmentInfo(1 << 20, 0), SegmentInfo(7, 0, is_crowd=True),
        SegmentInfo(3, 1, is_thing=False), SegmentInfo(5, 1, is_thing=False), SegmentInfo(99, 2, is_thing=False),
    ]
    return Example(np.zeros((6, 8, 3), np.uint8), segments, id_map=id_map), metadata([True, False, False])


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("panoptic", [(0, [0]), (0, [1]), (1, [3, 4])]),
        ("semantic", [(0, [0, 1, 2]), (1, [3, 4])]),
        ("instance", [(0, [0]), (0, [1])]),
    ],
)
def test_targets_of_each_task(task: Task, expected: list[tuple[int, list[int]]]) -> None:
    example, classes = panoptic_example()
    labels, masks = target_segments(example, task, classes)
    assert labels.dtype == np.int64 and masks.dtype == bool
    got = [(int(label), np.flatnonzero(mask.all(1)).tolist()) for label, mask in zip(labels, masks, strict=True)]
    assert got == expected
    assert masks.sum() == 8 * sum(len(rows) for _, rows in expected)


def test_semantic_targets_of_overlapping_masks_follow_the_semantic_map() -> None:
    masks = np.zeros((3, 4, 6), bool)
    masks[0, :, :4] = masks[1, 1:3] = masks[2, 0] = True
    example = Example(np.zeros((4, 6, 3), np.uint8), [SegmentInfo(i, c) for i, c in enumerate([1, 0, 1])], masks=masks)
    labels, dense = target_segments(example, "semantic", metadata([True, True]))
    assert labels.tolist() == [0, 1]
    for label, mask in zip(labels, dense, strict=True):
        np.testing.assert_array_equal(mask, example.semantic_map() == label)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_an_example_without_segments_has_no_targets(task: Task) -> None:
    example = Example(np.zeros((9, 11, 3), np.uint8), [], id_map=np.full((9, 11), VOID, np.int32))
    sample = TrainTransform(AugmentConfig(short_edge=(20,), crop_size=(16, 13)), task, metadata([True]))(
        example, np.random.default_rng(0)
    )
    assert sample.labels.shape == (0,) and sample.labels.dtype == torch.int64
    assert sample.masks.shape == (0, 16, 2)
    empty = replace(example, id_map=None, masks=np.zeros((0, 9, 11), bool))
    assert TrainTransform(PLAIN, task, metadata([True]))(empty, np.random.default_rng(0)).masks.shape == (0, 9, 2)


def test_segments_outside_the_crop_are_dropped() -> None:
    example = ramp_example(64, 64, 1, overlap=True)
    augment = replace(PLAIN, crop_size=(64, 10))
    sample = TrainTransform(augment, "instance", metadata([True] * 64))(example, np.random.default_rng(1))
    assert len(sample.labels) == 10 and torch.equal(sample.labels, sample.image[0, 0].to(torch.int64))


@pytest.mark.parametrize(
    ("size", "short_edge", "max_size", "expected"),
    [
        ((480, 640), 512, 2048, (512, 683)),
        ((640, 480), 512, 2048, (683, 512)),
        ((100, 1000), 512, 2048, (205, 2048)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((1, 5000), 64, 100, (1, 100)),
        ((512, 512), 512, 512, (512, 512)),
    ],
)
def test_short_edge_size(size: tuple[int, int], short_edge: int, max_size: int, expected: tuple[int, int]) -> None:
    assert short_edge_size(*size, short_edge, max_size) == expected


@pytest.mark.parametrize("short_edge", [20, 47, 90])
def test_resize_is_antialiased_bilinear(short_edge: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (47, 61, 3), dtype=np.uint8)
    resized = resize_image(image, short_edge, 1000)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    oracle = torch.nn.functional.interpolate(tensor, resized.shape[1:], mode="bilinear", antialias=True)[0]
    assert resized.dtype == torch.uint8 and min(resized.shape[1:]) == short_edge
    assert (resized.float() - oracle).abs().max() <= 1.01


def test_resize_keeps_the_size_without_a_short_edge_and_names_bad_input() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_image(image, None, 4).permute(1, 2, 0), image)
    with pytest.raises(TypeError, match="image: expected uint8, got float32"):
        resize_image(image.astype(np.float32), 8, 8)
    with pytest.raises(ValueError, match=r"image: expected shape \[H, W, 3\], got \(5, 7\)"):
        resize_image(image[..., 0], 8, 8)
    with pytest.raises(ValueError, match="task"):
        TrainTransform(PLAIN, "depth", metadata([True]))  # type: ignore[arg-type]


def test_color_jitter_of_grey_stays_in_its_range() -> None:
    image = Image.new("RGB", (4, 4), (128, 128, 128))
    values = []
    for seed in range(400):
        pixels = np.asarray(jitter_colors(image, np.random.default_rng(seed)))
        assert (pixels == pixels[0, 0, 0]).all()  # a uniform grey image stays uniform and grey
        values.append(int(pixels[0, 0, 0]))
    assert min(values) >= (128 - 32) * 0.5 - 1 and max(values) <= (128 + 32) * 1.5 + 1
    assert min(values) < 75 and max(values) > 200
    assert 0.12 < np.mean(np.array(values) == 128) < 0.4  # neither brightness nor contrast, one in four


def test_color_jitter_of_hue_and_saturation_stays_in_its_range() -> None:
    image = Image.new("RGB", (1, 1), (160, 80, 80))
    hues, saturations = [], []
    for seed in range(400):
        red, green, blue = jitter_colors(image, np.random.default_rng(seed)).getpixel((0, 0))
        hue, saturation, _ = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        hues.append((hue * 360 + 180) % 360 - 180)
        saturations.append(saturation)
    assert -39 <= min(hues) < -30 and 30 < max(hues) <= 39  # 18 of 180 is 36 degrees
    assert 0.35 < np.mean(np.abs(hues) < 1.5) < 0.7  # unchanged with probability 0.5
    assert min(saturations) < 0.3 and max(saturations) > 0.72


def test_color_jitter_skips_one_image_in_sixteen_and_does_not_change_truth() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    same = sum(
        np.array_equal(np.asarray(jitter_colors(image, np.random.default_rng(seed))), np.asarray(image))
        for seed in range(320)
    )
    assert 8 < same < 36
    example = ramp_example(30, 40, 1, overlap=False)
    colorful = TrainTransform(replace(PLAIN, color_jitter=True), "instance", metadata([True] * 40))
    samples = [colorful(example, np.random.default_rng(seed)) for seed in range(8)]
    for sample in samples:
        np.testing.assert_array_equal(label_map(sample), example.id_map)
    assert len({sample.image.numpy().tobytes() for sample in samples}) > 4
