"""Numbers of a data set: classes, objects, sizes, channels, and the files that cannot be used."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maskformer_fast.core.image_resize import is_rgb
from maskformer_fast.data.bands import nodata_value, read_layout
from maskformer_fast.data.base import BrokenExampleError, SegmentationDataset
from maskformer_fast.data.datasets.coco_instances import CocoInstances
from maskformer_fast.data.statistics import BandStatistics
from maskformer_fast.structures import Example

TINY_AREA = 16
"""Pixels of the largest object that counts as tiny."""
_OUTSIDE = 1.0  # pixels that an outline may reach beyond its image


@dataclass
class Part:
    """Numbers of one part of a data set, of the pictures that were read."""

    split: str
    listed: int = 0
    """Pictures of the part, read or not."""
    paths: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """File and reason of each picture or label that cannot be used."""
    unusable: list[str] = field(default_factory=list)
    """Those files."""
    empty: list[str] = field(default_factory=list)
    """Pictures without an object."""
    class_pictures: Counter[int] = field(default_factory=Counter)
    class_objects: Counter[int] = field(default_factory=Counter)
    class_pixels: Counter[int] = field(default_factory=Counter)
    objects: list[int] = field(default_factory=list)
    """Objects of each picture."""
    areas: list[int] = field(default_factory=list)
    """Pixels of each object."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width of each picture."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Format, channels and bits of the files."""
    digests: dict[str, list[str]] = field(default_factory=dict)
    """Files of equal pixels, by their hash."""
    outside: list[str] = field(default_factory=list)
    """Objects whose outline leaves the picture."""
    tiny: list[str] = field(default_factory=list)
    """Objects of at most `TINY_AREA` pixels."""


def measure_part(
    dataset: SegmentationDataset, split: str, indices: Sequence[int], statistics: BandStatistics
) -> Part:
    """Read pictures of a data set, and count what is in them; what cannot be read is listed.

    Pixels without data, as a GeoTIFF of bands states them, do not count in the statistics.
    """
    part = Part(split, len(dataset))
    for index in indices:
        try:
            example = dataset[index]
        except BrokenExampleError as error:
            part.broken.append(str(error))
            part.unusable.append(error.path)
            continue
        _add(part, example, statistics)
        if isinstance(dataset, CocoInstances):
            _check_outlines(part, dataset, index, example)
    return part


def _add(part: Part, example: Example, statistics: BandStatistics) -> None:
    statistics.add(example.image, None if is_rgb(example.image) else nodata_value(example.path))
    part.paths.append(example.path)
    part.sizes.append(example.size)
    part.kinds[file_kind(example.path)] += 1
    digest = hashlib.blake2b(str(example.image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(example.image).data)
    part.digests.setdefault(digest.hexdigest(), []).append(example.path)
    part.objects.append(len(example.segments))
    if not example.segments:
        part.empty.append(example.path)
    part.class_pictures.update({segment.category for segment in example.segments})
    for segment in example.segments:
        part.class_objects[segment.category] += 1
        part.class_pixels[segment.category] += segment.area
        part.areas.append(segment.area)
        if segment.area <= TINY_AREA:
            part.tiny.append(example.path)


def _check_outlines(part: Part, dataset: CocoInstances, index: int, example: Example) -> None:
    height, width = example.size
    for _, outline in dataset.outlines(index):
        if isinstance(outline, dict):
            continue
        xs, ys = ([value for polygon in outline for value in polygon[axis::2]] for axis in (0, 1))
        if min(xs) < -_OUTSIDE or min(ys) < -_OUTSIDE or max(xs) > width + _OUTSIDE or max(ys) > height + _OUTSIDE:
            part.outside.append(example.path)


def file_kind(path: str) -> str:
    """Format, channels and bits a channel of a picture's file, as far as its header tells."""
    try:
        layout = read_layout(path)
        return f"{layout.format}, {layout.channels} x {layout.bits} bits"
    except Exception:  # what the header of a damaged file causes; what can be read is told by the data set
        return "unknown"


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Smallest, quartiles and largest of numbers; nothing of none."""
    if not len(values):
        return {}
    names = ("min", "25%", "median", "75%", "max")
    found = np.percentile(np.asarray(values, np.float64), (0, 25, 50, 75, 100)).round(2).tolist()
    return dict(zip(names, found, strict=True))


def part_numbers(part: Part) -> dict[str, Any]:
    """Numbers of a part for a report."""
    return {
        "split": part.split, "pictures": part.listed, "read": len(part.paths), "broken": len(part.broken),
        "without objects": len(part.empty), "objects": sum(part.objects),
        "objects a picture": quartiles(part.objects),
        "object's side (root of pixels)": quartiles(np.sqrt(part.areas).tolist()),
        "picture's height": quartiles([size[0] for size in part.sizes]),
        "picture's width": quartiles([size[1] for size in part.sizes]), "files": dict(part.kinds.most_common()),
    }  # fmt: skip
