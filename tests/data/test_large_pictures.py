"""Pictures that are read in parts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.data import BrokenExampleError, large_pictures
from maskformer_fast.data.images import read_image
from maskformer_fast.data.large_pictures import open_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_parts_are_those_of_the_decoded_picture(kind: str, suffix: str, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).convert(kind).save(tmp_path / f"a{suffix}")
    expected = read_image(tmp_path / f"a{suffix}")
    with open_picture(tmp_path / f"a{suffix}") as picture:
        assert picture.size == (50, 70)
        for box in ((0, 0, 50, 70), (10, 20, 33, 21), (49, 69, 50, 70)):
            part = picture.read(box)
            assert part.dtype == np.uint8 and (part == expected[box[0] : box[2], box[1] : box[3]]).all()


def test_without_rasterio_pillow_reads_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with open_picture(tmp_path / "a.tif") as picture:
        assert picture.georeference is None and (picture.read((0, 0, 50, 70)) == PIXELS).all()
    monkeypatch.setattr(large_pictures, "MOST_PIXELS", 3000)
    with pytest.raises(BrokenExampleError, match=r"maskformer_fast\[geo\]"), open_picture(tmp_path / "a.tif"):
        pass


def test_more_pixels_than_pillow_takes_are_read_by_rasterio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rasterio")
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr(large_pictures, "MOST_PIXELS", 3000)
    with open_picture(tmp_path / "a.png") as picture:
        assert picture.georeference is None and (picture.read((5, 5, 50, 70)) == PIXELS[5:, 5:]).all()


def test_other_content_is_refused(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(tmp_path / "deep.tif", "w", driver="GTiff", height=9, width=9, count=3, dtype="uint16") as file:
        file.write(np.zeros((3, 9, 9), np.uint16))
    with pytest.raises(BrokenExampleError, match="8 bits, got uint16"), open_picture(tmp_path / "deep.tif"):
        pass
    (tmp_path / "text.tif").write_text('<VRTDataset rasterXSize="9" rasterYSize="9"></VRTDataset>')
    with pytest.raises(BrokenExampleError, match="cannot be decoded"), open_picture(tmp_path / "text.tif"):
        pass
    (tmp_path / "cut.tif").write_bytes((tmp_path / "deep.tif").read_bytes()[:50])
    with pytest.raises(BrokenExampleError, match="cannot be decoded"), open_picture(tmp_path / "cut.tif"):
        pass
    with pytest.raises(BrokenExampleError), open_picture(tmp_path / "none.tif"):
        pass
