"""Meaning of stored pixel values: bits of deep pictures, and indices of shallow, lossy or grey-palette images.

The file's own header decides where it says something. Where it does not, the values decide, and a warning names them.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Source = str | os.PathLike[str] | bytes
"""Path of a file, or its content."""

_LOGGER = logging.getLogger("maskformer_fast.data")

_GUESSED_BITS = (8, 12, 16)  # depths that are tried for 16-bit files that do not say theirs
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that hold text, or the profile of its colours
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_warned: set[str] = set()  # kinds of warnings that this process has logged


class PngHeader(NamedTuple):
    """Bits of a PNG's samples: those in the file, and those that carry content, if the file says that (sBIT)."""

    depth: int
    significant: int | None


def read_png_header(source: Source) -> PngHeader | None:
    """Read the header of a PNG; None if the file is none."""
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        head = file.read(33)  # signature and IHDR
        if len(head) < 33 or not head.startswith(_SIGNATURE):
            return None
        depth = head[24]
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind == b"sBIT" and 1 <= length <= 4:
                bits = max(file.read(length)[:3], default=0)
                return PngHeader(depth, bits if 1 <= bits <= depth else None)
            if kind in (b"IDAT", b"IEND"):
                break
            file.seek(length + 4, os.SEEK_CUR)  # with its checksum
    return PngHeader(depth, None)


def without_texts(path: str | os.PathLike[str]) -> io.BytesIO:
    """Copy a PNG without its texts and colour profile, which Pillow refuses if they are large."""
    content = memoryview(Path(path).read_bytes())
    kept, position = [content[:8]], 8
    while position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + length + 12
        if kind not in _TEXTS:
            kept.append(content[position:end])
        position = end
    return io.BytesIO(b"".join(kept))


def declared_bits(image: Image.Image, path: Source | None) -> int | None:
    """Return the bits of a deep picture's content as its file states them; None if it does not.

    Without a ``path`` the file is the one that Pillow opened, if it is still there.
    """
    if image.format == "PNG":
        header = _png_header(image, path)
        return header and header.significant
    largest, stored = _tag(image, _MAX_SAMPLE_VALUE), _tag(image, _BITS_PER_SAMPLE)
    if largest is not None and 0 < largest <= 65535:
        return largest.bit_length()
    return stored if stored is not None and 8 < stored < 16 else None


def _png_header(image: Image.Image, path: Source | None) -> PngHeader | None:
    """Read the header of an image's file, without a path that of the one that Pillow opened; None if it is gone."""
    try:
        return read_png_header(path or getattr(image, "filename", "") or os.devnull)
    except OSError:
        return None


def _tag(image: Image.Image, tag: int) -> int | None:
    """Read a TIFF's tag, or the first of its values, as an integer; None if there is none."""
    try:
        value = getattr(image, "tag_v2", {}).get(tag)
    except Exception:  # Pillow decodes tags when they are read, and damaged ones raise any exception
        return None
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def to_8_bits(
    values: np.ndarray,  # integers
    declared: int | None,
    name: str | os.PathLike[str],
) -> np.ndarray:
    """Keep the upper 8 of the bits that carry content -> uint8, of the same shape.

    These are the ``declared`` bits if all values fit into them. Without a declaration they are 8, 12 or 16, the fewest
    that hold the largest value; for fewer than 16 a warning names the file ``name``, once a process.

    Raises:
        ValueError: values below 0 or of more than 16 bits.
    """
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high > 65535:
        raise ValueError(f"expected at most 16 bits a pixel, got {low}..{high}")
    if declared is not None:
        bits = declared if high < 1 << declared else 16  # a PNG's samples may be stretched to its depth
    else:
        bits = next(bits for bits in _GUESSED_BITS if high < 1 << bits)
        if bits < 16 and high:
            warn_once(f"{bits} bits", "%s: 16-bit pixels of at most %d are read as pixels of %d bits, since the file "
                      "does not state its bits. Larger values are read with more bits. To be sure, convert the files "
                      "to 8 bits, or state the bits in them (sBIT in PNG, MaxSampleValue in TIFF). Further files are "
                      "not logged", name, high, bits)
    shifted = values >> (bits - 8) if bits >= 8 else values << (8 - bits)
    return shifted.astype(np.uint8)


def is_black_in_16_bits(
    image: Image.Image,
    rgb: np.ndarray,  # [H, W, 3] uint8, the upper bytes
    path: Source | None,
) -> bool:
    """Tell whether the upper bytes of a 16-bit colour file, which Pillow keeps, are those of at most 12 bits."""
    dark = image.mode in ("RGB", "RGBA") and rgb.size > 0 and int(rgb.max()) < 16
    return dark and has_16_bits(image, path)


def has_16_bits(image: Image.Image, path: Source | None) -> bool:
    """Tell whether the file of an opened image has 16 bits a channel."""
    if image.format == "PNG":
        header = _png_header(image, path)
        return header is not None and header.depth == 16
    return _tag(image, _BITS_PER_SAMPLE) == 16


def take_lower_bytes(image: Image.Image) -> bool:
    """Make an opened 16-bit colour image, not loaded yet, decode the lower byte of each sample; False if it cannot."""
    tiles: Any = getattr(image, "tile", [])
    swapped = []
    for tile in tiles:
        mode, *rest = (tile[3],) if isinstance(tile[3], str) else tile[3]
        if not isinstance(mode, str) or not mode.startswith("RGB") or mode[-4:-1] != ";16":
            return False
        mode = mode[:-1] + _OTHER_BYTE[mode[-1]]
        swapped.append((*tile[:3], (mode, *rest) if rest else mode))
    image.tile = swapped  # type: ignore[attr-defined]
    return bool(swapped)


def stored_indices(
    image: Image.Image,  # of one channel
    path: str | os.PathLike[str],
) -> np.ndarray:
    """Return the values as the file stores them, which Pillow stretches in grey images of 2 and 4 bits -> int32 [H, W].

    A palette that is all grey, and differs from the indices, is logged once a process.
    """
    values = np.asarray(image).astype(np.int32)
    if image.mode == "L":
        header = read_png_header(path) if image.format == "PNG" else None
        bits = header.depth if header else _tag(image, _BITS_PER_SAMPLE)
        if bits in (2, 4):
            values //= 255 // ((1 << bits) - 1)
    if image.mode == "P":
        _check_palette(image, values, path)
    return values


def _check_palette(image: Image.Image, values: np.ndarray, path: str | os.PathLike[str]) -> None:
    colors = np.array(image.getpalette("RGB") or [], dtype=np.int32).reshape(-1, 3)
    used = np.unique(values)
    if not len(colors) or used[-1] >= len(colors) or (colors != colors[:, :1]).any():
        return
    greys = colors[used, 0]
    if (greys != used).any():
        warn_once("grey palette", "%s: a palette of greys: its indices %s are read as classes, and not the greys %s "
                  "that a viewer shows. If the greys are the classes, save the annotations as grey images. Further "
                  "files are not logged", path, listed(used), listed(greys))


def listed(values: np.ndarray) -> str:
    """List the first few values as text."""
    return ", ".join(map(str, values[:8].tolist())) + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def warn_once(kind: str, message: str, *arguments: object) -> None:
    """Log a warning of a kind once a process: thousands of files may have the same trouble."""
    if kind not in _warned:
        _warned.add(kind)
        _LOGGER.warning(message, *arguments)
