"""Grey pictures of DICOM, with their rescaling and window, by pydicom."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from maskformer_fast.core.image_resize import MAX_PIXELS
from maskformer_fast.data.base import BrokenExampleError

_MAX_BYTES = 1 << 30  # of a file, which is read into memory
_DEFLATED = "1.2.840.10008.1.2.1.99"  # transfer syntax whose whole data set is compressed, by any factor
_ALLOWED = ("MONOCHROME1", "MONOCHROME2")


def read_dicom(path: str | os.PathLike[str], bits: int) -> np.ndarray:
    """Read a monochrome picture -> [H, W] uint8 for 8 bits, uint16 for 16.

    Stored values are rescaled (Rescale Slope and Intercept), then the first window (Window Center and Width, by the
    linear function of DICOM PS3.3 C.11.2.1.2.1) becomes 0 to the largest value. Without a window, all values that the
    stored bits can have do. MONOCHROME1, in which small values are bright, is inverted.

    Raises:
        BrokenExampleError: missing, damaged, in colour, of several frames, too large, or compressed in a way that
            pydicom cannot decode here.
        ModuleNotFoundError: pydicom is not installed.
    """
    pydicom = _pydicom()
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise BrokenExampleError(path, f"expected a file of at most {_MAX_BYTES} bytes")
        if not _has_preamble(path):
            raise BrokenExampleError(path, "cannot be decoded: expected DICOM, got another content")
        meta = pydicom.filereader.read_file_meta_info(path)
        if str(meta.get("TransferSyntaxUID", "")) == _DEFLATED:
            raise BrokenExampleError(path, "expected DICOM that is not deflated as a whole")
        dataset = pydicom.dcmread(path)
        _check(path, dataset)
        stored = np.asarray(dataset.pixel_array)
        return _windowed(path, dataset, stored, bits)
    except (BrokenExampleError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise BrokenExampleError(path, "no such file") from error
    except Exception as error:  # pydicom raises any exception on damaged data
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BrokenExampleError(path, f"cannot be decoded: {message}") from error


def _check(path: str | os.PathLike[str], dataset: Any) -> None:
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames != 1:
        raise BrokenExampleError(path, f"expected one frame, got {frames}: write each into a file of its own")
    kind = str(dataset.get("PhotometricInterpretation", ""))
    if kind not in _ALLOWED or int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise BrokenExampleError(path, f"expected {' or '.join(_ALLOWED)}, got {kind or 'no kind of picture'}")
    height, width = int(dataset.Rows), int(dataset.Columns)
    if height * width > MAX_PIXELS:
        raise BrokenExampleError(path, f"expected at most {MAX_PIXELS} pixels, got {height} x {width}")


def _windowed(path: str | os.PathLike[str], dataset: Any, stored: np.ndarray, bits: int) -> np.ndarray:
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    values = stored.astype(np.float64) * slope + intercept
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if center is not None and width is not None and width >= 1:
        scaled = (values - (center - 0.5)) / (width - 1) + 0.5 if width > 1 else (values > center - 0.5).astype(float)
    else:
        depth = int(dataset.BitsStored)
        lowest = -(1 << depth - 1) if int(dataset.get("PixelRepresentation", 0)) else 0
        ends = sorted((lowest * slope + intercept, (lowest + (1 << depth) - 1) * slope + intercept))
        scaled = (values - ends[0]) / max(ends[1] - ends[0], 1e-9)
    if not np.isfinite(scaled).all():
        raise BrokenExampleError(path, "expected finite values after rescaling")
    scaled = scaled.clip(0, 1)
    if str(dataset.PhotometricInterpretation) == "MONOCHROME1":
        scaled = 1 - scaled
    return np.rint(scaled * ((1 << bits) - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def _first(value: Any) -> float | None:
    """First of a value's numbers; None if it has none."""
    if value is None or value == "":
        return None
    return float(value if isinstance(value, (int, float, str)) else value[0])


def _has_preamble(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.filereader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pydicom is needed to read DICOM; install it with: pip install "maskformer_fast[dicom]"', name=error.name
        ) from error
    return pydicom
