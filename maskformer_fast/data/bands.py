"""Pictures of any number of bands, of 8 or 16 bits, as they are stored: TIFF, PNG, NumPy arrays and DICOM."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maskformer_fast.core.image_files import DICOM_SUFFIX, IMAGE_FORMATS
from maskformer_fast.core.image_resize import MAX_PIXELS
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.dicom import read_dicom
from maskformer_fast.data.images import ImageLike, as_rgb_array, decode, read_image
from maskformer_fast.data.pixel_values import has_16_bits, read_png_header

MAX_VALUES = 4 * MAX_PIXELS
"""Number of values of all bands of the largest picture that is read."""


class Layout(NamedTuple):
    """What the header of a picture's file says."""

    format: str
    """Pillow's name of it, ``NPY`` or ``DICOM``."""
    size: tuple[int, int]
    """Height and width as they are stored."""
    channels: int
    bits: int
    """Bits of a value; 32 stands for all types but integers of 8 and 16 bits."""
    has_colors: bool
    """There is a palette, CMYK or transparency, of which `read_image` makes RGB."""

    @property
    def has_bands(self) -> bool:
        """Whether RGB of 8 bits, as `read_image` makes it, would lose channels or bits that `read_bands` reads."""
        if self.has_colors or self.bits > 16:
            return False
        return self.bits == 16 or self.format == "NPY" or (self.format == "TIFF" and self.channels not in (1, 3))


def read_layout(path: str | os.PathLike[str], channels: int = 0) -> Layout:
    """Read what a picture's header says; of DICOM all of the file is read.

    Args:
        channels: as ``data.channels``, by which the axes of an array are told apart. 0: they are the first axis where
            it is the shorter one, else the last.

    Raises:
        BrokenExampleError: missing, damaged, or of another format.
        ModuleNotFoundError: a DICOM file without pydicom.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        return _array_layout(path, channels)
    if suffix == DICOM_SUFFIX:
        height, width = read_dicom(path, 16).shape
        return Layout("DICOM", (height, width), 1, 16, False)
    if suffix in (".tif", ".tiff") and (opened := open_raster(path)) is not None:
        with opened:
            types = {"uint8": 8, "uint16": 16}
            bits = max(types.get(kind, 32) for kind in opened.dtypes)
            is_cmyk = opened.tags(ns="IMAGE_STRUCTURE").get("SOURCE_COLOR_SPACE") == "CMYK"  # GDAL makes RGBA of it
            is_color = is_cmyk or opened.colorinterp[0].name == "palette"
            return Layout("TIFF", (opened.height, opened.width), opened.count, bits, is_color)
    try:
        with Image.open(path, formats=sorted(set(IMAGE_FORMATS.values()))) as image:
            header = read_png_header(path) if image.format == "PNG" else None
            deep = 16 if image.mode.startswith("I") else 32 if image.mode == "F" else 1 if image.mode == "1" else 8
            stored = getattr(image, "tag_v2", {}).get(258, deep)
            bits = header.depth if header else stored[0] if isinstance(stored, tuple) else stored
            is_color = image.mode in ("P", "PA", "LA", "RGBA", "CMYK")
            return Layout(str(image.format), (image.height, image.width), len(image.getbands()), bits, is_color)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenExampleError(path, f"cannot be decoded: {error}") from error


def read_picture(
    path: str | os.PathLike[str], upright: bool = True, channels: int = 0, content: bytes | None = None
) -> np.ndarray:
    """Read a picture for a network -> [H, W, C] uint8 or uint16.

    Args:
        channels: 0 for RGB of 8 bits, as `read_image` makes it of whatever the file has, and for DICOM grey as RGB;
            else the number of bands that the file must have, whose values are kept as they are stored.
        upright: as of `read_image`; without ``channels``.
        content: the file's content, where it does not lie at ``path``.

    Raises:
        BrokenExampleError: missing, damaged, too large, or of another number or type of bands.
        ModuleNotFoundError: a DICOM file without pydicom.
    """
    if Path(path).suffix.lower() == DICOM_SUFFIX and content is None:
        grey = read_dicom(path, 16 if channels else 8)
        return np.repeat(grey[..., None], 3, axis=2) if channels == 0 else _checked(path, grey[..., None], channels)
    return read_image(path, upright, content=content) if channels == 0 else read_bands(path, channels, content)


def as_picture(image: ImageLike, upright: bool = True, channels: int = 0) -> np.ndarray:
    """Convert a path, PIL image, array or tensor to what `read_picture` gives; arguments and errors are its own.

    Pictures of bands are paths or arrays [H, W, C] uint8 or uint16.

    Raises:
        TypeError: another type, dtype or shape.
    """
    if isinstance(image, (str, Path)):
        return read_picture(image, upright, channels)
    if channels == 0:
        return as_rgb_array(image, upright)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"images: expected a path or an array [H, W, {channels}], got {type(image).__name__}")
    if image.dtype not in (np.uint8, np.uint16) or image.ndim != 3 or image.shape[2] != channels:
        expected = f"a uint8 or uint16 array [H, W, {channels}]"
        raise TypeError(f"images: expected {expected}, got {image.dtype} {image.shape}")
    return image


def read_bands(path: str | os.PathLike[str], channels: int, content: bytes | None = None) -> np.ndarray:
    """Read the bands of a picture -> [H, W, C] uint8 or uint16, as they are stored.

    A TIFF, of any number of bands, is read by rasterio where it is installed. Pillow reads the other formats, and TIFF
    without rasterio, of 1, 3 or 4 bands. An array of NumPy (``.npy``) is [H, W, C], [C, H, W], or [H, W] for one band.

    Raises:
        BrokenExampleError: as `read_picture`.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".npy" and content is None:
        return _checked(path, _read_array(path, channels), channels)
    if suffix in (".tif", ".tiff") and content is None and (opened := open_raster(path)) is not None:
        with opened:
            check_raster(path, opened, channels)
            if opened.width * opened.height * channels > MAX_VALUES:
                raise _too_large(path, (opened.height, opened.width, channels))
            return read_window(opened, (0, 0, opened.height, opened.width), channels)
    source = None if content is None else io.BytesIO(content)
    image = decode(path, source=source)
    header = path if content is None else content
    pixels = np.asarray(image)
    if image.mode in ("RGB", "RGBA") and has_16_bits(image, header):  # of which Pillow gives the upper bytes
        lower = decode(path, lower_bytes=True, source=None if content is None else io.BytesIO(content))
        pixels = pixels.astype(np.uint16) << 8 | np.asarray(lower)
    if image.mode == "I":  # 32 bits, in which Pillow gives 16 of a PNG
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BrokenExampleError(path, f"expected bands of 8 or 16 bits, got values {pixels.min()}..{pixels.max()}")
        pixels = pixels.astype(np.uint16)
    if image.mode in ("1", "P", "CMYK", "YCbCr", "LAB", "HSV"):
        raise BrokenExampleError(path, f"expected bands of numbers, got an image of mode {image.mode}")
    return _checked(path, pixels if pixels.ndim == 3 else pixels[..., None], channels)


def open_raster(path: str | os.PathLike[str]) -> Any:
    """A TIFF opened by rasterio, or None where rasterio is not installed. Raises `BrokenExampleError`."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ModuleNotFoundError:
        return None
    if not os.path.isfile(path):
        raise BrokenExampleError(path, "no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            return rasterio.open(path, driver="GTiff")
        except RasterioError as error:
            raise BrokenExampleError(path, f"cannot be decoded: {error}") from error


def check_raster(path: str | os.PathLike[str], opened: Any, channels: int) -> None:
    """Raise `BrokenExampleError` unless an opened TIFF has so many bands of 8 or 16 bits."""
    if opened.count != channels:
        raise BrokenExampleError(path, f"expected {channels} bands, got {opened.count}")
    if not set(opened.dtypes) <= {"uint8", "uint16"}:
        kinds = ", ".join(sorted(set(opened.dtypes)))
        raise BrokenExampleError(path, f"expected bands of uint8 or uint16, got {kinds}")


def read_window(opened: Any, box: tuple[int, int, int, int], channels: int) -> np.ndarray:
    """Bands of a rectangle (top, left, bottom, right) of an opened TIFF -> [h, w, C]. Raises `BrokenExampleError`."""
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    top, left, bottom, right = box
    try:
        pixels = opened.read(range(1, channels + 1), window=Window(left, top, right - left, bottom - top))
    except RasterioError as error:
        raise BrokenExampleError(opened.name, f"cannot be decoded: {error}") from error
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def nodata_value(path: str | os.PathLike[str]) -> float | None:
    """Value of pixels without data that a GeoTIFF states; None for another file, and without rasterio."""
    if Path(path).suffix.lower() not in (".tif", ".tiff") or (opened := open_raster(path)) is None:
        return None
    with opened:
        return None if opened.nodata is None else float(opened.nodata)


def _map_array(path: str | os.PathLike[str]) -> np.ndarray:
    try:  # a map of the file: a header that promises more than the file has takes no memory
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise BrokenExampleError(path, "no such file") from error
    except (ValueError, OSError, EOFError, OverflowError, SyntaxError, MemoryError, TypeError) as error:
        raise BrokenExampleError(path, f"cannot be read as an array of NumPy: {error}") from error


def _array_layout(path: str | os.PathLike[str], channels: int) -> Layout:
    stored = _map_array(path)
    shape = stored.shape if stored.ndim == 3 else (*stored.shape, 1)
    if len(shape) != 3:
        raise BrokenExampleError(path, f"expected bands as [H, W, C] or [C, H, W], got shape {stored.shape}")
    is_last = shape[2] == channels or (shape[0] != channels and shape[2] <= shape[0])
    height, width, count = shape if is_last else (*shape[1:], shape[0])
    bits = 8 * stored.dtype.itemsize if stored.dtype in ("uint8", "uint16") else 32
    return Layout("NPY", (height, width), count, bits, False)


def _read_array(path: str | os.PathLike[str], channels: int) -> np.ndarray:
    stored = _map_array(path)
    if stored.size > MAX_VALUES:
        raise _too_large(path, stored.shape)
    if stored.ndim == 2 and channels == 1:
        return np.array(stored)[..., None]
    if stored.ndim == 3 and stored.shape[2] == channels:
        return np.array(stored)
    if stored.ndim == 3 and stored.shape[0] == channels:
        return np.ascontiguousarray(stored.transpose(1, 2, 0))
    raise BrokenExampleError(path, f"expected {channels} bands as [H, W, C] or [C, H, W], got shape {stored.shape}")


def _checked(path: str | os.PathLike[str], pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.ndim != 3 or pixels.size == 0:
        raise BrokenExampleError(path, f"expected an array [H, W, {channels}], got shape {pixels.shape}")
    if pixels.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise BrokenExampleError(path, f"expected bands of uint8 or uint16, got {pixels.dtype}")
    if pixels.shape[2] != channels:
        raise BrokenExampleError(path, f"expected {channels} bands, got {pixels.shape[2]}")
    return np.ascontiguousarray(pixels)


def _too_large(path: str | os.PathLike[str], shape: tuple[int, ...]) -> BrokenExampleError:
    return BrokenExampleError(path, f"expected at most {MAX_VALUES} values, got {' x '.join(map(str, shape))}")
