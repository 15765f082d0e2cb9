"""Reading and checking of the parts that COCO's instance and panoptic annotation files share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.base import path_below

_PROBED = 16  # number of images that are searched to find the folder of images


class ImageInfo(NamedTuple):
    """One entry of the list ``images``."""

    id: int | str
    file_name: str
    height: int
    width: int


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; the message names the file and the position.
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
    """Check an optional ``[red, green, blue]`` of a JSON file; None if there is no colour.

    Raises:
        ValueError: the colour is not three integers 0..255.
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
    """Parse a JSON file whose top level is an object.

    Raises:
        FileNotFoundError, ValueError: as `load_json` does; the top level is something else.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


class Records:
    """Objects of one list of an annotation file; errors name the list, the index and the key.

    Raises:
        ValueError: the file has no such list, or an entry is not an object.
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
        """Return the file, list and index of one record, for messages."""
        return f"{self.path}: {self.section}[{index}]"

    def number(self, index: int, key: str, low: int = 0, default: int | None = None) -> int:
        """Read an integer of at least ``low``; true and false are 1 and 0."""
        value = self.items[index].get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or value < low:
            raise self.error(index, key, f"an integer of at least {low}")
        return int(value)

    def text(self, index: int, key: str) -> str:
        """Read a text that is not empty."""
        value = self.items[index].get(key)
        if not isinstance(value, str) or not value:
            raise self.error(index, key, "a text")
        return value

    def identity(self, index: int, key: str) -> int | str:
        """Read an image id: an integer or a text."""
        value = self.items[index].get(key)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.error(index, key, "an integer or a text")
        return value

    def error(self, index: int, key: str, expected: str) -> ValueError:
        """Make the error about one key of one record."""
        record = self.items[index]
        got = repr(record[key])[:80] if key in record else "no such key"
        return ValueError(f"{self.where(index)}: {key}: expected {expected}, got {got}")


def read_images(content: dict[str, Any], path: Path) -> dict[int | str, ImageInfo]:
    """Read the list ``images`` -> id to entry.

    Raises:
        ValueError: the list is empty, a key is missing or wrong, an id is repeated, or a file name leads out of its
            folder.
    """
    records = Records(content, "images", path)
    images: dict[int | str, ImageInfo] = {}
    for index in range(len(records.items)):
        image_id = records.identity(index, "id")
        if image_id in images:
            raise ValueError(f"{records.where(index)}: id: expected distinct ids, got {image_id!r} twice")
        name, height = records.text(index, "file_name"), records.number(index, "height", 1)
        path_below(path.parent, name, records.where(index))
        images[image_id] = ImageInfo(image_id, name, height, records.number(index, "width", 1))
    if not images:
        raise ValueError(f'{path}: expected at least one entry in "images"')
    return images


def read_categories(content: dict[str, Any], path: Path, name: str, things_only: bool) -> Metadata:
    """Read the list ``categories``, in its order, as metadata of the data set ``name``.

    With ``things_only`` every category is a thing (instances); otherwise ``isthing`` is required. Some export tools
    write a name twice: such a name gets its id appended.

    Raises:
        ValueError: the list is empty, a key is missing or wrong, or an id is repeated.
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
    """Return the configured name of a split, and its names in COCO's 2017 release and in Roboflow's exports."""
    return (split, f"{split}2017", *(("valid",) if split == "val" else ()))


def image_paths(root: Path, split: str, images: Sequence[ImageInfo]) -> list[Path]:
    """Find the files of the images of a split.

    These folders are searched in order: those of `split_names`, all of them below ``images``, then ``images`` and the
    root itself. The first folder that has one of the first `_PROBED` images is taken. File names may begin with
    folders.

    Raises:
        FileNotFoundError: no folder has one of these images; the message lists the folders.
    """
    names = split_names(split)
    folders = [root / name for name in names] + [root / "images" / name for name in names] + [root / "images", root]
    for folder in folders:
        if any((folder / image.file_name).is_file() for image in images[:_PROBED]):
            return [folder / image.file_name for image in images]
    raise FileNotFoundError(f"image {images[0].file_name} not found; looked in {', '.join(map(str, folders))}")
