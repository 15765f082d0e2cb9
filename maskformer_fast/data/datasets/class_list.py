"""Class lists: names, pixel values, things and stuff, colours, and the pixel values that mean "unlabelled"."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.core.checks import shown_value
from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import VOID, Metadata
from maskformer_fast.data.datasets.coco_json import check_color, load_json

UNKNOWN = VOID - 1
"""Entry of `ClassList.lookup` for a pixel value that is neither a class nor ignored."""

DEFAULT_IGNORE = 255
"""Pixel value of unlabelled pixels unless the class list names another."""

_MAX_VALUE = 65535  # largest pixel value of a 16-bit image
_FOLDER = Path(__file__).parents[1] / "classes"
_KEYS = {"name", "id", "isthing", "is_thing", "color", "supercategory"}


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of their indices, and their pixel values in index images."""

    names: tuple[str, ...]
    values: tuple[int, ...]  # pixel value of each class
    is_thing: tuple[bool, ...]
    colors: tuple[tuple[int, int, int], ...]  # RGB
    ignore: tuple[int, ...]  # pixel values of unlabelled pixels

    def metadata(self, name: str) -> Metadata:
        """Return the classes as metadata of the data set ``name``."""
        return Metadata(name, self.names, self.is_thing, self.values, self.colors)

    def lookup(self) -> np.ndarray:
        """Return the class index of each pixel value -> int32 [n].

        Ignored values give `VOID`, all others `UNKNOWN`. The last entry is always `UNKNOWN`, for all larger values.
        """
        table = np.full(max(*self.values, *self.ignore, 0) + 2, UNKNOWN, dtype=np.int32)
        table[list(self.ignore)] = VOID
        table[list(self.values)] = np.arange(len(self.values))
        return table

    def with_ignore(self, value: int) -> ClassList:
        """Return the same classes with ``value`` as the only value of unlabelled pixels.

        Raises:
            ValueError: a class has this value.
        """
        _check_ignore("data.ignore_index", (value,), self.values)
        return dataclasses.replace(self, ignore=(value,))


def _check_ignore(source: str, ignore: tuple[int, ...], values: tuple[int, ...]) -> None:
    if clash := set(ignore) & set(values):
        raise ValueError(f"{source}: expected values that are no class's, got {min(clash)}")


def _is_value(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_VALUE


def numbered_class_list(values: Sequence[int], ignore: Sequence[int]) -> ClassList:
    """Make a class "class N" of each pixel value N, except for the values to ignore."""
    kept = tuple(value for value in values if value not in ignore)
    names = tuple(f"class {value}" for value in kept)
    return ClassList(names, kept, (False,) * len(kept), default_colors(len(kept)), tuple(ignore))


def read_class_list(path: Path) -> ClassList:
    """Read a ``classes.json``.

    The file holds a list of classes, or an object ``{"classes": [...], "ignore_index": 255}`` in which
    ``ignore_index`` is one value of unlabelled pixels or a list of such values. A class is a name, or an object with
    ``name`` and optionally ``id`` (pixel value; default: its position in the list), ``isthing`` (0, 1, true or false;
    default: stuff) and ``color`` (RGB). Without ``ignore_index``, 255 is ignored unless a class has that value.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: malformed; the message names the file, the entry and the key.
    """
    content = load_json(path)
    entries = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{path}: expected a list of classes, or an object with the list as "classes", got '
                         f"{shown_value(content)[:80]}")
    parsed = [_entry(path, position, entry) for position, entry in enumerate(entries)]
    names = tuple(entry["name"] for entry in parsed)
    values = tuple(entry["id"] for entry in parsed)
    for key, column in (("name", names), ("id", values)):
        if len(set(column)) != len(column):
            repeated = next(value for value in column if column.count(value) > 1)
            raise ValueError(f"{path}: {key}: expected distinct values, got {repeated!r} twice")
    defaults = default_colors(len(parsed))
    colors = tuple(entry["color"] or default for entry, default in zip(parsed, defaults, strict=True))
    ignore = _ignored(path, content, values)
    return ClassList(names, values, tuple(entry["isthing"] for entry in parsed), colors, ignore)


def _ignored(path: Path, content: Any, values: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(content, dict) or "ignore_index" not in content:
        return () if DEFAULT_IGNORE in values else (DEFAULT_IGNORE,)
    if stray := set(content) - {"classes", "ignore_index"}:
        raise ValueError(f'{path}: expected the keys "classes" and "ignore_index", got {min(stray)!r}')
    value = content["ignore_index"]
    ignore = tuple(value) if isinstance(value, list) else (value,)
    if not all(map(_is_value, ignore)):
        raise ValueError(f"{path}: ignore_index: expected integers 0..{_MAX_VALUE}, got {value!r}")
    _check_ignore(f"{path}: ignore_index", ignore, values)
    return ignore


def _entry(path: Path, position: int, entry: object) -> dict[str, Any]:
    where = f"{path}: classes[{position}]"
    record = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a name or an object, got {entry!r}")
    if stray := set(record) - _KEYS:
        raise ValueError(f"{where}: expected keys out of {', '.join(sorted(_KEYS))}, got {min(stray)!r}")
    name, value = record.get("name"), record.get("id", position)
    thing = record.get("isthing", record.get("is_thing", False))
    color = record.get("color")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: name: expected a text, got {name!r}")
    if not _is_value(value):
        raise ValueError(f"{where}: id: expected an integer 0..{_MAX_VALUE}, got {value!r}")
    if thing not in (0, 1):
        raise ValueError(f"{where}: isthing: expected true, false, 1 or 0, got {thing!r}")
    return {"name": name, "id": value, "isthing": bool(thing), "color": check_color(color, where)}


def read_preset_classes(name: str) -> ClassList:
    """Read the class list of a preset from the package's files."""
    return read_class_list(_FOLDER / f"{name}.json")
