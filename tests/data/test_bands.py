"""Pictures of bands and DICOM: every format gives its values, hostile files one line; statistics are NumPy's."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskformer_fast.core.display import as_display
from maskformer_fast.core.image_resize import resize_array, resize_bands
from maskformer_fast.data import bands as bands_module
from maskformer_fast.data.bands import nodata_value, read_bands, read_picture
from maskformer_fast.data.base import BrokenExampleError
from maskformer_fast.data.large_pictures import open_picture
from maskformer_fast.data.statistics import BandStatistics, statistics_of_files
from tests.support.bands import write_tiff

DTYPES = [np.uint8, np.uint16]


def values(channels, dtype, size=(23, 31), seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (*size, channels), dtype=dtype, endpoint=True)


def png_16_bit_rgb(pixels):
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_arrays_and_tiffs_give_their_values(tmp_path, channels, dtype):
    pixels = values(channels, dtype)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", np.asfortranarray(pixels.transpose(2, 0, 1)))
    names = ["a.npy", "b.npy"]
    if channels == 1:
        np.save(tmp_path / "c.npy", pixels[..., 0])
        Image.fromarray(pixels[..., 0]).save(tmp_path / "d.png")
        Image.fromarray(pixels[..., 0]).save(tmp_path / "e.tif")
        names += ["c.npy", "d.png", "e.tif"]
    if pytest.importorskip("rasterio"):
        write_tiff(tmp_path / "f.tif", pixels)
        names.append("f.tif")
    for name in names:
        read = read_bands(tmp_path / name, channels)
        assert read.dtype == dtype and read.flags.c_contiguous
        np.testing.assert_array_equal(read, pixels, err_msg=name)
        with open_picture(tmp_path / name, channels=channels) as picture:
            np.testing.assert_array_equal(picture.read((3, 4, 20, 30)), pixels[3:20, 4:30], err_msg=name)
        with pytest.raises(BrokenExampleError, match=rf"expected {channels + 1} bands"):
            read_bands(tmp_path / name, channels + 1)


def test_colour_images_give_all_of_their_bits(tmp_path):
    deep, shallow = values(3, np.uint16), values(4, np.uint8)
    (tmp_path / "deep.png").write_bytes(png_16_bit_rgb(deep))
    Image.fromarray(shallow).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_bands(tmp_path / "deep.png", 3), deep)
    np.testing.assert_array_equal(read_bands("x.png", 3, (tmp_path / "deep.png").read_bytes()), deep)
    np.testing.assert_array_equal(read_bands(tmp_path / "rgba.png", 4), shallow)
    np.testing.assert_array_equal(read_picture(tmp_path / "rgba.png"), shallow[..., :3])


def test_files_of_other_content_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(bands_module, "MAX_VALUES", 5000)
    np.save(tmp_path / "float.npy", np.zeros((5, 5, 4), np.float32))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(4, np.uint8))
    np.save(tmp_path / "empty.npy", np.zeros((0, 5, 4), np.uint8))
    np.save(tmp_path / "large.npy", np.zeros((40, 40, 4), np.uint8))
    (tmp_path / "text.npy").write_bytes(b"not an array")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999, 4), }".ljust(118) + b"\n"
    (tmp_path / "promise.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    Image.fromarray(values(1, np.uint8)[..., 0]).convert("P").save(tmp_path / "palette.png")
    (tmp_path / "text.tif").write_bytes(b"II*\0" + b"\xff" * 50)
    write_tiff(tmp_path / "float.tif", np.zeros((5, 6, 4), np.float32))
    write_tiff(tmp_path / "large.tif", np.zeros((40, 40, 4), np.uint16))
    expected = {
        "float.npy": "expected bands of uint8 or uint16, got float32", "object.npy": "cannot be read as an array",
        "flat.npy": "expected 4 bands as",
        "empty.npy": "expected an array|cannot be read", "text.npy": "cannot be read",
        "large.npy": "at most 5000 values, got 40 x 40 x 4", "promise.npy": "cannot be read|at most 5000 values",
        "palette.png": "mode P", "text.tif": "cannot be decoded", "float.tif": "uint8 or uint16, got float32",
        "large.tif": "at most 5000 values", "missing.npy": "no such file", "missing.tif": "no such file",
    }  # fmt: skip
    for name, message in expected.items():
        with pytest.raises(BrokenExampleError, match=message) as raised:
            read_bands(tmp_path / name, 4)
        assert "\n" not in str(raised.value), name


@pytest.mark.parametrize("size", [(10, 12), (46, 62), (40, 25)])
def test_bands_are_resized_as_rgb_is_but_not_rounded(size):
    pixels = values(3, np.uint8)
    rounded = resize_array(pixels, size, 10**6)
    resized = resize_bands(pixels, size)
    assert resized.dtype == np.float32 and np.abs(resized - rounded).max() <= 1.0
    many = np.concatenate([pixels.astype(np.uint16) * 257, pixels[..., :2]], axis=2)
    np.testing.assert_allclose(resize_bands(many, size)[..., :3], resized * 257, rtol=1e-4, atol=0.05)
    part = resize_bands(pixels, (8, 9), (2.0, 3.5, 18.0, 21.5))
    image = Image.fromarray(pixels).resize((9, 8), Image.Resampling.BILINEAR, box=(3.5, 2.0, 21.5, 18.0))
    assert np.abs(part - np.asarray(image)).max() <= 1.0
    np.testing.assert_array_equal(resize_bands(pixels, (23, 31)), pixels)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_statistics_are_those_of_numpy(seed, channels, heights):
    rng = np.random.default_rng(seed)
    offset = rng.integers(0, 60000)
    images = [(offset + rng.integers(0, 5000, (height, 7, channels))).astype(np.uint16) for height in heights]
    parts = [BandStatistics(channels), BandStatistics(channels)]
    for number, image in enumerate(images):
        parts[number % 2].add(image, nodata=float(offset + 7))
    parts[0].merge(parts[1])
    every = np.concatenate([image.reshape(-1, channels) for image in images]).astype(np.float64)
    for band in range(channels):
        kept = every[every[:, band] != offset + 7, band]
        assert parts[0].count[band] == len(kept)
        assert parts[0].mean[band] == pytest.approx(kept.mean() if len(kept) else 0, rel=1e-12)
        assert parts[0].std[band] == pytest.approx(kept.std() if len(kept) else 0, rel=1e-9, abs=1e-9)
    constant = BandStatistics(1)
    constant.add(np.full((9, 9, 1), 1e9 + 0.1))
    assert constant.std[0] == pytest.approx(0, abs=1e-6) and constant.mean[0] == pytest.approx(1e9 + 0.1, rel=1e-15)


def test_statistics_of_files_leave_out_pixels_without_data(tmp_path):
    pixels = values(4, np.uint16)
    pixels[:5] = 9
    write_tiff(tmp_path / "a.tif", pixels, nodata=9)
    np.save(tmp_path / "b.npy", pixels[5:])
    found = statistics_of_files([tmp_path / "a.tif", tmp_path / "b.npy"], 4)
    kept = pixels[5:].reshape(-1, 4).astype(float)
    np.testing.assert_allclose(found.mean, kept.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.std, kept.std(0), rtol=1e-3)
    assert nodata_value(tmp_path / "a.tif") == 9 and nodata_value(tmp_path / "b.npy") is None
    Image.fromarray(values(3, np.uint8)).save(tmp_path / "c.png")
    rgb = statistics_of_files([tmp_path / "c.png"])
    np.testing.assert_allclose(rgb.mean, values(3, np.uint8).reshape(-1, 3).mean(0))


def test_bands_are_shown_by_their_percentiles():
    pixels = values(5, np.uint16)
    shown = as_display(pixels)
    low, high = np.percentile(pixels[..., 1], (2, 98))
    expected = np.clip(np.rint((pixels[..., 1] - low) / (high - low) * 255), 0, 255)
    np.testing.assert_array_equal(shown[..., 1], expected)
    assert shown.dtype == np.uint8 and (as_display(pixels[..., :2])[..., 2] == shown[..., 0]).all()
    assert (as_display(np.full((4, 4, 4), 7, np.uint16)) == 0).all()
    rgb = values(3, np.uint8)
    assert as_display(rgb) is rgb


def test_band_files_in_shards_are_read_as_files(tmp_path):
    pixels = values(1, np.uint16)
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(content, "PNG")
    np.testing.assert_array_equal(read_picture("x.png", True, 1, content.getvalue()), pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture("x.png", True, 1, content.getvalue()).dtype == np.uint16
