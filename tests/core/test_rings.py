"""Rings: one for parts and holes, none that passes a corner twice, and fewer corners."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.core.exchange import Polygon, mask_of_polygons, polygons_of
from maskformer_fast.core.label_formats import coco_polygons, geojson_document, objects_of_map, yolo_lines
from maskformer_fast.core.metadata import SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.core.rings import joined_ring, simple_polygon, simplified

SEEDS = st.integers(0, 99999)


def random_mask(seed: int) -> np.ndarray:
    """Ragged sizes, dots or blocks, with holes, parts, and corners that touch."""
    generator = np.random.default_rng(seed)
    height, width = generator.integers(1, 40, 2)
    side = int(generator.integers(1, 6))
    small = generator.random((-(-height // side), -(-width // side))) < generator.random()
    mask = small.repeat(side, 0).repeat(side, 1)[:height, :width]
    mask[0, 0] |= not mask.any()
    return mask


def rasterised(rings: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    tools = pytest.importorskip("pycocotools.mask")
    return tools.decode(tools.merge(tools.frPyObjects(rings, *size))).astype(bool)


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_one_ring_has_the_pixels_of_all_parts_and_holes(seed: int) -> None:
    mask = random_mask(seed)
    polygons = polygons_of(mask)
    ring = joined_ring(polygons)
    assert np.array_equal(mask_of_polygons([Polygon(ring, [])], mask.shape), mask)
    assert np.array_equal(rasterised([ring.ravel().astype(float).tolist()], mask.shape), mask)
    assert np.array_equal(rasterised(coco_polygons(polygons), mask.shape), mask)
    corners = {tuple(corner) for polygon in polygons for one in (polygon.exterior, *polygon.holes) for corner in one}
    assert corners <= set(map(tuple, ring))


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_simple_polygons_are_valid_and_have_the_same_pixels(seed: int) -> None:
    shapely = pytest.importorskip("shapely")
    mask = random_mask(seed)
    simple = [simple_polygon(polygon) for polygon in polygons_of(mask)]
    assert np.array_equal(mask_of_polygons(simple, mask.shape), mask)
    shapes = [shapely.Polygon(polygon.exterior, polygon.holes) for polygon in simple]
    assert all(shape.is_valid for shape in shapes) and sum(shape.area for shape in shapes) == mask.sum()
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    assert np.array_equal(np.any([shapely.contains_xy(shape, x, y) for shape in shapes], axis=0), mask)


def test_a_pocket_that_touches_the_outside_at_a_corner_is_a_hole() -> None:
    mask = np.ones((5, 5), bool)
    mask[1:3, 1:3] = mask[3:, 3:] = False
    polygon, = polygons_of(mask)
    assert not polygon.holes
    simple = simple_polygon(polygon)
    assert len(simple.holes) == 1 and {tuple(corner) for corner in simple.holes[0]} == {(1, 1), (1, 3), (3, 1), (3, 3)}


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0.1, 3))
def test_no_corner_is_farther_from_fewer_corners_than_the_tolerance(seed: int, tolerance: float) -> None:
    shapely = pytest.importorskip("shapely")
    for polygon in polygons_of(random_mask(seed)):
        fewer = simplified(polygon, tolerance)
        assert len(fewer.exterior) <= len(polygon.exterior) and len(fewer.holes) <= len(polygon.holes)
        if len(fewer.exterior) < len(polygon.exterior):
            line = shapely.LinearRing(fewer.exterior) if len(fewer.exterior) > 2 else shapely.LineString(fewer.exterior)
            assert shapely.distance(shapely.points(polygon.exterior), line).max() <= tolerance + 1e-9
        assert len(fewer.exterior) >= 3
    assert len(simplified(Polygon(np.array([[0, 0], [4, 0], [4, 4], [2, 4], [0, 4]]), []), 0.5).exterior) == 4


def test_objects_of_maps_and_masks_are_the_same() -> None:
    generator = np.random.default_rng(3)
    id_map = generator.integers(-1, 4, (9, 14)).repeat(3, 0).repeat(2, 1).astype(np.int32)
    result = PanopticResult(id_map, [SegmentInfo(number, number % 2, score=0.5, area=9) for number in (3, 0, 2, 1)])
    from_map, from_masks = result.to_objects(), result.to_instances().to_objects()
    for one, other in zip(from_map, from_masks, strict=True):
        assert (one.label, one.score) == (other.label, other.score)
        assert np.array_equal(mask_of_polygons(one.polygons, (27, 28)), mask_of_polygons(other.polygons, (27, 28)))
    semantic = SemanticResult(np.where(id_map < 0, 255, id_map).astype(np.uint8))
    assert [one.label for one in semantic.to_objects()] == [0, 1, 2, 3, 255]
    assert objects_of_map(result._columns())[0].label == 1


def test_methods_of_results_give_each_format() -> None:
    masks = np.zeros((2, 8, 10), bool)
    masks[0, 1:7, 2:9] = True
    masks[0, 3:5, 4:6] = False
    masks[1, 0, 0] = masks[1, 4, 4] = True
    packed = np.packbits(masks, axis=-1, bitorder="little")
    result = InstanceResult(np.array([1, 0]), np.array([0.5, 0.25]), packed, np.zeros((2, 4), np.float32), (8, 10))
    first, second = result.to_yolo()
    assert first.startswith("1 0.2 0.125 ") and second.split()[0] == "0"
    assert yolo_lines(result.to_objects(), (8, 10)) == [first, second]
    document = result.to_labelme(["cat", "dog"], "../a.jpg")
    assert [shape["label"] for shape in document["shapes"]] == ["dog", "cat", "cat"]
    assert [shape["group_id"] for shape in document["shapes"]] == [None, 1, 1]
    assert (document["imagePath"], document["imageHeight"], document["imageWidth"]) == ("../a.jpg", 8, 10)
    polygon, parts = (one["geometry"] for one in result.to_geojson(["cat", "dog"])["features"])
    assert polygon["type"] == "Polygon" and len(polygon["coordinates"]) == 2 and parts["type"] == "MultiPolygon"
    moved = result.to_geojson(["cat", "dog"], (2.0, 0.0, 100.0, 0.0, -2.0, 50.0), "urn:ogc:def:crs:EPSG::32633")
    ring = np.array(moved["features"][0]["geometry"]["coordinates"][0])
    assert ring.min(0).tolist() == [104, 36] and ring.max(0).tolist() == [118, 48] and "EPSG" in str(moved["crs"])
    x, y = ring[:-1].T
    assert x @ np.roll(y, -1) - y @ np.roll(x, -1) > 0, "exteriors are counterclockwise (RFC 7946)"


def test_an_object_without_pixels_is_in_no_format() -> None:
    empty = InstanceResult(np.array([0]), np.array([1.0]), np.zeros((1, 4, 1), np.uint8), np.zeros((1, 4)), (4, 5))
    assert empty.to_yolo() == [] and empty.to_labelme(["a"], "x.png")["shapes"] == []
    assert geojson_document(empty.to_objects(), ["a"])["features"] == []
    with pytest.raises(ValueError, match="tolerance: expected a distance"):
        empty.to_yolo(tolerance=-1)
