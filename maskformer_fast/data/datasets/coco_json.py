"""Reading and checking of the parts that COCO's instance and panoptic annotation files share."""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.base import check_same_size, path_below

_LOGGER = logging.getLogger("maskformer_fast.data")
_DIGITS = 18  # most digits of a number that is written as a text
_PARTS = 16  # most folders of a file name of another machine that are tried
_FOREIGN = re.compile(r"^/|^[A-Za-z]:|%[0-9A-Fa-f]{2}|://|\.\.[/\\]")  # absolute, an address, or leading out
_PROBED = 16  # number of images that are searched to find the folder of images


class ImageInfo(NamedTuple):
    """One entry of the list ``images``."""

    id: int | str
    file_name: str
    height: int | None  # None: not listed
    width: int | None

    def check_size(self, file: Path, image: tuple[int, int]) -> None:
        """Check the listed height and width, as far as there are any, against those of the image file.

        Raises:
            BrokenExampleError: they differ.
        """
        check_same_size(file, image, (self.height or image[0], self.width or image[1]))


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
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: malformed JSON: expected a text in UTF-8, got another encoding: {error}; save it as "
                         "UTF-8") from error
    except ValueError as error:  # not JSON, or a number of thousands of digits
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


def as_integer(value: object) -> int | None:
    """Convert an integer, 1.0, true or a text of digits; None if it is none of them."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal() and len(value) <= _DIGITS:
        return int(value)
    return None


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
        """Read an integer of at least ``low``, also from a text or a float; true is 1, false 0, and null absent."""
        value = as_integer(self.items[index].get(key))
        if value is None and default is not None and self.items[index].get(key) is None:
            return default
        if value is None or value < low:
            raise self.error(index, key, f"an integer of at least {low}")
        return value

    def text(self, index: int, key: str) -> str:
        """Read a text that is not empty."""
        value = self.items[index].get(key)
        if not isinstance(value, str) or not value:
            raise self.error(index, key, "a text")
        return value

    def identity(self, index: int, key: str) -> int | str:
        """Read an image id: an integer (also written as 1.0) or a text."""
        value = self.items[index].get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.error(index, key, "an integer or a text")
        return value

    def image_id(self, index: int, image_ids: Container[int | str]) -> int | str | None:
        """Read the id of a listed image, None where it is not listed; the number 1 and the text "1" are the same id."""
        value = self.identity(index, "image_id")
        for same in (value, str(value), as_integer(value)):
            if same is not None and same in image_ids:
                return same
        return None

    def error(self, index: int, key: str, expected: str) -> ValueError:
        """Make the error about one key of one record."""
        record = self.items[index]
        got = repr(record[key])[:80] if key in record else "no such key"
        return ValueError(f"{self.where(index)}: {key}: expected {expected}, got {got}")


def read_images(
    content: dict[str, Any], path: Path, folders: Sequence[Path] = ()
) -> dict[int | str, ImageInfo]:
    """Read the list ``images`` -> id to entry. An entry that is listed twice counts once.

    Args:
        content: the annotation file's content.
        path: the annotation file, for messages.
        folders: folders in which images are searched, for messages.

    Raises:
        ValueError: the list is empty, a key is missing or wrong, an id has two images, or a file name leads out of its
            folder.
    """
    records = Records(content, "images", path)
    images: dict[int | str, ImageInfo] = {}
    for index in range(len(records.items)):
        image_id, name = records.identity(index, "id"), _below_folders(records.text(index, "file_name"), folders)
        height, width = (records.number(index, key, default=0) or None for key in ("height", "width"))
        _check_file_name(name, folders or (path.parent,), records.where(index))
        info = ImageInfo(image_id, name, height, width)
        if images.setdefault(image_id, info) != info:
            raise ValueError(f"{records.where(index)}: id: expected distinct ids, got {image_id!r} twice")
    if not images:
        raise ValueError(f'{path}: expected at least one entry in "images"')
    names = Counter(info.file_name for info in images.values())
    if repeated := [name for name, count in names.items() if count > 1]:
        _LOGGER.warning("%s: %d files are listed under several ids, such as %s: each entry counts as an image of its "
                        "own, with the annotations of its id alone", path, len(repeated), repeated[0])
    return images


def _below_folders(name: str, folders: Sequence[Path]) -> str:
    """A file name of another machine, or an address, as the end of it that is a file below one of the folders.

    Label Studio writes ``/data/upload/3/a%20b.jpg``, ``/data/local-files/?d=a/b.jpg`` and paths of its server. A name
    that is no such file stays as it is, and so does one that is there.
    """
    if not _FOREIGN.search(name) or any(_is_file_below(folder, name) for folder in folders):
        return name
    address = urlsplit(name) if "://" in name or name.startswith("/") else None
    text = unquote((parse_qs(address.query).get("d") or [address.path])[0] if address else name)
    parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".", "..")][-_PARTS:]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if any(_is_file_below(folder, end) for folder in folders)), name)


def _is_file_below(folder: Path, name: str) -> bool:
    try:
        return os.path.isfile(path_below(folder, name, ""))
    except ValueError:
        return False


def _check_file_name(name: str, folders: Sequence[Path], where: str) -> None:
    try:
        path_below(folders[0], name, where)
    except ValueError:
        searched = " or ".join(map(str, folders))
        raise ValueError(f"{where}: file_name: expected a file name below {searched}, got {name!r}: take the folders "
                         "off it, or give the path below one of these") from None


def read_categories(content: dict[str, Any], path: Path, name: str, things_only: bool) -> Metadata:
    """Read the list ``categories``, in its order, as metadata of the data set ``name``.

    With ``things_only`` every category is a thing (instances); otherwise ``isthing`` is required. Some export tools
    write a name twice: such a name gets its id appended. An entry that is listed twice counts once.

    Raises:
        ValueError: the list is empty, a key is missing or wrong, or an id has two categories.
    """
    records = Records(content, "categories", path)
    records.items = [item for index, item in enumerate(records.items) if item not in records.items[:index]]
    count = len(records.items)
    if not count:
        raise ValueError(f'{path}: expected at least one entry in "categories"')
    ids = [records.number(index, "id") for index in range(count)]
    names = [records.text(index, "name") for index in range(count)]
    for index, category in enumerate(ids):
        if category in ids[:index]:
            raise ValueError(f"{records.where(index)}: id: expected distinct ids, got {category} twice")
    unique = [f"{text} ({ids[i]})" if names.count(text) > 1 else text for i, text in enumerate(names)]
    while len(set(unique)) < count:  # a name that had such an ending before
        unique = [f"{text} ({ids[i]})" if unique.count(text) > 1 else text for i, text in enumerate(unique)]
    for index, record in enumerate(records.items):
        if not things_only and as_integer(record.get("isthing")) is None:
            raise records.error(index, "isthing", "1 for a thing or 0 for stuff")
    things = [things_only or bool(records.number(index, "isthing")) for index in range(count)]
    given = [check_color(record.get("color"), records.where(index)) for index, record in enumerate(records.items)]
    colors = [color or default for color, default in zip(given, default_colors(count), strict=True)]
    return Metadata(name, tuple(unique), tuple(things), tuple(ids), tuple(colors))


def split_names(split: str) -> tuple[str, ...]:
    """Return the configured name of a split, and its names in COCO's 2017 release and in Roboflow's exports."""
    return (split, f"{split}2017", *(("valid",) if split == "val" else ()))


def image_folders(root: Path, split: str) -> list[Path]:
    """List the folders in which the images of a split are searched.

    These are those of `split_names`, all of them below ``images``, ``images`` below each of them, then ``images`` and
    the root itself.
    """
    names = split_names(split)
    below = [root / name for name in names] + [root / "images" / name for name in names]
    return [*below, *(root / name / "images" for name in names), root / "images", root]


def image_paths(root: Path, split: str, images: Sequence[ImageInfo]) -> list[Path]:
    """Find the files of the images of a split.

    The first of the `image_folders` that has one of the first `_PROBED` images is taken. File names may begin with
    folders. `stored_file` finds the files whose names are spelled otherwise.

    Raises:
        FileNotFoundError: no folder has one of these images; the message lists the folders.
    """
    folders = image_folders(root, split)
    for folder in folders:
        if any(os.path.isfile(stored_file(folder / image.file_name)) for image in images[:_PROBED]):
            return [folder / image.file_name for image in images]
    raise FileNotFoundError(f"image {images[0].file_name} not found; looked in {', '.join(map(str, folders))}")


def stored_file(path: Path) -> Path:
    """Return a file's path as the disk spells it; the same path if there is no such file.

    Tools on Windows write a backslash for a slash and make no difference between ``.jpg`` and ``.JPG``, and macOS has
    another form of Unicode for letters with accents.
    """
    if os.path.isfile(path):
        return path
    for name in (path.name, path.name.replace("\\", "/")):
        stem, suffix = os.path.splitext(name)
        for spelled in (stem + suffix, stem + suffix.lower(), stem + suffix.upper()):
            for candidate in (spelled, unicodedata.normalize("NFC", spelled), unicodedata.normalize("NFD", spelled)):
                if os.path.isfile(path.parent / candidate):
                    return path.parent / candidate
    return path
