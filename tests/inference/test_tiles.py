"""Tiles of large pictures: geometry, blended scores, objects joined across seams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskformer_fast.config import Task, TestConfig
from maskformer_fast.core.exchange import unpack
from maskformer_fast.core.metadata import VOID
from maskformer_fast.core.results import PanopticResult
from maskformer_fast.inference.postprocess import semantic
from maskformer_fast.inference.tile_grid import TileGrid, groups_of
from maskformer_fast.inference.tiled import ArrayPicture, TiledSegmentation, TileFiles, infer_tiled
from maskformer_fast.structures import PixelPredictions, Predictions
from tests.support.demo_cases import scene_predictor
from tests.support.scene import METADATA, Truth, draw_scene, partition, scene_keys

SIZES = [(7, 9), (64, 64), (100, 65), (65, 300), (331, 257), (129, 1)]



@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_tiles_cover_the_picture_and_each_pixel_has_one_owner_and_weights_of_one(size, overlap):
    grid = TileGrid(*size, tile=64, overlap=overlap)
    covered, owners, blocks = (np.zeros(size, int) for _ in range(3))
    for box, owned in zip(grid.boxes, grid.owned, strict=True):
        assert box.size == tuple(min(64, side) for side in size)
        covered[box.slices] += 1
        owners[owned.slices] += 1
        assert owned.intersect(box) == owned
    assert covered.min() >= 1 and (owners == 1).all()
    for blend in ("mean", "feather"):
        for block in grid.blocks:
            weights = grid.weights(block, blend)
            total = sum(down[:, None] * across for down, across in weights)
            np.testing.assert_allclose(total, np.ones(block.box.size), rtol=1e-5)
            assert (covered[block.box.slices] == len(block.tiles)).all()
    for block in grid.blocks:
        blocks[block.box.slices] += 1
    assert (blocks == 1).all()
    for number in range(1, len(grid)):
        assert all(0 <= other < number for other in grid.neighbours(number))


def test_neighbours_overlap_at_least_as_asked():
    grid = TileGrid(1000, 50, tile=100, overlap=0.25)
    tops = [box.top for box in grid.boxes]
    assert max(np.diff(tops)) <= 75 and grid.boxes[-1].bottom == 1000


@pytest.mark.parametrize("field, value", [("tile", 0), ("tile_overlap", 0.6), ("tile_blend", "max")])
def test_options_are_checked(field, value):
    with pytest.raises(ValueError, match=f"test.{field}"):
        TestConfig(**{field: value})


@pytest.mark.parametrize("tile", [1.5, "64", True])
def test_a_side_that_is_no_number_of_pixels_is_an_error(tile):
    with pytest.raises(TypeError, match=f"tile: expected a whole number of pixels or None, got {tile!r}"):
        scene_predictor("maskformer").predict(np.zeros((90, 80, 3), np.uint8), tile=tile)


def test_tiles_do_not_go_with_augmentation_or_other_orders():
    with pytest.raises(ValueError, match=r"test\.tile"):
        TestConfig(tile=64, flip=True)
    with pytest.raises(ValueError, match=r"test\.semantic_order"):
        TestConfig(tile=64, semantic_order="official")


def test_groups_do_not_depend_on_the_order_of_pairs():
    pairs = [(3, 1), (5, 4), (4, 3), (7, 8)]
    expected = [0, 1, 2, 1, 1, 1, 6, 7, 7]
    for order in (pairs, pairs[::-1], [(b, a) for a, b in pairs]):
        assert groups_of(9, order).tolist() == expected


class FakeNetwork:
    """Predictions of each tile at random, given by the tile's first pixel."""

    def __init__(self, test: TestConfig, per_pixel: bool) -> None:
        self.test, self.metadata, self.device, self.per_pixel = test, METADATA, torch.device("cpu"), per_pixel
        self.channels = 0

    def run_network(self, images: Sequence[np.ndarray]):
        height, width = images[0].shape[:2]
        padded = height + 5, width + 3  # as a network pads
        maps = -(-padded[0] // 4), -(-padded[1] // 4)
        valid = torch.tensor([[height, width]] * len(images))
        parts = []
        for image in images:
            make = torch.Generator().manual_seed(int(image[0, 0, 0]) * 256 + int(image[0, 0, 1]))
            parts.append([torch.randn(shape, generator=make) * 3 for shape in ((6, 5), (6, 8), (8, *maps), (4, *maps))])
        classes, embeddings, features, logits = (torch.stack(column) for column in zip(*parts, strict=True))
        if self.per_pixel:
            return PixelPredictions(logits[None], valid, padded)
        return Predictions(classes[None], embeddings[None], features, valid, padded)

    def postprocess(self, predictions, sizes, tasks):
        return {task: semantic(predictions, sizes) for task in tasks}

    def infer(self, images, tasks):
        return self.postprocess(self.run_network(images), [image.shape[:2] for image in images], tasks)

    def reference(self, image: np.ndarray, grid: TileGrid) -> tuple[np.ndarray, np.ndarray]:
        """Labels by score maps of full size, and how far the winner leads."""
        total = torch.zeros(4, *image.shape[:2])
        for number, box in enumerate(grid.boxes):
            predictions = self.run_network([image[box.slices]])
            if self.per_pixel:
                maps = predictions.logits[0]
            else:
                maps = torch.einsum("bqd,bdhw->bqhw", predictions.mask_embeddings[0], predictions.pixel_features)
            whole = F.interpolate(maps, predictions.input_size, mode="bilinear", align_corners=False)[0]
            whole = whole[:, : box.size[0], : box.size[1]]
            if self.per_pixel:
                scores = whole.softmax(0)
            else:
                probabilities = predictions.class_logits[0, 0].softmax(-1)[:, :-1]
                scores = torch.einsum("qk,qhw->khw", probabilities, whole.sigmoid())
            weight = np.zeros(image.shape[:2], np.float32)
            for block in grid.blocks:
                if number in block.tiles:
                    down, across = grid.weights(block, self.test.tile_blend)[block.tiles.index(number)]
                    weight[block.box.slices] = down[:, None] * across
            total[:, box.top : box.bottom, box.left : box.right] += scores * torch.from_numpy(weight[box.slices])
        best = total.topk(2, dim=0).values
        return total.argmax(0).numpy(), (best[0] - best[1]).numpy()


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("blend", ["feather", "mean"])
@pytest.mark.parametrize("size", [(50, 111), (97, 40), (30, 31)])
def test_semantic_labels_are_of_the_weighted_mean_of_scores(size, blend, per_pixel):
    test = TestConfig(short_edge=None, tile=40, tile_blend=blend, batch_size=2)
    network = FakeNetwork(test, per_pixel)
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    labels = infer_tiled(network, image, ("semantic",))["semantic"].labels.numpy()
    expected, lead = network.reference(image, TileGrid(*size, 40))
    assert labels.dtype == np.uint8
    assert (labels == expected)[lead > 1e-4].all() and (lead > 1e-4).mean() > 0.99


@pytest.mark.parametrize("size, tile, overlap", [((300, 401), 128, 0.25), ((150, 150), 64, 0.5), ((90, 500), 100, 0.1)])
def test_every_object_is_found_once(size, tile, overlap):
    scene = draw_scene(size, 40, radius=(3, 40))
    test = TestConfig(tile=tile, tile_overlap=overlap)
    results = infer_tiled(Truth(test), scene, ("semantic", "panoptic", "instance"))
    assert (results["semantic"].labels.numpy() == scene[..., 0]).all()
    key = scene_keys(scene)
    panoptic = results["panoptic"]
    assert partition(panoptic.id_map.numpy()) == partition(key)
    assert [segment.id for segment in panoptic.segments] == list(range(1, len(np.unique(key)) + 1))
    for segment in panoptic.segments:
        inside = panoptic.id_map.numpy() == segment.id
        assert segment.area == inside.sum() and set(scene[..., 0][inside]) == {segment.category}
    instances = results["instance"]
    masks = unpack(instances.masks.numpy(), size[1])
    things = [value for value in np.unique(key) if METADATA.is_thing[value >> 16]]
    found = {masks[row].tobytes() for row in range(len(masks))}
    assert len(masks) == len(things) and found == {(key == value).tobytes() for value in things}
    assert (np.diff(instances.scores.numpy()) <= 0).all()
    for mask, label, box in zip(masks, instances.labels, instances.boxes.tolist(), strict=True):
        assert scene[..., 0][mask].max() == label
        assert box == [mask.any(0).argmax(), mask.any(1).argmax(), size[1] - mask.any(0)[::-1].argmax(),
                       size[0] - mask.any(1)[::-1].argmax()]  # fmt: skip


def test_results_do_not_depend_on_the_order_of_tiles():
    scene = draw_scene((200, 260), 30)
    test = TestConfig(tile=80)
    tasks: tuple[Task, ...] = ("panoptic", "instance")
    expected = infer_tiled(Truth(test), scene, tasks)
    tiled = TiledSegmentation(Truth(test), ArrayPicture(scene), tasks, {})
    for number in np.random.default_rng(0).permutation(len(tiled.grid)).tolist():
        tiled._segment([number])
    tiled.run()
    assert (tiled.id_map == expected["panoptic"].id_map.numpy()).all()
    assert tiled.segments == expected["panoptic"].segments
    assert [one.score for one in tiled.instances] == expected["instance"].scores.tolist()


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_from_its_files(tmp_path):
    test = TestConfig(short_edge=None, tile=40)
    network = FakeNetwork(test, per_pixel=False)
    image = np.random.default_rng(3).integers(0, 256, (120, 130, 3), np.uint8)
    expected = infer_tiled(network, image, ("semantic",))["semantic"].labels.numpy()
    kept: dict[str, np.ndarray] = {}

    def make_array(name, size, dtype):
        return kept.setdefault(name, np.zeros(size, dtype))

    def interrupt(count: int, total: int) -> None:
        nonlocal budget
        budget -= count
        if budget < 0:
            raise Interrupted

    runs = 0
    for budget in (3, 6, 9, 100):  # noqa: B007
        runs += 1
        tiled = TiledSegmentation(network, ArrayPicture(image), ("semantic",), TileFiles(tmp_path), make_array)
        try:
            tiled.run(interrupt)
        except Interrupted:
            continue
    assert runs == 4 and (kept["labels"] == expected).all()
    assert not any(TileFiles(tmp_path)[key] for key in TileFiles(tmp_path))  # nothing large is left


def test_a_damaged_entry_is_named(tmp_path):
    store = TileFiles(tmp_path)
    store["panoptic-0"] = {"rows": np.arange(1000)}
    complete = (tmp_path / "panoptic-0.npz").read_bytes()
    for content in (b"", b"damaged", complete[: len(complete) // 2], complete[:60] + b"damaged" + complete[67:]):
        (tmp_path / "panoptic-0.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"panoptic-0\.npz: expected arrays of an earlier run.* begins anew"):
            store["panoptic-0"]


def test_a_thing_of_two_classes_has_the_larger_one():
    class Doubtful(Truth):
        def result(self, image, task):
            found = super().result(image, task)
            if image[0, 0, 2] == 0:  # the tile on the left
                found.segments[:] = [replace(s, category=3 if s.category == 2 else s.category) for s in found.segments]
            return found

    scene = np.zeros((60, 100, 3), np.uint8)
    scene[..., 0] = 1
    scene[20:40, 30:90] = 2, 1, 7
    scene[0, 40, 2] = 1  # marks the tile on the right
    result = infer_tiled(Doubtful(TestConfig(tile=60, tile_overlap=0.3)), scene, ("panoptic",))["panoptic"]
    thing = [segment for segment in result.segments if segment.is_thing]
    assert len(thing) == 1 and thing[0].category == 2 and thing[0].area == 20 * 60


def test_a_thing_that_one_tile_cuts_off_and_another_sees_whole_is_as_in_that_one():
    class Unsure(Truth):
        def infer(self, images, tasks):
            results = {task: [] for task in tasks}
            for image in images:
                seen = image.copy()
                if image[0, 0, 2] == 9:  # the tile on the left, which sees some rows, as another class
                    rows = (np.arange(len(image)) < 32)[:, None] & (image[..., 0] == 2)
                    seen[image[..., 0] == 2] = 1, 0, 0
                    seen[rows] = 3, 1, 7
                for task, found in super().infer([seen], tasks).items():
                    results[task] += found
            return results

    scene = np.zeros((60, 100, 3), np.uint8)
    scene[..., 0] = 1
    scene[0, 0] = 1, 0, 9
    scene[20:40, 45:85] = 2, 1, 7  # the tiles are columns 0 to 60 and 40 to 100, and each owns half of the overlap
    results = infer_tiled(Unsure(TestConfig(tile=60, tile_overlap=0.3)), scene, ("panoptic", "instance"))
    (thing,) = [segment for segment in results["panoptic"].segments if segment.is_thing]
    assert thing.category == 2 and thing.area == 20 * 40
    assert (results["panoptic"].id_map.numpy() == thing.id).tolist() == (scene[..., 0] == 2).tolist()
    assert sum(segment.area for segment in results["panoptic"].segments) == 60 * 100
    instances = results["instance"]
    assert instances.labels.tolist() == [2]
    assert (unpack(instances.masks.numpy(), 100)[0] == (scene[..., 0] == 2)).all()


@pytest.mark.parametrize("left, expected", [(45, False), (42, True)])
def test_a_thing_that_only_one_tile_found_must_be_nearer_to_it(left, expected):
    class Dreaming(Truth):
        def infer(self, images, tasks):
            results = {task: [] for task in tasks}
            for image in images:
                seen = image.copy()
                if image[0, 0, 2] == 9:  # the tile on the left
                    seen[20:40, left : left + 13] = 2, 1, 7
                for task, found in super().infer([seen], tasks).items():
                    results[task] += found
            return results

    scene = np.zeros((60, 100, 3), np.uint8)
    scene[..., 0] = 1
    scene[0, 0] = 1, 0, 9
    results = infer_tiled(Dreaming(TestConfig(tile=60, tile_overlap=0.3)), scene, ("panoptic", "instance"))
    things = [segment for segment in results["panoptic"].segments if segment.is_thing]
    assert [thing.area for thing in things] == [20 * 13] * expected
    assert len(results["instance"].labels) == expected


def test_pixels_without_a_segment_stay_void():
    class Blind(Truth):
        def result(self, image, task):
            found = super().result(image, task)
            return PanopticResult(torch.full_like(found.id_map, VOID), [])

    scene = draw_scene((90, 90), 3)
    result = infer_tiled(Blind(TestConfig(tile=40)), scene, ("panoptic",))["panoptic"]
    assert (result.id_map == VOID).all() and result.segments == []
    instances = infer_tiled(Truth(TestConfig(tile=40)), np.zeros((90, 90, 3), np.uint8), ("instance",))["instance"]
    assert instances.masks.shape == (0, 90, 12)
