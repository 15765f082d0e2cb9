"""Training transforms of the official recipes, and the resize of inference.

The geometry is planned first: a window of the source image and the size to which it is resampled. Pixels are then
resampled once. So the cost depends on the crop and not on the image's size, and image and truth stay aligned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskformer_fast.config import TASKS, AugmentConfig, Task
from maskformer_fast.core.checks import check_choice
from maskformer_fast.core.image_resize import is_rgb, resize_bands, resize_picture, short_edge_size
from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.structures import Example

_CROP_TRIES = 10  # random crops that are tried until one has more than one category
_DETR_SHORT_EDGES = (400, 500, 600)  # pixels, of DETR's first resize
_DETR_WINDOW = (384, 600)  # smallest and largest height and width of DETR's crop, in pixels


class Sample(NamedTuple):
    """One transformed training image and its targets."""

    image: Tensor  # [3, h, w] uint8 RGB, or [C, h, w] float32
    labels: Tensor  # [T] int64
    masks: Tensor  # [T, h, ceil(w/8)] uint8, packed as `structures.pack_masks` does
    image_id: int | str
    path: str


def resize_image(
    image: np.ndarray,  # [H, W, 3] uint8, or bands [H, W, C] uint8 or uint16
    short_edge: int | tuple[int, int] | None,
    max_size: int,
) -> Tensor:
    """Resize for inference: bilinear with antialiasing -> uint8 [3, h, w]; ``short_edge`` None keeps the size.

    Bands become float32 [C, h, w] of the same scale.

    Raises:
        TypeError: the image is not uint8 or uint16.
        ValueError: the image is not [H, W, C] or is empty.
    """
    return _to_tensor(resize_picture(image, short_edge, max_size))


def target_segments(example: Example, task: Task, metadata: Metadata) -> tuple[np.ndarray, np.ndarray]:
    """Make the targets of one example for a task -> labels int64 [T], masks bool [T, H, W], none of them empty.

    - Semantic: one mask for each category, crowds included.
    - Panoptic: one mask for each thing that is no crowd, and one for each stuff class.
    - Instance: one mask for each thing that is no crowd.
    """
    check_choice("task", task, TASKS)
    if task == "semantic" and example.masks is not None:  # where masks overlap, the later one wins, as in evaluation
        category_map = example.semantic_map()
        labels = np.unique(category_map[category_map >= 0]).astype(np.int64)
        return labels, category_map == labels[:, None, None]

    segments = [segment for segment in example.segments if is_target(segment, task, metadata)]
    masks = example.segment_masks(segments)
    rows: dict[tuple[int, int | None], int] = {}  # key -> target
    merged = np.zeros_like(masks)
    for segment, mask in zip(segments, masks, strict=True):
        merged[rows.setdefault(_target_key(segment, task, metadata), len(rows))] |= mask
    labels = np.array([category for category, _ in rows], dtype=np.int64)
    filled = merged[: len(rows)].reshape(len(rows), example.size[0] * example.size[1]).any(1)
    return labels[filled], merged[: len(rows)][filled]


def is_target(segment: SegmentInfo, task: Task, metadata: Metadata) -> bool:
    """Return whether a segment of the truth is, or belongs to, a target of a task."""
    is_thing = metadata.is_thing[segment.category]
    return task == "semantic" or (not segment.is_crowd and (is_thing or task == "panoptic"))


def _target_key(segment: SegmentInfo, task: Task, metadata: Metadata) -> tuple[int, int | None]:
    """Return the category, and the segment's id, or None for a class whose segments are one target."""
    is_separate = task != "semantic" and metadata.is_thing[segment.category]
    return segment.category, segment.id if is_separate else None


class TrainTransform:
    """Resize, crop, jitter the colours of and flip one example, in the official order; then make the task's targets.

    An image smaller than the crop keeps its size; `loader.collate` pads the batch and records the valid sizes.
    The result is a pure function of the example and the generator's state.
    """

    def __init__(self, augment: AugmentConfig, task: Task, metadata: Metadata) -> None:
        check_choice("task", task, TASKS)
        self._augment = augment
        self._task = task
        self._metadata = metadata

    def __call__(self, example: Example, rng: np.random.Generator) -> Sample:
        return self.sample(self.place(example, rng))

    def place(self, example: Example, rng: np.random.Generator) -> Example:
        """Resize, crop, jitter and flip an example -> image and truth of the crop."""
        augment = self._augment
        window = Window.of(example)
        if augment.detr_crop and rng.random() < 0.5:
            window = _detr_crop(window, rng)
        window = self._resized(window, rng)
        if augment.crop_size is not None:
            window = self._cropped(window, example, augment.crop_size, rng)
        return self.render(example, window, rng)

    def render(self, example: Example, window: Window, rng: np.random.Generator) -> Example:
        """Resample a window of an example, jitter its colours and flip it -> its image and truth."""
        top, left, bottom, right = window.box
        if is_rgb(example.image):
            image = Image.fromarray(example.image)
            if window.box != (0.0, 0.0, *example.size) or window.size != example.size:
                image = image.resize(window.size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
            pixels = np.asarray(jitter_colors(image, rng) if self._augment.color_jitter else image)
        else:
            pixels = resize_bands(example.image, window.size, window.box)
        mirror = self._augment.flip and rng.random() < 0.5
        if mirror:
            pixels = pixels[:, ::-1]
        return replace(_take(example, window, mirror), image=pixels)

    def sample(self, example: Example) -> Sample:
        """Make the task's targets of an example that is already resized and cropped."""
        labels, masks = target_segments(example, self._task, self._metadata)
        packed = np.packbits(masks, axis=-1, bitorder="little")
        return Sample(_to_tensor(example.image), torch.from_numpy(labels), torch.from_numpy(packed),
                      example.image_id, example.path)

    def count_targets(self, example: Example) -> int:
        """Count the targets of the complete image, before it is cropped."""
        task, metadata = self._task, self._metadata
        return len({_target_key(s, task, metadata) for s in example.segments if is_target(s, task, metadata)})

    def _resized(self, window: Window, rng: np.random.Generator) -> Window:
        augment = self._augment
        height, width = window.size
        if augment.scale_mode == "none":
            return window
        if augment.scale_mode == "short_edge":
            short_edge = augment.short_edge[rng.integers(len(augment.short_edge))]
            return window._replace(size=short_edge_size(height, width, short_edge, augment.max_size))
        jitter = rng.uniform(*augment.scale_range)
        scale = min(augment.scale_size[0] * jitter / height, augment.scale_size[1] * jitter / width)
        return window._replace(size=(max(1, round(height * scale)), max(1, round(width * scale))))

    def _cropped(
        self, window: Window, example: Example, crop_size: tuple[int, int], rng: np.random.Generator
    ) -> Window:
        """Crop at random; try again while one category covers too much of the labelled pixels."""
        height, width = (min(side, limit) for side, limit in zip(window.size, crop_size, strict=True))
        share = self._augment.single_category_max_area
        limited = share < 1.0 and example.id_map is not None
        for _ in range(_CROP_TRIES if limited else 1):
            top, left = random_offset(rng, window.size[0], height), random_offset(rng, window.size[1], width)
            crop = window.crop(top, left, height, width)
            if not limited or _is_varied(_take(example, crop), share):
                break
        return crop


class Window(NamedTuple):
    """Part of the source image, and the size in pixels to which it is resampled."""

    box: tuple[float, float, float, float]  # top, left, bottom, right in source pixels
    size: tuple[int, int]  # height, width

    @classmethod
    def of(cls, example: Example) -> Window:
        """Return the complete image at its own size."""
        return cls((0.0, 0.0, float(example.size[0]), float(example.size[1])), example.size)

    def crop(self, top: int, left: int, height: int, width: int) -> Window:
        """Return a part of this window, given in pixels of the resampled size."""
        y0, x0, y1, x1 = self.box
        step_y, step_x = (y1 - y0) / self.size[0], (x1 - x0) / self.size[1]
        # Pillow refuses a box that extends beyond the image, even by a rounding error.
        bottom, right = min(y1, y0 + (top + height) * step_y), min(x1, x0 + (left + width) * step_x)
        return Window((y0 + top * step_y, x0 + left * step_x, bottom, right), (height, width))

    def sources(self, axis: int) -> np.ndarray:
        """Return the source row (axis 0) or column (axis 1) nearest to the centre of each output pixel."""
        start, end = self.box[axis], self.box[axis + 2]
        position = start + (np.arange(self.size[axis]) + 0.5) * ((end - start) / self.size[axis])
        return np.minimum(position.astype(np.int64), int(np.ceil(end)) - 1)


def random_offset(rng: np.random.Generator, side: int, part: int) -> int:
    """Draw the place of a part within a side, both in pixels."""
    return int(rng.integers(side - part + 1))


def _detr_crop(window: Window, rng: np.random.Generator) -> Window:
    """Plan DETR's first resize and crop; the second resize is planned after it, and pixels are resampled once."""
    short_edge = _DETR_SHORT_EDGES[rng.integers(len(_DETR_SHORT_EDGES))]
    height, width = window.size
    scale = short_edge / min(height, width)
    window = window._replace(size=(max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))))
    low, high = _DETR_WINDOW
    sides = [int(rng.integers(min(side, low), min(side, high) + 1)) for side in window.size]
    top, left = random_offset(rng, window.size[0], sides[0]), random_offset(rng, window.size[1], sides[1])
    return window.crop(top, left, *sides)


def _take(example: Example, window: Window, mirror: bool = False) -> Example:
    """Return the truth of a window, by nearest neighbour, with a blank image of the window's size."""
    rows, columns = window.sources(0), window.sources(1)
    top, left = rows[0], columns[0]
    cut = (..., slice(top, rows[-1] + 1), slice(left, columns[-1] + 1))  # cut first, so that no full mask is copied
    if mirror:
        columns = columns[::-1]

    def nearest(truth: np.ndarray | None) -> np.ndarray | None:
        return None if truth is None else truth[cut].take(rows - top, axis=-2).take(columns - left, axis=-1)

    blank = np.broadcast_to(np.uint8(0), (*window.size, 3))
    return replace(example, image=blank, id_map=nearest(example.id_map), masks=nearest(example.masks))


def _is_varied(example: Example, share: float) -> bool:
    """Return whether there are two or more categories, each with less than ``share`` of the labelled pixels."""
    counts: dict[int, int] = {}
    for segment in example.segments:
        area = int(np.count_nonzero(example.id_map == segment.id))
        if area:
            counts[segment.category] = counts.get(segment.category, 0) + area
    return len(counts) > 1 and max(counts.values()) < share * sum(counts.values())


def jitter_colors(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Apply SSD's photometric distortion to an RGB image; each of the four parts with probability 0.5.

    Brightness changes by up to 32 of 255, contrast and saturation by factors of 0.5 to 1.5, and hue by up to 18 of 180.
    Contrast comes before or after saturation and hue, at random.
    """
    levels = np.arange(256)
    if rng.random() < 0.5:
        image = image.point(_table(levels + rng.uniform(-32, 32)) * 3)
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = int(rng.integers(-18, 19)) if rng.random() < 0.5 else 0
    if contrast != 1.0 and contrast_first:
        image = image.point(_table(levels * contrast) * 3)
    if saturation != 1.0 or hue != 0:  # skipped if nothing changes, since converting to HSV and back rounds
        shift = round(hue * 256 / 180)  # Pillow counts 256 hues
        tables = _table((levels + shift) % 256) + _table(levels * saturation) + _table(levels)
        image = image.convert("HSV").point(tables).convert("RGB")
    if contrast != 1.0 and not contrast_first:
        image = image.point(_table(levels * contrast) * 3)
    return image


def _table(values: np.ndarray) -> list[int]:
    """Make a lookup table of 256 levels, rounded and clipped."""
    return [int(v) for v in np.floor(values + 0.5).clip(0, 255)]


def _to_tensor(
    image: np.ndarray,  # [h, w, C]
) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
