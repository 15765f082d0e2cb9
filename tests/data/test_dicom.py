"""DICOM: rescaling and windows as pydicom's own, and files that are refused in one line."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from maskformer_fast.core.image_files import list_files, picture_suffixes
from maskformer_fast.data.bands import read_picture
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.dicom import read_dicom
from maskformer_fast.data.large_pictures import open_picture

pydicom = pytest.importorskip("pydicom")


def write(path, pixels, **tags):
    """Write a file of monochrome pixels, with further tags."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def stored(dtype, low, high):
    return np.random.default_rng(0).integers(low, high, (17, 22)).astype(dtype)


CASES = {
    "window": (stored(np.int16, -1000, 2000), {"RescaleSlope": 1, "RescaleIntercept": -24, "WindowCenter": 40,
                                               "WindowWidth": 400}),
    "two windows": (stored(np.uint16, 0, 4096), {"BitsStored": 12, "HighBit": 11, "RescaleSlope": "0.5",
                                                 "RescaleIntercept": 3, "WindowCenter": [600, 40],
                                                 "WindowWidth": [1500.5, 80]}),
    "inverted": (stored(np.uint16, 0, 65536), {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 30000,
                                               "WindowWidth": 50000}),
    "8 bits": (stored(np.uint8, 0, 256), {"WindowCenter": 100, "WindowWidth": 90}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_windows_are_those_of_pydicom(tmp_path, name):
    pixels, tags = CASES[name]
    path = write(tmp_path / "a.dcm", pixels, **tags)
    dataset = pydicom.dcmread(path)
    rescaled = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    windowed = pydicom.pixels.apply_voi_lut(rescaled, dataset).astype(np.float64)
    # pydicom windows to the range of the stored values after rescaling
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    lowest = -(1 << dataset.BitsStored - 1) if dataset.PixelRepresentation else 0
    low, high = (value * slope + intercept for value in (lowest, lowest + (1 << dataset.BitsStored) - 1))
    expected = (windowed - low) / (high - low)
    expected = 1 - expected if name == "inverted" else expected
    for bits, dtype in ((8, np.uint8), (16, np.uint16)):
        read = read_dicom(path, bits)
        assert read.dtype == dtype and read.std() > 1
        assert np.abs(read - expected * ((1 << bits) - 1)).max() <= 1.0
    assert (read_picture(path, channels=1)[..., 0] == read_dicom(path, 16)).all()
    assert (read_picture(path) == read_dicom(path, 8)[..., None]).all() and read_picture(path).shape[2] == 3
    with open_picture(path) as picture:
        np.testing.assert_array_equal(picture.read((2, 3, 10, 12)), read_picture(path)[2:10, 3:12])


def test_without_a_window_all_stored_values_are_kept(tmp_path):
    pixels = stored(np.uint16, 0, 65536)
    np.testing.assert_array_equal(read_dicom(write(tmp_path / "a.dcm", pixels), 16), pixels)
    shallow = stored(np.uint16, 0, 1024)
    read = read_dicom(write(tmp_path / "b.dcm", shallow, BitsStored=10, HighBit=9), 8)
    np.testing.assert_array_equal(read, np.rint(shallow / 1023 * 255))


def test_other_files_are_refused_in_one_line(tmp_path):
    pixels = stored(np.uint16, 0, 4096)
    good = write(tmp_path / "good.dcm", pixels).read_bytes()
    write(tmp_path / "frames.dcm", np.stack([pixels] * 3), NumberOfFrames=3)
    write(tmp_path / "colour.dcm", pixels, PhotometricInterpretation="RGB")
    write(tmp_path / "huge.dcm", pixels, Rows=60000, Columns=60000)
    write(tmp_path / "wrong.dcm", pixels, Rows=170)
    write(tmp_path / "infinite.dcm", pixels, RescaleSlope="1e308", RescaleIntercept="1e308")
    (tmp_path / "cut.dcm").write_bytes(good[:-100])
    (tmp_path / "head.dcm").write_bytes(good[:300])
    (tmp_path / "text.dcm").write_bytes(b"not DICOM")
    deflated = write(tmp_path / "deflated.dcm", pixels).read_bytes()
    (tmp_path / "deflated.dcm").write_bytes(deflated.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    expected = {
        "frames": "expected one frame, got 3", "colour": "expected MONOCHROME1 or MONOCHROME2, got RGB",
        "huge": "at most .* pixels, got 60000 x 60000", "wrong": "cannot be decoded", "cut": "cannot be decoded",
        "head": "cannot be decoded|no kind of picture", "text": "expected DICOM, got another content",
        "deflated": "cannot be decoded", "missing": "no such file", "infinite": "finite|cannot be decoded",
    }  # fmt: skip
    for name, message in expected.items():
        with pytest.raises(BrokenExampleError, match=message) as raised:
            read_dicom(tmp_path / f"{name}.dcm", 8)
        assert "\n" not in str(raised.value), name


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path):
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    path = write(tmp_path / "a.dcm", np.zeros((3000, 3000), np.uint16), syntax=DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 100_000
    with pytest.raises(BrokenExampleError, match="not deflated as a whole"):
        read_dicom(path, 8)


def test_without_pydicom_the_error_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "a.dcm", stored(np.uint8, 0, 256))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ModuleNotFoundError, match=r"maskformer_fast\[dicom\]"):
        read_picture(path)
    assert list_files(tmp_path, picture_suffixes(0)) == ["a.dcm"]
