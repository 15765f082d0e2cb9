"""Decoding of image files, which may be damaged, too large, or of an unusual colour mode."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from maskformer_fast.core.image_files import IMAGE_FORMATS
from maskformer_fast.core.image_resize import MAX_PIXELS
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.pixel_values import (
    declared_bits,
    has_16_bits,
    is_black_in_16_bits,
    stored_indices,
    take_lower_bytes,
    to_8_bits,
    warn_once,
    without_texts,
)

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

MOST_PIXELS = 2 * MAX_PIXELS
"""Pixels of the largest picture that Pillow decodes at all."""

_LOGGER = logging.getLogger("maskformer_fast.data")

_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_LOSSY = ("JPEG", "MPO", "JPEG2000")
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L")
_UNDO = {6: 8, 8: 6}  # EXIF orientations that undo others; the rest undo themselves
_OTHERS = {
    b"": "an empty file",
    b"version https://": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    b"GIF8": "GIF: convert it to PNG",
    b"<": "HTML or XML: perhaps a download that failed",
    b"PK\x03\x04": "a zip archive",
}
"""Beginnings of files that are taken for images -> what they are. The beginning of HEIC and AVIF is their length."""
_FORMATS = sorted(set(IMAGE_FORMATS.values()))  # Pillow opens others with code of less use, and EPS with Ghostscript


def _turned_upright(image: Image.Image, in_place: bool = False) -> Image.Image:
    try:
        image.load()  # a PNG may have its EXIF data after its pixels
        if in_place:
            ImageOps.exif_transpose(image, in_place=True)
        elif image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    except Exception:  # pixels can be used even if their metadata cannot be read
        _LOGGER.debug("unreadable EXIF data ignored", exc_info=True)
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 if it has none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _turned_back(image: Image.Image, orientation: int) -> None:
    """Undo, in place, the turn by ``orientation`` that Pillow makes when it loads a TIFF."""
    if orientation != 1:
        image.getexif()[ExifTags.Base.Orientation] = _UNDO.get(orientation, orientation)
        ImageOps.exif_transpose(image, in_place=True)


def decode(
    path: str | os.PathLike[str],
    upright: bool = False,
    lower_bytes: bool = False,  # of 16-bit colours, instead of the upper ones
    source: IO[bytes] | None = None,  # the file's content; by default the path is opened
    most: int | None = None,  # pixels, by default `MAX_PIXELS`
) -> Image.Image:
    """Decode an image of a format of `IMAGE_FORMATS` as Pillow has it. Raises `BrokenExampleError`."""
    most = most or MAX_PIXELS
    try:
        if source is None and os.path.exists(path) and not os.path.isfile(path):
            raise OSError("expected a file, got a folder, pipe or device")
        with Image.open(source or path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= most:
                turned = _orientation(image) if image.format == "TIFF" else 1
                if turned != 1 and source is None:  # Pillow 12 mixes up rows and columns where it maps a TIFF's pixels
                    return decode(path, upright, lower_bytes, io.BytesIO(Path(path).read_bytes()), most)
                if lower_bytes and not take_lower_bytes(image):
                    raise ValueError("expected 16-bit colours")
                image.load()
                if upright:
                    return _turned_upright(image, in_place=True)
                _turned_back(image, turned)
                return image
        reason = f"expected at most {most} pixels, got {width} x {height} = {width * height}"
    except MemoryError:
        if source is not None:
            raise
        # a PNG's part may claim gigabytes: reading from memory gives no more than the file has
        return decode(path, upright, lower_bytes, io.BytesIO(Path(path).read_bytes()), most)
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        content = _other_content(source, path)
        reason = f"cannot be decoded: expected content of one of {', '.join(_FORMATS)}, got {content}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"expected at most {most} pixels: {error}"
    except Exception as error:  # decoders raise any exception on damaged data
        if source is None and isinstance(error, ValueError) and "text" in str(error).lower():
            return decode(path, upright, lower_bytes, without_texts(path), most)
        raise BrokenExampleError(path, f"cannot be decoded: {error or type(error).__name__}") from error
    raise BrokenExampleError(path, reason)


def _other_content(source: IO[bytes] | None, path: str | os.PathLike[str]) -> str:
    """Say what a file is that has no format of `IMAGE_FORMATS`, as far as its first bytes tell."""
    with open(path, "rb") if source is None else source as file:
        file.seek(0)
        start = file.read(16)
    if start[4:8] == b"ftyp":
        return "HEIC, AVIF or a video: convert it to JPEG or PNG"
    return next((name for beginning, name in _OTHERS.items() if start[: len(beginning) or 1] == beginning), "another")


def read_image(
    path: str | os.PathLike[str], upright: bool = True, most: int | None = None, content: bytes | None = None
) -> np.ndarray:
    """Decode a picture for a network -> uint8 [H, W, 3] RGB.

    The content must be of a format of `IMAGE_FORMATS`, whatever the file's name. EXIF orientation is applied unless
    ``upright`` is False. Grey, palette, CMYK and 16-bit pictures are converted, the latter as `pixel_values.to_8_bits`
    does. Transparency is dropped. Of several frames the first is taken.

    Args:
        most: number of pixels of the largest picture that is decoded, up to `MOST_PIXELS`; `MAX_PIXELS` by default.
        content: the file's content, where it does not lie at ``path``, which then names it in errors only.

    Raises:
        BrokenExampleError: missing, damaged, truncated, floating-point, or larger than ``most``.
    """
    try:
        image = decode(path, upright, most=most, source=None if content is None else io.BytesIO(content))
        rgb = rgb_array(image, path, content=content)
        if is_black_in_16_bits(image, rgb, path if content is None else content):
            rgb = _dark_colors(image, rgb, path, upright, most, content)
        return rgb
    except BrokenExampleError:
        raise
    except (OSError, ValueError) as error:
        raise BrokenExampleError(path, f"cannot be converted to RGB: {error}") from error


def image_size(path: str | os.PathLike[str], upright: bool = True) -> tuple[int, int]:
    """Height and width of a picture as `read_image` gives it, from its header.

    Raises:
        BrokenExampleError: the file is missing or has no header of such a picture.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            turned = upright and _orientation(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenExampleError(path, f"cannot be decoded: {error}") from error


def _dark_colors(
    image: Image.Image, upper: np.ndarray, path: str | os.PathLike[str], upright: bool, most: int | None,
    content: bytes | None,
) -> np.ndarray:  # fmt: skip
    """Read 16-bit colours of 12 bits or fewer, of which Pillow gives the upper bytes -> uint8 [H, W, 3] RGB."""
    source = None if content is None else io.BytesIO(content)
    try:
        lower = rgb_array(decode(path, upright, lower_bytes=True, source=source, most=most))
    except BrokenExampleError:
        warn_once("dark colours", "%s: 16-bit colours of at most 4095 are read as almost black. Convert the files to 8 "
                  "bits. Further files are not logged", path)
        return upper
    bits = declared_bits(image, path if content is None else content)
    return to_8_bits(upper.astype(np.int32) << 8 | lower, bits, path)


def rgb_array(
    image: Image.Image, path: str | os.PathLike[str] | None = None, opened: Image.Image | None = None,
    content: bytes | None = None,
) -> np.ndarray:  # fmt: skip
    """Convert a decoded image of any mode as `read_image` does -> uint8 [H, W, 3] RGB.

    Args:
        image: the decoded image.
        path: its file, whose header may say what its values mean.
        opened: the image as Pillow opened it, with the tags of its file, which a turned copy lacks.
        content: the file's content, where it does not lie at ``path``.

    Raises:
        ValueError: floating-point pixels, or more than 16 bits.
    """
    if image.mode in _DEEP_MODES:
        bits = declared_bits(opened or image, path if content is None else content)
        grey = to_8_bits(np.asarray(image).astype(np.int64), bits, path or "image")
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("expected integer pixels, got floating point")
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def as_rgb_array(image: ImageLike, upright: bool = True) -> np.ndarray:
    """Convert a path, PIL image, array or tensor -> uint8 [H, W, 3] RGB.

    A path and a PIL image are turned as their EXIF orientation says, unless ``upright`` is False.

    Raises:
        TypeError: another type, dtype or shape.
        BrokenExampleError, ValueError: as `read_image` and `rgb_array` do.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, upright)
    if isinstance(image, Image.Image):
        turned = _orientation(image) if image.format == "TIFF" and not upright else 1
        copy = _turned_upright(image) if upright else image if turned == 1 else image.copy()
        _turned_back(copy, turned)
        rgb = rgb_array(copy, opened=image)
        if is_black_in_16_bits(image, rgb, None):
            warn_once("dark PIL image", "a PIL image of 16-bit colours of at most 4095 is almost black, since Pillow "
                      "keeps their upper 8 bits: give its path instead. Further images are not logged")
        return rgb
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise TypeError(f"images: expected a uint8 tensor [3, H, W], got {image.dtype} {tuple(image.shape)}")
        return image.permute(1, 2, 0).contiguous().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise TypeError(f"images: expected a uint8 array [H, W, 3], got {image.dtype} {image.shape}")
        return image
    raise TypeError(f"images: expected a path, PIL image, array or tensor, got {type(image).__name__}")


def read_index_png(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image whose pixel values are class indices -> int32 [H, W].

    The image is grey (1 to 16 bits) or has a palette, of which the index is read and not the colour. Despite the name,
    TIFF works as well as PNG.

    Raises:
        BrokenExampleError: missing, damaged, larger than `MAX_PIXELS`, a colour image, or a JPEG, whose compression
            changes indices.
    """
    image = decode(path)
    if image.mode not in _INDEX_MODES:
        raise BrokenExampleError(path, f"expected one index a pixel (grey or palette image), got mode {image.mode}: "
                                 "write the class index of each colour into a grey PNG")
    if image.format in _LOSSY:
        reason = f"got {image.format}, whose compression changes the indices"
        raise BrokenExampleError(path, f"expected an index image without loss (PNG), {reason}")
    return stored_indices(image, path)


def read_color_png(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image whose colours are classes or objects -> int32 [H, W], 65536 R + 256 G + B.

    Raises:
        BrokenExampleError: missing, damaged, larger than `MAX_PIXELS`, of 16 bits a channel, or a JPEG, whose
            compression changes colours.
    """
    image = decode(path)
    if image.format in _LOSSY or has_16_bits(image, path):
        kind = image.format if image.format in _LOSSY else "16 bits a channel"
        raise BrokenExampleError(path, f"expected colours of 8 bits without loss (PNG), got {kind}")
    rgb = np.asarray(image.convert("RGB")).astype(np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def read_panoptic_png(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode a COCO panoptic PNG, segment id = R + 256 G + 65536 B -> int32 [H, W].

    Raises:
        BrokenExampleError: missing, damaged, larger than `MAX_PIXELS`, not a colour image, or of 16 bits a channel.
    """
    image = decode(path)
    if image.mode not in ("RGB", "RGBA"):
        raise BrokenExampleError(path, f"expected an RGB image of segment ids, got mode {image.mode}")
    if has_16_bits(image, path):  # Pillow keeps their upper bytes, which need not be those of the ids
        raise BrokenExampleError(path, "expected an RGB image of segment ids of 8 bits a channel, got 16 bits")
    rgb = np.asarray(image)[..., :3].astype(np.int32)
    return rgb[..., 0] | rgb[..., 1] << 8 | rgb[..., 2] << 16
