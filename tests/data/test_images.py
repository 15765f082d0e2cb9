"""Decoding of pictures and index images, including damaged ones."""

from __future__ import annotations

import io
import logging
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from maskformer_fast.data import images, pixel_values
from maskformer_fast.data.base import BrokenExampleError, path_below
from maskformer_fast.data.images import as_rgb_array, read_image, read_index_png, read_panoptic_png


def noise(rng, *shape, dtype=np.uint8, high=256):
    return rng.integers(0, high, shape).astype(dtype)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_every_colour_mode_becomes_rgb(tmp_path, rng):
    rgb = noise(rng, 7, 5, 3)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), rgb)
    assert read_image(tmp_path / "rgb.png").flags.writeable
    grey = noise(rng, 7, 5)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    alpha = np.concatenate([rgb, noise(rng, 7, 5, 1)], 2)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), rgb)
    palette = Image.fromarray(noise(rng, 7, 5, high=4), mode=None).convert("P")
    palette.putpalette(bytes(rng.integers(0, 256, 768).tolist()))
    palette.save(tmp_path / "palette.png", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    deep = noise(rng, 7, 5, dtype=np.uint16, high=65536)
    deep[0, 0] = 65535
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name)[..., 1], deep >> 8)
    cmyk = Image.new("CMYK", (5, 7), (0, 255, 255, 0))
    cmyk.save(tmp_path / "cmyk.jpg")
    assert abs(read_image(tmp_path / "cmyk.jpg").astype(int) - [255, 0, 0]).max() < 12
    Image.fromarray(rng.random((4, 4)).astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BrokenExampleError, match="float.tif.*floating point"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, :8] = 255  # the left half is white; after a clockwise turn it is the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path)
    assert image.shape == (16, 8, 3)
    assert image[:7].mean() > 240
    assert image[9:].mean() < 15


def test_a_pil_image_lies_as_its_file_does(tmp_path):
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png"):
        path = tmp_path / f"turned.{suffix}"
        Image.fromarray(stored).save(path, exif=exif)
        opened = Image.open(path)
        np.testing.assert_array_equal(as_rgb_array(opened), as_rgb_array(path))
        assert opened.size == (16, 8), "the caller's image stays as it is"
        assert as_rgb_array(opened).shape == (16, 8, 3)
        for image in (path, str(path), Image.open(path)):
            assert as_rgb_array(image, upright=False).shape == (8, 16, 3)
        assert as_rgb_array(ImageOps.exif_transpose(opened)).shape == (16, 8, 3), "an upright one is not turned again"


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("read", [read_image, read_index_png, read_panoptic_png, as_rgb_array])
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.eps"])
def test_content_of_other_formats_is_refused_and_no_program_is_run(tmp_path, monkeypatch, read, name):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n[ $1 = --version ] && echo 10.0\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow searches Ghostscript anew
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with pytest.raises(BrokenExampleError, match=f"{name}: .*expected content of one of BMP, JPEG, PNG"):
        read(tmp_path / name)
    assert not (tmp_path / "called").exists()
    for kind in ("GIF", "ICO", "PCX", "TGA"):
        Image.new("L", (16, 16)).save(tmp_path / "x.png", kind)
        with pytest.raises(BrokenExampleError, match="expected content"):
            read(tmp_path / "x.png")


def test_photographs_of_several_frames_are_jpeg(tmp_path, rng):
    """Cameras write a JPEG with a preview behind it, which Pillow calls MPO."""
    frames = [Image.fromarray(noise(rng, 8, 8, 3)) for _ in range(2)]
    frames[0].save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "first.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), read_image(tmp_path / "first.jpg"))


def test_content_and_suffix_may_differ_among_the_formats_of_images(tmp_path, rng):
    rgb = noise(rng, 7, 5, 3)
    Image.fromarray(rgb).save(tmp_path / "x.jpg", "PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), rgb)


def test_index_images_keep_their_values(tmp_path, rng):
    for dtype, high in ((np.uint8, 256), (np.uint16, 65536)):
        values = noise(rng, 6, 9, dtype=dtype, high=high)
        for suffix in ("png", "tif"):
            Image.fromarray(values).save(tmp_path / f"i.{suffix}")
            got = read_index_png(tmp_path / f"i.{suffix}")
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, values)
    values = noise(rng, 6, 9, high=5)
    palette = Image.fromarray(values, mode=None).convert("P")
    palette = Image.frombytes("P", (9, 6), values.tobytes())
    palette.putpalette([9, 9, 9] * 5)  # equal colours: only the index matters
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_index_png(tmp_path / "p.png"), values)
    Image.fromarray(values > 2).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_index_png(tmp_path / "bit.png"), values > 2)
    Image.fromarray(noise(rng, 6, 9, 3)).save(tmp_path / "rgb.png")
    with pytest.raises(BrokenExampleError, match="rgb.png.*index.*mode RGB"):
        read_index_png(tmp_path / "rgb.png")


def test_panoptic_ids_are_read_from_three_bytes(tmp_path, rng):
    rgb = noise(rng, 6, 9, 3)
    Image.fromarray(rgb).save(tmp_path / "p.png")
    expected = rgb.astype(np.int64) @ np.array([1, 256, 65536])
    np.testing.assert_array_equal(read_panoptic_png(tmp_path / "p.png"), expected)
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    with pytest.raises(BrokenExampleError, match="mode L"):
        read_panoptic_png(tmp_path / "grey.png")


def test_errors_name_damaged_files(tmp_path, rng):
    path = tmp_path / "half.jpg"
    Image.fromarray(noise(rng, 64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(BrokenExampleError, match="half.jpg: cannot be decoded.*truncated"):
        read_image(path)
    path.write_bytes(b"")
    with pytest.raises(BrokenExampleError, match=r"half\.jpg"):
        read_image(path)
    with pytest.raises(BrokenExampleError, match="none.jpg: no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(BrokenExampleError):
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_large_images_are_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (60_000, 2_000)).save(tmp_path / "wide.png")
    with pytest.raises(BrokenExampleError, match=f"at most {images.MAX_PIXELS} pixels, got 60000 x 2000"):
        read_image(tmp_path / "wide.png")
    Image.new("1", (60_000, 6_000)).save(tmp_path / "wider.png")
    with pytest.raises(BrokenExampleError, match=f"at most {images.MAX_PIXELS} pixels"):
        read_index_png(tmp_path / "wider.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 11)
    Image.new("L", (4, 3)).save(tmp_path / "small.png")
    with pytest.raises(BrokenExampleError, match="4 x 3 = 12"):
        read_image(tmp_path / "small.png")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(np.random.default_rng(1), 12, 17, 3)).save(buffer, kind)
    return buffer.getvalue()


def test_a_large_colour_profile_in_a_png_does_not_matter(tmp_path, rng):
    values, data = noise(rng, 6, 9), b"c\0\0" + zlib.compress(b"z" * 3_000_000)
    chunk = struct.pack(">I", len(data)) + b"iCCP" + data + struct.pack(">I", zlib.crc32(b"iCCP" + data))
    content = png(values, 8, 0)
    (tmp_path / "x.png").write_bytes(content[:33] + chunk + content[33:])  # after the header
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[..., 0], values)


@pytest.mark.parametrize(("content", "named"), [
    (b"", "an empty file"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"GIF89a", "GIF: convert"), (b"<!DOCTYPE html>", "HTML"),
    (b"\0\0\0\x18ftypheic", "HEIC, AVIF or a video: convert"), (b"PK\x03\x04", "zip"),
    (b"text", "got another"),
])  # fmt: skip
def test_an_error_says_what_is_in_the_place_of_an_image(tmp_path, content, named):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(BrokenExampleError, match=rf"x\.jpg: cannot be decoded: expected content of .*{named}"):
        read_image(tmp_path / "x.jpg")


def test_a_pipe_or_folder_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "y.png").mkdir()
    for name in ("x.png", "y.png"):
        with pytest.raises(BrokenExampleError, match=f"{name}: cannot be decoded: expected a file"):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about damaged metadata
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "BMP"]), data=st.data())
def test_damaged_files_give_an_image_or_a_broken_example_error(tmp_path, kind, data):
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        image = read_image(path)
    except BrokenExampleError as error:
        assert error.path == str(path)
        assert error.reason
    else:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BrokenExampleError("a/b.png", "too bad")))
    assert (error.path, error.reason, str(error)) == ("a/b.png", "too bad", "a/b.png: too bad")


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "C:\\a", "..\\a", "\\\\host\\a", "", "a\0b"])
def test_file_names_outside_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"x\.json: expected a file name below"):
        path_below(tmp_path, name, "x.json")
    assert path_below(tmp_path, "a/b..png", "x.json") == tmp_path / "a" / "b..png"


def png(
    samples: np.ndarray,  # [H, W * channels]
    depth: int,
    color_type: int,
    significant: int | None = None,
    palette: bytes = b"",
    texts: bytes = b"",
) -> bytes:
    """Write a PNG by hand: Pillow writes neither sBIT nor 16-bit colours. ``texts`` are chunks after the pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    height, width = samples.shape[0], samples.shape[1] // channels
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row).tobytes() for row in bits.reshape(height, -1)]
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    if significant is not None:
        content += chunk(b"sBIT", bytes([significant] * channels))
    if palette:
        content += chunk(b"PLTE", palette)
    return content + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + texts + chunk(b"IEND", b"")


def deep_tiff(samples: np.ndarray, order: str, **tags: int) -> bytes:
    """Write an uncompressed TIFF of 16-bit colours [H, W, 3] by hand."""
    height, width = samples.shape[:2]
    data = samples.astype(order + "u2").tobytes()
    numbers = {"bits": 258, "largest": 281}
    fields = {256: width, 257: height, 258: 16, 259: 1, 262: 2, 273: 8, 277: 3, 278: height, 279: len(data)}
    fields |= {numbers[name]: value for name, value in tags.items()}
    entries = b"".join(
        struct.pack(order + "HHII", tag, *((3, 3, 8 + len(data)) if tag == 258 else (4, 1, value)))
        for tag, value in sorted(fields.items())
    )
    bits = struct.pack(order + "HHH", 16, 16, 16)
    start = 8 + len(data) + len(bits)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return head + data + bits + struct.pack(order + "H", len(fields)) + entries + struct.pack(order + "I", 0)


def spread(top: int, shape: tuple[int, ...] = (5, 6)) -> np.ndarray:
    """Values from 0 to ``top``."""
    return np.linspace(0, top, int(np.prod(shape))).astype(np.int64).reshape(shape)


@pytest.fixture(autouse=True)
def every_warning(monkeypatch):
    monkeypatch.setattr(pixel_values, "_warned", set())


@pytest.mark.parametrize(("top", "significant", "shift", "warns"), [
    (255, None, 0, True), (1023, None, 4, True), (4095, None, 4, True), (4096, None, 8, False), (65535, None, 8, False),
    (1023, 10, 2, False), (255, 8, 0, False), (65535, 10, 8, False), (900, 16, 8, False), (100, 12, 4, False),
])
@pytest.mark.parametrize("color_type", [0, 2, 6])
def test_deep_pngs_are_read_with_the_bits_they_state_or_have(
    tmp_path, caplog, top, significant, shift, warns, color_type
):
    channels = {0: 1, 2: 3, 6: 4}[color_type]
    values = spread(top, (5, 6, channels))
    values[..., :3] = spread(top, (5, 6, min(channels, 3)))
    (tmp_path / "deep.png").write_bytes(png(values.reshape(5, -1), 16, color_type, significant))
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        image = read_image(tmp_path / "deep.png")
        read_image(tmp_path / "deep.png")
    np.testing.assert_array_equal(image, np.broadcast_to(values[..., :3] >> shift, (5, 6, 3)))
    assert [f"at most {values[..., :3].max()}" in record.getMessage() for record in caplog.records] == [True] * warns


def test_a_pil_image_has_the_bits_that_its_file_states_also_when_it_is_turned(tmp_path, caplog):
    values = spread(700).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.tif", tiffinfo={274: 6, 281: 1023})  # turned by 90 degrees
    (tmp_path / "x.png").write_bytes(png(values, 16, 0, significant=10))
    in_memory = io.BytesIO((tmp_path / "x.tif").read_bytes())  # Pillow 12 mixes up what it maps
    for image in (tmp_path / "x.tif", Image.open(in_memory)):
        np.testing.assert_array_equal(as_rgb_array(image)[..., 0], np.rot90(values, -1) >> 2)
    opened = Image.open(tmp_path / "x.png")
    for image in (tmp_path / "x.png", opened):
        np.testing.assert_array_equal(as_rgb_array(image)[..., 0], values >> 2)
    assert not caplog.records
    (tmp_path / "x.png").unlink()
    np.testing.assert_array_equal(as_rgb_array(opened)[..., 0], values >> 4)
    assert "at most 700 are read as pixels of 12 bits" in caplog.text


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_its_orientation_says_or_left_as_stored(tmp_path, compression, orientation):
    stored = spread(250).astype(np.uint8)
    Image.fromarray(stored).save(tmp_path / "x.tif", tiffinfo={274: orientation}, compression=compression)
    turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T,
              6: np.rot90(stored, -1), 7: stored[::-1, ::-1].T, 8: np.rot90(stored)}[orientation]
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif")[..., 0], turned)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", upright=False)[..., 0], stored)
    np.testing.assert_array_equal(read_index_png(tmp_path / "x.tif"), stored)
    in_memory = io.BytesIO((tmp_path / "x.tif").read_bytes())
    np.testing.assert_array_equal(as_rgb_array(Image.open(in_memory))[..., 0], turned)
    np.testing.assert_array_equal(as_rgb_array(Image.open(in_memory), upright=False)[..., 0], stored)


@pytest.mark.parametrize("stretch", [1, 257])
def test_panoptic_ids_of_16_bits_a_channel_are_refused(stretch, tmp_path, rng):
    values = noise(rng, 6, 9, 3, dtype=np.uint16, high=256) * np.uint16(stretch)
    (tmp_path / "p.png").write_bytes(png(values.reshape(6, -1), 16, 2))
    with pytest.raises(BrokenExampleError, match=r"p\.png.*8 bits a channel, got 16 bits"):
        read_panoptic_png(tmp_path / "p.png")


def test_a_dark_pil_image_of_16_bit_colours_is_named(tmp_path, caplog):
    (tmp_path / "x.png").write_bytes(png(spread(1000, (5, 18)), 16, 2))
    assert as_rgb_array(Image.open(tmp_path / "x.png")).max() < 4
    assert "give its path instead" in caplog.text


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("tags", "shift"), [({}, 4), ({"largest": 1023}, 2), ({"largest": 65535}, 8)])
def test_deep_colour_tiffs_are_read_with_the_bits_they_state_or_have(tmp_path, order, tags, shift):
    values = spread(1023, (5, 6, 3))
    (tmp_path / "deep.tif").write_bytes(deep_tiff(values, order, **tags))
    np.testing.assert_array_equal(read_image(tmp_path / "deep.tif"), values >> shift)


def test_deep_grey_tiffs_state_their_largest_value(tmp_path, caplog):
    values = spread(700)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "x.tif", tiffinfo={281: 1023})
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif")[..., 0], values >> 2)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "x.tif")
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        np.testing.assert_array_equal(read_image(tmp_path / "x.tif")[..., 0], values >> 4)
    assert "at most 700 are read as pixels of 12 bits" in caplog.text
    Image.fromarray((values - 1).astype(np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(BrokenExampleError, match=r"at most 16 bits a pixel, got -1\.\.699"):
        read_image(tmp_path / "x.tif")


def test_a_black_deep_image_stays_black_without_a_warning(tmp_path, caplog):
    for color_type, channels in ((0, 1), (2, 3)):
        (tmp_path / "x.png").write_bytes(png(np.zeros((5, 6 * channels), int), 16, color_type))
        with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
            assert not read_image(tmp_path / "x.png").any()
    assert not caplog.records


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("color_type", [0, 3])
def test_indices_of_every_depth_are_read_as_stored(tmp_path, depth, color_type):
    values = spread(2**depth - 1, (5, 16))
    palette = bytes(range(1, 1 + 3 * 2**depth)) if depth < 8 else bytes((np.arange(768) % 251).astype(np.uint8))
    (tmp_path / "x.png").write_bytes(png(values, depth, color_type, palette=palette if color_type == 3 else b""))
    np.testing.assert_array_equal(read_index_png(tmp_path / "x.png"), values)


@pytest.mark.parametrize("depth", [2, 4])
def test_indices_of_shallow_tiffs_are_read_as_stored(tmp_path, depth):
    values = spread(2**depth - 1, (5, 16))
    bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :].reshape(5, -1)
    data = np.packbits(bits, axis=1).tobytes()
    fields = {256: 16, 257: 5, 258: depth, 259: 1, 262: 1, 273: 8, 277: 1, 278: 5, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    head = b"II" + struct.pack("<HI", 42, 8 + len(data))
    (tmp_path / "x.tif").write_bytes(head + data + struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0))
    np.testing.assert_array_equal(read_index_png(tmp_path / "x.tif"), values)


@pytest.mark.parametrize(("greys", "warns"), [((0, 5, 7), True), ((0, 1, 2), False), ((7, 1, 2), True)])
def test_a_palette_of_other_greys_is_named(tmp_path, caplog, greys, warns):
    values = spread(2, (5, 16))
    (tmp_path / "x.png").write_bytes(png(values, 2, 3, palette=bytes(grey for grey in greys for _ in range(3))))
    with caplog.at_level(logging.WARNING, "maskformer_fast.data"):
        np.testing.assert_array_equal(read_index_png(tmp_path / "x.png"), values)
        read_index_png(tmp_path / "x.png")
    assert [", ".join(map(str, greys)) in record.getMessage() for record in caplog.records] == [True] * warns


def test_an_index_image_with_loss_is_refused(tmp_path):
    Image.fromarray(spread(3, (16, 16)).astype(np.uint8)).save(tmp_path / "x.png", "JPEG")
    with pytest.raises(BrokenExampleError, match=r"x\.png: expected an index image without loss \(PNG\), got JPEG"):
        read_index_png(tmp_path / "x.png")


@pytest.mark.parametrize("after", [False, True])
def test_large_texts_in_a_png_do_not_matter(tmp_path, rng, after):
    texts, values = PngInfo(), noise(rng, 6, 9)
    texts.add_itxt("b", "y" * 3_000_000, zip=True)
    if after:
        data = b"c\0\0" + zlib.compress(b"z" * 3_000_000)
        chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
        (tmp_path / "x.png").write_bytes(png(values, 8, 0, texts=chunk))
    else:
        Image.fromarray(values).save(tmp_path / "x.png", pnginfo=texts)
    np.testing.assert_array_equal(read_index_png(tmp_path / "x.png"), values)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[..., 0], values)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about damaged metadata
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["sbit", "shallow", "colours", "tiff"]), data=st.data())
def test_damaged_deep_and_shallow_files_give_an_image_or_a_broken_example_error(tmp_path, kind, data):
    content = bytearray({
        "sbit": png(spread(900), 16, 0, 10),
        "shallow": png(spread(3, (5, 16)), 2, 0),
        "colours": png(spread(900, (5, 18)), 16, 2),
        "tiff": deep_tiff(spread(1023, (5, 6, 3)), "<", largest=1023),
    }[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    for read in (read_image, read_index_png):
        try:
            assert read(path).ndim in (2, 3)
        except BrokenExampleError as error:
            assert error.path == str(path)
