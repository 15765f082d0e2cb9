"""Names of image files: their formats, the search of a folder for them, and portable names for results."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

IMAGE_FORMATS = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".ppm": "PPM", ".tif": "TIFF",
                 ".tiff": "TIFF", ".webp": "WEBP"}  # fmt: skip
"""Pillow's format of each file name ending of images, in lower case. Content of other formats is not opened."""
IMAGE_SUFFIXES = tuple(IMAGE_FORMATS)
"""File name endings of images, in lower case."""

DICOM_SUFFIX = ".dcm"
"""File name ending of DICOM, in lower case."""

RESULT_FOLDERS = ("semantic", "panoptic", "overlays", "labels")
"""Folders that `output.writer.ResultWriter` makes, and that of its `LabelWriter`."""
RESULT_LIST = "images.json"
"""List of the images of the results in those folders."""
RESULT_MARK = "results of maskformer_fast"
"""Text at the beginning of `RESULT_LIST`."""

_MAX_NAME = 255 - len("_panoptic.png")  # bytes of a file's or folder's name, less the longest ending of a result
_MAX_PATH = 1024  # bytes of a name with its folders
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff]')  # on Windows; surrogates are bytes that are not UTF-8
# Devices of Windows.
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE)


def picture_suffixes(channels: int) -> tuple[str, ...]:
    """File name endings of what is read with ``data.channels``, in lower case: images, DICOM, and arrays of bands."""
    return (*IMAGE_SUFFIXES, DICOM_SUFFIX, *((".npy",) if channels else ()))


def list_files(
    folder: str | os.PathLike[str],
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    onerror: Callable[[OSError], None] | None = None,
) -> list[str]:
    """List the files below a folder whose names end in one of the suffixes -> sorted relative paths, with "/".

    Capital letters in suffixes make no difference. Links are followed; of a link to a folder that it lies in, the
    content is not listed again. Left out are hidden files and folders (their names begin with a dot), folders of
    results (`is_result_folder`), and what is not a file, such as a pipe. A link to a missing file is listed.

    Args:
        folder: the folder. Names on the way to it are not examined.
        suffixes: endings in lower case.
        onerror: gets the error of a folder that cannot be read; by default it is raised.

    Raises:
        OSError: a folder cannot be read.
    """
    return sorted(_walk(os.fspath(folder), "", tuple(suffixes), onerror, ()))


def _walk(
    folder: str,
    prefix: str,
    suffixes: tuple[str, ...],
    onerror: Callable[[OSError], None] | None,
    parents: tuple[tuple[int, int], ...],  # device and inode of each folder on the way
) -> Iterator[str]:
    try:
        status = os.stat(folder)
        with os.scandir(folder) as opened:
            entries = [entry for entry in opened if not entry.name.startswith(".")]
    except OSError as error:
        if onerror is None:
            raise
        onerror(error)
        return
    identity = status.st_dev, status.st_ino
    if identity in parents:
        return
    for entry in entries:
        if entry.is_dir():
            if not is_result_folder(entry.path):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", suffixes, onerror, (*parents, identity))
        elif entry.name.lower().endswith(suffixes) and (entry.is_file() or not os.path.exists(entry.path)):
            yield prefix + entry.name


def is_result_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has pictures that `predict` or `evaluate` wrote: `RESULT_LIST` beside it begins so."""
    parent, name = os.path.split(os.path.abspath(path))
    return name in RESULT_FOLDERS and is_result_list(os.path.join(parent, RESULT_LIST))


def is_result_list(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins with the mark of a `RESULT_LIST` that `predict` or `evaluate` wrote."""
    try:
        with open(path, "rb") as file:
            return RESULT_MARK.encode() in file.read(200)
    except OSError:
        return False


def in_result_folder(path: str | os.PathLike[str], below: str | os.PathLike[str]) -> bool:
    """Whether a file lies in a folder of results that is itself below another folder."""
    folders = Path(path).parent.parts
    known = len(Path(below).parts)
    return any(is_result_folder(Path(*folders[:count])) for count in range(known + 1, len(folders) + 1))


def result_names(file_names: Sequence[str]) -> list[str]:
    """Names for the results of image files: relative paths with "/" and without an ending, in the files' order.

    A name is that of the file where possible. Every name stays inside the folder it is relative to, is valid on Linux,
    macOS and Windows with an ending of up to 13 bytes, and differs from all others even where capital letters and
    forms of Unicode make no difference: of equal names, the second and later ones get ``_2``, ``_3``... The same list
    gives the same names, on every rank.

    Args:
        file_names: paths or other texts; parts such as ``..`` and ``C:`` are taken out.
    """
    taken: set[str] = set()
    next_number: dict[str, int] = {}
    names = []
    for file_name in file_names:
        *folders, stem = _portable_parts(file_name)
        name = _joined(folders, stem, "")
        first = _key(name)
        while _key(name) in taken:
            next_number[first] = next_number.get(first, 1) + 1
            name = _joined(folders, stem, f"_{next_number[first]}")
        taken.add(_key(name))
        names.append(name)
    return names


def _portable_parts(file_name: str) -> list[str]:
    """Folders and the last part without its suffix, at least one part."""
    text = re.sub(r"^[A-Za-z]:(?=[/\\])", "", file_name).replace("\\", "/")
    parts = [part for part in text.split("/") if part not in ("", ".", "..")] or ["image"]
    parts[-1] = PurePosixPath(parts[-1]).stem
    # No folder may have the name of another image's result.
    parts = [re.sub(r"\.png$", "_png", part, flags=re.IGNORECASE) for part in parts[:-1]] + parts[-1:]
    return [_portable(part) for part in parts]


def _portable(part: str) -> str:
    part = _cut(_FORBIDDEN.sub("_", part), _MAX_NAME).rstrip(" .") or "_"
    return f"{part[:-1]}_" if _RESERVED.match(part) else part


def _joined(folders: Sequence[str], stem: str, ending: str) -> str:
    parts = [*folders, _cut(stem, _MAX_NAME - len(ending)) + ending]
    while len(parts) > 1 and len("/".join(parts).encode()) > _MAX_PATH:
        del parts[0]
    return "/".join(parts)


def _cut(text: str, size: int) -> str:
    """The beginning of a text that takes at most ``size`` bytes."""
    return text.encode()[:size].decode(errors="ignore")


def _key(name: str) -> str:
    """The same text for names that a file system may take for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
