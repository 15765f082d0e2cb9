"""Reading and checking of what COCO's instance and panoptic annotation files have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.base import inside

_PROBED = 16  # images looked for when a folder of images is chosen


class ImageInfo(NamedTuple):
    """One entry of ``images``."""

    id: int | str
    file_name: str
    height: int
    width: int


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; the message names file and place.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:  # not JSON, not Unicode, or a number of thousands of digits
        raise ValueError(f"{path}: malformed JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: malformed JSON: nested too deep") from None


def check_color(color: object, where: str) -> tuple[int, int, int] | None:
    """An optional ``[red, green, blue]`` of a JSON file.

    Raises:
        ValueError: neither missing nor three integers 0..255.
    """
    if color is None:
        return None
    if (
        not isinstance(color, list)
        or len(color) != 3
        or not all(type(part) is int and 0 <= part <= 255 for part in color)
    ):
        raise ValueError(f"{where}: color: expected three integers 0..255, got {color!r}")
    return color[0], color[1], color[2]


def load_coco(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


class Records:
    """The objects of one list of an annotation file, with errors that say which of them lacks what.

    Raises:
        ValueError: the file has no such list, or it holds something else than objects.
    """

    def __init__(self, content: dict[str, Any], section: str, path: Path | str) -> None:
        items = content.get(section)
        if not isinstance(items, list):
            got = "none" if items is None else type(items).__name__
            raise ValueError(f'{path}: expected a list "{section}", got {got}')
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise ValueError(f"{path}: {section}[{index}]: expected an object, got {type(item).__name__}")
        self.items: list[dict[str, Any]] = items
        self.section = section
        self.path = path

    def where(self, index: int) -> str:
        """Name of one record in messages."""
        return f"{self.path}: {self.section}[{index}]"

    def number(self, index: int, key: str, low: int = 0, default: int | None = None) -> int:
        """An integer of at least ``low`` (true and false count as 1 and 0)."""
        value = self.items[index].get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or value < low:
            raise self.error(index, key, f"an integer of at least {low}")
        return int(value)

    def text(self, index: int, key: str) -> str:
        """A text that is not empty."""
        value = self.items[index].get(key)
        if not isinstance(value, str) or not value:
            raise self.error(index, key, "a text")
        return value

    def identity(self, index: int, key: str) -> int | str:
        """An image id: an integer or a text."""
        value = self.items[index].get(key)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.error(index, key, "an integer or a text")
        return value

    def error(self, index: int, key: str, expected: str) -> ValueError:
        """What to raise about one key of one record."""
        record = self.items[index]
        got = repr(record[key])[:80] if key in record else "no such key"
        return ValueError(f"{self.where(index)}: {key}: expected {expected}, got {got}")


def read_images(content: dict[str, Any], path: Path) -> dict[int | str, ImageInfo]:
    """The list ``images`` by id.

    Raises:
        ValueError: empty, a key is missing or wrong, an id comes twice, or a file name leaves its folder.
    """
    records = Records(content, "images", path)
    images: dict[int | str, ImageInfo] = {}
    for index in range(len(records.items)):
        image_id = records.identity(index, "id")
        if image_id in images:
            raise ValueError(f"{records.where(index)}: id: expected distinct ids, got {image_id!r} twice")
        name, height = records.text(index, "file_name"), records.number(index, "height", 1)
        inside(path.parent, name, records.where(index))
        images[image_id] = ImageInfo(image_id, name, height, records.number(index, "width", 1))
    if not images:
        raise ValueError(f'{path}: expected at least one entry in "images"')
    return images


def read_categories(content: dict[str, Any], path: Path, name: str, things_only: bool) -> Metadata:
    """The list ``categories``, in its order, as metadata of the data set ``name``.

    ``things_only`` takes every category for a thing (instances); else ``isthing`` is required. A name that comes
    twice, as some export tools write it, gets its id appended.

    Raises:
        ValueError: empty, a key is missing or wrong, or an id comes twice.
    """
    records = Records(content, "categories", path)
    count = len(records.items)
    if not count:
        raise ValueError(f'{path}: expected at least one entry in "categories"')
    ids = [records.number(index, "id") for index in range(count)]
    names = [records.text(index, "name") for index in range(count)]
    for index, category in enumerate(ids):
        if category in ids[:index]:
            raise ValueError(f"{records.where(index)}: id: expected distinct ids, got {category} twice")
    unique = [f"{text} ({ids[i]})" if names.count(text) > 1 else text for i, text in enumerate(names)]
    things = [things_only or bool(records.number(index, "isthing")) for index in range(count)]
    given = [check_color(record.get("color"), records.where(index)) for index, record in enumerate(records.items)]
    colors = [color or default for color, default in zip(given, default_colors(count), strict=True)]
    return Metadata(name, tuple(unique), tuple(things), tuple(ids), tuple(colors))


def split_names(split: str) -> tuple[str, ...]:
    """A split as configured, then as COCO's 2017 release names it."""
    return (split, f"{split}2017")


def image_paths(root: Path, split: str, images: Sequence[ImageInfo]) -> list[Path]:
    """Files of the images of a split, as `read_images` gives them.

    They lie below ``{split}``, ``{split}2017``, the same below ``images``, ``images`` itself or the root: the first of
    them with one of the first few images is taken. File names may carry a folder of their own.

    Raises:
        FileNotFoundError: no folder does; the message lists them.
    """
    names = split_names(split)
    folders = [root / name for name in names] + [root / "images" / name for name in names] + [root / "images", root]
    for folder in folders:
        if any((folder / image.file_name).is_file() for image in images[:_PROBED]):
            return [folder / image.file_name for image in images]
    raise FileNotFoundError(f"image {images[0].file_name} not found; looked in {', '.join(map(str, folders))}")
