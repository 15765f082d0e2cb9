"""Pictures of any size, read in parts: through GDAL by rasterio where it is installed, else by Pillow as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskformer_fast.core.image_files import DICOM_SUFFIX
from maskformer_fast.data.bands import check_raster, open_raster, read_picture, read_window
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.images import MOST_PIXELS, read_image
from maskformer_fast.data.shards import Member, read_member

_DRIVERS = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".tif": "GTiff", ".tiff": "GTiff",
            ".webp": "WEBP"}  # fmt: skip
"""GDAL's format of each file name ending. By itself it would try formats that read other files or addresses."""


class LargePicture:
    """A picture of which rectangles are read: uint8 RGB, or bands of 8 or 16 bits."""

    def __init__(
        self, size: tuple[int, int], image: np.ndarray | None, opened: Any = None, channels: int = 0
    ) -> None:
        self._channels = channels
        self.size = size
        """Height, width."""
        self._image, self._opened = image, opened

    @property
    def georeference(self) -> dict[str, Any] | None:
        """Coordinate reference system and transform of a TIFF as rasterio writes them; None for another picture."""
        opened = self._opened
        if opened is None or opened.driver != "GTiff":
            return None
        return {"crs": opened.crs, "transform": opened.transform}

    def close(self) -> None:
        """Free the memory of a picture that was decoded as a whole; nothing can be read from then on."""
        if self._image is not None:
            self._image = np.empty((0, 0, 3), np.uint8)

    def read(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """Pixels of a rectangle of top, left, bottom and right -> uint8 [h, w, 3] RGB, or [h, w, C] of bands.

        Raises:
            BrokenExampleError: the file is damaged there.
        """
        top, left, bottom, right = box
        if self._image is not None:
            return np.ascontiguousarray(self._image[top:bottom, left:right])
        if self._channels:
            return read_window(self._opened, box, self._channels)
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        bands = [1, 2, 3] if self._opened.count >= 3 else [1]
        try:
            pixels = self._opened.read(bands, window=Window(left, top, right - left, bottom - top))
        except RasterioError as error:
            raise BrokenExampleError(self._opened.name, f"cannot be decoded: {error}") from error
        colors = _palette(self._opened)
        if colors is not None:
            return colors[pixels[0]]
        return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


@contextmanager
def open_picture(
    path: Path, exif: bool = True, member: Member | None = None, channels: int = 0
) -> Iterator[LargePicture]:
    """Open a picture of any size.

    TIFF files, and other files of more than `MOST_PIXELS` pixels, are read in parts by rasterio, where it is installed;
    their first band, or first three, must have 8 bits. Other files are decoded as a whole, like `read_image` does.

    Args:
        exif: turn pictures that are decoded as a whole as their EXIF orientation says.
        member: the picture within the tar file ``path``, decoded as a whole.
        channels: as ``data.channels``. Pictures of bands in TIFF are read in parts, others as a whole.

    Raises:
        BrokenExampleError: missing, damaged, of other bands, or too large without rasterio.
    """
    if channels:
        with _bands(path, exif, member, channels) as picture:
            yield picture
        return
    if member is not None or path.suffix.lower() == DICOM_SUFFIX:
        yield _decoded(path, exif, member)
        return
    size = _size_of(path)
    driver = _DRIVERS.get(path.suffix.lower())
    if driver != "GTiff" and (size is None or size[0] * size[1] <= MOST_PIXELS):
        yield _decoded(path, exif)
        return
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ModuleNotFoundError:
        if size is not None and size[0] * size[1] > MOST_PIXELS:
            raise BrokenExampleError(path, f"expected at most {MOST_PIXELS} pixels, got {size[0]} x {size[1]}: larger "
                                     'pictures need rasterio: pip install "maskformer_fast[geo]"') from None
        yield _decoded(path, exif)
        return
    if driver is None:
        raise BrokenExampleError(path, f"expected a file name ending of {', '.join(_DRIVERS)}, got {path.suffix!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            opened = rasterio.open(path, driver=driver)
        except RasterioError as error:
            raise BrokenExampleError(path, f"cannot be decoded: {error}") from error
    with opened:
        if set(opened.dtypes[: 3 if opened.count >= 3 else 1]) != {"uint8"}:
            raise BrokenExampleError(path, f"expected bands of 8 bits, got {', '.join(sorted(set(opened.dtypes)))}")
        yield LargePicture((opened.height, opened.width), None, opened)


def read_georeference(path: Path) -> dict[str, Any] | None:
    """Coordinate reference system and transform of a TIFF file; None without them, or without rasterio."""
    if _DRIVERS.get(path.suffix.lower()) != "GTiff":
        return None
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ModuleNotFoundError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(path, driver="GTiff") as opened:
                found = {"crs": opened.crs, "transform": opened.transform}
        except RasterioError as error:
            raise BrokenExampleError(path, f"cannot be decoded: {error}") from error
    return None if found["crs"] is None and found["transform"].is_identity else found


def _decoded(path: Path, exif: bool, member: Member | None = None) -> LargePicture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if path.suffix.lower() == DICOM_SUFFIX:
            image = read_picture(path)
        else:
            image = read_image(path, exif, MOST_PIXELS, read_member(path, member) if member else None)
    return LargePicture((image.shape[0], image.shape[1]), image)


@contextmanager
def _bands(path: Path, exif: bool, member: Member | None, channels: int) -> Iterator[LargePicture]:
    opened = open_raster(path) if member is None and _DRIVERS.get(path.suffix.lower()) == "GTiff" else None
    if opened is None:
        content = read_member(path, member) if member else None
        image = read_picture(member.name if member else path, exif, channels, content)
        yield LargePicture((image.shape[0], image.shape[1]), image)
        return
    with opened:
        check_raster(path, opened, channels)
        yield LargePicture((opened.height, opened.width), None, opened, channels)


def _size_of(path: Path) -> tuple[int, int] | None:
    """Height and width in a file's header; None if Pillow cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.height, image.width
    except Image.DecompressionBombError:
        return MOST_PIXELS, 2  # more than Pillow decodes
    except Exception:  # whatever a damaged file causes; reading it will say so
        return None


def _palette(opened: Any) -> np.ndarray | None:
    """RGB of each value of a palette image -> [256, 3] uint8; None for another."""
    if opened.count >= 3 or opened.colorinterp[0].name != "palette":
        return None
    colors = np.zeros((256, 3), np.uint8)
    for value, color in opened.colormap(1).items():
        colors[value] = color[:3]
    return colors
