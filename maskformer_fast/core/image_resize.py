"""The resize of inference on arrays, without torch, so that a network and a bundle's runtime get the same pixels."""

from __future__ import annotations

import numpy as np

from maskformer_fast.core.checks import check

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded or made (a quarter GiB as RGB); larger ones may be bombs."""


def short_edge_size(height: int, width: int, short_edge: int | tuple[int, int], max_size: int) -> tuple[int, int]:
    """Height, width with the shorter side at ``short_edge``, or less if the longer would exceed ``max_size``.

    A ``short_edge`` that is itself a height and width is returned.

    Raises:
        ValueError: an input of more than `MAX_PIXELS` pixels.
    """
    if isinstance(short_edge, tuple):
        size = short_edge
    else:
        scale = min(short_edge / min(height, width), max_size / max(height, width))
        size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    check(size[0] * size[1] <= MAX_PIXELS, "short_edge and max_size",
          f"an input of at most {MAX_PIXELS} pixels for an image of {height} x {width}", size)
    return size


def check_image(image: np.ndarray, name: str = "image", channels: int = 0) -> None:
    """Raise ``TypeError`` unless the image is uint8, ``ValueError`` unless it is [H, W, 3] with pixels.

    With ``channels``, as ``data.channels``, it must be uint8 or uint16, and [H, W, channels].
    """
    shape = f"[H, W, {channels or 3}]"
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name}: expected an array {shape}, got {type(image).__name__}")
    dtypes = ("uint8", "uint16") if channels else ("uint8",)
    if image.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(dtypes)}, got {image.dtype}")
    fits = image.ndim == 3 and image.shape[2] == (channels or 3) and image.size > 0
    check(fits, name, f"shape {shape}", image.shape)


def resize_bands(
    image: np.ndarray,  # [H, W, C] uint8, uint16 or float32
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize a picture of bands, or a part of it: bilinear with antialiasing -> float32 [h, w, C], not rounded.

    The filter is that of `resize_array`, in float32. A picture that keeps its size keeps its values.

    Args:
        size: height and width of the result.
        box: top, left, bottom and right of the part, in pixels; None takes all.
    """
    from PIL import Image

    height, width = size
    whole = (0.0, 0.0, float(image.shape[0]), float(image.shape[1]))
    top, left, bottom, right = box or whole
    if (top, left, bottom, right) == whole and size == image.shape[:2]:
        return image.astype(np.float32)
    result = np.empty((height, width, image.shape[2]), np.float32)
    for band in range(image.shape[2]):
        grey = Image.fromarray(np.ascontiguousarray(image[..., band], np.float32))
        resized = grey.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        result[..., band] = np.asarray(resized)
    return result


def is_rgb(image: np.ndarray) -> bool:
    """Whether an array is a picture of three bands of 8 bits, which fast paths take; others are pictures of bands."""
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def is_bands(image: np.ndarray) -> bool:
    """Whether an array is a picture of bands: [H, W, C] uint8 or uint16 with pixels."""
    return isinstance(image, np.ndarray) and image.ndim == 3 and image.size > 0 and image.dtype in (np.uint8, np.uint16)


def resize_picture(
    image: np.ndarray,  # [H, W, 3] uint8, or bands [H, W, C] uint8 or uint16
    short_edge: int | tuple[int, int] | None,
    max_size: int,
) -> np.ndarray:
    """Resize for inference: RGB of 8 bits by `resize_array`, bands by `resize_bands` -> uint8 or float32 [h, w, C].

    Arguments and errors are those of `resize_array`.
    """
    if is_rgb(image) or not is_bands(image):
        return resize_array(image, short_edge, max_size)
    size = (image.shape[0], image.shape[1])
    return resize_bands(image, size if short_edge is None else short_edge_size(*size, short_edge, max_size))


def resize_array(
    image: np.ndarray,  # [H, W, 3] uint8
    short_edge: int | tuple[int, int] | None,
    max_size: int,
) -> np.ndarray:
    """Resize for inference: bilinear with antialiasing -> uint8 [h, w, 3]; ``short_edge`` None keeps the size.

    A tuple is the height and width of the result.

    Raises:
        TypeError: the image is not uint8.
        ValueError: the image is not [H, W, 3] or is empty.
        ModuleNotFoundError: Pillow is not installed.
    """
    check_image(image)
    if short_edge is None:
        return image
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pillow is needed to resize images; install it with: pip install pillow", name=error.name
        ) from error
    height, width = short_edge_size(image.shape[0], image.shape[1], short_edge, max_size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
