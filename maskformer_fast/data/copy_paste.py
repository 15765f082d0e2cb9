"""Copy-paste augmentation (Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method", CVPR 2021)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.data.transforms import TrainTransform, Window, random_offset
from maskformer_fast.structures import Example

_KEPT = 0.5  # probability with which an object of the other image is pasted


def paste_objects(
    target: Example,
    source: Example,
    transform: TrainTransform,
    scale_range: tuple[float, float],
    metadata: Metadata,
    rng: np.random.Generator,
) -> Example:
    """Paste objects of one example onto another, whose image is already resized and cropped -> a new example.

    The source is resized so that it fits into the target's size times a uniform draw of ``scale_range``, cropped to or
    placed within the target's size at random, and jittered and flipped as ``transform`` does. Of its visible objects
    (things that are no crowd), each is pasted with probability 0.5, and at least one. Pasted pixels belong to no other
    segment any more; segments without pixels are dropped. The result is a pure function of the arguments and the
    generator's state; without objects in the source it is the target.
    """
    truth = transform.render(source, _window(source, target.size, scale_range, rng), rng)
    top, left = (random_offset(rng, side, part) for side, part in zip(target.size, truth.size, strict=True))
    objects = [segment for segment in truth.segments if metadata.is_thing[segment.category] and not segment.is_crowd]
    masks = truth.segment_masks(objects)
    visible = np.flatnonzero(masks.any((1, 2)))
    if len(visible) == 0:
        return target
    chosen = visible[rng.random(len(visible)) < _KEPT]
    if len(chosen) == 0:
        chosen = visible[rng.integers(len(visible), size=1)]
    pasted = masks[chosen]
    region = slice(top, top + truth.size[0]), slice(left, left + truth.size[1])
    composed = target.image.copy()
    covered = pasted.any(0)
    composed[region][covered] = truth.image[covered]
    first = max((segment.id for segment in target.segments), default=0) + 1
    added = [SegmentInfo(first + row, objects[index].category) for row, index in enumerate(chosen)]
    if target.id_map is not None:
        id_map = target.id_map.copy()
        for segment, mask in zip(added, pasted, strict=True):
            id_map[region][mask] = segment.id
        left_ids = set(np.unique(id_map).tolist())
        segments = [segment for segment in (*target.segments, *added) if segment.id in left_ids]
        return replace(target, image=composed, segments=segments, id_map=id_map)
    assert target.masks is not None  # by Example.__post_init__
    before = len(target.masks)
    merged = np.zeros((before + len(pasted), *target.size), dtype=bool)
    merged[:before] = target.masks
    within = merged[:, region[0], region[1]]  # a view
    within[:before] &= ~covered
    within[before:] = pasted
    kept = np.flatnonzero(merged.any((1, 2)))
    everything = [*target.segments, *added]
    return replace(target, image=composed, segments=[everything[row] for row in kept], masks=merged[kept])


def _window(
    source: Example, size: tuple[int, int], scale_range: tuple[float, float], rng: np.random.Generator
) -> Window:
    """Window of the source after a large-scale jitter, cropped to at most ``size`` (height, width)."""
    jitter = rng.uniform(*scale_range)
    height, width = source.size
    scale = min(size[0] * jitter / height, size[1] * jitter / width)
    window = Window.of(source)._replace(size=(max(1, round(height * scale)), max(1, round(width * scale))))
    sides = [min(side, limit) for side, limit in zip(window.size, size, strict=True)]
    top, left = (random_offset(rng, side, part) for side, part in zip(window.size, sides, strict=True))
    return window.crop(top, left, *sides)
