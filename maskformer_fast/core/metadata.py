"""Classes of a data set, and segments of its images or of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VOID = -1
"""Value of an unlabelled pixel in every id map and label map of this package."""


@dataclass(frozen=True)
class Metadata:
    """Classes of a data set, indexed from 0."""

    name: str
    class_names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    category_ids: tuple[int, ...]  # id of each class in files of the data set's format
    colors: tuple[tuple[int, int, int], ...]  # RGB

    def __post_init__(self) -> None:
        for name in ("is_thing", "category_ids", "colors"):
            got = len(getattr(self, name))
            if got != len(self.class_names):
                raise ValueError(f"{name}: expected one entry for each of {len(self.class_names)} classes, got {got}")
        if wrong := [color for color in self.colors if not all(0 <= part <= 255 for part in color)]:
            raise ValueError(f"colors: expected red, green and blue of 0..255, got {wrong[0]}")
        if len(set(self.category_ids)) < len(self.category_ids):
            repeated = next(number for number in self.category_ids if self.category_ids.count(number) > 1)
            raise ValueError(f"category_ids: expected distinct ids, got {repeated} twice")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class SegmentInfo:
    """One segment of the truth or of a result; ``category`` is a class's index in `Metadata`."""

    id: int
    category: int
    is_thing: bool = True
    is_crowd: bool = False
    score: float = 1.0
    area: int = 0


def segments_of_rows(
    rows: Iterable[Sequence[float]],  # id, category, area, score of each query; an id below 1 means no segment
    is_thing: Sequence[bool],
) -> list[SegmentInfo]:
    """Merge queries with equal ids into segments, sorted by id: areas add up, and the best score counts."""
    merged: dict[int, tuple[int, int, float]] = {}
    for number, category, area, score in rows:
        if number > 0:
            _, old_area, old_score = merged.get(int(number), (0, 0, 0.0))
            merged[int(number)] = (int(category), old_area + int(area), max(old_score, score))
    return [
        SegmentInfo(number, category, bool(is_thing[category]), score=score, area=area)
        for number, (category, area, score) in sorted(merged.items())
    ]
