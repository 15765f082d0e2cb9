"""Moving scenes of known identities: discs, boxes and diamonds that cross, hide one another, come and go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from maskformer_fast.core.exchange import instances_of_masks
from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult

METADATA = Metadata("moving", ("disc", "box", "diamond", "sky", "ground"), (True, True, True, False, False),
                    (1, 2, 3, 4, 5), ((220, 60, 60), (60, 200, 60), (70, 90, 230), (150, 200, 230), (110, 90, 60)))
THINGS = 3


class Moving(NamedTuple):
    """An object on its way."""

    category: int
    start: tuple[float, float]  # y, x in pixels at its first frame
    velocity: tuple[float, float]  # pixels a frame
    wave: tuple[float, float]  # amplitude in pixels, and radians a frame, of a sway across the way
    radius: float
    first: int
    last: int  # one after its last frame


@dataclass
class Frame:
    """Truth of one frame."""

    id_map: np.ndarray  # [H, W] int32: 1 and 2 are sky and ground, objects follow from 3
    categories: dict[int, int]  # of each id that is visible


class MovingScene:
    """A function of seed and size. Later objects lie in front."""

    def __init__(self, seed: int, frames: int = 120, size: tuple[int, int] = (120, 160), objects: int = 8) -> None:
        self.frames, self.size = frames, size
        make = np.random.default_rng(seed)
        self.objects = [self._object(make) for _ in range(objects)]

    def _object(self, make: np.random.Generator) -> Moving:
        height, width = self.size
        radius = float(make.uniform(0.06, 0.14) * height)
        start = float(make.uniform(0.15, 0.85) * height), float(make.uniform(0.05, 0.95) * width)
        speed, angle = make.uniform(0.3, 2.0) * height / 120, make.uniform(0, 2 * np.pi)
        first = int(make.integers(0, self.frames // 2)) if make.random() < 0.5 else 0
        last = int(make.integers(min(first + 20, self.frames), self.frames + 1)) if make.random() < 0.4 else self.frames
        wave = float(make.uniform(0, 0.04) * height), float(make.uniform(0.05, 0.25))
        velocity = float(speed * np.sin(angle)), float(speed * np.cos(angle))
        return Moving(int(make.integers(THINGS)), start, velocity, wave, radius, first, last)

    def place(self, moving: Moving, time: int) -> tuple[float, float]:
        """Middle of an object, y, x; it is reflected by the scene's borders."""
        since = time - moving.first
        sway = moving.wave[0] * np.sin(moving.wave[1] * since)
        norm = max(float(np.hypot(*moving.velocity)), 1e-9)
        y = moving.start[0] + moving.velocity[0] * since - sway * moving.velocity[1] / norm
        x = moving.start[1] + moving.velocity[1] * since + sway * moving.velocity[0] / norm
        return _reflected(y, self.size[0]), _reflected(x, self.size[1])

    def truth(self, time: int) -> Frame:
        height, width = self.size
        rows, columns = np.mgrid[:height, :width]
        id_map = np.where(rows < height * 0.45, 1, 2).astype(np.int32)
        categories = {1: THINGS, 2: THINGS + 1}
        for number, moving in enumerate(self.objects, start=3):
            if not moving.first <= time < moving.last:
                continue
            y, x = self.place(moving, time)
            down, across = np.abs(rows - y), np.abs(columns - x)
            inside = (down**2 + across**2 < moving.radius**2, np.maximum(down, across) < 0.88 * moving.radius,
                      down + across < 1.25 * moving.radius)[moving.category]  # fmt: skip
            id_map[inside] = number
            categories[number] = moving.category
        present = set(np.unique(id_map).tolist())
        return Frame(id_map, {number: kind for number, kind in categories.items() if number in present})

    def image(self, time: int) -> np.ndarray:
        """The frame as a picture in the classes' colours -> [H, W, 3] uint8."""
        frame = self.truth(time)
        table = np.zeros((max(frame.categories) + 1, 3), np.uint8)
        for number, category in frame.categories.items():
            table[number] = METADATA.colors[category]
        return table[frame.id_map]


def _reflected(position: float, side: int) -> float:
    """A position folded back into 0..side."""
    position %= 2 * side
    return float(2 * side - position if position > side else position)


@dataclass
class Mistakes:
    """What a network gets wrong: chances for each object and frame."""

    edge: float = 1.5  # pixels of random bulges
    dropped: float = 0.08
    split: float = 0.04
    shift: float = 0.7  # pixels, standard deviation
    least: int = 12  # pixels of the smallest segment that is seen


def perturbed(frame: Frame, mistakes: Mistakes, make: np.random.Generator) -> PanopticResult:
    """A result of a frame with mistakes; its segments are in a random order, and ids count anew in each frame."""
    height, width = frame.id_map.shape
    stuff = np.where(frame.id_map == 1, 1, np.where(frame.id_map == 2, 2, 0))
    if (stuff == 0).any():  # behind things
        stuff[stuff == 0] = np.where(np.mgrid[:height, :width][0][stuff == 0] < height * 0.45, 1, 2)
    id_map = stuff.astype(np.int32)
    categories = [THINGS, THINGS + 1]
    things = [number for number in frame.categories if number > 2]
    for number in make.permutation(things).tolist():
        mask = frame.id_map == number
        if make.random() < mistakes.dropped or mask.sum() < mistakes.least:
            continue
        mask = _noisy(mask, mistakes, make)
        parts = [mask]
        if make.random() < mistakes.split and mask.any():
            axis = int(make.integers(2))
            cut = int(np.median(np.nonzero(mask)[axis]))
            half = np.mgrid[:height, :width][axis] < cut
            parts = [mask & half, mask & ~half]
        for part in parts:
            if part.sum() >= mistakes.least:
                categories.append(frame.categories[number])
                id_map[part] = len(categories)
    areas = np.bincount(id_map.ravel(), minlength=len(categories) + 1)
    rows = [row for row in range(len(categories)) if areas[row + 1] >= (mistakes.least if row > 1 else 1)]
    kept = np.zeros(len(categories) + 1, np.int32)
    order = make.permutation(len(rows)) + 1
    kept[[row + 1 for row in rows]] = order
    gone = [row + 1 for row in range(len(categories)) if row not in rows]
    id_map = np.where(np.isin(id_map, gone), stuff, id_map)
    segments = [
        SegmentInfo(int(kept[row + 1]), categories[row], categories[row] < THINGS, score=float(make.uniform(0.6, 1)),
                    area=int(areas[row + 1]))
        for row in rows
    ]  # fmt: skip
    segments.sort(key=lambda segment: segment.id)
    return PanopticResult(torch.from_numpy(kept[id_map]), segments)


def _noisy(mask: np.ndarray, mistakes: Mistakes, make: np.random.Generator) -> np.ndarray:
    """A mask moved a little, with an edge that bulges."""
    dy, dx = np.rint(make.normal(0, mistakes.shift, 2)).astype(int)
    mask = np.roll(mask, (dy, dx), (0, 1))
    bulge = round(make.uniform(-mistakes.edge, mistakes.edge))
    for _ in range(abs(bulge)):
        grown = mask if bulge > 0 else ~mask
        wide = grown.copy()
        wide[1:] |= grown[:-1]
        wide[:-1] |= grown[1:]
        wide[:, 1:] |= grown[:, :-1]
        wide[:, :-1] |= grown[:, 1:]
        rough = wide & ~grown & (make.random(mask.shape) < 0.8)
        grown = grown | rough
        mask = grown if bulge > 0 else ~grown
    return mask


def as_instances(result: PanopticResult) -> InstanceResult:
    """The things of a panoptic result as instances, best first."""
    things = sorted((s for s in result.segments if s.is_thing), key=lambda segment: -segment.score)
    id_map = result.id_map.numpy()
    masks = np.array([id_map == s.id for s in things]).reshape(-1, *id_map.shape)
    arrays = instances_of_masks([s.category for s in things], [s.score for s in things], masks)
    return InstanceResult(*map(torch.from_numpy, arrays), id_map.shape)
