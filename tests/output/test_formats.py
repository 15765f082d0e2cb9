"""Result files, read back with independent readers: Pillow, json, pycocotools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult
from maskformer_fast.ops.rle import encode_masks, encode_packed_masks
from maskformer_fast.output.formats import (
    instances_to_coco,
    panoptic_png,
    write_index_png,
    write_panoptic_json,
    write_panoptic_png,
)
from maskformer_fast.output.id_maps import segment_rows
from maskformer_fast.structures import pack_masks

METADATA = Metadata("t", ("cat", "sky", "dog"), (True, False, True), (17, 119, 90), default_colors(3))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), high=st.sampled_from([0, 1, 3, 15, 253, 254, 255, 300, 65534]),
       shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), colored=st.booleans())
def test_index_png_reads_back_as_the_labels(
    tmp_path_factory: pytest.TempPathFactory, seed: int, high: int, shape: tuple[int, int], colored: bool
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(VOID, high + 1, shape)
    labels.flat[0] = high
    palette = default_colors(high + 1) if colored and high < 400 else None
    path = tmp_path_factory.mktemp("index") / "a.png"
    write_index_png(path, torch.from_numpy(labels) if seed % 2 else labels, palette)
    image = Image.open(path)
    values = np.array(image)
    assert (image.mode == "P") == (palette is not None and high <= 254)
    assert values.dtype == (np.uint8 if high <= 254 else np.uint16)
    np.testing.assert_array_equal(values, np.where(labels == VOID, 255 if high <= 254 else 65535, labels))
    if image.mode == "P":
        colors = np.array([*palette, (0, 0, 0)])  # void, the last one, is black
        np.testing.assert_array_equal(np.array(image.convert("RGB")), colors[labels])


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 255])
def test_void_survives_short_palettes(tmp_path: Path, count: int) -> None:
    write_index_png(tmp_path / "a.png", np.array([[VOID, 0, count - 1]]), default_colors(count))
    assert np.array(Image.open(tmp_path / "a.png")).tolist() == [[255, 0, count - 1]]


def test_index_png_depth_follows_the_palette(tmp_path: Path) -> None:
    labels = np.zeros((2, 2), dtype=np.int16)
    write_index_png(tmp_path / "a.png", labels, default_colors(847))
    write_index_png(tmp_path / "b.png", labels, default_colors(255))
    assert np.array(Image.open(tmp_path / "a.png")).dtype == np.uint16
    assert np.array(Image.open(tmp_path / "b.png")).dtype == np.uint8


@pytest.mark.parametrize(("labels", "error"), [
    (np.zeros((2, 2)), TypeError), (np.zeros((2, 2, 1), int), ValueError), (np.zeros((0, 2), int), ValueError),
    (np.full((2, 2), -2), ValueError), (np.full((2, 2), 65535), ValueError)])
def test_index_png_refuses_bad_labels(tmp_path: Path, labels: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error, match="labels: expected"):
        write_index_png(tmp_path / "a.png", labels)
    assert not list(tmp_path.iterdir())


def test_panoptic_files_read_back_as_the_segments(tmp_path: Path) -> None:
    id_map = np.full((5, 7), VOID, dtype=np.int32)
    id_map[1:3, 2:6], id_map[4, 0], id_map[0, 0] = 11_259_375, 2, 2
    result = PanopticResult(torch.from_numpy(id_map), [
        SegmentInfo(11_259_375, 0), SegmentInfo(2, 1, is_thing=False, is_crowd=True)])
    entry = write_panoptic_png(tmp_path / "img.png", result, 42, METADATA)
    assert entry == {"image_id": 42, "file_name": "img.png", "segments_info": [
        {"id": 11_259_375, "category_id": 17, "area": 8, "bbox": [2, 1, 4, 2], "iscrowd": 0},
        {"id": 2, "category_id": 119, "area": 2, "bbox": [0, 0, 1, 5], "iscrowd": 1}]}
    rgb = np.array(Image.open(tmp_path / "img.png")).astype(int)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 256 * 256 * rgb[..., 2]
    np.testing.assert_array_equal(ids, np.where(id_map == VOID, 0, id_map))

    images = [{"id": 42, "file_name": "img.jpg", "height": 5, "width": 7}]
    write_panoptic_json(tmp_path / "p.json", images, [entry], METADATA)
    read = json.loads((tmp_path / "p.json").read_text())
    assert read["annotations"] == [entry] and read["images"] == images
    assert read["categories"][1] == {"id": 119, "name": "sky", "isthing": 0, "color": list(METADATA.colors[1])}
    with pytest.raises(ValueError, match=r"image ids from images, got \[42\]"):
        write_panoptic_json(tmp_path / "p.json", [], [entry], METADATA)


def test_panoptic_png_of_void_alone_and_of_ids_that_do_not_fit() -> None:
    rgb, infos = panoptic_png(PanopticResult(torch.full((3, 4), VOID, dtype=torch.int32)), METADATA)
    assert infos == [] and rgb.shape == (3, 4, 3) and not rgb.any()
    for segment_id in (0, 2**24):
        ids = torch.full((3, 4), segment_id, dtype=torch.int32)
        with pytest.raises(ValueError, match=f"ids in 1..16777215, got {segment_id}"):
            panoptic_png(PanopticResult(ids, [SegmentInfo(segment_id, 0)]), METADATA)
    with pytest.raises(ValueError, match="listed segments"):
        panoptic_png(PanopticResult(torch.ones(3, 4, dtype=torch.int32)), METADATA)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 8), far=st.booleans())
def test_segment_rows_are_the_places_in_the_list(seed: int, count: int, far: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 8)), int(rng.integers(1, 8)))
    ids = rng.choice(2**24 if far else 12, count, replace=False)
    pool = np.array([*ids, VOID, -5, -12, -(2**31), 11, 12, 2**24 - 1, 2**31 - 1], dtype=np.int32)
    id_map = rng.choice(pool, shape).astype(np.int32)
    rows = segment_rows(id_map, [SegmentInfo(int(i), 0) for i in ids])
    for value, row in zip(id_map.ravel().tolist(), rows.ravel().tolist(), strict=True):
        assert row == (ids.tolist().index(value) if value in ids.tolist() else VOID)


def run_lengths(mask: np.ndarray) -> list[int]:
    """Uncompressed COCO counts: runs down the columns, zeros first."""
    counts, current, run = [], False, 0
    for value in mask.T.ravel().tolist():
        if value != current:
            counts.append(run)
            current, run = value, 0
        run += 1
    return [*counts, run]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 20), width=st.integers(1, 20), count=st.integers(0, 4),
       density=st.sampled_from([0.0, 0.05, 0.5, 1.0]))
def test_instances_to_coco_decode_to_the_masks_by_pycocotools(
    seed: int, height: int, width: int, count: int, density: float
) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    masks = rng.random((count, height, width)) < density
    boxes = torch.zeros(count, 4)
    for i, mask in enumerate(masks):
        ys, xs = np.nonzero(mask)
        if len(ys):
            boxes[i] = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    result = InstanceResult(torch.from_numpy(rng.integers(0, 3, count)), torch.from_numpy(rng.random(count)).float(),
                            pack_masks(torch.from_numpy(masks)), boxes, (height, width))
    entries = json.loads(json.dumps(instances_to_coco(result, "a", METADATA)))
    assert len(entries) == count
    for i, entry in enumerate(entries):
        rle = entry["segmentation"]
        np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), masks[i])
        expected = coco_mask.frPyObjects({"size": [height, width], "counts": run_lengths(masks[i])}, height, width)
        assert rle["counts"] == expected["counts"].decode() and rle["size"] == [height, width]
        assert "bbox" not in entry and entry["area"] == masks[i].sum()
        assert entry["box"] == coco_mask.toBbox(expected).tolist() or not masks[i].any()
        assert entry["category_id"] == METADATA.category_ids[int(result.labels[i])] and entry["image_id"] == "a"
        assert entry["score"] == pytest.approx(float(result.scores[i]))


def test_masks_are_encoded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    monkeypatch.setattr("maskformer_fast.ops.rle._CHUNK_PIXELS", 300)
    masks = np.random.default_rng(0).random((7, 9, 13)) < 0.4  # 2 masks a chunk, the last one alone
    packed = pack_masks(torch.from_numpy(masks)).numpy()
    for rles in (encode_masks(masks), encode_packed_masks(packed, 13)):
        np.testing.assert_array_equal(np.stack([coco_mask.decode(r) for r in rles]).astype(bool), masks)
    with pytest.raises(TypeError, match="expected bool"):
        encode_masks(masks.astype(np.uint8))
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        encode_masks(masks[0])
    with pytest.raises(TypeError, match="expected uint8"):
        encode_packed_masks(masks, 13)
    with pytest.raises(ValueError, match="for width 17"):
        encode_packed_masks(packed, 17)
