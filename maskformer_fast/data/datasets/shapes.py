"""Synthetic scenes: overlapping shapes (things) over textured regions (stuff).

They need no download and have exact truth for the three tasks. A scene is a pure function of (seed, split, index).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from maskformer_fast.config import ShapesConfig, Task
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.data.datasets.scene import (
    EXTENT,
    GROUNDS,
    HUES,
    KINDS,
    PATTERNS,
    ground_texture,
    hsv_to_rgb,
    light_field,
    region_map,
    shape_pattern,
    signed_distance,
)
from maskformer_fast.structures import Example

MIN_AREA = 15 / 22
"""Smallest visible area of a shape, as a share of ``shape_area``'s least; a shape with less is not painted."""
MIN_VISIBLE = 0.45
"""Smallest share of a shape that later shapes leave uncovered."""
MIN_STUFF_AREA = 0.005
"""Share of the image below which a stuff class becomes void."""
_TRIES = 8  # number of placements that are tried for each shape
_SPLITS = ("train", "val")
_STREAM = 20210713  # last part of the seed: separates scenes from other generators of the same seed
_GROUND_HUES = (4, 8, 1, 0, 7, 2, 9, 5)  # first hue of each ground: green grass, blue water, orange sand...


@dataclass(frozen=True)
class ThingClass:
    """A thing class: shape, hue and pattern as indices into the tuples of `scene`, and whether it is pale."""

    kind: int
    hue: int
    pattern: int
    pale: bool = False

    @property
    def name(self) -> str:
        return f"{'pale ' if self.pale else ''}{HUES[self.hue]} {PATTERNS[self.pattern]} {KINDS[self.kind]}"

    @property
    def color(self) -> tuple[float, float, float]:
        """Hue, saturation and value in 0..1, before jitter."""
        return (self.hue / len(HUES), 0.35, 0.96) if self.pale else (self.hue / len(HUES), 0.75, 0.88)


@dataclass(frozen=True)
class StuffClass:
    """A stuff class: ground and hue as indices into the tuples of `scene`, and whether it is pale."""

    ground: int
    hue: int
    pale: bool

    @property
    def name(self) -> str:
        return f"{'pale ' if self.pale else ''}{HUES[self.hue]} {GROUNDS[self.ground]}"

    @property
    def color(self) -> tuple[float, float, float]:
        """Hue, saturation and value in 0..1, before jitter."""
        return (self.hue / len(HUES), 0.22, 0.80) if self.pale else (self.hue / len(HUES), 0.42, 0.55)


MAX_THINGS = len(KINDS) * len(HUES) * len(PATTERNS) * 2
"""Number of different thing classes."""
MAX_STUFF = len(GROUNDS) * len(HUES) * 2
"""Number of different stuff classes."""


def thing_class(index: int) -> ThingClass:
    """Return thing class number ``index``; all classes differ, and neighbours differ in shape and hue."""
    block, kind = divmod(index, len(KINDS))
    lap, shift = divmod(block, len(HUES))
    pale, lap = divmod(lap, len(PATTERNS))
    return ThingClass(kind, (5 * kind + shift) % len(HUES), (kind + lap) % len(PATTERNS), bool(pale))


def stuff_class(index: int) -> StuffClass:
    """Return stuff class number ``index``; all classes differ, and neighbours differ in ground and mostly in hue."""
    block, ground = divmod(index, len(GROUNDS))
    lap, shift = divmod(block, len(HUES))
    return StuffClass(ground, (_GROUND_HUES[ground] + 5 * shift) % len(HUES), bool(lap))


class ShapesDataset:
    """Panoptic examples; things are classes 0..num_things-1, and stuff classes follow.

    Every shape is a segment, and so is every stuff class, even if it has several regions. The visible part of a shape
    is at least `MIN_AREA` of the least area and `MIN_VISIBLE` of the shape. The splits have different random streams.
    """

    task: Task = "panoptic"

    def __init__(self, config: ShapesConfig, split: Literal["train", "val"] | str) -> None:
        check_choice("split", split, _SPLITS)
        check(config.num_things <= MAX_THINGS, "data.shapes.num_things", f"at most {MAX_THINGS}", config.num_things)
        check(config.num_stuff <= MAX_STUFF, "data.shapes.num_stuff", f"at most {MAX_STUFF}", config.num_stuff)
        check(config.seed >= 0, "data.shapes.seed", ">= 0", config.seed)
        self._config = config
        self._split = split
        self._things = [thing_class(index) for index in range(config.num_things)]
        self._stuff = [stuff_class(index) for index in range(config.num_stuff)]
        classes: list[ThingClass | StuffClass] = [*self._things, *self._stuff]
        self.metadata = Metadata(
            name="shapes",
            class_names=tuple(c.name for c in classes),
            is_thing=(True,) * config.num_things + (False,) * config.num_stuff,
            category_ids=tuple(range(1, len(classes) + 1)),
            colors=tuple(_display_color(c.color, row) for row, c in enumerate(classes)),
        )

    @property
    def file_names(self) -> list[str]:
        """A name for each scene: its number, which is its image id."""
        return [f"{index}.png" for index in range(len(self))]

    def __len__(self) -> int:
        return self._config.train_images if self._split == "train" else self._config.val_images

    def __getitem__(self, index: int) -> Example:
        """Make scene number ``index``; raises IndexError outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        rng = np.random.default_rng([self._config.seed, _SPLITS.index(self._split), index, _STREAM])
        image, id_map, categories = self._paint(rng)
        areas = np.bincount(id_map.ravel(), minlength=len(categories) + 1)
        small = [i + 1 for i, c in enumerate(categories)
                 if c >= len(self._things) and areas[i + 1] < MIN_STUFF_AREA * id_map.size]
        for segment in small:
            id_map[id_map == segment] = VOID
        segments = [
            SegmentInfo(i, category, is_thing=category < len(self._things), area=int(areas[i]))
            for i, category in enumerate(categories, start=1)
            if i not in small
        ]
        path = f"shapes/{self._split}/{index:06d}"
        return Example(image, segments, id_map=id_map, image_id=index, path=path)

    def _paint(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Paint one scene -> image uint8 [H, W, 3], id map int32 [H, W] counting from 1, class index of each id."""
        size = self._config.size
        regions = min(int(rng.integers(2, 5)), len(self._stuff))
        chosen = rng.choice(len(self._stuff), regions, replace=False)
        where = region_map(rng, size, regions)
        relief = np.empty(size, dtype=np.float32)
        palette = np.empty((regions, 3), dtype=np.float32)
        for region, stuff in enumerate(chosen):
            np.copyto(relief, ground_texture(rng, GROUNDS[self._stuff[stuff].ground], size), where=where == region)
            palette[region] = _jittered(rng, self._stuff[stuff].color, hue=0.02, value=0.08)
        canvas = palette.take(where, axis=0) * (1.0 + np.float32(0.28) * relief)[..., None]
        id_map = (where + 1).astype(np.int32)
        categories = [len(self._things) + int(stuff) for stuff in chosen]

        shares = self._config.shape_area
        least = MIN_AREA * shares[0] * id_map.size
        sun = rng.uniform(0.0, 2 * np.pi)  # direction of the light in radians, the same for every shape
        visible: dict[int, _Visibility] = {}
        for _ in range(int(rng.integers(1, self._config.max_shapes + 1))):
            known = categories[regions:]
            repeat = len(known) > 0 and rng.random() < 0.2  # several shapes of one class, to train their separation
            category = int(rng.choice(known)) if repeat else int(rng.integers(len(self._things)))
            for _ in range(_TRIES):
                shape = _place(rng, self._things[category], size, shares)
                if _write_ids(shape, id_map, visible, len(categories) + 1, least):
                    categories.append(category)
                    _draw(rng, shape, self._things[category], canvas, sun)
                    break

        # Light, white balance and the 8-bit scale are multiplied in one pass over the canvas.
        tint = 255.0 * rng.uniform(0.94, 1.06, 3).astype(np.float32)
        canvas *= light_field(rng, size)[..., None] * tint
        grain = rng.standard_normal((*size, 3), dtype=np.float32)
        grain *= np.float32(255.0 * rng.uniform(0.01, 0.04))
        canvas += grain
        return np.rint(canvas).clip(0.0, 255.0).astype(np.uint8), id_map, categories


class _Visibility(NamedTuple):
    """Number of pixels of a shape when it was painted, and number of those still visible."""

    painted: int
    remaining: int


@dataclass
class _Shape:
    """A placed shape, on the part of the image around it."""

    top: int
    left: int
    x: np.ndarray  # [h, w], in radii, in the shape's own axes
    y: np.ndarray  # [h, w]
    distance: np.ndarray  # [h, w], in pixels, negative inside
    radius: float
    angle: float

    @property
    def box(self) -> tuple[slice, slice]:
        height, width = self.distance.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def _place(
    rng: np.random.Generator, thing: ThingClass, size: tuple[int, int], shares: tuple[float, float]
) -> _Shape:
    """Place a shape with random position, size (its logarithm is uniform), rotation and stretch."""
    area = size[0] * size[1] * np.exp(rng.uniform(*np.log(shares)))
    radius = float(np.sqrt(area / 2.5))  # every kind has an area of about 2.5 radii squared
    cy, cx = (float(rng.uniform(0.06, 0.94) * side) for side in size)
    angle = float(rng.uniform(0.0, 2 * np.pi))
    stretch = float(np.exp(rng.uniform(-0.12, 0.12)))
    reach = radius * EXTENT * 1.13 + 2
    top, left = max(0, int(cy - reach)), max(0, int(cx - reach))
    bottom, right = min(size[0], int(cy + reach) + 1), min(size[1], int(cx + reach) + 1)
    v = (np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - cy)) / np.float32(radius)
    u = (np.arange(left, right, dtype=np.float32)[None] + np.float32(0.5 - cx)) / np.float32(radius)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x = (cos * u + sin * v) * np.float32(stretch)
    y = (cos * v - sin * u) / np.float32(stretch)
    distance = signed_distance(KINDS[thing.kind], x, y) * np.float32(radius)
    return _Shape(top, left, x, y, distance, radius, angle)


def _write_ids(
    shape: _Shape, id_map: np.ndarray, visible: dict[int, _Visibility], new_id: int, least: float
) -> bool:
    """Write the shape's id into the map, unless this shape or one below it would then be visible too little.

    ``least`` is the smallest visible area in pixels.
    """
    inside = shape.distance < 0
    below = id_map[shape.box]
    painted = int(np.count_nonzero(inside))
    if painted < least:
        return False
    hidden = np.bincount(below[inside], minlength=new_id)
    for segment, (full, remaining) in visible.items():
        if hidden[segment] and remaining - hidden[segment] < max(least, MIN_VISIBLE * full):
            return False
    for segment, (full, remaining) in visible.items():
        visible[segment] = _Visibility(full, remaining - int(hidden[segment]))
    visible[new_id] = _Visibility(painted, painted)
    below[inside] = new_id
    return True


def _draw(rng: np.random.Generator, shape: _Shape, thing: ThingClass, canvas: np.ndarray, sun: float) -> None:
    """Blend a shadow and then the shaded shape onto the canvas, with soft edges."""
    part = canvas[shape.box]
    depth = rng.uniform(0.06, 0.16) * shape.radius
    dy, dx = round(depth * np.sin(sun)), round(depth * np.cos(sun))
    shadow = (0.5 - shape.distance / np.float32(0.12 * shape.radius + 1)).clip(0.0, 1.0) * rng.uniform(0.25, 0.5)
    height, width = shadow.shape
    to_y, from_y = slice(max(0, dy), height + min(0, dy)), slice(max(0, -dy), height + min(0, -dy))
    to_x, from_x = slice(max(0, dx), width + min(0, dx)), slice(max(0, -dx), width + min(0, -dx))
    part[to_y, to_x] *= 1.0 - shadow[from_y, from_x, None].astype(np.float32)

    color = _jittered(rng, thing.color, hue=0.022, value=0.12)
    tone = shape_pattern(PATTERNS[thing.pattern], shape.x, shape.y, rng.uniform(0.42, 0.6))
    toward = sun + np.pi - shape.angle  # direction of the light in the shape's axes; shadows fall the other way
    shade = 1.0 + rng.uniform(0.05, 0.22) * (shape.x * np.cos(toward) + shape.y * np.sin(toward)).astype(np.float32)
    if tone is not None:
        shade = shade * (1.0 - np.float32(rng.uniform(0.35, 0.5)) * tone)
    alpha = (0.5 - shape.distance).clip(0.0, 1.0)[..., None]
    part += alpha * (color * shade[..., None].astype(np.float32) - part)


def _jittered(rng: np.random.Generator, color: tuple[float, float, float], hue: float, value: float) -> np.ndarray:
    """Draw a colour near that of a class -> RGB [3] float32."""
    h, s, v = color
    return hsv_to_rgb((h + rng.uniform(-hue, hue)) % 1.0, s * rng.uniform(0.8, 1.15), v + rng.uniform(-value, value))


def _display_color(color: tuple[float, float, float], row: int) -> tuple[int, int, int]:
    """Return the colour of a class in pictures: its own, with a brightness that varies between classes."""
    hue, saturation, value = color
    red, green, blue = hsv_to_rgb(hue, saturation, value * (0.75 + 0.25 * (row * 0.618 % 1.0))) * 255
    return int(red), int(green), int(blue)
